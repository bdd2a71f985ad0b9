// AVX2 with FMA and F16C (Haswell, Zen 1 and later).
//
// Instruction: vpmaddubsw ymm, sum_i16x16[i] = code_u8[2i] * q_i8[2i] + code_u8[2i+1] * q_i8[2i+1],
//              which saturates; it never has to here: |3 * 128 + 3 * 128| = 768 < 32767.
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (docs/layouts.md).
// Overflow:    a pair of valid codes (at most 2) lies in [-512, 508], so 64 pairs fit an int16 lane
//              and 65 do not; with code 3 (a corrupt file) a pair lies in [-768, 762] and 42 fit.
//              After 32 pairs |sum| <= 24576 for any byte, and the lanes are widened to int32; after 64 (256 inputs,
//              the largest group) where codes are decoded first and seen to be valid: 64 pairs, and so all
//              sums of fewer, lie in [-32768, 32512], which is all that fits below 0. In int32 |acc| <= 384 K <= 1.0e8
//              < 2^31.
//
// Half a block is one ymm; a row is one 32-bit group, two int16 sums, one int32 sum:
//
//     code_u8x32    | row 0: j=0..3   | row 1: j=0..3   | ... | row 7: j=0..3   |   >> 2p, & 3
//     q_i8x32       | q[4p .. 4p+3]   | q[4p .. 4p+3]   | ... | q[4p .. 4p+3]   |
//     acc_i16x16    | j=0,1  | j=2,3  | j=0,1  | j=2,3  | ... | j=0,1  | j=2,3  |   vpmaddubsw, vpaddw
//     acc_i32x8     |      row 0      |      row 1      | ... |      row 7      |   vpmaddwd with 1

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
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

struct Maddubs {
  static constexpr int64_t kDotsPerWidening = 32;  // a pair each: see Overflow above
  // 2 x 4 accumulators + 2 codes + 1 mask + 1 activation + 2 products = 14 of 16 registers.
  static constexpr int kRows = 4;

  // One or two rows of q: steps 0 and 1 of a byte, and 2 and 3 of it shifted by four bits, are multiplied where they
  // stand: one shift instead of three. Steps 1 and 3 are four times too large, and have accumulators of their own.
  static constexpr int kRowsInPlace = 2;

  static __m256i dot(__m256i acc_i16x16, __m256i code_u8x32, __m256i q_i8x32) {
    acc_i16x16 = _mm256_add_epi16(acc_i16x16, _mm256_maddubs_epi16(code_u8x32, q_i8x32));
    // Nothing happens here. But GCC would regroup the sums of several steps and then need more registers
    // than there are: six rows of q ran at half the speed (bench/LOG.md).
    __asm__("" : "+x"(acc_i16x16));
    return acc_i16x16;
  }

  static constexpr int kDecodedRows = 6;

  template <int ROWS>
  __attribute__((always_inline)) static void piece(const uint8_t* codes, int64_t blocks, const int8_t* q,
                                                   int64_t q_stride, __m256i (&low_i16x16)[ROWS],
                                                   __m256i (&high_i16x16)[ROWS]) {
#if !defined(__SANITIZE_ADDRESS__)  // which sees what an intrinsic reads, not what assembly does
    if constexpr (ROWS == kDecodedRows) return six_rows(codes, blocks, q, q_stride, low_i16x16, high_i16x16);
#endif
#pragma GCC unroll 8
    for (int t = 0; t < ROWS; ++t) {
      low_i16x16[t] = _mm256_setzero_si256();
      high_i16x16[t] = _mm256_setzero_si256();
    }
    for (int64_t step = 0; step < 4 * blocks; ++step) {
      const __m256i low_u8x32 = load32(codes + step * kBlockBytes);
      const __m256i high_u8x32 = load32(codes + step * kBlockBytes + 32);
#pragma GCC unroll 8
      for (int t = 0; t < ROWS; ++t) {
        const __m256i q_i8x32 = broadcast4(q + t * q_stride + 4 * step);
        low_i16x16[t] = dot(low_i16x16[t], low_u8x32, q_i8x32);
        high_i16x16[t] = dot(high_i16x16[t], high_u8x32, q_i8x32);
      }
    }
  }

