// What the three NEON kernels share: float32 x 4 for float_algorithms.h, and the decoding of a tile.
//
// Include this inside a kernel file's target region, like float_algorithms.h. Everything here is
// baseline ARMv8-A, whose conversions and rounding instructions need no further feature.

namespace bitnet_ops {
namespace {

// How far ahead of a tile's stream memory is asked for. A miss takes about 100 ns; a core reads 20 GB/s
// (Graviton 2) to 60 GB/s (Apple M1), so 2 to 6 KB pass meanwhile.
constexpr int64_t kPrefetchBytes = 4096;

inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

// Keeps loads from moving up across it. GCC otherwise schedules the loads of a whole loop body first, and
// then spills accumulators to make room. Loops over arrays of registers must be unrolled by pragma around it,
// early in the compiler's work: an array that is still one by then stays in memory.
inline void keep_load_order() { __asm__ volatile("" ::: "memory"); }

struct Neon {
  using F32 = float32x4_t;
  using I32 = int32x4_t;
  static constexpr int kLanes = 4;
  // 4 x 6 accumulators + 4 rows + 1 activation = 29 of 32 registers.
  static constexpr int kLogitsRows = 4;
  static constexpr int kLogitsTokens = 6;
  static constexpr int kLogitsTokensStreamed = 1;         // x 16 accumulators
  static constexpr int64_t kTokenGroupBytes = 256 << 10;  // half of a 512 KB L2 (Cortex-A76)
  // 6 x 4 accumulators + 4 lanes + 1 scalar = 29 of 32 registers.
  static constexpr int kAttentionRows = 6;
  static constexpr int kAttentionRegisters = 4;

  static F32 zero() { return vdupq_n_f32(0.0f); }
  static F32 set1(float s) { return vdupq_n_f32(s); }
  static F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
  static F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
  static F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
  static F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
  __attribute__((always_inline)) static void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
  __attribute__((always_inline)) static void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

