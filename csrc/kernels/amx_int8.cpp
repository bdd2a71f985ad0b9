// AMX-INT8 (Sapphire Rapids and later): prompts and batches. Few rows of q, and all that is no ternary product,
// are as in avx512_vbmi.cpp: every CPU with AMX has VBMI.
//
// Instruction: tdpbsud tmm, acc_i32[m][n] += sum over k of q_i8[m][k] * code_u8[k][n], for 16 rows of q, 16 rows of
//              the matrix and 64 inputs: 16384 multiplications, one tile product every 16 cycles.
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (docs/layouts.md).
// Overflow:    products are added to int32 without saturating: |acc| <= K * 3 * 128 = 384 K <= 1.0e8.
//
// The right operand wants the four inputs of an output side by side. A step of layout tile16 is just that, so a tile
// register is 16 decoded steps ("lines"), one below the other:
//
//     line 0    | row 0: k = 0..3   | row 1: k = 0..3   | ... | row 15: k = 0..3   |
//     line 1    | row 0: k = 4..7   | row 1: k = 4..7   | ... | row 15: k = 4..7   |
//     ...
//     line 15   | row 0: k = 60..63 | row 1: k = 60..63 | ... | row 15: k = 60..63 |
//
// A block of tile16 gives four lines, one of tile16_base3 five. The left operand is 16 rows of q as they lie in memory.
// Four sums stay in registers, of 32 rows of q and 32 rows of the matrix: four products for four loads.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((                                                                                           \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8")
#endif

#include "kernels/float_algorithms.h"
#include "kernels/tile_sums.h"
#include "kernels/exponential.h"
#include "kernels/attention_int8.h"
#include "kernels/attention.h"
#include "kernels/glu.h"
#include "kernels/screen.h"
#include "kernels/ternary_driver.h"
#include "kernels/ternary_decoded.h"
#include "kernels/avx512.h"
#include "kernels/avx512_base3.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
namespace {

constexpr int64_t kRegisterRows = 16;                   // of a tile register
constexpr int64_t kLineBytes = 64;                      // of one of them
constexpr int64_t kRegisterInputs = 4 * kRegisterRows;  // that a tile product adds up
constexpr int64_t kRegisterBytes = kRegisterRows * kLineBytes;

// What ldtilecfg reads, palette 1.
struct alignas(64) RegisterShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(RegisterShapes) == 64, "the operand of ldtilecfg");

// Registers: sums of (upper, lower) 16 rows of q and (left, right) 16 rows of the matrix, then their operands.
#define UPPER_LEFT 0
#define UPPER_RIGHT 1
#define LOWER_LEFT 2
#define LOWER_RIGHT 3
#define UPPER_Q 4
#define LOWER_Q 5
#define LEFT_CODES 6
#define RIGHT_CODES 7

// GCC's intrinsics are assembly that does not say which memory it reads or writes.
inline void memory_as_written() { __asm__ volatile("" ::: "memory"); }

// The shapes that are loaded, and their end: registers in use would cost every switch between threads 8 KB.
class Registers {
 public:
  ~Registers() {
    if (rows_ != 0) _tile_release();
  }

  // For `rows` rows of q at a time, 1 .. 32.
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    RegisterShapes shapes;
    const int64_t upper = rows < kRegisterRows ? rows : kRegisterRows;
    set(shapes, UPPER_LEFT, upper);
    set(shapes, UPPER_RIGHT, upper);
    set(shapes, UPPER_Q, upper);
    set(shapes, LOWER_LEFT, rows - upper);
    set(shapes, LOWER_RIGHT, rows - upper);
    set(shapes, LOWER_Q, rows - upper);
    set(shapes, LEFT_CODES, kRegisterRows);
    set(shapes, RIGHT_CODES, kRegisterRows);
    // GCC's intrinsic says that it reads 8 bytes.
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }

 private:
  static void set(RegisterShapes& shapes, int number, int64_t rows) {
    shapes.rows[number] = static_cast<uint8_t>(rows);
    shapes.row_bytes[number] = rows == 0 ? 0 : kLineBytes;  // a register without rows has no bytes either
  }

  int64_t rows_ = 0;
};

