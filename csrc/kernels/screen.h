// The screen of the LM head: a copy of the table in six bits, whose rows give every logit but for a known error.
//
// Include this inside a kernel file's target region, after float_algorithms.h and tile_sums.h.
//
// Definitions. E is a row of the table (K inputs), h a token. Group g is inputs 64 g .. 64 g + 63; G = ceil(K / 64).
// E = Q + rho with Q = s m_g q on group g: integers |q| <= 31 and 0 <= m_g <= 127, and a scale s of the row.
// h = t p + delta with p of 16 bits. Then, over the real numbers,
//
//     E.h = s t sum_g m_g (q.p)_g  +  Q.delta  +  rho.h
//     |E.h - s t sum_g m_g (q.p)_g|  <=  ||Q|| ||delta|| + ||rho|| ||h||                       (Cauchy-Schwarz)
//
// (q.p)_g is an exact integer. The sum over the groups is made in float32: each integer is rounded once, and there
// are G fused multiply-adds, so with u = 2^-24 (Higham, Accuracy and Stability, section 3.1) it is off by at most
//
//     gamma(G + 1) sum_g |m_g (q.p)_g|,  and  s t sum_g |m_g (q.p)_g| <= ||Q|| ||t p||,     gamma(n) = n u / (1 - n u)
//
// by Cauchy-Schwarz, first in the groups and then over them. The logit itself, in float32 and in the order of
// float_algorithms.h, is off too: an element passes through at most G fused multiply-adds and 6 folds, so
//
//     |logit - E.h|  <=  gamma(G + 6) ||E|| ||h||,   ||E|| <= ||Q|| + ||rho||,   ||t p|| <= ||h|| + ||delta||
//
// as long as nothing overflows or underflows. Overflow: see kLargestNorm. Underflow, with flush-to-zero
// and denormals-are-zero in the worst case: each of the K + 64 additions then loses at most 2^-126, and
// an element of E or h that counts as zero at most 2^-126 times its partner, which makes
// 2^-126 sqrt(K) (||E|| + ||h||) a sum. All of it, and the like in rho and delta, is below
// 2^-126 * 4 K (1 + ||E|| + ||h||) <= 2^-8 kUnderflow (1 + ||E|| + ||h||) for K <= 2^16.
//
// Kept per row:     scale s,  norm N >= ||Q|| + ||rho||,  residual R >= ||rho|| + (gamma(2 G + 7) + 4 u) N + kUnderflow
// Made per token:   scale t,  error D >= ||delta|| + kUnderflow,  reach H >= ||h|| + D
// Bound:            |logit - s t sum|  <=  R H + N D + kUnderflow       (gamma(a) + gamma(b) <= gamma(a + b))
//
// where 4 u N H is for its evaluation, which is in float32: (s sum) t is two products, the bound two fused
// multiply-adds, and an addition joins them. Of s t sum that takes at most 3.1 u |s t sum| <= 4 u N H, and of the bound
// 3.1 u of itself, for which R, N, D and H are made larger by kBoundRounding, 16 u, each. Again underflow: `sum` is an
// integer and s >= 2^-112 or 0, so the first product is normal or 0; the second and the addition lose 2^-126 each; and
// an N that counts as zero loses 2^-126 D, far below the kUnderflow H in R H.
// Rows that are not finite or too large: R is infinite and H > 0, so the upper bound is infinite or, if (s sum) t
// is minus infinite or NaN, NaN, which bounds nothing either. Such tokens are not screened.
//
// Why six bits: on Gaussian rows of 2560, the hardest case, the bound is 1.2 of the logits' standard deviations. As
// the k-th best logit is known exactly before rows are dropped, some 130 rows of 128256 survive for the best
// token and 2000 for the best 50; eight bits leave 4 and 210 and read a third more, five leave 3800 and 23000
// (bench/LOG.md).
//
// The copy, in tiles of 16 rows: m_g of the rows, whole cache lines, then the codes q + 32 of every group,
// SixBitCodes of tile_sums.h. Rows and inputs of the padding are zeros.
//
//     m[0][16 rows] m[1][16 rows] ... (0) | group 0: 4 blocks x 3 lines | group 1 | ...