  // 16-bit elements are copied by memcpy: BFloat16 and Float16 are types of their own.
  static uint16x4_t load_u16x4(const void* p) {
    uint16x4_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static F32 load(const float* p) { return vld1q_f32(p); }
  static F32 load(const BFloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_u16x4(p), 16)); }
  static void load_even_odd(const BFloat16* p, F32& even, F32& odd) {
    uint32x4_t pair_u32x4;
    std::memcpy(&pair_u32x4, p, sizeof pair_u32x4);
    even = vreinterpretq_f32_u32(vshlq_n_u32(pair_u32x4, 16));
    odd = vreinterpretq_f32_u32(vandq_u32(pair_u32x4, vdupq_n_u32(0xffff0000u)));
  }
  static F32 load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_u16x4(p))); }
  static void store(float* p, F32 v) { vst1q_f32(p, v); }
  static void store(BFloat16* p, F32 v) {
    // As from_float: integer rounding to even, and one NaN for all.
    const uint32x4_t bits_u32x4 = vreinterpretq_u32_f32(v);
    const uint32x4_t kept_u32x4 = vandq_u32(vshrq_n_u32(bits_u32x4, 16), vdupq_n_u32(1));
    const uint32x4_t rounded_u32x4 = vaddq_u32(bits_u32x4, vaddq_u32(kept_u32x4, vdupq_n_u32(0x7fff)));
    const uint16x4_t number_u16x4 = vmovn_u32(vceqq_f32(v, v));
    const uint16x4_t half_u16x4 = vbsl_u16(number_u16x4, vshrn_n_u32(rounded_u32x4, 16), vdup_n_u16(kBFloat16NaN));
    std::memcpy(p, &half_u16x4, sizeof half_u16x4);
  }
  static void store(Float16* p, F32 v) {
    const float16x4_t half_f16x4 = vcvt_f16_f32(v);
    std::memcpy(p, &half_f16x4, sizeof half_f16x4);
  }

  static F32 load(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    const int16x8_t i16x8 = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(i16x8)));
  }
  static F32 load(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
  static F32 load_less(const int32_t* p, int32_t less) {
    return vcvtq_f32_s32(vsubq_s32(vld1q_s32(p), vdupq_n_s32(less)));
  }
  static F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
  static float fold_max(F32 v) { return vmaxvq_f32(v); }
  static F32 power_of_two(F32 v) {
    return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), 23), vdupq_n_u32(kOneBits)));
  }
  static F32 zero_below(F32 x, F32 limit, F32 v) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, limit)));
  }
  static F32 choose_at_most(F32 x, F32 limit, F32 a, F32 b) { return vbslq_f32(vcleq_f32(x, limit), a, b); }

  static float fold(F32 v) {
    const float32x2_t f32x2 = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(f32x2, 0) + vget_lane_f32(f32x2, 1);
  }
  static void fold_all(F32 (&v)[1], float* out) { *out = fold(v[0]); }
  // Four folds at once: [a0+a2, a1+a3, b0+b2, b1+b3] and the same for c, d; then neighbours.
  static void fold_all(F32 (&v)[4], float* out) {
    const F32 ab_f32x4 = vaddq_f32(vcombine_f32(vget_low_f32(v[0]), vget_low_f32(v[1])),
                                   vcombine_f32(vget_high_f32(v[0]), vget_high_f32(v[1])));
    const F32 cd_f32x4 = vaddq_f32(vcombine_f32(vget_low_f32(v[2]), vget_low_f32(v[3])),
                                   vcombine_f32(vget_high_f32(v[2]), vget_high_f32(v[3])));
    vst1q_f32(out, vpaddq_f32(ab_f32x4, cd_f32x4));
  }

  static I32 zero_i32() { return vdupq_n_s32(0); }
  static int32_t sum(I32 v) { return vaddvq_s32(v); }
  static I32 max_magnitude(I32 m, F32 v) {
    return vmaxq_s32(m, vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(kAbsMask)));
  }
  static int32_t highest(I32 v) { return vmaxvq_s32(v); }
  static I32 quantize(F32 v, F32 s, int8_t* q, I32 sum) {
    const int32x4_t rounded_i32x4 = vcvtnq_s32_f32(vmulq_f32(v, s));  // half to even, whatever FPCR says
    const int16x4_t q_i16x4 = vqmovn_s32(rounded_i32x4);
    const int8x8_t q_i8x8 = vqmovn_s16(vcombine_s16(q_i16x4, q_i16x4));  // saturates to [-128, 127]
    std::memcpy(q, &q_i8x8, 4);
    return vaddw_s16(sum, vget_low_s16(vmovl_s8(q_i8x8)));
  }
};

// Rows of q that stay in L2 while weights pass: half of 512 KB (Cortex-A76).
constexpr int64_t kQBytesInL2 = int64_t{256} << 10;

// One register of a block: a quarter of its bytes, four rows.
constexpr int kQuarterBytes = 16;
constexpr int kQuarterRows = 4;

// The codes of step P of four rows: bits 2P and 2P+1 of every byte.
template <int P>
inline int8x16_t codes(uint8x16_t block_u8x16) {
  if constexpr (P == 3) {
    return vreinterpretq_s8_u8(vshrq_n_u8(block_u8x16, 6));  // nothing above to mask
  } else {
    if constexpr (P != 0) block_u8x16 = vshrq_n_u8(block_u8x16, 2 * P);
    return vreinterpretq_s8_u8(vandq_u8(block_u8x16, vdupq_n_u8(0x03)));
  }
}

// tile_sums.h: four rows, inputs 4P .. 4P+3 of a block, as signed numbers. `quarter` is the block's first byte of
// these rows.
template <int P>
inline int8x16_t number_of(SignedCodes, const uint8_t* quarter) {
  return vreinterpretq_s8_u8(vld1q_u8(quarter + P * kBlockBytes));
}
template <int P>
inline int8x16_t number_of(SixBitCodes codes, const uint8_t* quarter) {
  return vsubq_s8(reinterpret_cast<int8x16_t>(CodesIn<16>::line<P>(codes, quarter)), vdupq_n_s8(SixBitCodes::kZero));
}

}  // namespace
}  // namespace bitnet_ops