template <class Codes>
struct AmxDriver {
  using Inner = TileBlocks<Codes>;
  // From so many rows of q on this is faster than vpdpbusd, which has more to do to decode base 3 (bench/LOG.md).
  static constexpr int64_t kLeastRows = Codes::kSteps == 5 ? 4 : 5;
  static constexpr int64_t kTiles = 2;
  static constexpr int64_t kRows = 2 * kRegisterRows;    // at a time
  static constexpr int64_t kWidth = kTiles * kTileRows;  // of sums
  static constexpr int64_t kMostRows = 256;              // that pass over decoded weights; their sums are 32 KB
  static constexpr int64_t kQBytes = int64_t{1} << 20;   // half of an L2 of 2 MB
  // Blocks decoded at a time, whole registers of them. The codes of two tiles, 16 or 20 KB, and as much of 32 rows of q
  // stay in an L1 of 48 KB: twice as many are a quarter slower (bench/LOG.md).
  static constexpr int64_t kPieceBlocks = 2 * kRegisterRows;
  static constexpr int64_t kPieceLines = kPieceBlocks * Codes::kSteps;
  static_assert(kPieceLines % kRegisterRows == 0, "whole registers");

  struct Piece {
    alignas(64) uint8_t codes[kTiles][kPieceLines * kLineBytes];
  };

