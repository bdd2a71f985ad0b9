// The packed layouts both ways, in portable C++; bitnet_ops/packing.py draws them and is their
// specification. tile16 is the one that all others turn into: weights become tile16 first, and a
// kernel that has no loop of its own for a layout (many tokens, or an older CPU) runs on a tile16 copy.
#pragma once

#include <cstdint>

namespace bitnet_ops {

enum class Layout { kTile16, kTile16Base3, kRow, kColumn };

// Bytes of the last axis of every layout: a cache line.
constexpr int64_t kBlockBytes = 64;
constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockInputs = 16;       // tile16: a block is 16 rows x 16 inputs
constexpr int64_t kBase3BlockInputs = 20;  // tile16_base3: 16 rows x 20 inputs
constexpr int64_t kChunkInputs = 256;      // row: one row x 256 inputs
constexpr int64_t kPanelRows = 256;        // column: one input x 256 rows
constexpr int64_t kPanelTiles = kPanelRows / kTileRows;

// Four weights of 0, code 1: what padding holds.
constexpr uint8_t kZeroByte = 0x55;

constexpr int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

constexpr int64_t tiles_of(int64_t out_features) { return divide_up(out_features, kTileRows); }
constexpr int64_t blocks_of(int64_t in_features) { return divide_up(in_features, kBlockInputs); }

// A matrix of out_features x in_features weights.
struct MatrixSize {
  int64_t out_features;
  int64_t in_features;
};

// Packs tiles [tile_begin, tile_end) of w [out_features][in_features], values -1, 0, 1. False if some
// value is not ternary (the output is then meaningless).
bool pack_tile16(const int8_t* w, MatrixSize size, uint8_t* tile16, int64_t tile_begin, int64_t tile_end);

// The inverse. False if a code of a real row and column is 3, which stands for no weight.
bool unpack_tile16(const uint8_t* tile16, MatrixSize size, int8_t* w, int64_t tile_begin, int64_t tile_end);

// A matrix of 2-bit codes 0, 1, 2 (weight + 1) as files have it: each row in `parts`, between which something else may
// lie. A part is runs of `width` bytes, drawn in two_bits.cpp.
struct TwoBitCodes {
  const uint8_t* bytes;
  int64_t rows;
  int64_t row_stride;  // bytes from row to row
  int64_t parts;
  int64_t part_stride;  // likewise
  int64_t part_bytes;   // of codes in each part: a multiple of 4 and of `width`
  int64_t width;        // 1, 16 or 32
  bool high_first;      // the first code of a byte is in its high bits; not with width 1

  int64_t in_features() const { return parts * part_bytes * 4; }
};

// Packs tiles [tile_begin, tile_end). False if a code is 3, which stands for no weight; it is in the output then.
bool tile16_from_two_bits(const TwoBitCodes& codes, uint8_t* tile16, int64_t tile_begin, int64_t tile_end);

// Between tile16 and the others. A unit is a tile, and for column a panel of 16 tiles; units are
// independent of one another. Every byte of the destination's units is written.
void base3_from_tile16(const uint8_t* tile16, MatrixSize size, uint8_t* base3, int64_t tile_begin, int64_t tile_end);
void tile16_from_base3(const uint8_t* base3, MatrixSize size, uint8_t* tile16, int64_t tile_begin, int64_t tile_end);
void row_from_tile16(const uint8_t* tile16, MatrixSize size, uint8_t* row, int64_t tile_begin, int64_t tile_end);
void tile16_from_row(const uint8_t* row, MatrixSize size, uint8_t* tile16, int64_t tile_begin, int64_t tile_end);
void column_from_tile16(const uint8_t* tile16, MatrixSize size, uint8_t* column, int64_t panel_begin,
                        int64_t panel_end);
void tile16_from_column(const uint8_t* column, MatrixSize size, uint8_t* tile16, int64_t panel_begin,
                        int64_t panel_end);

}  // namespace bitnet_ops
