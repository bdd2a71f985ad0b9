// AVX-VNNI (Alder Lake and later, Zen 5): the VNNI dot product in VEX encoding, for CPUs that have no
// AVX-512 or have it switched off.
//
// Instruction: vpdpbusd ymm, acc_i32x8[i] += sum over j of code_u8x32[4i+j] * q_i8x32[4i+j].
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (docs/layouts.md).
// Overflow:    vpdpbusd adds four products to an int32 lane without saturating in between. With
//              shifted codes |acc| <= K * 3 * 128 = 384 K <= 1.0e8; with codes in place (one
//              row of q) |acc| <= K/2 * (3 << 2) * 128 = 768 K <= 2.0e8, for any byte.
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

  // In assembly, so that nothing is moved across it: GCC 12 would decode all four steps of a block first, and then lacks
  // registers for six rows of q (bench/LOG.md).
  static __m256i dot(__m256i acc_i32x8, __m256i code_u8x32, __m256i q_i8x32) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc_i32x8) : "x"(code_u8x32), "x"(q_i8x32));
    return acc_i32x8;
  }
  static constexpr int kDecodedRows = 0;  // slower (bench/LOG.md)
  static __m256i widen(__m256i acc_i32x8) { return acc_i32x8; }
};

struct Inner : YmmLoops<Dpbusd> {
  template <int TILES, int ROWS>
  static void block(const uint8_t* tile, int64_t tile_bytes, int64_t blocks, const int8_t* q, int64_t q_stride,
                    int32_t* acc) {
    if constexpr (ROWS == 1) {
      block_in_place(tile, blocks, q, acc);
    } else {
      YmmLoops<Dpbusd>::block<TILES, ROWS>(tile, tile_bytes, blocks, q, q_stride, acc);
    }
  }

  // One row of q: steps 0 and 1 of a byte, and 2 and 3 of it shifted by four bits, are multiplied where they stand,
  // each into its own accumulator: eight independent chains to cover the latency of vpdpbusd (5 cycles). Steps 1 and 3
  // are four times too large until the end, where the shift is exact. A mask for each step instead of the one shift
  // needs one register more than there are, and then sums go through memory in every block (bench/LOG.md).
  static void block_in_place(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    const __m256i even_u8x32 = _mm256_set1_epi8(0x03);
    const __m256i odd_u8x32 = _mm256_set1_epi8(0x0c);
    __m256i acc_i32x8[2][4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) acc_i32x8[half][p] = _mm256_setzero_si256();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* address = tile + b * kBlockBytes;
      const int8_t* q_block = q + b * kBlockInputs;
      ask_ahead<Ymm>(address);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i(&sums)[4] = acc_i32x8[half];
        const __m256i low_u8x32 = load32(address + 32 * half);
        const __m256i high_u8x32 = _mm256_srli_epi16(low_u8x32, 4);
        sums[0] = Dpbusd::dot(sums[0], _mm256_and_si256(low_u8x32, even_u8x32), broadcast4(q_block));
        sums[1] = Dpbusd::dot(sums[1], _mm256_and_si256(low_u8x32, odd_u8x32), broadcast4(q_block + 4));
        sums[2] = Dpbusd::dot(sums[2], _mm256_and_si256(high_u8x32, even_u8x32), broadcast4(q_block + 8));
        sums[3] = Dpbusd::dot(sums[3], _mm256_and_si256(high_u8x32, odd_u8x32), broadcast4(q_block + 12));
      }
    }
    for (int half = 0; half < 2; ++half) {
      const __m256i ones_i32x8 = _mm256_add_epi32(acc_i32x8[half][0], acc_i32x8[half][2]);
      const __m256i fours_i32x8 = _mm256_add_epi32(acc_i32x8[half][1], acc_i32x8[half][3]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8 * half),
                          _mm256_add_epi32(ones_i32x8, _mm256_srai_epi32(fours_i32x8, 2)));
    }
  }
};

// tile_sums.h
struct DpbusdSums {
  template <class Codes>
  static constexpr int32_t kExcess = Codes::kZero;
  static constexpr int kRows = 4;  // 2 x 4 accumulators + 2 codes + 1 activation

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    __m256i acc_i32x8[ROWS][2];
    for (int t = 0; t < ROWS; ++t) acc_i32x8[t][0] = acc_i32x8[t][1] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * Codes::kLines * kBlockBytes;
      step<0, Codes>(block, q + b * kBlockInputs, q_stride, acc_i32x8);
      step<1, Codes>(block, q + b * kBlockInputs, q_stride, acc_i32x8);
      step<2, Codes>(block, q + b * kBlockInputs, q_stride, acc_i32x8);
      step<3, Codes>(block, q + b * kBlockInputs, q_stride, acc_i32x8);
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
  static void step(const uint8_t* block, const int8_t* q, int64_t q_stride, __m256i (&acc_i32x8)[ROWS][2]) {
    if (P < Codes::kLines) ask_ahead<Ymm>(block + P * kBlockBytes);
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
constexpr KernelTable kAvxVnniKernels = make_table<Ymm, Inner, Inner, DpbusdSums>("avx_vnni");

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
