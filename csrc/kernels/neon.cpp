// NEON as every ARMv8-A CPU has it (Cortex-A53, A72: Raspberry Pi 3 and 4).
//
// Instruction: smlal / smlal2, acc_i16x8[i] += code_i8x8[i] * q_i8x8[i]; sadalp adds neighbours to int32.
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 (docs/layouts.md).
// Overflow:    a product lies in [-384, 381] for any byte (code 3), so 85 fit an int16 lane and 86 do not.
//              A block adds four to a lane; after 16 blocks, 64 products, |sum| <= 24576, and the lanes
//              are widened to int32. There |acc| <= 384 K <= 1.0e8 < 2^31.
//
// A quarter of a block is one register, four rows; a lane of int16 is one row and one j:
//
//     code_i8x16      | row 0: j=0..3 | row 1: j=0..3 | row 2: j=0..3 | row 3: j=0..3 |   >> 2p, & 3
//     q_i8x16         | q[4p .. 4p+3] | q[4p .. 4p+3] | q[4p .. 4p+3] | q[4p .. 4p+3] |
//     acc_i16x8, low  | row 0: j=0 | j=1 | j=2 | j=3 | row 1: j=0 | j=1 | j=2 | j=3 |     smlal
//     acc_i16x8, high | row 2: j=0 | j=1 | j=2 | j=3 | row 3: j=0 | j=1 | j=2 | j=3 |     smlal2
//     sum_i32x4       |    row 0: j=0,1 | j=2,3      |    row 1: j=0,1 | j=2,3      |     sadalp
//
// One addp of two such sums then gives four rows.

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// No target region: all of this is the baseline.
#include "kernels/float_algorithms.h"
#include "kernels/tile_sums.h"
#include "kernels/exponential.h"
#include "kernels/attention_int8.h"
#include "kernels/attention.h"
#include "kernels/glu.h"
#include "kernels/screen.h"
#include "kernels/ternary_driver.h"
#include "kernels/ternary_decoded.h"
#include "kernels/neon.h"
#include "kernels/neon_sparse.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
namespace {

struct Smlal {
  // Two products a lane of int16 at most: |sum| <= 2 * 384.
  static int32x4_t dot(int32x4_t acc_i32x4, int8x16_t code_i8x16, int8x16_t q_i8x16) {
    const int16x8_t low_i16x8 = vmull_s8(vget_low_s8(code_i8x16), vget_low_s8(q_i8x16));
    return vpadalq_s16(acc_i32x4, vmlal_high_s8(low_i16x8, code_i8x16, q_i8x16));
  }

  static int32x4_t dot_columns(int32x4_t acc_i32x4, int8x16_t first_i8x16, int8x16_t second_i8x16, int8x8_t q_i8x8) {
    const int8x16_t first_q_i8x16 = vreinterpretq_s8_s32(vdupq_lane_s32(vreinterpret_s32_s8(q_i8x8), 0));
    const int8x16_t second_q_i8x16 = vreinterpretq_s8_s32(vdupq_lane_s32(vreinterpret_s32_s8(q_i8x8), 1));
    int16x8_t low_i16x8 = vmull_s8(vget_low_s8(first_i8x16), vget_low_s8(first_q_i8x16));
    int16x8_t high_i16x8 = vmull_high_s8(first_i8x16, first_q_i8x16);
    low_i16x8 = vmlal_s8(low_i16x8, vget_low_s8(second_i8x16), vget_low_s8(second_q_i8x16));
    high_i16x8 = vmlal_high_s8(high_i16x8, second_i8x16, second_q_i8x16);
    return vaddq_s32(acc_i32x4, vpaddq_s32(vpaddlq_s16(low_i16x8), vpaddlq_s16(high_i16x8)));
  }
};

struct Inner : NeonSparse<Smlal> {
  static constexpr int64_t kInputs = kBlockInputs;
  static constexpr int kTiles = 1;
  static constexpr int kRowsStreamed = 0;  // nothing to choose: kTiles is 1
  static constexpr bool kHasGroupScales = true;
  static constexpr int kRowsOfGroups = 0;
  static constexpr int kDecodedRows = 0;
  static constexpr int64_t kQBytes = kQBytesInL2;
  // Half a tile: 6 x 4 accumulators + 2 codes + 1 activation + 1 mask = 28 of 32 registers. Every register
  // of codes and every broadcast activation costs instructions: here 36 for 96 products, while a whole
  // tile and two rows of q would need 32 for 64.
  static constexpr int kRows = 6;
  static constexpr int kRowsOfWholeTile = 1;         // one sequential stream
  static constexpr int64_t kBlocksPerWidening = 16;  // 64 products a lane: see Overflow above

  template <int TILES, int ROWS>
  static void block(const uint8_t* tile, int64_t, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    static_assert(TILES == 1, "the driver asks for kTiles at most");
    constexpr int kQuarters = ROWS <= kRowsOfWholeTile ? 4 : 2;
    for (int quarter = 0; quarter < 4; quarter += kQuarters) {
      quarters<kQuarters, ROWS>(tile + quarter * kQuarterBytes, blocks, q, q_stride, acc + quarter * kQuarterRows);
    }
  }