namespace bitnet_ops {
namespace {

// Of (s sum) t, and of adding the bound to it: 4 u.
constexpr double kEvaluationRounding = 0x1p-22;

// Rows of smaller elements are kept as zeros with a residual: the inverse of a scale could overflow.
constexpr float kSmallestQuantized = 0x1p-100f;

constexpr float kLargestCode = 31.0f;
constexpr float kLargestFactor = 127.0f;  // of m_g: it is a signed byte
constexpr int64_t kGroupBlocks = kScreenGroup / kBlockInputs;
static_assert(kScreenGroup == kVirtualLanes, "a group is one step of the float algorithms");
static_assert(kScreenGroupBytes == kGroupBlocks * SixBitCodes::kLines * kBlockBytes, "as kernel_table.h says");

template <class Isa, class Sums>
struct ScreenDriver {
  using F32 = typename Isa::F32;

  // Upper bounds of the logits of 16 rows, or fewer at the end of the vocabulary, and the logits but for the error.
  static void store_bounds(const Screen& p, const float* sum, int64_t token, int64_t row) {
    const ScreenedToken& h = p.token[token];
    const F32 token_scale = Isa::set1(h.scale);
    const F32 reach = Isa::set1(h.reach);
    const F32 error = Isa::set1(h.error);
    alignas(64) float upper[kTileRows];
    alignas(64) float approximate[kTileRows];
    for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) {
      // In this order, because scale * token_scale alone may underflow.
      const F32 product = Isa::mul(Isa::mul(Isa::load(p.scale + row + i), Isa::load(sum + i)), token_scale);
      const F32 of_token = Isa::fma(Isa::load(p.norm + row + i), error, Isa::set1(static_cast<float>(kUnderflow)));
      const F32 bound = Isa::fma(Isa::load(p.residual + row + i), reach, of_token);
      const F32 high = Isa::add(product, bound);
      Isa::store(upper + i, high);
      // About `product`, but NaN where the bound is infinite.
      Isa::store(approximate + i, Isa::fma(bound, Isa::set1(-1.0f), high));
    }
    const int64_t left = p.vocabulary - row;
    const size_t bytes = static_cast<size_t>(left < kTileRows ? left : kTileRows) * sizeof(float);
    std::memcpy(p.upper + token * p.vocabulary + row, upper, bytes);
    std::memcpy(p.approximate + token * p.vocabulary + row, approximate, bytes);
  }

  // sum += m * (256 * hi + lo), for the 16 rows of a group. |256 * hi + lo| <= 64 * 31 * 32639 < 2^26, and
  // what unsigned codes add before it is taken off again is no more than that.
  static void add_group(const int32_t* hi_lo, int32_t excess, const uint8_t* m, float* sum) {
    alignas(64) int32_t total[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) total[i] = 256 * hi_lo[i] + hi_lo[kTileRows + i] - excess;
    for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) {
      const F32 factor = Isa::load(reinterpret_cast<const int8_t*>(m) + i);
      Isa::store(sum + i, Isa::fma(Isa::load(total + i), factor, Isa::load(sum + i)));
    }
  }

  template <int TOKENS>
  static void tile_of(int64_t tokens, const Screen& p, int64_t tile, int64_t token) {
    if constexpr (TOKENS > 1) {
      if (tokens < TOKENS) return tile_of<TOKENS - 1>(tokens, p, tile, token);
    }
    const uint8_t* m = p.codes + tile * screen_tile_bytes(p.groups);
    const uint8_t* codes = m + screen_factor_bytes(p.groups);
    alignas(64) float sum[TOKENS][kTileRows] = {};
    for (int64_t g = 0; g < p.groups; ++g) {
      alignas(64) int32_t acc[2 * TOKENS * kTileRows];
      Sums::template sums<SixBitCodes, 2 * TOKENS>(codes + g * kScreenGroupBytes, kGroupBlocks,
                                                   p.q + 2 * token * p.q_stride + g * kScreenGroup, p.q_stride, acc);
      for (int t = 0; t < TOKENS; ++t) {
        const int32_t excess = Sums::template kExcess<SixBitCodes> * p.group_sum[(token + t) * p.groups + g];
        add_group(acc + 2 * t * kTileRows, excess, m + g * kTileRows, sum[t]);
      }
    }
    for (int t = 0; t < TOKENS; ++t) store_bounds(p, sum[t], token + t, tile * kTileRows);
  }

