// AVX-VNNI (Alder Lake and later, Zen 5): the VNNI dot product in VEX encoding, for CPUs that have no
// AVX-512 or have it switched off.
//
// Instruction: vpdpbusd ymm, acc_i32x8[i] += sum over j of code_u8x32[4i+j] * q_i8x32[4i+j].
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (docs/layouts.md).
// Overflow:    vpdpbusd adds four products to an int32 lane without saturating in between. With
//              shifted codes |acc| <= K * 3 * 128 = 384 K <= 1.0e8; with odd steps in place (one or two
//              rows of q) |acc| <= K/2 * (3 << 2) * 128 = 768 K <= 2.0e8 < 2^31 at K = 2^18, for any byte.
//
// Half a block is one ymm; lane i is row i (or 8 + i):
//
//     code_u8x32    | row 0: j=0..3 | row 1: j=0..3 | ... | row 7: j=0..3 |     >> 2p, & 3
//     q_i8x32       | q[4p .. 4p+3] | q[4p .. 4p+3] | ... | q[4p .. 4p+3] |
//     acc_i32x8     |     row 0     |     row 1     | ... |     row 7     |

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
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
#include "kernels/ymm.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
namespace {

struct Dpbusd {
  // Never before the end: int32 lanes hold a whole row (see Overflow above).
  static constexpr int64_t kDotsPerWidening = kMaxInFeatures;
  // 2 x 6 accumulators + 2 codes + 1 mask + 1 activation = 16 registers.
  static constexpr int kRows = 6;

  // In assembly, so that nothing is moved across it: GCC 12 would decode all four steps of a block first, and then
  // lacks registers for six rows of q (bench/LOG.md).
  static __m256i dot(__m256i acc_i32x8, __m256i code_u8x32, __m256i q_i8x32) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc_i32x8) : "x"(code_u8x32), "x"(q_i8x32));
    return acc_i32x8;
  }
  static constexpr int kDecodedRows = 0;  // slower (bench/LOG.md)
  static __m256i widen(__m256i acc_i32x8) { return acc_i32x8; }

  // One or two rows of q: odd steps are multiplied where they stand in the byte, four times too large, into
  // accumulators of their own, and shifted back at the end, which is exact. So there are eight chains, which cover the
  // latency of vpdpbusd (4 or 5 cycles), one shift for two steps, and two masks: with four GCC ran out of registers.
  static constexpr int kRowsInPlace = 2;

  template <int ROWS>
  __attribute__((always_inline)) static void in_place(const uint8_t* tile, int64_t begin, int64_t end, const int8_t* q,
                                                      int64_t q_stride, const StreamAhead ahead, __m256i (&low)[ROWS],
                                                      __m256i (&high)[ROWS]) {
    constexpr int kChains = 4 / ROWS;  // of half a tile, of a row of q; the odd ones are of odd steps
    __m256i low_i32x8[ROWS][kChains];
    __m256i high_i32x8[ROWS][kChains];
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        low_i32x8[t][chain] = _mm256_setzero_si256();
        high_i32x8[t][chain] = _mm256_setzero_si256();
      }
    }
    tile += begin * kBlockBytes;
    q += begin * kBlockInputs;
    int64_t blocks = end - begin;
    for (; blocks >= 2; blocks -= 2) {
      add_block(tile, q, q_stride, ahead, low_i32x8, high_i32x8);
      add_block(tile + kBlockBytes, q + kBlockInputs, q_stride, ahead, low_i32x8, high_i32x8);
      tile += 2 * kBlockBytes;
      q += 2 * kBlockInputs;
    }
    if (blocks > 0) add_block(tile, q, q_stride, ahead, low_i32x8, high_i32x8);
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
      low[t] = add_chains(low_i32x8[t]);
      high[t] = add_chains(high_i32x8[t]);
    }
  }

 private:
  template <int ROWS, int CHAINS>
  __attribute__((always_inline)) static void add_block(const uint8_t* block, const int8_t* q, int64_t q_stride,
                                                       const StreamAhead ahead, __m256i (&low_i32x8)[ROWS][CHAINS],
                                                       __m256i (&high_i32x8)[ROWS][CHAINS]) {
    ask_ahead<Ymm>(block, ahead);
    __m256i low_u8x32 = load32(block);
    __m256i high_u8x32 = load32(block + 32);
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      if (p == 2) {  // moves bits across bytes, but only into places that the masks clear
        low_u8x32 = _mm256_srli_epi16(low_u8x32, 4);
        high_u8x32 = _mm256_srli_epi16(high_u8x32, 4);
      }
      const __m256i mask_u8x32 = _mm256_set1_epi8(p % 2 == 0 ? 0x03 : 0x0c);
#pragma GCC unroll 2
      for (int t = 0; t < ROWS; ++t) {
        const __m256i q_i8x32 = broadcast4(q + t * q_stride + 4 * p);
        __m256i& low_sum = low_i32x8[t][p % CHAINS];
        __m256i& high_sum = high_i32x8[t][p % CHAINS];
        low_sum = dot(low_sum, _mm256_and_si256(low_u8x32, mask_u8x32), q_i8x32);
        high_sum = dot(high_sum, _mm256_and_si256(high_u8x32, mask_u8x32), q_i8x32);
      }
    }
  }

  template <int CHAINS>
  __attribute__((always_inline)) static __m256i add_chains(const __m256i (&sum_i32x8)[CHAINS]) {
    __m256i even = sum_i32x8[0];
    __m256i odd = sum_i32x8[1];
    if constexpr (CHAINS == 4) {
      even = _mm256_add_epi32(even, sum_i32x8[2]);
      odd = _mm256_add_epi32(odd, sum_i32x8[3]);
    }
    return _mm256_add_epi32(even, _mm256_srai_epi32(odd, 2));
  }
};