  template <int QUARTERS, int ROWS>
  static void quarters(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    int32x4_t sum_i32x4[ROWS][2 * QUARTERS];
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
      for (int half = 0; half < 2 * QUARTERS; ++half) sum_i32x4[t][half] = vdupq_n_s32(0);
    }
    for (int64_t begin = 0; begin < blocks; begin += kBlocksPerWidening) {
      const int64_t end = blocks - begin < kBlocksPerWidening ? blocks : begin + kBlocksPerWidening;
      int16x8_t acc_i16x8[ROWS][2 * QUARTERS];
#pragma GCC unroll 6
      for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
        for (int half = 0; half < 2 * QUARTERS; ++half) acc_i16x8[t][half] = vdupq_n_s16(0);
      }
      for (int64_t b = begin; b < end; ++b) {
        const uint8_t* address = tile + b * kBlockBytes;
        prefetch_near(address + kPrefetchBytes);
        const int8_t* q_block = q + b * kBlockInputs;
        step<0, QUARTERS>(address, q_block, q_stride, acc_i16x8);
        step<1, QUARTERS>(address, q_block, q_stride, acc_i16x8);
        step<2, QUARTERS>(address, q_block, q_stride, acc_i16x8);
        step<3, QUARTERS>(address, q_block, q_stride, acc_i16x8);
      }
#pragma GCC unroll 6
      for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
        for (int half = 0; half < 2 * QUARTERS; ++half) {
          sum_i32x4[t][half] = vpadalq_s16(sum_i32x4[t][half], acc_i16x8[t][half]);
        }
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < QUARTERS; ++i) {
        const int32x4_t row_i32x4 = vpaddq_s32(sum_i32x4[t][2 * i], sum_i32x4[t][2 * i + 1]);
        vst1q_s32(acc + t * kTileRows + i * kQuarterRows, row_i32x4);
      }
    }
  }

  // Inputs 4P .. 4P+3 of a block. Its quarters are loaded anew in every step: a load costs no vector
  // pipe, and registers are short.
  template <int P, int QUARTERS, int ROWS>
  static void step(const uint8_t* address, const int8_t* q_block, int64_t q_stride,
                   int16x8_t (&acc_i16x8)[ROWS][2 * QUARTERS]) {
    int8x16_t code_i8x16[QUARTERS];
#pragma GCC unroll 4
    for (int i = 0; i < QUARTERS; ++i) code_i8x16[i] = codes<P>(vld1q_u8(address + i * kQuarterBytes));
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; ++t) {
      keep_load_order();
      int32_t four;
      std::memcpy(&four, q_block + t * q_stride + 4 * P, sizeof four);
      const int8x16_t q_i8x16 = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
      for (int i = 0; i < QUARTERS; ++i) {
        int16x8_t& low_i16x8 = acc_i16x8[t][2 * i];
        int16x8_t& high_i16x8 = acc_i16x8[t][2 * i + 1];
        low_i16x8 = vmlal_s8(low_i16x8, vget_low_s8(code_i8x16[i]), vget_low_s8(q_i8x16));
        high_i16x8 = vmlal_high_s8(high_i16x8, code_i8x16[i], q_i8x16);
      }
    }
  }
};

// tile_sums.h. Two products of -128 by -128 would overflow an int16 lane, so each is added to int32 at once.
struct SmullSums {
  template <class Codes>
  static constexpr int32_t kExcess = 0;
  static constexpr int kRows = 2;  // 2 x 8 accumulators + 4 codes + 1 activation + 1 mask + products

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    int32x4_t acc_i32x4[ROWS][8];  // of rows 2i and 2i+1: | j=0,1 | j=2,3 | j=0,1 | j=2,3 |
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc_i32x4[t][i] = vdupq_n_s32(0);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * Codes::kLines * kBlockBytes;
      step<0, Codes, ROWS>(block, q + b * kBlockInputs, q_stride, acc_i32x4);
      step<1, Codes, ROWS>(block, q + b * kBlockInputs, q_stride, acc_i32x4);
      step<2, Codes, ROWS>(block, q + b * kBlockInputs, q_stride, acc_i32x4);
      step<3, Codes, ROWS>(block, q + b * kBlockInputs, q_stride, acc_i32x4);
    }
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        vst1q_s32(acc + t * kTileRows + i * kQuarterRows, vpaddq_s32(acc_i32x4[t][2 * i], acc_i32x4[t][2 * i + 1]));
      }
    }
  }

 private:
  // Inputs 4P .. 4P+3 of a block.
  template <int P, class Codes, int ROWS>
  static void step(const uint8_t* block, const int8_t* q, int64_t q_stride, int32x4_t (&acc_i32x4)[ROWS][8]) {
    if (P < Codes::kLines) ask_ahead<Neon>(block + P * kBlockBytes, kStreamThroughL2);
    int8x16_t code_i8x16[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) code_i8x16[i] = number_of<P>(Codes{}, block + i * kQuarterBytes);
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
      keep_load_order();
      int32_t word;
      std::memcpy(&word, q + t * q_stride + 4 * P, sizeof word);
      const int8x16_t q_i8x16 = vreinterpretq_s8_s32(vdupq_n_s32(word));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        int32x4_t& low = acc_i32x4[t][2 * i];
        int32x4_t& high = acc_i32x4[t][2 * i + 1];
        low = vpadalq_s16(low, vmull_s8(vget_low_s8(code_i8x16[i]), vget_low_s8(q_i8x16)));
        high = vpadalq_s16(high, vmull_high_s8(code_i8x16[i], q_i8x16));
      }
    }
  }
};

}  // namespace

extern const KernelTable kNeonKernels;
constexpr KernelTable kNeonKernels = make_table<Neon, Inner, Inner, SmullSums>("neon");

}  // namespace bitnet_ops