  // clang-format off
#define BITNET_OPS_ROW(four, t)                        \
  "vpbroadcastd " four ", %%ymm14\n\t"                 \
  "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\n\t"           \
  "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t"           \
  "vpaddw %%ymm15, %[low" #t "], %[low" #t "]\n\t"     \
  "vpaddw %%ymm14, %[high" #t "], %[high" #t "]\n\t"
#define BITNET_OPS_STEP(p)                             \
  "vmovdqa 64*" #p "(%[codes]), %%ymm12\n\t"           \
  "vmovdqa 64*" #p "+32(%[codes]), %%ymm13\n\t"        \
  BITNET_OPS_ROW("4*" #p "(%[q])", 0)                  \
  BITNET_OPS_ROW("4*" #p "(%[q],%[stride])", 1)        \
  BITNET_OPS_ROW("4*" #p "(%[q],%[stride],2)", 2)      \
  BITNET_OPS_ROW("4*" #p "(%[q_3])", 3)                \
  BITNET_OPS_ROW("4*" #p "(%[q_3],%[stride])", 4)      \
  BITNET_OPS_ROW("4*" #p "(%[q_3],%[stride],2)", 5)
#define BITNET_OPS_ZERO(t)                             \
  "vpxor %[low" #t "], %[low" #t "], %[low" #t "]\n\t" \
  "vpxor %[high" #t "], %[high" #t "], %[high" #t "]\n\t"
#define BITNET_OPS_SUMS(t) [low##t] "=&x"(low_i16x16[t]), [high##t] "=&x"(high_i16x16[t])

  // 2 x 6 accumulators + 2 codes + 1 activation + 1 product = 16 of 16 registers: in assembly, because GCC and
  // clang want one more, and then move accumulators to memory and back. `codes` are aligned to 64, and not empty.
  __attribute__((always_inline)) static void six_rows(const uint8_t* codes, int64_t blocks, const int8_t* q,
                                                       int64_t q_stride, __m256i (&low_i16x16)[6],
                                                       __m256i (&high_i16x16)[6]) {
    const int8_t* q_3 = q + 3 * q_stride;
    const uint8_t* end = codes + blocks * 4 * kBlockBytes;
    __asm__ volatile(
        BITNET_OPS_ZERO(0) BITNET_OPS_ZERO(1) BITNET_OPS_ZERO(2)
        BITNET_OPS_ZERO(3) BITNET_OPS_ZERO(4) BITNET_OPS_ZERO(5)
        ".p2align 6\n"
        "1:\n\t"
        BITNET_OPS_STEP(0) BITNET_OPS_STEP(1) BITNET_OPS_STEP(2) BITNET_OPS_STEP(3)
        "add $256, %[codes]\n\t"
        "add $16, %[q]\n\t"
        "add $16, %[q_3]\n\t"
        "cmp %[end], %[codes]\n\t"
        "jne 1b"
        : BITNET_OPS_SUMS(0), BITNET_OPS_SUMS(1), BITNET_OPS_SUMS(2), BITNET_OPS_SUMS(3), BITNET_OPS_SUMS(4),
          BITNET_OPS_SUMS(5), [codes] "+r"(codes), [q] "+r"(q), [q_3] "+r"(q_3)
        : [stride] "r"(q_stride), [end] "r"(end)
        : "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
  }
// clang-format on
#undef BITNET_OPS_ROW
#undef BITNET_OPS_STEP
#undef BITNET_OPS_ZERO
#undef BITNET_OPS_SUMS

  static __m256i widen(__m256i acc_i16x16) { return _mm256_madd_epi16(acc_i16x16, _mm256_set1_epi16(1)); }

  // Of a block, two pairs in each lane are four times too large and lie in [-6144, 6096] for any byte: five blocks fit.
  // In true size they lie in [-1536, 1524], as the others do: ten blocks of both fit. Four and eight end with a group.
  static constexpr int64_t kBlocksOfFours = 4;
  static constexpr int64_t kBlocksInPlace = 8;

  template <int ROWS>
  __attribute__((always_inline)) static void in_place(const uint8_t* tile, int64_t begin, int64_t end, const int8_t* q,
                                                      int64_t q_stride, const StreamAhead ahead,
                                                      __m256i (&low_i32x8)[ROWS], __m256i (&high_i32x8)[ROWS]) {
    tile += begin * kBlockBytes;
    q += begin * kBlockInputs;
    int64_t blocks = end - begin;
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) low_i32x8[t] = high_i32x8[t] = _mm256_setzero_si256();
    for (; blocks >= kBlocksInPlace; blocks -= kBlocksInPlace) {
      __m256i sums_i16x16[2][ROWS];
      zero(sums_i16x16);
      // Not a loop: with one, what GCC 12 makes of it is slower by a twentieth.
      few_in_place(tile, kBlocksOfFours, q, q_stride, ahead, sums_i16x16);
      tile += kBlocksOfFours * kBlockBytes;
      q += kBlocksOfFours * kBlockInputs;
      few_in_place(tile, kBlocksOfFours, q, q_stride, ahead, sums_i16x16);
      tile += kBlocksOfFours * kBlockBytes;
      q += kBlocksOfFours * kBlockInputs;
      add_widened(sums_i16x16, low_i32x8, high_i32x8);
    }
    while (blocks > 0) {
      const int64_t few = blocks < kBlocksOfFours ? blocks : kBlocksOfFours;
      __m256i sums_i16x16[2][ROWS];
      zero(sums_i16x16);
      few_in_place(tile, few, q, q_stride, ahead, sums_i16x16);
      add_widened(sums_i16x16, low_i32x8, high_i32x8);
      tile += few * kBlockBytes;
      q += few * kBlockInputs;
      blocks -= few;
    }
  }

 private:
  template <int ROWS>
  __attribute__((always_inline)) static void zero(__m256i (&sums)[2][ROWS]) {
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) sums[0][t] = sums[1][t] = _mm256_setzero_si256();
  }

  template <int ROWS>
  __attribute__((always_inline)) static void add_widened(const __m256i (&sums_i16x16)[2][ROWS],
                                                         __m256i (&low_i32x8)[ROWS], __m256i (&high_i32x8)[ROWS]) {
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
      low_i32x8[t] = _mm256_add_epi32(low_i32x8[t], widen(sums_i16x16[0][t]));
      high_i32x8[t] = _mm256_add_epi32(high_i32x8[t], widen(sums_i16x16[1][t]));
    }
  }

  // Adds at most kBlocksOfFours blocks to sums[half of the tile][row].
  template <int ROWS>
  __attribute__((always_inline)) static void few_in_place(const uint8_t* tile, int64_t blocks, const int8_t* q,
                                                          int64_t q_stride, const StreamAhead ahead,
                                                          __m256i (&sums_i16x16)[2][ROWS]) {
    __m256i fours_i16x16[2][ROWS];
    zero(fours_i16x16);
    const __m256i mask_u8x32[2] = {_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c)};
#pragma GCC unroll 4
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* address = tile + b * kBlockBytes;
      const int8_t* q_block = q + b * kBlockInputs;
      ask_ahead<Ymm>(address, ahead);
      __m256i low_u8x32 = load32(address);
      __m256i high_u8x32 = load32(address + 32);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        if (p == 2) {  // moves bits across bytes, but only into places that the masks clear
          low_u8x32 = _mm256_srli_epi16(low_u8x32, 4);
          high_u8x32 = _mm256_srli_epi16(high_u8x32, 4);
        }
        const __m256i low_code_u8x32 = _mm256_and_si256(low_u8x32, mask_u8x32[p % 2]);
        const __m256i high_code_u8x32 = _mm256_and_si256(high_u8x32, mask_u8x32[p % 2]);
#pragma GCC unroll 2
        for (int t = 0; t < ROWS; ++t) {
          const __m256i q_i8x32 = broadcast4(q_block + t * q_stride + 4 * p);
          __m256i& low_sum = p % 2 == 0 ? sums_i16x16[0][t] : fours_i16x16[0][t];
          __m256i& high_sum = p % 2 == 0 ? sums_i16x16[1][t] : fours_i16x16[1][t];
          low_sum = dot(low_sum, low_code_u8x32, q_i8x32);
          high_sum = dot(high_sum, high_code_u8x32, q_i8x32);
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        sums_i16x16[half][t] = _mm256_add_epi16(sums_i16x16[half][t], _mm256_srai_epi16(fours_i16x16[half][t], 2));
      }
    }
  }
};

// tile_sums.h, in two ways.
//
// Signed bytes: vpmaddubsw would saturate (255 * 128 * 2 > 32767), so numbers and activations widen to
// 16 bits; vpmaddwd then adds two products to int32. A quarter of a line is one ymm of four rows:
//
//     number_i16x16   | row 0: j=0..3   | row 1: j=0..3   | row 2: j=0..3   | row 3: j=0..3   |   vpmovsxbw
//     q_i16x16      | q[4p .. 4p+3]   | q[4p .. 4p+3]   | q[4p .. 4p+3]   | q[4p .. 4p+3]   |
//     acc_i32x8     | j=0,1  | j=2,3  | j=0,1  | j=2,3  | j=0,1  | j=2,3  | j=0,1  | j=2,3  |
//
// Codes of six bits: a pair of products lies in [-16128, 16002], so two pairs fit an int16 lane, and half a line is one
// ymm of eight rows, as for ternary codes.
struct Avx2Sums {
  template <class Codes>
  static constexpr int32_t kExcess = Codes::kLines == SixBitCodes::kLines ? SixBitCodes::kZero : 0;
  // Signed bytes: 2 x 4 accumulators + 2 activations + 1 code + 1 product; six bits: 4 x 2 and two codes. Both 12
  // of 16.
  static constexpr int kRows = 4;

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    if constexpr (Codes::kLines == SixBitCodes::kLines) {
      six_bits<ROWS>(codes, blocks, q, q_stride, acc);
    } else if constexpr (ROWS > 2) {
      signed_bytes<2>(codes, blocks, q, q_stride, acc);
      signed_bytes<ROWS - 2>(codes, blocks, q + 2 * q_stride, q_stride, acc + 2 * kTileRows);
    } else {
      signed_bytes<ROWS>(codes, blocks, q, q_stride, acc);
    }
  }

 private:
  template <int ROWS>
  static void signed_bytes(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const StreamAhead ahead = stream_ahead;
    __m256i acc_i32x8[ROWS][4];
    for (int t = 0; t < ROWS; ++t) {
      for (int i = 0; i < 4; ++i) acc_i32x8[t][i] = _mm256_setzero_si256();
    }
    for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const uint8_t* line = codes + (4 * b + p) * kBlockBytes;
        ask_ahead<Ymm>(line, ahead);
        __m256i q_i16x16[ROWS];
#pragma GCC unroll 2
        for (int t = 0; t < ROWS; ++t) {
          int32_t four;
          std::memcpy(&four, q + t * q_stride + b * kBlockInputs + 4 * p, sizeof four);
          q_i16x16[t] = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i number_i16x16 =
              _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line + 16 * i)));
#pragma GCC unroll 2
          for (int t = 0; t < ROWS; ++t) {
            acc_i32x8[t][i] = _mm256_add_epi32(acc_i32x8[t][i], _mm256_madd_epi16(number_i16x16, q_i16x16[t]));
          }
        }
      }
    }
    for (int t = 0; t < ROWS; ++t) {
      for (int i = 0; i < 4; i += 2) {
        // Rows 0, 1, 4, 5 and 2, 3, 6, 7: vphaddd works within 128-bit halves.
        const __m256i rows_i32x8 = _mm256_hadd_epi32(acc_i32x8[t][i], acc_i32x8[t][i + 1]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + t * kTileRows + 4 * i),
                            _mm256_permute4x64_epi64(rows_i32x8, 0xd8));
      }
    }
  }

  template <int ROWS>
  static void six_bits(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const StreamAhead ahead = stream_ahead;
    __m256i acc_i32x8[ROWS][2];
    for (int t = 0; t < ROWS; ++t) acc_i32x8[t][0] = acc_i32x8[t][1] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * SixBitCodes::kLines * kBlockBytes;
      two_steps<0>(block, q + b * kBlockInputs, q_stride, ahead, acc_i32x8);
      two_steps<2>(block, q + b * kBlockInputs, q_stride, ahead, acc_i32x8);
    }
    for (int t = 0; t < ROWS; ++t) {
      for (int half = 0; half < 2; ++half) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + t * kTileRows + 8 * half), acc_i32x8[t][half]);
      }
    }
  }

  // Inputs 4P .. 4P+7 of a block.
  template <int P, int ROWS>
  static void two_steps(const uint8_t* block, const int8_t* q, int64_t q_stride, const StreamAhead ahead,
                        __m256i (&acc_i32x8)[ROWS][2]) {
    for (int p = P; p < P + 2 && p < SixBitCodes::kLines; ++p) ask_ahead<Ymm>(block + p * kBlockBytes, ahead);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i first_u8x32 = code_of<P>(SixBitCodes{}, block + 32 * half);
      const __m256i second_u8x32 = code_of<P + 1>(SixBitCodes{}, block + 32 * half);
#pragma GCC unroll 4
      for (int t = 0; t < ROWS; ++t) {
        const int8_t* q_four = q + t * q_stride + 4 * P;
        const __m256i pairs_i16x16 = _mm256_add_epi16(_mm256_maddubs_epi16(first_u8x32, broadcast4(q_four)),
                                                      _mm256_maddubs_epi16(second_u8x32, broadcast4(q_four + 4)));
        acc_i32x8[t][half] =
            _mm256_add_epi32(acc_i32x8[t][half], _mm256_madd_epi16(pairs_i16x16, _mm256_set1_epi16(1)));
      }
    }
  }
};

}  // namespace

extern const KernelTable kAvx2Kernels;
constexpr KernelTable kAvx2Kernels = make_table<Ymm, YmmLoops<Maddubs>, YmmLoops<Maddubs>, Avx2Sums>("avx2");

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