  // Lines of blocks [begin, begin + blocks) of a tile, and of zeros up to a whole register; the number of registers.
  static int64_t decode(const TernaryProduct& p, int64_t tile, int64_t begin, int64_t blocks, uint8_t* codes) {
    const int64_t tile_bytes = p.blocks * kBlockBytes;
    const uint8_t* packed = p.packed + tile * tile_bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t offset = (begin + b) * kBlockBytes;
      // Two tiles are read side by side: behind the end of one comes the next but one.
      const int64_t ahead = offset + kPrefetchBytes;
      prefetch_near(packed + ahead + (ahead < tile_bytes ? 0 : (kTiles - 1) * tile_bytes));
      const typename Codes::Block block = Codes::load(packed + offset);
#pragma GCC unroll 5
      for (int p = 0; p < Codes::kSteps; ++p) {
        _mm512_store_si512(codes + (b * Codes::kSteps + p) * kLineBytes, Codes::shifted(block, p));
      }
    }
    const int64_t lines = blocks * Codes::kSteps;
    const int64_t registers = divide_up(lines, kRegisterRows);
    std::memset(codes + lines * kLineBytes, 0, static_cast<size_t>((registers * kRegisterRows - lines) * kLineBytes));
    return registers;
  }

  // acc[rows][kWidth] of `registers` registers of codes of each tile: set if `first`, or added to. UPPER_ONLY: at most
  // 16 rows; LEFT_ONLY: one tile.
  template <bool UPPER_ONLY, bool LEFT_ONLY>
  static void multiply(const uint8_t* left, const uint8_t* right, int64_t registers, const int8_t* q, int64_t q_stride,
                       int32_t* acc, bool first) {
    constexpr int64_t kStride = kWidth * static_cast<int64_t>(sizeof *acc);
    int32_t* lower = acc + kRegisterRows * kWidth;
    memory_as_written();
    if (first) {
      _tile_zero(UPPER_LEFT);
      if (!LEFT_ONLY) _tile_zero(UPPER_RIGHT);
      if (!UPPER_ONLY) _tile_zero(LOWER_LEFT);
      if (!UPPER_ONLY && !LEFT_ONLY) _tile_zero(LOWER_RIGHT);
    } else {
      _tile_loadd(UPPER_LEFT, acc, kStride);
      if (!LEFT_ONLY) _tile_loadd(UPPER_RIGHT, acc + kTileRows, kStride);
      if (!UPPER_ONLY) _tile_loadd(LOWER_LEFT, lower, kStride);
      if (!UPPER_ONLY && !LEFT_ONLY) _tile_loadd(LOWER_RIGHT, lower + kTileRows, kStride);
    }
    for (int64_t r = 0; r < registers; ++r) {
      _tile_loadd(LEFT_CODES, left + r * kRegisterBytes, kLineBytes);
      _tile_loadd(UPPER_Q, q + r * kRegisterInputs, q_stride);
      _tile_dpbsud(UPPER_LEFT, UPPER_Q, LEFT_CODES);
      if (!LEFT_ONLY) {
        _tile_loadd(RIGHT_CODES, right + r * kRegisterBytes, kLineBytes);
        _tile_dpbsud(UPPER_RIGHT, UPPER_Q, RIGHT_CODES);
      }
      if (!UPPER_ONLY) {
        _tile_loadd(LOWER_Q, q + kRegisterRows * q_stride + r * kRegisterInputs, q_stride);
        _tile_dpbsud(LOWER_LEFT, LOWER_Q, LEFT_CODES);
        if (!LEFT_ONLY) _tile_dpbsud(LOWER_RIGHT, LOWER_Q, RIGHT_CODES);
      }
    }
    _tile_stored(UPPER_LEFT, acc, kStride);
    if (!LEFT_ONLY) _tile_stored(UPPER_RIGHT, acc + kTileRows, kStride);
    if (!UPPER_ONLY) _tile_stored(LOWER_LEFT, lower, kStride);
    if (!UPPER_ONLY && !LEFT_ONLY) _tile_stored(LOWER_RIGHT, lower + kTileRows, kStride);
    memory_as_written();
  }

  // Likewise for any 1 .. 32 rows and 1 or 2 tiles.
  static void multiply(const Piece& piece, int64_t tiles, int64_t first_register, int64_t registers, const int8_t* q,
                       int64_t q_stride, int64_t rows, int32_t* acc, bool first, Registers& shapes) {
    const uint8_t* left = piece.codes[0] + first_register * kRegisterBytes;
    const uint8_t* right = piece.codes[1] + first_register * kRegisterBytes;
    shapes.shape(rows);
    if (rows <= kRegisterRows) {
      if (tiles == 1) return multiply<true, true>(left, right, registers, q, q_stride, acc, first);
      return multiply<true, false>(left, right, registers, q, q_stride, acc, first);
    }
    if (tiles == 1) return multiply<false, true>(left, right, registers, q, q_stride, acc, first);
    return multiply<false, false>(left, right, registers, q, q_stride, acc, first);
  }

  // One or two tiles x `tokens` tokens, one weight scale a row.
  static void whole_rows(const TernaryProduct& p, int64_t tile, int64_t tiles, int64_t token, int64_t tokens,
                         Registers& shapes) {
    alignas(64) int32_t acc[kMostRows * kWidth];
    Piece piece;
    const int64_t rows = tokens * p.planes;
    for (int64_t block = 0; block < p.blocks; block += kPieceBlocks) {
      const int64_t blocks = p.blocks - block < kPieceBlocks ? p.blocks - block : kPieceBlocks;
      int64_t registers = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        registers = decode(p, tile + i, block, blocks, piece.codes[i]);
      }
      const int8_t* q = p.q + token * p.planes * p.q_stride + block * Inner::kInputs;
      for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t count = rows - row < kRows ? rows - row : kRows;
        multiply(piece, tiles, 0, registers, q + row * p.q_stride, p.q_stride, count, acc + row * kWidth, block == 0,
                 shapes);
        if (block + blocks < p.blocks) continue;
        for (int64_t t = row / p.planes; t < (row + count) / p.planes; ++t) {  // while the sums are in L1
          for (int64_t i = 0; i < tiles; ++i) {
            store_rows<Avx512>(p, acc + t * p.planes * kWidth + i * kTileRows, kWidth, token + t,
                               (tile + i) * kTileRows);
          }
        }
      }
    }
  }

  // Likewise with a weight scale for every group of blocks.
  template <int PLANES, class Scale>
  static void in_groups(const TernaryProduct& p, int64_t tile, int64_t tiles, int64_t token, int64_t tokens,
                        Registers& shapes) {
    alignas(64) int32_t acc[kRows * kWidth];
    alignas(64) float sums[kMostRows * kWidth];
    Piece piece;
    std::memset(sums, 0, static_cast<size_t>(tokens * kWidth) * sizeof *sums);
    const int64_t group_registers = divide_up(p.group_blocks * Codes::kSteps, kRegisterRows);
    const int64_t most_groups = kPieceLines / kRegisterRows / group_registers;
    const int64_t rows_left = p.out_features - tile * kTileRows;
    const auto count_of = [&](int64_t i) {
      const int64_t left = rows_left - i * kTileRows;
      return left < kTileRows ? left : kTileRows;
    };
    for (int64_t begin = 0; begin < p.groups; begin += most_groups) {
      const int64_t end = p.groups - begin < most_groups ? p.groups : begin + most_groups;
      for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t group = begin; group < end; ++group) {
          const int64_t block = group * p.group_blocks;
          const int64_t blocks = p.blocks - block < p.group_blocks ? p.blocks - block : p.group_blocks;
          decode(p, tile + i, block, blocks, piece.codes[i] + (group - begin) * group_registers * kRegisterBytes);
        }
      }
      for (int64_t t = 0; t < tokens; t += kRows / PLANES) {
        const int64_t count = tokens - t < kRows / PLANES ? tokens - t : kRows / PLANES;
        for (int64_t group = begin; group < end; ++group) {
          const int64_t block = group * p.group_blocks;
          const int64_t blocks = p.blocks - block < p.group_blocks ? p.blocks - block : p.group_blocks;
          const int8_t* q = p.q + (token + t) * PLANES * p.q_stride + block * Inner::kInputs;
          multiply(piece, tiles, (group - begin) * group_registers, divide_up(blocks * Codes::kSteps, kRegisterRows), q,
                   p.q_stride, count * PLANES, acc, true, shapes);
          for (int64_t i = 0; i < tiles; ++i) {
            const Scale* scale = scales_of_tile<Scale>(p, tile + i) + group * kTileRows;
            for (int64_t j = 0; j < count; ++j) {
              add_group<Avx512, PLANES>(p, acc + j * PLANES * kWidth + i * kTileRows, kWidth, token + t + j, group,
                                        scale, sums + (t + j) * kWidth + i * kTileRows);
            }
          }
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < tiles; ++i) {
        store_sums<Avx512>(p, sums + t * kWidth + i * kTileRows, token + t, (tile + i) * kTileRows, count_of(i));
      }
    }
  }

  template <int PLANES>
  static void in_groups_of(const TernaryProduct& p, int64_t tile, int64_t tiles, int64_t token, int64_t tokens,
                           Registers& shapes) {
    if (p.scale_dtype == DType::kFloat16) return in_groups<PLANES, Float16>(p, tile, tiles, token, tokens, shapes);
    return in_groups<PLANES, float>(p, tile, tiles, token, tokens, shapes);
  }

  static void ternary_product(const TernaryProduct& p, int64_t tile_begin, int64_t tile_end) {
    if (p.tokens * p.planes < kLeastRows || p.blocks == 0) {
      return TernaryDriver<Avx512, Inner>::ternary_product(p, tile_begin, tile_end);
    }
    // As many rows of q as L2 keeps, in equal parts; all tiles pass over one part, then over the next.
    const int64_t kept = kQBytes / p.q_stride + 1;
    const int64_t tokens = (kept < kMostRows ? kept : kMostRows) / p.planes;
    const int64_t parts = divide_up(p.tokens, tokens < 1 ? 1 : tokens);
    Registers shapes;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = p.tokens * part / parts;
      const int64_t count = p.tokens * (part + 1) / parts - begin;
      for (int64_t tile = tile_begin; tile < tile_end; tile += kTiles) {
        const int64_t tiles = tile_end - tile < kTiles ? tile_end - tile : kTiles;
        if constexpr (Codes::kHasGroupScales) {
          if (p.group_blocks != 0) {
            if (p.planes == 1) {
              in_groups_of<1>(p, tile, tiles, begin, count, shapes);
            } else {
              in_groups_of<2>(p, tile, tiles, begin, count, shapes);
            }
            continue;
          }
        }
        whole_rows(p, tile, tiles, begin, count, shapes);
      }
    }
  }
};

constexpr KernelTable amx_table() {
  KernelTable table = make_table<Avx512, TileBlocks<Tile16Codes>, Sparse, Avx512Sums>(
      "amx_int8", AmxDriver<Base3Codes>::ternary_product);
  table.ternary_product = AmxDriver<Tile16Codes>::ternary_product;
  return table;
}

}  // namespace

extern const KernelTable kAmxInt8Kernels;
constexpr KernelTable kAmxInt8Kernels = amx_table();

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
