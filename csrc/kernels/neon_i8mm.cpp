// NEON with the matrix product of Armv8.6 (Neoverse V1, N2: Graviton 3 and 4; Apple M2).
//
// Instruction: smmla, a 2 x 2 matrix of int32 += 2 rows x 8 codes times 8 activations x 2 tokens:
//              twice the products of sdot. A single token would leave half of them unused, and pairing
//              codes costs, so up to three tokens take sdot (neon_dotprod.cpp draws it).
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 (docs/layouts.md).
// Overflow:    smmla adds eight products to an int32 lane without saturating in between:
//              |acc| <= K * 3 * 128 = 384 K <= 1.0e8 < 2^31 at K = 2^18, for any byte. With sdot
//              and codes in place |acc| <= K/4 * (3 << 4) * 128 = 1536 K <= 4.1e8.
//
// A quarter of a block is one register of four rows; steps p and p+1 interleave by 32-bit lanes:
//
//     step p          | row 0: j=0..3 | row 1: j=0..3 | row 2: j=0..3 | row 3: j=0..3 |   >> 2p, & 3
//     step p+1        | row 0: j=0..3 | row 1: j=0..3 | row 2: j=0..3 | row 3: j=0..3 |   >> 2p+2, & 3
//     code_i8x16      | row 0: 8 inputs from 4p       | row 1: 8 inputs from 4p       |   zip1; zip2: rows 2, 3
//     q_i8x16         | token 0: q[4p .. 4p+7]        | token 1: q[4p .. 4p+7]        |
//     acc_i32x4       | row 0 token 0 | row 0 token 1 | row 1 token 0 | row 1 token 1 |

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature. GCC 12 inlines the intrinsics
// only where all of armv8.2-a is enabled.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
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
#include "kernels/neon.h"
#include "kernels/neon_sparse.h"
#include "kernels/sdot.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
namespace {

struct Inner {
  static constexpr int64_t kInputs = kBlockInputs;
  static constexpr int kTiles = 1;
  static constexpr int kRowsStreamed = 0;  // nothing to choose: kTiles is 1
  static constexpr bool kHasGroupScales = true;
  static constexpr int kRowsOfGroups = 0;
  static constexpr int kDecodedRows = 0;
  static constexpr int64_t kQBytes = kQBytesInL2;
  // Half a tile: 6 pairs x 4 accumulators + 4 codes + 1 activation + 1 mask = 30 of 32 registers. Here 20
  // instructions decode and 12 pair activations for 48 products; a whole tile and six rows of q would
  // need 40 and 6.
  static constexpr int kRows = 12;
  // Instructions for a block: smmla needs 40 to decode and 20 for a pair of rows of q, sdot 24 (in place
  // 16) and 16 for a row. They meet between three rows and four.
  static constexpr int kRowsSdot = 3;

  template <int TILES, int ROWS>
  static void block(const uint8_t* tile, int64_t tile_bytes, int64_t blocks, const int8_t* q, int64_t q_stride,
                    int32_t* acc) {
    static_assert(TILES == 1, "the driver asks for kTiles at most");
    if constexpr (ROWS <= kRowsSdot) {
      SdotLoops::block<TILES, ROWS>(tile, tile_bytes, blocks, q, q_stride, acc);
    } else {
      half_tile<ROWS>(tile, blocks, q, q_stride, acc);
      half_tile<ROWS>(tile + 2 * kQuarterBytes, blocks, q, q_stride, acc + 2 * kQuarterRows);
    }
  }

  template <int ROWS>
  static void half_tile(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    constexpr int kPairs = (ROWS + 1) / 2;
    int32x4_t acc_i32x4[kPairs][4];  // of rows 2i and 2i+1
#pragma GCC unroll 6
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc_i32x4[pair][i] = vdupq_n_s32(0);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* address = tile + b * kBlockBytes;
      prefetch_near(address + kPrefetchBytes);
      const int8_t* q_block = q + b * kBlockInputs;
      two_steps<0, ROWS>(address, q_block, q_stride, acc_i32x4);
      two_steps<2, ROWS>(address, q_block, q_stride, acc_i32x4);
    }
#pragma GCC unroll 6
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i += 2) {
        int32_t* out = acc + 2 * pair * kTileRows + 2 * i;
        vst1q_s32(out, vuzp1q_s32(acc_i32x4[pair][i], acc_i32x4[pair][i + 1]));
        if (2 * pair + 1 < ROWS) {
          vst1q_s32(out + kTileRows, vuzp2q_s32(acc_i32x4[pair][i], acc_i32x4[pair][i + 1]));
        }
      }
    }
  }

  // Inputs 4P .. 4P+7 of a block.
  template <int P, int ROWS, int PAIRS>
  static void two_steps(const uint8_t* address, const int8_t* q_block, int64_t q_stride,
                        int32x4_t (&acc_i32x4)[PAIRS][4]) {
    int8x16_t code_i8x16[4];  // of rows 2i and 2i+1
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += 2) {
      const uint8x16_t block_u8x16 = vld1q_u8(address + i / 2 * kQuarterBytes);
      const int32x4_t step_i32x4 = vreinterpretq_s32_s8(codes<P>(block_u8x16));
      const int32x4_t next_i32x4 = vreinterpretq_s32_s8(codes<P + 1>(block_u8x16));
      code_i8x16[i] = vreinterpretq_s8_s32(vzip1q_s32(step_i32x4, next_i32x4));
      code_i8x16[i + 1] = vreinterpretq_s8_s32(vzip2q_s32(step_i32x4, next_i32x4));
    }
#pragma GCC unroll 6
    for (int pair = 0; pair < PAIRS; ++pair) {
      keep_load_order();
      const int first = 2 * pair;
      const int second = first + 1 < ROWS ? first + 1 : first;  // an odd token stands in for its partner
      const int8x16_t q_i8x16 = vcombine_s8(vld1_s8(q_block + first * q_stride + 4 * P),  //
                                            vld1_s8(q_block + second * q_stride + 4 * P));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc_i32x4[pair][i] = vmmlaq_s32(acc_i32x4[pair][i], code_i8x16[i], q_i8x16);
    }
  }
};

}  // namespace

extern const KernelTable kNeonI8mmKernels;
constexpr KernelTable kNeonI8mmKernels = make_table<Neon, Inner, SdotLoops, SdotSums>("neon_i8mm");

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
