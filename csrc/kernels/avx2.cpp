// AVX2 with FMA and F16C (Haswell, Zen 1 and later).
//
// Instruction: vpmaddubsw ymm, sum_i16x16[i] = code_u8[2i] * q_i8[2i] + code_u8[2i+1] * q_i8[2i+1],
//              which saturates; it never has to here: |3 * 128 + 3 * 128| = 768 < 32767.
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (DESIGN.md section 4).
// Overflow:    a pair of valid codes (at most 2) lies in [-512, 508], so 64 pairs fit an int16 lane
//              and 65 do not; with code 3 (a corrupt file) a pair lies in [-768, 762] and 42 fit.
//              After 32 pairs |sum| <= 24576 for any byte, and the lanes are widened to int32. There
//              |acc| <= 384 K <= 1.0e8 < 2^31.
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

#include "../float_convert.h"
#include "../kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "float_algorithms.h"
#include "attention.h"
#include "ternary_driver.h"
#include "ymm.h"

namespace bitnet_ops {
namespace {

struct Maddubs {
  static constexpr int64_t kDotsPerWidening = 32;  // a pair each: see Overflow above
  // 2 x 4 accumulators + 2 codes + 1 mask + 1 activation + 2 products = 14 of 16 registers.
  static constexpr int kRows = 4;

  static __m256i dot(__m256i acc_i16x16, __m256i code_u8x32, __m256i q_i8x32) {
    acc_i16x16 = _mm256_add_epi16(acc_i16x16, _mm256_maddubs_epi16(code_u8x32, q_i8x32));
    // Nothing happens here. But GCC would regroup the sums of several steps and then need more registers
    // than there are: six rows of q ran at half the speed (bench/LOG.md).
    __asm__("" : "+x"(acc_i16x16));
    return acc_i16x16;
  }
  static __m256i widen(__m256i acc_i16x16) { return _mm256_madd_epi16(acc_i16x16, _mm256_set1_epi16(1)); }
};

using Float = FloatKernels<Ymm>;
using Attend = AttentionKernels<Ymm>;

}  // namespace

extern const KernelTable kAvx2Kernels;
constexpr KernelTable kAvx2Kernels = {
    "avx2",
    Float::quantize_row,
    Float::quantize_row_16,
    TernaryDriver<Ymm, YmmLoops<Maddubs>>::ternary_product,
    nullptr,
    RowDriver<YmmLoops<Maddubs>>::ternary_rows,
    ColumnDriver<Ymm, YmmLoops<Maddubs>>::ternary_columns,
    Float::rms_norm_row,
    Float::widen_row,
    Float::logits,
    Attend::store,
    Attend::span,
    Attend::join,
    Attend::finish,
};

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
