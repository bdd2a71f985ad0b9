// Row quantisation, RMSNorm and LM-head logits, once; an instruction set only supplies `Isa`.
//
// Include this inside a kernel file's target region, after <cstring> and float_convert.h: everything
// here has internal linkage, so each file keeps its own copy, compiled for its own instruction set.
//
// The order of every float sum (docs/numerics.md). Element k of a row belongs to virtual lane
// k mod 64. A row counts as padded with zeros to a multiple of 64, each lane runs
// acc = fma(a, b, acc) in index order from acc = +0, and the 64 lanes fold in halves:
//
//     lane      0    1  ...  31 | 32   33  ...  63
//     64 -> 32  lane i + lane i+32
//     32 -> 16  lane i + lane i+16            ...  2 -> 1  lane 0 + lane 1
//
// With L lanes to a register, register r holds lanes r*L .. r*L+L-1, so the first folds add whole
// registers and the last ones add inside a register: the same additions for every L.
//
// Isa provides
//     F32                       float32 x kLanes
//     zero() set1(s) add mul fma(a, b, c)
//     load(const T*) store(T*, F32)        T = float, BFloat16, Float16; any alignment
//     load_even_odd(const BFloat16*, F32& even, F32& odd)   2 * kLanes elements
//     fold(F32)                            the folds kLanes -> 1 above
//     fold_all(F32[n], float* out)         the same for n vectors, n = 1 and kLogitsRows
//     prefetch_far(p) prefetch_near(p)     asks for a cache line, towards L2 or L1; always_inline, or GCC 12 may
//                                          find that nothing comes of a call and leave it out
//     I32, zero_i32(), sum(I32)            int32 x kLanes
//     max_magnitude(I32 m, F32 v)          larger of m and the bits of |v|, as integers
//     highest(I32)                         the largest lane
//     quantize(F32 v, F32 s, int8_t* q, I32 sum)   stores round(v * s) clamped, returns sum + it

