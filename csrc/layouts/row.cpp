// row: the words of tile16 that belong to one row, one after another; a chunk is 16 of them.

#include <cstring>

#include "layouts/layouts.h"

namespace bitnet_ops {
namespace {

constexpr int64_t kWordBytes = 4;
constexpr int64_t kWordsPerChunk = kBlockBytes / kWordBytes;

}  // namespace

void row_from_tile16(const uint8_t* tile16, MatrixSize size, uint8_t* row, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = blocks_of(size.in_features);
  const int64_t row_bytes = divide_up(size.in_features, kChunkInputs) * kBlockBytes;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < size.out_features; ++r) {
      const uint8_t* in = tile16 + tile * blocks * kBlockBytes + r * kWordBytes;
      uint8_t* out = row + (tile * kTileRows + r) * row_bytes;
      for (int64_t b = 0; b < blocks; ++b) std::memcpy(out + b * kWordBytes, in + b * kBlockBytes, kWordBytes);
      std::memset(out + blocks * kWordBytes, kZeroByte, static_cast<size_t>(row_bytes - blocks * kWordBytes));
    }
  }
}

void tile16_from_row(const uint8_t* row, MatrixSize size, uint8_t* tile16, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = blocks_of(size.in_features);
  const int64_t row_bytes = divide_up(size.in_features, kChunkInputs) * kBlockBytes;
  uint8_t padding[kBlockBytes];
  std::memset(padding, kZeroByte, sizeof padding);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    // A chunk of all 16 rows at a time: 16 x 64 bytes, transposed word by word within L1.
    for (int64_t begin = 0; begin < blocks; begin += kWordsPerChunk) {
      const int64_t count = blocks - begin < kWordsPerChunk ? blocks - begin : kWordsPerChunk;
      uint8_t* out = tile16 + (tile * blocks + begin) * kBlockBytes;
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t n = tile * kTileRows + r;
        const uint8_t* in = n < size.out_features ? row + n * row_bytes + begin * kWordBytes : padding;
        for (int64_t b = 0; b < count; ++b) {
          std::memcpy(out + b * kBlockBytes + r * kWordBytes, in + b * kWordBytes, kWordBytes);
        }
      }
    }
  }
}

}  // namespace bitnet_ops
