// Row quantisation, RMSNorm and LM-head logits, once; an instruction set only supplies `Isa`.
//
// Include this inside a kernel file's target region, after <cstring> and float_convert.h: everything
// here has internal linkage, so each file keeps its own copy, compiled for its own instruction set.
//
// The order of every float sum (DESIGN.md section 3). Element k of a row belongs to virtual lane
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
//     fold(F32)                            the folds kLanes -> 1 above
//     I32, zero_i32(), sum(I32)            int32 x kLanes
//     max_magnitude(I32 m, F32 v)          larger of m and the bits of |v|, as integers
//     highest(I32)                         the largest lane
//     quantize(F32 v, F32 s, int8_t* q, I32 sum)   stores round(v * s) clamped, returns sum + it

namespace bitnet_ops {
namespace {

constexpr float kAbsmaxFloor = 1e-5f;  // reference.ABSMAX_FLOOR

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

  template <class T>
  static void quantize_row_of(const T* x, int64_t in_features, int8_t* q, int64_t q_length, float* x_scale,
                              int32_t* q_sum) {
    const int64_t full = in_features - in_features % kLanes;
    const int64_t rest = in_features - full;
    // Bits of |x| order like the numbers do, infinity above every finite one and NaN above infinity,
    // so one integer maximum finds absmax and every row that is not finite.
    I32 magnitude = Isa::zero_i32();
    for (int64_t k = 0; k < full; k += kLanes) magnitude = Isa::max_magnitude(magnitude, Isa::load(x + k));
    if (rest != 0) magnitude = Isa::max_magnitude(magnitude, load_partial<Isa>(x + full, rest));
    const uint32_t absmax_bits = static_cast<uint32_t>(Isa::highest(magnitude));
    if (absmax_bits >= kInfinityBits) {
      std::memset(q, 0, static_cast<size_t>(q_length));
      *x_scale = bits_float(0x7fc00000u);  // quiet NaN: every product with this row becomes NaN
      *q_sum = 0;
      return;
    }
    const float absmax = bits_float(absmax_bits);
    // PyTorch evaluates 127.0 / tensor as reciprocal, then product: two roundings, and the reference
    // (like the model's own training code) has both.
    const float s = (1.0f / (absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax)) * 127.0f;
    *x_scale = 1.0f / s;

    const F32 scale = Isa::set1(s);
    I32 sum = Isa::zero_i32();
    for (int64_t k = 0; k < full; k += kLanes) sum = Isa::quantize(Isa::load(x + k), scale, q + k, sum);
    if (rest != 0) {
      int8_t last[kLanes];
      sum = Isa::quantize(load_partial<Isa>(x + full, rest), scale, last, sum);
      std::memcpy(q + full, last, static_cast<size_t>(rest));
    }
    if (q_length > in_features) std::memset(q + in_features, 0, static_cast<size_t>(q_length - in_features));
    *q_sum = Isa::sum(sum);
  }

