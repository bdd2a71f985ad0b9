// AVX-512 VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later).
//
// Instruction: vpdpbusd zmm, acc_i32x16[i] += sum over j of code_u8x64[4i+j] * q_i8x64[4i+j].
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (DESIGN.md section 4).
// Overflow:    vpdpbusd adds four products to an int32 lane without saturating in between. With
//              shifted codes |acc| <= K * 3 * 128 = 384 K <= 1.0e8; with codes in place (few
//              tokens) |acc| <= K/4 * (3 << 6) * 128 = 6144 K <= 1.61e9 < 2^31 at K = 2^18, for any byte.
//
// One 64-byte block is one zmm; lane i is row i, and the four activations of step p are broadcast:
//
//     block_u8x64   | row 0: j=0..3 | row 1: j=0..3 | ... | row 15: j=0..3 |     >> 2p, & 3
//     q_i8x64       | q[4p .. 4p+3] | q[4p .. 4p+3] | ... | q[4p .. 4p+3]  |     16 inputs = p 0..3
//     acc_i32x16    |     row 0     |     row 1     | ... |     row 15     |
//
// No horizontal sum is ever needed.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../float_convert.h"
#include "../kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "float_algorithms.h"
#include "ternary_driver.h"

namespace bitnet_ops {
namespace {

struct Avx512 {
  using F32 = __m512;
  using I32 = __m512i;
  static constexpr int kLanes = 16;
  // 4 x 6 accumulators + 4 rows + 1 activation = 29 of 32 registers.
  static constexpr int kLogitsRows = 4;
  static constexpr int kLogitsTokens = 6;
  // Three tokens of 2560 floats are 30 KB: a fourth would not stay in an L1 of 32 KB.
  static constexpr int kLogitsTokensStreamed = 3;
  static constexpr int64_t kTokenGroupBytes = 512 << 10;  // half of a 1 MB L2 (Zen 4; 2 MB on newer Intel)

  static F32 zero() { return _mm512_setzero_ps(); }
  static F32 set1(float s) { return _mm512_set1_ps(s); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static F32 load(const BFloat16* p) {
    const __m256i half_u16x16 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_u16x16), 16));
  }
  static void load_even_odd(const BFloat16* p, F32& even, F32& odd) {
    const __m512i pair_u32x16 = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pair_u32x16, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pair_u32x16, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F32 load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, F32 v) {
    // As from_float: integer rounding to even. vcvtneps2bf16 would flush subnormals to zero.
    const __m512i bits_u32x16 = _mm512_castps_si512(v);
    const __m512i kept_u32x16 = _mm512_and_si512(_mm512_srli_epi32(bits_u32x16, 16), _mm512_set1_epi32(1));
    const __m512i rounded_u32x16 =
        _mm512_add_epi32(bits_u32x16, _mm512_add_epi32(kept_u32x16, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high_u32x16 =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded_u32x16, 16), nan, _mm512_set1_epi32(kBFloat16NaN));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high_u32x16));
  }
  static void store(Float16* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static float fold(F32 v) {
    const __m256 f32x8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 f32x4 = _mm_add_ps(_mm256_castps256_ps128(f32x8), _mm256_extractf128_ps(f32x8, 1));
    const __m128 f32x2 = _mm_add_ps(f32x4, _mm_movehl_ps(f32x4, f32x4));
    return _mm_cvtss_f32(_mm_add_ss(f32x2, _mm_movehdup_ps(f32x2)));
  }

  static void fold_all(F32 (&v)[1], float* out) { *out = fold(v[0]); }
  // Four folds at once: from four lanes on, the four vectors are transposed rather than reduced.
  static void fold_all(F32 (&v)[4], float* out) {
    __m128 f32x4[4];
    for (int i = 0; i < 4; ++i) {
      const __m256 f32x8 = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
      f32x4[i] = _mm_add_ps(_mm256_castps256_ps128(f32x8), _mm256_extractf128_ps(f32x8, 1));
    }
    // [a0+a2, a1+a3, b0+b2, b1+b3] and the same for c, d
    const __m128 ab_f32x4 = _mm_add_ps(_mm_movelh_ps(f32x4[0], f32x4[1]), _mm_movehl_ps(f32x4[1], f32x4[0]));
    const __m128 cd_f32x4 = _mm_add_ps(_mm_movelh_ps(f32x4[2], f32x4[3]), _mm_movehl_ps(f32x4[3], f32x4[2]));
    const __m128 even_f32x4 = _mm_shuffle_ps(ab_f32x4, cd_f32x4, 0x88);
    const __m128 odd_f32x4 = _mm_shuffle_ps(ab_f32x4, cd_f32x4, 0xdd);
    _mm_storeu_ps(out, _mm_add_ps(even_f32x4, odd_f32x4));
  }

  static I32 zero_i32() { return _mm512_setzero_si512(); }
  static int32_t sum(I32 v) { return _mm512_reduce_add_epi32(v); }
  static I32 max_magnitude(I32 m, F32 v) {
    return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(kAbsMask)));
  }
  static int32_t highest(I32 v) { return _mm512_reduce_max_epi32(v); }
  static I32 quantize(F32 v, F32 s, int8_t* q, I32 sum) {
    // Rounding is explicit, half to even, whatever the caller's MXCSR says.
    const __m512i rounded_i32x16 =
        _mm512_cvt_roundps_epi32(_mm512_mul_ps(v, s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i q_i8x16 = _mm512_cvtsepi32_epi8(rounded_i32x16);  // saturates to [-128, 127]
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), q_i8x16);
    return _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(q_i8x16));
  }
};