  static void screen(const Screen& p, int64_t tile_begin, int64_t tile_end) {
    // A tile of 2560 inputs is 31 KB: it stays in L2 while groups of tokens pass.
    constexpr int kTokens = Sums::kRows / 2;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokens) {
        const int64_t left = p.tokens - token;
        tile_of<kTokens>(left < kTokens ? left : kTokens, p, tile, token);
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

  // A row widened to whole groups becomes numbers q and factors m, one a group.
  static void screen_row(const ScreenTable& p, const float* x, int64_t groups, int64_t row, int8_t* q, uint8_t* m) {
    const int64_t length = groups * kScreenGroup;
    const float absmax = bits_float(Float::absmax_bits_of(x, length));
    float scale = 0.0f;
    double rho = __builtin_inf();  // of a row that is not finite
    double norm = rho;
    if (absmax < kSmallestQuantized) {
      rho = static_cast<double>(absmax) * __builtin_sqrt(static_cast<double>(length));
      norm = rho;
    } else if (float_bits(absmax) < kInfinityBits) {
      scale = scale_for(absmax);
      quantize(x, groups, scale, q, m, &rho, &norm);
    }
    if (scale == 0.0f) {
      std::memset(q, 0, static_cast<size_t>(length));
      std::memset(m, 0, static_cast<size_t>(groups));
    }
    const double n = static_cast<double>(2 * groups + 7);
    const double gamma = n * 0x1p-24 / (1.0 - n * 0x1p-24);
    p.scale[row] = scale;
    p.norm[row] = rounded_up(norm);
    const double residual = rho + (gamma + kEvaluationRounding) * norm + kUnderflow;
    p.residual[row] = norm < kLargestNorm ? rounded_up(residual) : kInfinity;
  }

  // Beyond kLargestNorm the value does not matter.
  static float rounded_up(double value) {
    return value < kLargestNorm ? static_cast<float>(value * kBoundRounding) : kInfinity;
  }

  // The smallest scale of 16 significant bits, so that a product with m is exact, whose largest number reaches absmax.
  static float scale_for(float absmax) {
    constexpr uint32_t kDropped = 0xffu;  // of 24 significant bits
    uint32_t bits = (float_bits(absmax / (kLargestCode * kLargestFactor)) + kDropped) & ~kDropped;
    while (static_cast<double>(bits_float(bits)) * (kLargestCode * kLargestFactor) < absmax) bits += kDropped + 1;
    return bits_float(bits);
  }

  // The smallest m for which 31 m scale reaches absmax; at most 127, by the choice of scale.
  static int32_t factor_for(float absmax, float scale) {
    int32_t m = static_cast<int32_t>(absmax / (scale * kLargestCode));
    while (static_cast<double>(scale) * kLargestCode * m < absmax) ++m;
    return m;
  }

  // rho and norm are bounds of ||rho|| and of ||Q|| + ||rho||.
  static void quantize(const float* x, int64_t groups, float scale, int8_t* q, uint8_t* m, double* rho, double* norm) {
    // Adding 1.5 * 2^23 leaves no fraction bits: half to even, like Isa::quantize. |x / step| <= 31.0001.
    const F32 to_integer = Isa::set1(12582912.0f);
    const F32 from_integer = Isa::set1(-12582912.0f);
    const F32 per_scale = Isa::set1(1.0f / scale);
    F32 squares[kRegisters], residual_squares[kRegisters];
    for (int r = 0; r < kRegisters; ++r) squares[r] = residual_squares[r] = Isa::zero();
    typename Isa::I32 unused_sum = Isa::zero_i32();
    for (int64_t g = 0; g < groups; ++g) {
      const float* x_group = x + g * kScreenGroup;
      const int32_t factor = factor_for(bits_float(Float::absmax_bits_of(x_group, kScreenGroup)), scale);
      m[g] = static_cast<uint8_t>(factor);
      const float step = scale * static_cast<float>(factor);  // exact
      const F32 negative_step = Isa::set1(-step);
      const F32 inverse = Isa::set1(factor == 0 ? 0.0f : 1.0f / step);
      const F32 in_scales = Isa::set1(static_cast<float>(factor));
      for (int r = 0; r < kRegisters; ++r) {
        const F32 v = Isa::load(x_group + r * kLanes);
        unused_sum = Isa::quantize(v, inverse, q + g * kScreenGroup + r * kLanes, unused_sum);
        const F32 number = Isa::add(Isa::add(Isa::mul(v, inverse), to_integer), from_integer);
        // One rounding of the exact rho; rho and Q in units of the scale: no square leaves the range of float32.
        const F32 difference = Isa::mul(Isa::fma(negative_step, number, v), per_scale);
        const F32 in_units = Isa::mul(number, in_scales);
        residual_squares[r] = Isa::fma(difference, difference, residual_squares[r]);
        squares[r] = Isa::fma(in_units, in_units, squares[r]);
      }
    }
    // Half of gamma <= 2^-15 for the sums, and a few u for `difference` and for scale * per_scale, which is 1 only to
    // two roundings, are below 2^-12. Squares that underflow: sqrt(2^16 * 2^-126) = 2^-55.
    constexpr double kSumRounding = 1.0 + 0x1p-12;
    *rho =
        scale * (__builtin_sqrt(static_cast<double>(Float::fold_registers(residual_squares))) * kSumRounding + 0x1p-50);
    *norm = scale * __builtin_sqrt(static_cast<double>(Float::fold_registers(squares))) * kSumRounding + *rho;
  }

  // Numbers of 16 rows of `length` inputs, as SixBitCodes.
  static void store_codes(const int8_t* q, int64_t length, uint8_t* codes) {
    constexpr uint32_t kZeros = 0x01010101u * SixBitCodes::kZero;
    constexpr uint32_t kTwoBits = 0x03030303u;
    static_assert(SixBitCodes::kZero == 32, "a number of six bits plus 32 is that number with bit 5 flipped");
    for (int64_t block = 0; block < length / kBlockInputs; ++block) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        uint32_t four[4];  // a byte of each is a code
        std::memcpy(four, q + r * length + block * kBlockInputs, sizeof four);
        for (uint32_t& word : four) word = (word ^ kZeros) & 0x3f3f3f3fu;
        for (int line = 0; line < 3; ++line) {
          const uint32_t word = four[line] | (four[3] >> (2 * line) & kTwoBits) << 6;
          std::memcpy(codes + (3 * block + line) * kBlockBytes + 4 * r, &word, sizeof word);
        }
      }
    }
  }

  template <class T>
  static void screen_rows_of(const ScreenTable& p, int64_t tile_begin, int64_t tile_end, float* wide, int8_t* q) {
    const int64_t groups = screen_groups(p.in_features);
    const int64_t length = groups * kScreenGroup;
    uint8_t* row_m = reinterpret_cast<uint8_t*>(q + kTileRows * length);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      uint8_t* m = p.codes + tile * screen_tile_bytes(groups);
      uint8_t* codes = m + screen_factor_bytes(groups);
      std::memset(m, 0, static_cast<size_t>(codes - m));
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = tile * kTileRows + r;
        const T* x = static_cast<const T*>(p.weight) + row * p.in_features;
        if (row < p.vocabulary) {
          Float::widen_row_of(x, p.in_features, wide, length);
        } else {
          std::memset(wide, 0, static_cast<size_t>(length) * sizeof(float));
        }
        screen_row(p, wide, groups, row, q + r * length, row_m);
        for (int64_t g = 0; g < groups; ++g) m[g * kTileRows + r] = row_m[g];
      }
      store_codes(q, length, codes);
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
