// The screen of the LM head: an int8 copy of the table, whose rows give every logit but for a known error.
//
// Include this inside a kernel file's target region, after float_algorithms.h.
//
// Definitions. E is a row of the table (K inputs), h a token; s, q and t, p are their quantised forms:
// E = s q + rho with integers |q| <= 127, h = t p + delta with p of 16 bits. Then, over the real numbers,
//
//     E.h = s t (q.p)  +  s q.delta  +  rho.h
//     |E.h - s t (q.p)|  <=  ||s q|| ||delta|| + ||rho|| ||h||                              (Cauchy-Schwarz)
//
// q.p is an exact integer. The logit itself, in float32 and in the order of float_algorithms.h, is off too: an
// element passes through at most n = ceil(K / 64) fused multiply-adds and 6 folds, each with a relative
// error of at most u = 2^-24, so (Higham, Accuracy and Stability, section 3.1)
//
//     |logit - E.h|  <=  gamma ||E|| ||h||,   gamma = n u / (1 - n u),   ||E|| <= ||s q|| + ||rho||
//
// as long as nothing overflows or underflows. Overflow: see kLargestScreened. Underflow, with flush-to-zero
// and denormals-are-zero in the worst case: each of the K + 64 additions then loses at most 2^-126, and
// an element of E or h that counts as zero at most 2^-126 times its partner, which makes
// 2^-126 sqrt(K) (||E|| + ||h||) a sum. All of it, and the like in rho and delta, is below
// 2^-126 * 4 K (1 + ||E|| + ||h||) <= kUnderflow (1 + ||E|| + ||h||) for K <= 2^16.
//
// Kept per row:     scale s,  norm >= ||s q|| + ||rho||,  residual >= ||rho|| + gamma norm + kUnderflow
// Made per token:   scale t,  norm H >= ||h||,  error D >= ||delta|| + kUnderflow
// Bound:            |logit - s t (q.p)|  <=  residual H + norm D + kUnderflow
//
// The bound itself is evaluated in float64, in a dozen operations, and rounded to float32: kBoundRounding and
// kResultRounding are thousands of times what these roundings amount to.
//
// The copy, in tiles of 16 rows: 16 inputs take four cache lines, one for four inputs, so that a dot product
// of four bytes needs no horizontal sum and a tile is one sequential stream.
//
//     codes[tile][block][64 * p + 4 * r + j] = q[row 16 * tile + r][input 16 * block + 4 * p + j] + 128
//
// Codes are unsigned for vpdpbusd; sum q p = sum code p - 128 sum p. Rows and inputs of the padding hold
// code 128.
//
// Inner provides
//     kRows                            most rows of p (two a token: hi and lo)
//     kCodeBias                        what `sums` takes a code of 128 for: 128, or 0 if it subtracts first
//     sums<ROWS>(tile, blocks, p, p_stride, acc)   acc[ROWS][16] = sum of (code - 128 + kCodeBias) * p
//
// Overflow: |acc| <= K * 255 * 128 = 32640 K, and 32640 * 2^16 = 2.139e9 < 2^31 - 1 (kMaxScreenFeatures).