// tile_sums.h
struct DpbusdSums {
  template <class Codes>
  static constexpr int32_t kExcess = Codes::kZero;
  static constexpr int kRows = 4;  // 2 x 4 accumulators + 2 codes + 1 activation

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const StreamAhead ahead = stream_ahead;
    __m256i acc_i32x8[ROWS][2];
    for (int t = 0; t < ROWS; ++t) acc_i32x8[t][0] = acc_i32x8[t][1] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * Codes::kLines * kBlockBytes;
      step<0, Codes>(block, q + b * kBlockInputs, q_stride, ahead, acc_i32x8);
      step<1, Codes>(block, q + b * kBlockInputs, q_stride, ahead, acc_i32x8);
      step<2, Codes>(block, q + b * kBlockInputs, q_stride, ahead, acc_i32x8);
      step<3, Codes>(block, q + b * kBlockInputs, q_stride, ahead, acc_i32x8);
    }
    for (int t = 0; t < ROWS; ++t) {
      for (int half = 0; half < 2; ++half) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + t * kTileRows + 8 * half), acc_i32x8[t][half]);
      }
    }
  }

 private:
  // Inputs 4P .. 4P+3 of a block.
  template <int P, class Codes, int ROWS>
  static void step(const uint8_t* block, const int8_t* q, int64_t q_stride, const StreamAhead ahead,
                   __m256i (&acc_i32x8)[ROWS][2]) {
    if (P < Codes::kLines) ask_ahead<Ymm>(block + P * kBlockBytes, ahead);
    const __m256i low_u8x32 = code_of<P>(Codes{}, block);
    const __m256i high_u8x32 = code_of<P>(Codes{}, block + 32);
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; ++t) {
      const __m256i q_i8x32 = broadcast4(q + t * q_stride + 4 * P);
      acc_i32x8[t][0] = Dpbusd::dot(acc_i32x8[t][0], low_u8x32, q_i8x32);
      acc_i32x8[t][1] = Dpbusd::dot(acc_i32x8[t][1], high_u8x32, q_i8x32);
    }
  }
};

}  // namespace

extern const KernelTable kAvxVnniKernels;
constexpr KernelTable kAvxVnniKernels = make_table<Ymm, YmmLoops<Dpbusd>, YmmLoops<Dpbusd>, DpbusdSums>("avx_vnni");

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