  static void quantize_row(const void* x, DType dtype, int64_t in_features, int8_t* q, int64_t q_length,
                           float* x_scale, int32_t* q_sum) {
    switch (dtype) {
      case DType::kBFloat16:
        return quantize_row_of(static_cast<const BFloat16*>(x), in_features, q, q_length, x_scale, q_sum);
      case DType::kFloat16:
        return quantize_row_of(static_cast<const Float16*>(x), in_features, q, q_length, x_scale, q_sum);
      default:
        return quantize_row_of(static_cast<const float*>(x), in_features, q, q_length, x_scale, q_sum);
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

  // One token: ROWS rows of the table stream past, widened in registers, and share the loads of x.
  template <int ROWS, class T>
  static void logits_one_token(const Logits& p, int64_t row) {
    const T* weight = static_cast<const T*>(p.weight) + row * p.in_features;
    F32 acc[ROWS][kRegisters];
    for (int i = 0; i < ROWS; ++i) {
      for (int r = 0; r < kRegisters; ++r) acc[i][r] = Isa::zero();
    }
    const int64_t full = p.in_features - p.in_features % kVirtualLanes;
    for (int64_t k = 0; k < full; k += kVirtualLanes) {
      for (int i = 0; i < ROWS; ++i) {
        // ROWS rows are contiguous, so the stream ahead of row i is row i + ROWS, ROWS rows on; a
        // prefetch past the table is harmless.
        Isa::prefetch(weight + (i + ROWS) * p.in_features + k);
        if (sizeof(T) == 4) {  // 64 floats are four cache lines, 64 halves two
          Isa::prefetch(weight + (i + ROWS) * p.in_features + k + 16);
          Isa::prefetch(weight + (i + ROWS) * p.in_features + k + 48);
        }
        Isa::prefetch(weight + (i + ROWS) * p.in_features + k + 32);
        for (int r = 0; r < kRegisters; ++r) {
          const F32 w = Isa::load(weight + i * p.in_features + k + r * kLanes);
          acc[i][r] = Isa::fma(w, Isa::load(p.x + k + r * kLanes), acc[i][r]);
        }
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      if (full < p.in_features) {
        T padded[kVirtualLanes] = {};
        std::memcpy(padded, weight + i * p.in_features + full,
                    static_cast<size_t>(p.in_features - full) * sizeof(T));
        for (int r = 0; r < kRegisters; ++r) {
          acc[i][r] = Isa::fma(Isa::load(padded + r * kLanes), Isa::load(p.x + full + r * kLanes), acc[i][r]);
        }
      }
      p.out[row + i] = fold_registers(acc[i]);
    }
  }

  // ROWS widened rows x TOKENS tokens. Register r of every (row, token) pair has a pass of its own, so
  // that ROWS * TOKENS accumulators share ROWS + TOKENS loads; a pass reads its own cache lines only.
  template <int ROWS, int TOKENS>
  static void logits_block(const Logits& p, const float* rows, int64_t row, int64_t token) {
    F32 folded[kRegisters][ROWS][TOKENS];
    for (int r = 0; r < kRegisters; ++r) {
      F32 acc[ROWS][TOKENS];
      for (int i = 0; i < ROWS; ++i) {
        for (int t = 0; t < TOKENS; ++t) acc[i][t] = Isa::zero();
      }
      const float* x = p.x + token * p.x_stride;
      for (int64_t k = r * kLanes; k < p.x_stride; k += kVirtualLanes) {
        F32 w[ROWS];
        for (int i = 0; i < ROWS; ++i) w[i] = Isa::load(rows + i * p.x_stride + k);
        for (int t = 0; t < TOKENS; ++t) {
          const F32 v = Isa::load(x + t * p.x_stride + k);
          for (int i = 0; i < ROWS; ++i) acc[i][t] = Isa::fma(w[i], v, acc[i][t]);
        }
      }
      for (int i = 0; i < ROWS; ++i) {
        for (int t = 0; t < TOKENS; ++t) folded[r][i][t] = acc[i][t];
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      for (int i = 0; i < ROWS; ++i) {
        F32 registers[kRegisters];
        for (int r = 0; r < kRegisters; ++r) registers[r] = folded[r][i][t];
        p.out[(token + t) * p.vocabulary + row + i] = fold_registers(registers);
      }
    }
  }

  // Largest token block first; the rest goes in blocks of half the size, down to one.
  template <int ROWS, int TOKENS>
  static int64_t logits_blocks(const Logits& p, const float* rows, int64_t row, int64_t token, int64_t token_end) {
    for (; token + TOKENS <= token_end; token += TOKENS) logits_block<ROWS, TOKENS>(p, rows, row, token);
    if constexpr (TOKENS > 1) return logits_blocks<ROWS, TOKENS / 2>(p, rows, row, token, token_end);
    return token;
  }

  template <class T>
  static void logits_of(const Logits& p, int64_t row_begin, int64_t row_end, float* scratch) {
    if (p.tokens == 1) {
      int64_t row = row_begin;
      for (; row + Isa::kStreamRows <= row_end; row += Isa::kStreamRows) {
        logits_one_token<Isa::kStreamRows, T>(p, row);
      }
      for (; row < row_end; ++row) logits_one_token<1, T>(p, row);
      return;
    }
    // A group of tokens stays in L2 (Isa::kTokenGroupBytes) while all rows pass; then the next group.
    int64_t group = Isa::kTokenGroupBytes / (p.x_stride * static_cast<int64_t>(sizeof(float)) + 1);
    group -= group % Isa::kLogitsTokens;
    if (group < Isa::kLogitsTokens) group = Isa::kLogitsTokens;
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t token = 0; token < p.tokens; token += group) {
      const int64_t token_end = token + group < p.tokens ? token + group : p.tokens;
      int64_t row = row_begin;
      for (; row + Isa::kLogitsRows <= row_end; row += Isa::kLogitsRows) {
        for (int i = 0; i < Isa::kLogitsRows; ++i) {
          widen_row_of(weight + (row + i) * p.in_features, p.in_features, scratch + i * p.x_stride, p.x_stride);
        }
        logits_blocks<Isa::kLogitsRows, Isa::kLogitsTokens>(p, scratch, row, token, token_end);
      }
      for (; row < row_end; ++row) {
        widen_row_of(weight + row * p.in_features, p.in_features, scratch, p.x_stride);
        logits_blocks<1, Isa::kLogitsTokens>(p, scratch, row, token, token_end);
      }
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