// Four activations in every lane; the compiler folds the load into vpdpbusd's broadcast operand.
inline __m512i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

struct Inner {
  // 2 x 12 accumulators + 2 blocks + 2 decoded + 1 mask = 29 of 32 registers. Twelve tokens pay for
  // one decoding; 24 chains cover the latency of vpdpbusd (4 or 5 cycles, up to two a cycle).
  static constexpr int kTiles = 2;
  static constexpr int kTokens = 12;
  // Memory, not arithmetic, limits up to four tokens; one tile at a time is then one stream, which
  // reads 1.5 to 1.8 times faster than two side by side (bench/LOG.md). 4 x 4 accumulators.
  static constexpr int kTokensStreamed = 4;
  // About 100 ns of one core's stream (40 GB/s): what a miss to memory takes.
  static constexpr int64_t kPrefetchBytes = 4096;

  template <int TILES, int TOKENS>
  static void block(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    if constexpr (TILES == 1 && TOKENS <= kTokensStreamed) {
      block_in_place<TOKENS>(tile, blocks, q, q_stride, acc);
    } else {
      block_shifted<TILES, TOKENS>(tile, blocks, q, q_stride, acc);
    }
  }

  // Few tokens: codes are multiplied where they stand in the byte, 4^p times too large, each p into
  // its own accumulator. No shift inside the loop, and four chains for every token; the shifts at the
  // end are exact.
  template <int TOKENS>
  static void block_in_place(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    __m512i acc_i32x16[TOKENS][4];
    for (int t = 0; t < TOKENS; ++t) {
      for (int p = 0; p < 4; ++p) acc_i32x16[t][p] = _mm512_setzero_si512();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* address = tile + b * kBlockBytes;
      _mm_prefetch(reinterpret_cast<const char*>(address + kPrefetchBytes), _MM_HINT_T0);
      const __m512i block_u8x64 = _mm512_loadu_si512(address);
      const int8_t* q_block = q + b * kBlockInputs;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const __m512i mask_u8x64 = _mm512_set1_epi8(static_cast<char>(0x03 << (2 * p)));
        const __m512i code_u8x64 = _mm512_and_si512(block_u8x64, mask_u8x64);
        for (int t = 0; t < TOKENS; ++t) {
          const __m512i q_i8x64 = broadcast4(q_block + t * q_stride + 4 * p);
          acc_i32x16[t][p] = _mm512_dpbusd_epi32(acc_i32x16[t][p], code_u8x64, q_i8x64);
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      __m512i sum_i32x16 = acc_i32x16[t][0];
      for (int p = 1; p < 4; ++p) {
        const unsigned shift = static_cast<unsigned>(2 * p);
        sum_i32x16 = _mm512_add_epi32(sum_i32x16, _mm512_srai_epi32(acc_i32x16[t][p], shift));
      }
      _mm512_storeu_si512(acc + t * kTileRows, sum_i32x16);
    }
  }

  // Tiles are read side by side, so the bytes to come after the end of one are not the next in memory
  // (another tile of this group is there) but those after the whole group.
  template <int TILES>
  static void prefetch(const uint8_t* tile, int64_t tile_bytes, int64_t offset) {
    int64_t ahead = offset + kPrefetchBytes;
    ahead += ahead < tile_bytes ? 0 : (TILES - 1) * tile_bytes;
    for (int i = 0; i < TILES; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(tile + i * tile_bytes + ahead), _MM_HINT_T0);
    }
  }

  template <int TILES, int TOKENS>
  static void block_shifted(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const __m512i mask_u8x64 = _mm512_set1_epi8(0x03);
    const int64_t tile_bytes = blocks * kBlockBytes;
    __m512i acc_i32x16[TOKENS][TILES];
    for (int t = 0; t < TOKENS; ++t) {
      for (int i = 0; i < TILES; ++i) acc_i32x16[t][i] = _mm512_setzero_si512();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      prefetch<TILES>(tile, tile_bytes, b * kBlockBytes);
      __m512i block_u8x64[TILES];
      for (int i = 0; i < TILES; ++i) block_u8x64[i] = _mm512_loadu_si512(tile + i * tile_bytes + b * kBlockBytes);
      const int8_t* q_block = q + b * kBlockInputs;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const unsigned shift = static_cast<unsigned>(2 * p);
        __m512i code_u8x64[TILES];
        for (int i = 0; i < TILES; ++i) {
          // A 16-bit shift moves bits across bytes, but only into places that the mask clears.
          code_u8x64[i] = _mm512_and_si512(_mm512_srli_epi16(block_u8x64[i], shift), mask_u8x64);
        }
#pragma GCC unroll 12
        for (int t = 0; t < TOKENS; ++t) {
          const __m512i q_i8x64 = broadcast4(q_block + t * q_stride + 4 * p);
          for (int i = 0; i < TILES; ++i) {
            acc_i32x16[t][i] = _mm512_dpbusd_epi32(acc_i32x16[t][i], code_u8x64[i], q_i8x64);
          }
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      for (int i = 0; i < TILES; ++i) {
        _mm512_storeu_si512(acc + (t * TILES + i) * kTileRows, acc_i32x16[t][i]);
      }
    }
  }
};

using Float = FloatKernels<Avx512>;

}  // namespace

extern const KernelTable kAvx512VnniKernels;
constexpr KernelTable kAvx512VnniKernels = {
    "avx512_vnni",       Float::quantize_row, TernaryDriver<Avx512, Inner>::ternary_product,
    Float::rms_norm_row, Float::widen_row,    Float::logits,
};

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