namespace bitnet_ops {
namespace {

constexpr double kBoundRounding = 1.0 + 0x1p-20;
constexpr double kResultRounding = 0x1p-22;  // twice float32's 2^-24 on approximation and bound, and more

// Rows and tokens of larger norms could overflow a sum of float32 (2^128); they are never screened out.
constexpr double kLargestScreened = 0x1p120;

// Rows of smaller elements are kept as zeros with a residual: 127 / absmax could overflow.
constexpr float kSmallestQuantized = 0x1p-100f;

template <class Inner>
struct ScreenDriver {
  // Upper and lower bounds of the logits of 16 rows, or fewer at the end of the vocabulary.
  static void store_bounds(const Screen& p, const int32_t* acc, int64_t token, int64_t row) {
    const ScreenedToken& h = p.token[token];
    const double hi_bias = static_cast<double>(Inner::kCodeBias) * h.sum[0];
    const double lo_bias = static_cast<double>(Inner::kCodeBias) * h.sum[1];
    alignas(64) float upper[kTileRows];
    alignas(64) float lower[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const double scale = p.scale[row + i];
      const double norm = p.norm[row + i];
      const double residual = p.residual[row + i];
      const double sum = 256.0 * (acc[i] - hi_bias) + (acc[kTileRows + i] - lo_bias);  // exact: below 2^40
      const double approximate = scale * h.scale * sum;
      const double bound = (residual * h.norm + norm * h.error + kUnderflow) * kBoundRounding +
                           __builtin_fabs(approximate) * kResultRounding;
      // Written so that a NaN, from a row or a token that is not finite, bounds nothing either.
      const bool screened = norm * (h.norm + h.error) < kLargestScreened;
      upper[i] = screened ? static_cast<float>(approximate + bound) : __builtin_inff();
      lower[i] = screened ? static_cast<float>(approximate - bound) : -__builtin_inff();
    }
    const int64_t left = p.vocabulary - row;
    const size_t bytes = static_cast<size_t>(left < kTileRows ? left : kTileRows) * sizeof(float);
    std::memcpy(p.upper + token * p.vocabulary + row, upper, bytes);
    std::memcpy(p.lower + token * p.vocabulary + row, lower, bytes);
  }

  template <int ROWS>
  static void tile_of(int64_t rows, const Screen& p, int64_t tile, int64_t token) {
    if constexpr (ROWS > 2) {
      if (rows < ROWS) return tile_of<ROWS - 2>(rows, p, tile, token);
    }
    alignas(64) int32_t acc[ROWS * kTileRows];
    Inner::template sums<ROWS>(p.codes + tile * p.blocks * kScreenBlockBytes, p.blocks, p.q + 2 * token * p.q_stride,
                               p.q_stride, acc);
    for (int64_t t = 0; t < ROWS / 2; ++t) {
      store_bounds(p, acc + 2 * t * kTileRows, token + t, tile * kTileRows);
    }
  }

  static void screen(const Screen& p, int64_t tile_begin, int64_t tile_end) {
    // A tile of 2560 inputs is 40 KB: it stays in L2 while groups of tokens pass.
    constexpr int64_t kTokens = Inner::kRows / 2;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokens) {
        const int64_t count = p.tokens - token < kTokens ? p.tokens - token : kTokens;
        tile_of<Inner::kRows>(2 * count, p, tile, token);
      }
    }
  }
};

// The copy itself: rows in float32 arithmetic in the order of float_algorithms.h, so that every instruction
// set makes the same one.
template <class Isa>
struct ScreenRows {
  using F32 = typename Isa::F32;
  using Float = FloatKernels<Isa>;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kRegisters = Float::kRegisters;

  // Of a row widened to `length` floats, a multiple of kVirtualLanes.
  static void screen_row(const ScreenTable& p, const float* x, int64_t length, int64_t row, int8_t* q) {
    const float absmax = bits_float(Float::absmax_bits_of(x, length));
    float scale = 0.0f;
    double rho = __builtin_inf();  // of a row that is not finite
    double norm = rho;
    if (absmax < kSmallestQuantized) {
      rho = static_cast<double>(absmax) * __builtin_sqrt(static_cast<double>(length));
      norm = rho;
    } else if (float_bits(absmax) < kInfinityBits) {
      scale = absmax / 127.0f;
      quantize(x, length, scale, 127.0f / absmax, q, &rho, &norm);
    }
    if (scale == 0.0f) std::memset(q, 0, static_cast<size_t>(length));
    const double n = static_cast<double>(divide_up(p.in_features, kVirtualLanes) + 6);
    const double gamma = n * 0x1p-24 / (1.0 - n * 0x1p-24);
    p.scale[row] = scale;
    p.norm[row] = rounded_up(norm);
    p.residual[row] = rounded_up(rho + gamma * norm + kUnderflow);
  }