namespace bitnet_ops {
namespace {

// How far ahead rows of the LM head are asked for, towards L2, whose misses in flight are more than
// L1's: with two tokens this reads 1.6 times faster than 4 KB towards L1 (bench/LOG.md).
constexpr int64_t kStreamAheadBytes = 8192;

constexpr float kAbsmaxFloor = 1e-5f;  // reference.ABSMAX_FLOOR

// The largest integer of 16 bits is the largest whose two signed bytes exist: 127 * 256 + 127.
constexpr float kLargestSplit = 32639.0f;

// The first `count` elements at p, then zeros.
template <class Isa, class T>
typename Isa::F32 load_partial(const T* p, int64_t count) {
  T padded[Isa::kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return Isa::load(padded);
}

template <class Isa, class T>
void store_partial(T* p, typename Isa::F32 v, int64_t count) {
  T full[Isa::kLanes];
  Isa::store(full, v);
  std::memcpy(p, full, static_cast<size_t>(count) * sizeof(T));
}

template <class Isa>
struct FloatKernels {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kRegisters = static_cast<int>(kVirtualLanes) / kLanes;

  static float fold_registers(F32 (&acc)[kRegisters]) {
    for (int width = kRegisters / 2; width >= 1; width /= 2) {
      for (int r = 0; r < width; ++r) acc[r] = Isa::add(acc[r], acc[r + width]);
    }
    return Isa::fold(acc[0]);
  }

  // ---- quantise ---------------------------------------------------------------------------------

  // Largest |x| of the row, as bits.
  template <class T>
  static uint32_t absmax_bits_of(const T* x, int64_t in_features) {
    const int64_t full = in_features - in_features % kLanes;
    // Bits of |x| order like the numbers do, infinity above every finite one and NaN above infinity,
    // so one integer maximum finds absmax and every row that is not finite.
    I32 magnitude = Isa::zero_i32();
    for (int64_t k = 0; k < full; k += kLanes) magnitude = Isa::max_magnitude(magnitude, Isa::load(x + k));
    if (full < in_features) {
      magnitude = Isa::max_magnitude(magnitude, load_partial<Isa>(x + full, in_features - full));
    }
    return static_cast<uint32_t>(Isa::highest(magnitude));
  }

  // The factor s of a row whose largest value becomes `highest`; stores 1 / s. False, and a scale of NaN,
  // which makes every product with this row NaN, for a row that is not finite.
  static bool row_scale(uint32_t absmax_bits, float highest, float* s, float* x_scale) {
    if (absmax_bits >= kInfinityBits) {
      *x_scale = bits_float(0x7fc00000u);
      return false;
    }
    const float absmax = bits_float(absmax_bits);
    // PyTorch evaluates 127.0 / tensor as reciprocal, then product: two roundings, and the reference
    // (like the model's own training code) has both.
    *s = (1.0f / (absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax)) * highest;
    *x_scale = 1.0f / *s;
    return true;
  }

  static void zero_from(int8_t* q, int64_t begin, int64_t end) {
    if (end > begin) std::memset(q + begin, 0, static_cast<size_t>(end - begin));
  }

  template <class T>
  static void quantize_row_of(const T* x, int64_t in_features, int8_t* q, int64_t q_length, float* x_scale,
                              int32_t* q_sum) {
    float s;
    *q_sum = 0;
    if (!row_scale(absmax_bits_of(x, in_features), 127.0f, &s, x_scale)) return zero_from(q, 0, q_length);
    const int64_t full = in_features - in_features % kLanes;
    const F32 scale = Isa::set1(s);
    I32 sum = Isa::zero_i32();
    for (int64_t k = 0; k < full; k += kLanes) sum = Isa::quantize(Isa::load(x + k), scale, q + k, sum);
    if (const int64_t rest = in_features - full; rest != 0) {
      int8_t last[kLanes];
      sum = Isa::quantize(load_partial<Isa>(x + full, rest), scale, last, sum);
      std::memcpy(q + full, last, static_cast<size_t>(rest));
    }
    zero_from(q, in_features, q_length);
    *q_sum = Isa::sum(sum);
  }

  static void quantize_row(const void* x, DType dtype, int64_t in_features, int8_t* q, int64_t q_length, float* x_scale,
                           int32_t* q_sum) {
    switch (dtype) {
      case DType::kBFloat16:
        return quantize_row_of(static_cast<const BFloat16*>(x), in_features, q, q_length, x_scale, q_sum);
      case DType::kFloat16:
        return quantize_row_of(static_cast<const Float16*>(x), in_features, q, q_length, x_scale, q_sum);
      default:
        return quantize_row_of(static_cast<const float*>(x), in_features, q, q_length, x_scale, q_sum);
    }
  }

  // n = round(v * s) of 16 bits as two signed bytes, n = 256 * hi + lo; adds them up. |n| <= kLargestSplit.
  static void split_16(F32 v, F32 s, int8_t* hi, int8_t* lo, I32* hi_sum, I32* lo_sum) {
    // Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds half to even.
    const F32 to_integer = Isa::set1(12582912.0f);
    const F32 from_integer = Isa::set1(-12582912.0f);
    const F32 n = Isa::add(Isa::add(Isa::mul(v, s), to_integer), from_integer);
    // lo lies in [-128, 127]: a quarter more breaks the tie between 128 and -128.
    const F32 above = Isa::add(n, Isa::set1(0.25f));
    const F32 high = Isa::add(Isa::fma(above, Isa::set1(0x1p-8f), to_integer), from_integer);
    *hi_sum = Isa::quantize(high, Isa::set1(1.0f), hi, *hi_sum);
    *lo_sum = Isa::quantize(Isa::fma(high, Isa::set1(-256.0f), n), Isa::set1(1.0f), lo, *lo_sum);
  }

  template <class T>
  static void split_16(const T* x, int64_t count, float s, int8_t* hi, int8_t* lo, int32_t* hi_lo_sum) {
    const int64_t full = count - count % kLanes;
    const F32 scale = Isa::set1(s);
    I32 hi_sum = Isa::zero_i32();
    I32 lo_sum = Isa::zero_i32();
    for (int64_t k = 0; k < full; k += kLanes) split_16(Isa::load(x + k), scale, hi + k, lo + k, &hi_sum, &lo_sum);
    if (const int64_t rest = count - full; rest != 0) {
      int8_t last[2][kLanes];
      split_16(load_partial<Isa>(x + full, rest), scale, last[0], last[1], &hi_sum, &lo_sum);
      std::memcpy(hi + full, last[0], static_cast<size_t>(rest));
      std::memcpy(lo + full, last[1], static_cast<size_t>(rest));
    }
    hi_lo_sum[0] = Isa::sum(hi_sum);
    hi_lo_sum[1] = Isa::sum(lo_sum);
  }

  template <class T>
  static void quantize_row_16_of(const T* x, int64_t in_features, int8_t* hi, int8_t* lo, int64_t q_length,
                                 float* x_scale, int32_t* hi_lo_sum) {
    float s;
    int64_t written = 0;
    hi_lo_sum[0] = hi_lo_sum[1] = 0;
    if (row_scale(absmax_bits_of(x, in_features), kLargestSplit, &s, x_scale)) {
      split_16(x, in_features, s, hi, lo, hi_lo_sum);
      written = in_features;
    }
    zero_from(hi, written, q_length);
    zero_from(lo, written, q_length);
  }

  static void quantize_row_16(const void* x, DType dtype, int64_t in_features, int8_t* hi, int8_t* lo, int64_t q_length,
                              float* x_scale, int32_t* hi_lo_sum) {
    switch (dtype) {
      case DType::kBFloat16:
        return quantize_row_16_of(static_cast<const BFloat16*>(x), in_features, hi, lo, q_length, x_scale, hi_lo_sum);
      case DType::kFloat16:
        return quantize_row_16_of(static_cast<const Float16*>(x), in_features, hi, lo, q_length, x_scale, hi_lo_sum);
      default:
        return quantize_row_16_of(static_cast<const float*>(x), in_features, hi, lo, q_length, x_scale, hi_lo_sum);
    }
  }

  // ---- RMSNorm ----------------------------------------------------------------------------------

  template <class T>
  static float sum_of_squares(const T* x, int64_t features) {
    F32 acc[kRegisters];
    for (int r = 0; r < kRegisters; ++r) acc[r] = Isa::zero();
    int64_t k = 0;
    for (; k + kVirtualLanes <= features; k += kVirtualLanes) {
      for (int r = 0; r < kRegisters; ++r) {
        const F32 v = Isa::load(x + k + r * kLanes);
        acc[r] = Isa::fma(v, v, acc[r]);
      }
    }
    if (k < features) {
      T padded[kVirtualLanes] = {};
      std::memcpy(padded, x + k, static_cast<size_t>(features - k) * sizeof(T));
      for (int r = 0; r < kRegisters; ++r) {
        const F32 v = Isa::load(padded + r * kLanes);
        acc[r] = Isa::fma(v, v, acc[r]);
      }
    }
    return fold_registers(acc);
  }

  template <class T>
  static void rms_norm_row_of(const T* x, const float* weight, float eps, int64_t features, T* y) {
    const float mean_square = sum_of_squares(x, features) / static_cast<float>(features);
    const F32 inverse_rms = Isa::set1(1.0f / __builtin_sqrtf(mean_square + eps));
    const int64_t full = features - features % kLanes;
    const int64_t rest = features - full;
    for (int64_t k = 0; k < full; k += kLanes) {
      Isa::store(y + k, Isa::mul(Isa::mul(Isa::load(x + k), inverse_rms), Isa::load(weight + k)));
    }
    if (rest != 0) {
      const F32 v = Isa::mul(load_partial<Isa>(x + full, rest), inverse_rms);
      store_partial<Isa>(y + full, Isa::mul(v, load_partial<Isa>(weight + full, rest)), rest);
    }
  }

  static void rms_norm_row(const void* x, DType dtype, const float* weight, float eps, int64_t features, void* y) {
    switch (dtype) {
      case DType::kBFloat16:
        return rms_norm_row_of(static_cast<const BFloat16*>(x), weight, eps, features, static_cast<BFloat16*>(y));
      case DType::kFloat16:
        return rms_norm_row_of(static_cast<const Float16*>(x), weight, eps, features, static_cast<Float16*>(y));
      default:
        return rms_norm_row_of(static_cast<const float*>(x), weight, eps, features, static_cast<float*>(y));
    }
  }

  // ---- widen ------------------------------------------------------------------------------------

  template <class T>
  static void widen_row_of(const T* x, int64_t features, float* out, int64_t length) {
    const int64_t full = features - features % kLanes;
    for (int64_t k = 0; k < full; k += kLanes) Isa::store(out + k, Isa::load(x + k));
    if (full < features) store_partial<Isa>(out + full, load_partial<Isa>(x + full, features - full), features - full);
    if (length > features) std::memset(out + features, 0, static_cast<size_t>(length - features) * sizeof(float));
  }

  static void widen_row(const void* x, DType dtype, int64_t features, float* out, int64_t length) {
    switch (dtype) {
      case DType::kBFloat16:
        return widen_row_of(static_cast<const BFloat16*>(x), features, out, length);
      case DType::kFloat16:
        return widen_row_of(static_cast<const Float16*>(x), features, out, length);
      default:
        return widen_row_of(static_cast<const float*>(x), features, out, length);
    }
  }

  // ---- logits -----------------------------------------------------------------------------------

  // Two registers of 2 * kLanes consecutive elements. Two bfloat16 share a 32-bit word, and splitting
  // the words is cheaper than widening in order: even elements by a shift, odd ones by a mask.
  static void load_pair(const BFloat16* p, F32& first, F32& second) { Isa::load_even_odd(p, first, second); }
  template <class T>
  static void load_pair(const T* p, F32& first, F32& second) {
    first = Isa::load(p);
    second = Isa::load(p + kLanes);
  }

  // The activations in the order of load_pair: themselves, or for bfloat16 a copy in scratch.
  static const float* in_pair_order(const Logits& p, const BFloat16*, float* scratch) {
    for (int64_t begin = 0; begin < p.tokens * p.x_stride; begin += 2 * kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        scratch[begin + i] = p.x[begin + 2 * i];
        scratch[begin + kLanes + i] = p.x[begin + 2 * i + 1];
      }
    }
    return scratch;
  }
  template <class T>
  static const float* in_pair_order(const Logits& p, const T*, float*) {
    return p.x;
  }

  // The folds of the header comment. With even and odd elements apart, the folds between registers
  // stop at one pair; those inside a register keep the parity of a lane down to lane 0 + lane 1.
  static float fold_pairs(F32 (&acc)[kRegisters], const BFloat16*) {
    for (int width = kRegisters / 2; width >= 2; width /= 2) {
      for (int r = 0; r < width; ++r) acc[r] = Isa::add(acc[r], acc[r + width]);
    }
    return Isa::fold(acc[0]) + Isa::fold(acc[1]);
  }
  template <class T>
  static float fold_pairs(F32 (&acc)[kRegisters], const T*) {
    return fold_registers(acc);
  }

  template <int TOKENS, class T>
  static void multiply_64(const T* weight, const float* x, int64_t x_stride, F32 (&acc)[TOKENS][kRegisters]) {
    for (int r = 0; r < kRegisters; r += 2) {
      F32 first, second;
      load_pair(weight + r * kLanes, first, second);
      for (int t = 0; t < TOKENS; ++t) {
        const float* x_pair = x + t * x_stride + r * kLanes;
        acc[t][r] = Isa::fma(first, Isa::load(x_pair), acc[t][r]);
        acc[t][r + 1] = Isa::fma(second, Isa::load(x_pair + kLanes), acc[t][r + 1]);
      }
    }
  }

  // One row of the table, widened in registers. Meanwhile memory at `ahead` is asked for.
  template <int TOKENS, class T>
  static void logits_row(const Logits& p, const T* weight, const float* x, const char* ahead,
                         F32 (&acc)[TOKENS][kRegisters]) {
    const int64_t full = p.in_features - p.in_features % kVirtualLanes;
    for (int t = 0; t < TOKENS; ++t) {
      for (int r = 0; r < kRegisters; ++r) acc[t][r] = Isa::zero();
    }
    for (int64_t k = 0; k < full; k += kVirtualLanes) {
      for (size_t line = 0; line < kVirtualLanes * sizeof(T); line += 64) Isa::prefetch_far(ahead + line);
      ahead += kVirtualLanes * sizeof(T);
      multiply_64<TOKENS>(weight + k, x + k, p.x_stride, acc);
    }
    if (full < p.in_features) {
      T padded[kVirtualLanes] = {};
      std::memcpy(padded, weight + full, static_cast<size_t>(p.in_features - full) * sizeof(T));
      multiply_64<TOKENS>(padded, x + full, p.x_stride, acc);
    }
  }

  // Few tokens: the rows of the table stream past one after another, so that memory sees one sequential read.
  // TOKENS * kRegisters accumulators.
  template <int TOKENS, class T>
  static void logits_streamed(const Logits& p, int64_t row_begin, int64_t row_end, float* scratch) {
    const T* weight = static_cast<const T*>(p.weight) + row_begin * p.in_features;
    const float* x = in_pair_order(p, weight, scratch);
    for (int64_t row = row_begin; row < row_end; ++row, weight += p.in_features) {
      F32 acc[TOKENS][kRegisters];
      logits_row<TOKENS>(p, weight, x, reinterpret_cast<const char*>(weight) + kStreamAheadBytes, acc);
      for (int t = 0; t < TOKENS; ++t) p.out[t * p.vocabulary + row] = fold_pairs(acc[t], weight);
    }
  }

  // Some rows of one token. The rows to come are asked for about as far ahead as in a stream.
  template <class T>
  static void logits_of_rows_of(const Logits& p, const int32_t* rows, int64_t count, float* out, float* scratch) {
    const T* table = static_cast<const T*>(p.weight);
    const float* x = in_pair_order(p, table, scratch);
    const int64_t rows_ahead = kStreamAheadBytes / (p.in_features * static_cast<int64_t>(sizeof(T)) + 1) + 1;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t next = rows[i + rows_ahead < count ? i + rows_ahead : count - 1];
      F32 acc[1][kRegisters];
      logits_row<1>(p, table + rows[i] * p.in_features, x, reinterpret_cast<const char*>(table + next * p.in_features),
                    acc);
      out[i] = fold_pairs(acc[0], table);
    }
  }

  static void logits_of_rows(const Logits& p, const int32_t* rows, int64_t count, float* out, float* scratch) {
    switch (p.weight_dtype) {
      case DType::kBFloat16:
        return logits_of_rows_of<BFloat16>(p, rows, count, out, scratch);
      case DType::kFloat16:
        return logits_of_rows_of<Float16>(p, rows, count, out, scratch);
      default:
        return logits_of_rows_of<float>(p, rows, count, out, scratch);
    }
  }

  // Calls logits_streamed with the number of tokens as a compile-time number, 1 .. TOKENS.
  template <int TOKENS, class T>
  static void logits_streamed_of(const Logits& p, int64_t row_begin, int64_t row_end, float* scratch) {
    if constexpr (TOKENS > 1) {
      if (p.tokens < TOKENS) return logits_streamed_of<TOKENS - 1, T>(p, row_begin, row_end, scratch);
    }
    logits_streamed<TOKENS, T>(p, row_begin, row_end, scratch);
  }

  // ROWS widened rows x TOKENS tokens. Register r of every (row, token) pair has a pass of its own, so
  // that ROWS * TOKENS accumulators share ROWS + TOKENS loads; a pass reads its own cache lines only.
  // Meanwhile the rows that come next are on their way from memory: `ahead`, a part in every step.
  template <int ROWS, int TOKENS>
  static void logits_block(const Logits& p, const float* rows, int64_t row, int64_t token, const char* ahead,
                           int64_t ahead_step_bytes) {
    F32 folded[kRegisters][TOKENS][ROWS];
    const float* x = p.x + token * p.x_stride;
    for (int r = 0; r < kRegisters; ++r) {
      F32 acc[TOKENS][ROWS];
      for (int t = 0; t < TOKENS; ++t) {
        for (int i = 0; i < ROWS; ++i) acc[t][i] = Isa::zero();
      }
      for (int64_t k = r * kLanes; k < p.x_stride; k += kVirtualLanes) {
        for (int64_t line = 0; line < ahead_step_bytes; line += 64) Isa::prefetch_far(ahead + line);
        ahead += ahead_step_bytes;
        F32 w[ROWS];
        for (int i = 0; i < ROWS; ++i) w[i] = Isa::load(rows + i * p.x_stride + k);
        for (int t = 0; t < TOKENS; ++t) {
          const F32 v = Isa::load(x + t * p.x_stride + k);
          for (int i = 0; i < ROWS; ++i) acc[t][i] = Isa::fma(w[i], v, acc[t][i]);
        }
      }
      for (int t = 0; t < TOKENS; ++t) {
        for (int i = 0; i < ROWS; ++i) folded[r][t][i] = acc[t][i];
      }
    }
    for (int width = kRegisters / 2; width >= 1; width /= 2) {
      for (int r = 0; r < width; ++r) {
        for (int t = 0; t < TOKENS; ++t) {
          for (int i = 0; i < ROWS; ++i) folded[r][t][i] = Isa::add(folded[r][t][i], folded[r + width][t][i]);
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) Isa::fold_all(folded[0][t], p.out + (token + t) * p.vocabulary + row);
  }

  // Calls logits_block with `count` as a compile-time number, 1 .. TOKENS.
  template <int ROWS, int TOKENS>
  static void logits_block_of(int64_t count, const Logits& p, const float* rows, int64_t row, int64_t token,
                              const char* ahead, int64_t ahead_step_bytes) {
    if constexpr (TOKENS > 1) {
      if (count < TOKENS) {
        return logits_block_of<ROWS, TOKENS - 1>(count, p, rows, row, token, ahead, ahead_step_bytes);
      }
    }
    logits_block<ROWS, TOKENS>(p, rows, row, token, ahead, ahead_step_bytes);
  }

  // Widens ROWS rows and multiplies them with tokens [token_begin, token_end), in equal blocks.
  template <int ROWS, class T>
  static void logits_rows(const Logits& p, int64_t row, int64_t token_begin, int64_t token_end, float* scratch) {
    const T* weight = static_cast<const T*>(p.weight) + row * p.in_features;
    for (int i = 0; i < ROWS; ++i) {
      widen_row_of(weight + i * p.in_features, p.in_features, scratch + i * p.x_stride, p.x_stride);
    }
    const int64_t count = token_end - token_begin;
    const int64_t blocks = (count + Isa::kLogitsTokens - 1) / Isa::kLogitsTokens;
    // The next ROWS rows, spread over all steps of the first block: a step covers kLanes inputs.
    const char* ahead = reinterpret_cast<const char*>(weight + ROWS * p.in_features);
    int64_t ahead_step_bytes = ROWS * kLanes * static_cast<int64_t>(sizeof(T));
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = count * block / blocks;
      const int64_t end = count * (block + 1) / blocks;
      logits_block_of<ROWS, Isa::kLogitsTokens>(end - begin, p, scratch, row, token_begin + begin, ahead,
                                                ahead_step_bytes);
      ahead_step_bytes = 0;
    }
  }

  template <class T>
  static void logits_of(const Logits& p, int64_t row_begin, int64_t row_end, float* scratch) {
    if (p.tokens <= Isa::kLogitsTokensStreamed) {
      return logits_streamed_of<Isa::kLogitsTokensStreamed, T>(p, row_begin, row_end, scratch);
    }
    // A group of tokens stays in L2 (Isa::kTokenGroupBytes) while all rows pass; then the next group.
    int64_t group = Isa::kTokenGroupBytes / (p.x_stride * static_cast<int64_t>(sizeof(float)) + 1);
    group -= group % Isa::kLogitsTokens;
    if (group < Isa::kLogitsTokens) group = Isa::kLogitsTokens;
    for (int64_t token = 0; token < p.tokens; token += group) {
      const int64_t token_end = token + group < p.tokens ? token + group : p.tokens;
      int64_t row = row_begin;
      for (; row + Isa::kLogitsRows <= row_end; row += Isa::kLogitsRows) {
        logits_rows<Isa::kLogitsRows, T>(p, row, token, token_end, scratch);
      }
      for (; row < row_end; ++row) logits_rows<1, T>(p, row, token, token_end, scratch);
    }
  }

  static void logits(const Logits& p, int64_t row_begin, int64_t row_end, float* scratch) {
    static_assert(Isa::kLogitsRows <= kLogitsScratchRows, "the scratch holds kLogitsScratchRows rows");
    switch (p.weight_dtype) {
      case DType::kBFloat16:
        return logits_of<BFloat16>(p, row_begin, row_end, scratch);
      case DType::kFloat16:
        return logits_of<Float16>(p, row_begin, row_end, scratch);
      default:
        return logits_of<float>(p, row_begin, row_end, scratch);
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