  // Of a positive number; beyond kLargestScreened the value does not matter.
  static float rounded_up(double value) {
    return value < kLargestScreened ? static_cast<float>(value * kBoundRounding) : __builtin_inff();
  }

  // rho and norm are bounds of ||rho|| and of ||s q|| + ||rho||.
  static void quantize(const float* x, int64_t length, float s, float inverse, int8_t* q, double* rho, double* norm) {
    const F32 negative_scale = Isa::set1(-s);
    const F32 factor = Isa::set1(inverse);
    // Adding 1.5 * 2^23 leaves no fraction bits: half to even, like Isa::quantize. |x * inverse| <= 127.0001.
    const F32 to_integer = Isa::set1(12582912.0f);
    const F32 from_integer = Isa::set1(-12582912.0f);
    F32 squares[kRegisters], residual_squares[kRegisters];
    for (int r = 0; r < kRegisters; ++r) squares[r] = residual_squares[r] = Isa::zero();
    typename Isa::I32 unused_sum = Isa::zero_i32();
    for (int64_t k = 0; k < length; k += kVirtualLanes) {
      for (int r = 0; r < kRegisters; ++r) {
        const F32 v = Isa::load(x + k + r * kLanes);
        unused_sum = Isa::quantize(v, factor, q + k + r * kLanes, unused_sum);
        const F32 rounded = Isa::add(Isa::add(Isa::mul(v, factor), to_integer), from_integer);
        // One rounding of the exact rho, then in units of s, so that no square leaves the range of float32.
        const F32 difference = Isa::mul(Isa::fma(negative_scale, rounded, v), factor);
        residual_squares[r] = Isa::fma(difference, difference, residual_squares[r]);
        squares[r] = Isa::fma(rounded, rounded, squares[r]);
      }
    }
    // Half of gamma <= 2^-15 for the sums, and a few u for `difference` and for s * inverse, which is 1 only to
    // two roundings, are below 2^-12. Squares that underflow: sqrt(2^16 * 2^-126) = 2^-55.
    constexpr double kSumRounding = 1.0 + 0x1p-12;
    *rho = s * (__builtin_sqrt(static_cast<double>(Float::fold_registers(residual_squares))) * kSumRounding + 0x1p-50);
    *norm = s * __builtin_sqrt(static_cast<double>(Float::fold_registers(squares))) * kSumRounding + *rho;
  }

  template <class T>
  static void screen_rows_of(const ScreenTable& p, int64_t tile_begin, int64_t tile_end, float* wide, int8_t* q) {
    const int64_t length = divide_up(p.in_features, kVirtualLanes) * kVirtualLanes;
    const int64_t blocks = blocks_of(p.in_features);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = tile * kTileRows + r;
        const T* x = static_cast<const T*>(p.weight) + row * p.in_features;
        if (row < p.vocabulary) {
          Float::widen_row_of(x, p.in_features, wide, length);
        } else {
          std::memset(wide, 0, static_cast<size_t>(length) * sizeof(float));
        }
        screen_row(p, wide, length, row, q + r * length);
      }
      uint8_t* codes = p.codes + tile * blocks * kScreenBlockBytes;
      for (int64_t four = 0; four < 4 * blocks; ++four) {
        for (int64_t r = 0; r < kTileRows; ++r) {
          uint32_t word;
          std::memcpy(&word, q + r * length + 4 * four, sizeof word);
          word ^= 0x80808080u;  // q + 128
          std::memcpy(codes + four * kBlockBytes + 4 * r, &word, sizeof word);
        }
      }
    }
  }

  static void screen_rows(const ScreenTable& p, int64_t tile_begin, int64_t tile_end, float* wide, int8_t* q) {
    switch (p.weight_dtype) {
      case DType::kBFloat16:
        return screen_rows_of<BFloat16>(p, tile_begin, tile_end, wide, q);
      case DType::kFloat16:
        return screen_rows_of<Float16>(p, tile_begin, tile_end, wide, q);
      default:
        return screen_rows_of<float>(p, tile_begin, tile_end, wide, q);
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
