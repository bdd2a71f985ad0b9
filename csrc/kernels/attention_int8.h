// Attention to a cache of bytes, in exact integers: keys and values are never widened to float32.
//
// Include this inside a kernel file's target region, before attention.h, after float_algorithms.h,
// exponential.h and tile_sums.h.
//
// A key is k = key_scale * k8, a value v = value_scale * v8. A query is rounded to 16 bits, q = q_scale * q16 with
// q16 = 256 * hi + lo, and so are the weights of a span of 256 keys once the values' scales are in them, with one
// scale for the span. Then scores and results are integer sums, which have no order:
//
//     score[j]  = float(q16 . k8[j]) * q_scale * key_scale[j]
//     max       = the largest score of the span,  weight[j] = exp2(score[j] - max)
//     sum       = the weights in 64 virtual lanes, each added up in order, folded as in float_algorithms.h
//     w16[j]    = round(weight[j] * value_scale[j] / w_scale),  w_scale = the largest weight * value_scale / 32639
//     out[i]    = float(sum over j of w16[j] * v8[j][i]) * w_scale
//
// where float(x) of the sums of hi and lo is fma(256, float(hi), float(lo)), three roundings at most. What 16 bits
// lose is little beside what 8 bits have lost already: an element of a query 1 / 65278 of its largest one, and a result
// 256 * 127 / 65278 = 1/2 of a step of the values at the very most, as much as they lose by their own rounding; but
// the errors of 256 weights hardly ever all have one sign: 1/60 of a step is usual.
//
// A key that a token does not see has the weight 0, and 0 times any byte is 0: so unlike floats, bytes that nobody
// wrote may be multiplied. Spans join as attention.h says.
//
// A span, as SignedCodes of tile_sums.h, with width = value_width(head_dim):
//
//     keys     16 tiles of 16 keys:            [tile][input / 16][input % 16 / 4][key % 16][input % 4]
//     values   width / 16 tiles of 16 inputs:  [tile][key / 16][key % 16 / 4][input % 16][key % 4]
//
// Overflow: a sum is at most 255 * 128 (unsigned codes) times head_dim or 256: see kMaxInt8HeadDim.

namespace bitnet_ops {
namespace {

// Queries of some rows in their integer form, and what a span makes of a few of them.
struct Int8Queries {
  int8_t* planes;   // [rows][2][width]: hi and lo
  float* scale;     // [rows]
  int32_t* sum;     // [rows][2]
  float* scores;    // [kAttentionRegisterRows][kAttentionSpan]
  int8_t* weights;  // [kAttentionRegisterRows][2][kAttentionSpan]
  float* rotated;   // [head_dim]: one query

  Int8Queries(float* scratch, int64_t rows, int64_t head_dim)
      : planes(reinterpret_cast<int8_t*>(scratch)),
        scale(scratch + rows * value_width(head_dim) / 2),
        sum(reinterpret_cast<int32_t*>(scale + rows)),
        scores(scale + 3 * rows),
        weights(reinterpret_cast<int8_t*>(scores + kAttentionRegisterRows * kAttentionSpan)),
        rotated(scores + kAttentionRegisterRows * kAttentionSpan * 3 / 2) {}
};

template <class Isa, class Sums>
struct Int8Attention {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  using Float = FloatKernels<Isa>;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kRegisters = Float::kRegisters;
  static constexpr int kRows = Sums::kRows / 2;  // queries at a time
  static_assert(kRows <= kAttentionRegisterRows, "scratch takes no more");
  static_assert(kAttentionSpan % kVirtualLanes == 0, "weights fold like 64 virtual lanes");

  // Byte `input` of row `row` in tiles of `inputs` inputs, a multiple of 16.
  static int64_t place(int64_t row, int64_t input, int64_t inputs) {
    return row / kTileRows * kTileRows * inputs + input / 4 * kBlockBytes + row % kTileRows * 4 + input % 4;
  }

  static void store_key(const int8_t* key, int64_t head_dim, int64_t position, int8_t* span) {
    const int64_t width = value_width(head_dim);
    for (int64_t i = 0; i < head_dim; ++i) span[place(position % kAttentionSpan, i, width)] = key[i];
  }
  static void store_value(const int8_t* value, int64_t head_dim, int64_t position, int8_t* span) {
    for (int64_t i = 0; i < head_dim; ++i) span[place(i, position % kAttentionSpan, kAttentionSpan)] = value[i];
  }

  // Row `row` of the queries.
  static void store_query(const float* rotated, int64_t head_dim, const Int8Queries& queries, int64_t row) {
    const int64_t width = value_width(head_dim);
    int8_t* hi = queries.planes + 2 * row * width;
    Float::quantize_row_16_of(rotated, head_dim, hi, hi + width, width, queries.scale + row, queries.sum + 2 * row);
  }

  // The sums of 16 rows of a tile with 256 * hi + lo, times `scale`.
  static void combine(const int32_t* acc, const int32_t* q_sum, float scale, float* out) {
    alignas(64) int32_t part[2][kTileRows];
    for (int plane = 0; plane < 2; ++plane) {
      const int32_t excess = Sums::template kExcess<SignedCodes> * q_sum[plane];
      for (int64_t i = 0; i < kTileRows; ++i) part[plane][i] = acc[plane * kTileRows + i] - excess;
    }
    const F32 high = Isa::set1(256.0f);
    for (int64_t i = 0; i < kTileRows; i += kLanes) {
      const F32 sum = Isa::fma(Isa::load(part[0] + i), high, Isa::load(part[1] + i));
      Isa::store(out + i, Isa::mul(sum, Isa::set1(scale)));
    }
  }

  // Scores of ROWS queries with the first `tiles` * 16 keys, still without the keys' scales.
  template <int ROWS>
  static void multiply_keys(const Int8Queries& queries, int64_t row, const int8_t* keys, int64_t width, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      alignas(64) int32_t acc[2 * ROWS * kTileRows];
      Sums::template sums<SignedCodes, 2 * ROWS>(reinterpret_cast<const uint8_t*>(keys) + tile * kTileRows * width,
                                                 width / kBlockInputs, queries.planes + 2 * row * width, width, acc);
      for (int r = 0; r < ROWS; ++r) {
        float* out = queries.scores + r * kAttentionSpan + tile * kTileRows;
        combine(acc + 2 * r * kTileRows, queries.sum + 2 * (row + r), queries.scale[row + r], out);
      }
    }
  }

  static I32 largest_of_64(I32 magnitude, const float* x) {
    for (int64_t i = 0; i < kVirtualLanes; i += kLanes) magnitude = Isa::max_magnitude(magnitude, Isa::load(x + i));
    return magnitude;
  }

  // Scores of one query become 16-bit weights with the values' scales in them. Keys [hidden, visible) of `count` are
  // seen, the others get the weight 0. Returns w_scale.
  static float soften(float* scores, int64_t hidden, int64_t visible, int64_t count, const float* key_scale,
                      const float* value_scale, int8_t* hi, int8_t* lo, int32_t* hi_lo_sum, float* max, float* sum) {
    // Registers [begin, whole) are seen as a whole, those around them in part. Scales of keys that are not seen may be
    // NaN: nothing is multiplied with them that is not replaced.
    const int64_t whole = visible - visible % kLanes;
    const int64_t from_hidden = divide_up(hidden, kLanes) * kLanes;
    const int64_t begin = from_hidden < whole ? from_hidden : whole;
    for (int64_t j = 0; j < hidden; ++j) scores[j] = -kInfinity;
    for (int64_t j = hidden; j < begin; ++j) scores[j] *= key_scale[j];
    F32 highest = hidden < begin ? Isa::load(scores + begin - kLanes) : Isa::set1(-kInfinity);
    for (int64_t j = begin; j < whole; j += kLanes) {
      const F32 score = Isa::mul(Isa::load(scores + j), Isa::load(key_scale + j));
      highest = Isa::max(highest, score);
      Isa::store(scores + j, score);
    }
    const int64_t end = divide_up(visible, kVirtualLanes) * kVirtualLanes;
    if (whole < end) {
      for (int64_t j = whole > hidden ? whole : hidden; j < visible; ++j) scores[j] *= key_scale[j];
      for (int64_t j = visible; j < end; ++j) scores[j] = -kInfinity;
      highest = Isa::max(highest, Isa::load(scores + whole));
    }
    *max = Isa::fold_max(highest);
    const F32 minus_max = Isa::set1(-*max);
    F32 lanes[kRegisters];
    for (int r = 0; r < kRegisters; ++r) lanes[r] = Isa::zero();
    I32 magnitude = Isa::zero_i32();
    const int64_t first = hidden - hidden % kVirtualLanes;  // weights before it are +0, which adds nothing
    for (int64_t j = first; j < end; j += kVirtualLanes) {
      for (int r = 0; r < kRegisters; ++r) {
        const int64_t i = j + r * kLanes;
        const F32 weight = exp2<Isa>(Isa::add(Isa::load(scores + i), minus_max));
        lanes[r] = Isa::add(lanes[r], weight);
        const F32 with_scale = Isa::mul(weight, Isa::load(value_scale + i));
        if (j >= hidden && j + kVirtualLanes <= visible) magnitude = Isa::max_magnitude(magnitude, with_scale);
        Isa::store(scores + i, with_scale);
      }
    }
    // The first and the last 64, where they are seen in part.
    for (int64_t j = 0; j < hidden; ++j) scores[j] = 0.0f;
    for (int64_t j = visible; j < end; ++j) scores[j] = 0.0f;
    for (int64_t j = first; j < hidden; j += kVirtualLanes) magnitude = largest_of_64(magnitude, scores + j);
    if (visible < end) magnitude = largest_of_64(magnitude, scores + end - kVirtualLanes);
    *sum = Float::fold_registers(lanes);
    const uint32_t bits = static_cast<uint32_t>(Isa::highest(magnitude));
    const float largest = bits_float(bits);
    // What is not finite makes every result NaN. Weights below 2^-100 are none: their inverse could overflow.
    if (bits >= kInfinityBits || largest < 0x1p-100f) {
      std::memset(hi, 0, kAttentionSpan);
      std::memset(lo, 0, kAttentionSpan);
      hi_lo_sum[0] = hi_lo_sum[1] = 0;
      return bits >= kInfinityBits ? bits_float(0x7fc00000u) : 0.0f;
    }
    Float::split_16(scores, end, kLargestSplit / largest, hi, lo, hi_lo_sum);
    Float::zero_from(hi, end, count);
    Float::zero_from(lo, end, count);
    return largest / kLargestSplit;
  }

  // Attends `rows` queries from row `row` on to a span. Query r sees keys [hidden[r], visible[r]); they grow with r.
  template <int ROWS>
  static void attend(int rows, const Int8Queries& queries, int64_t row, const int64_t* hidden, const int64_t* visible,
                     const int8_t* keys, const int8_t* values, const float* key_scale, const float* value_scale,
                     int64_t width, const AttentionState& state) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) {
        return attend<ROWS - 1>(rows, queries, row, hidden, visible, keys, values, key_scale, value_scale, width,
                                state);
      }
    }
    const int64_t tiles = divide_up(visible[ROWS - 1], kTileRows);
    multiply_keys<ROWS>(queries, row, keys, width, tiles);
    float scale[ROWS];
    int32_t sum[2 * ROWS];
    for (int r = 0; r < ROWS; ++r) {
      int8_t* hi = queries.weights + 2 * r * kAttentionSpan;
      scale[r] = soften(queries.scores + r * kAttentionSpan, hidden[r], visible[r], tiles * kTileRows, key_scale,
                        value_scale, hi, hi + kAttentionSpan, sum + 2 * r, state.max + row + r, state.sum + row + r);
    }
    for (int64_t tile = 0; tile < width / kTileRows; ++tile) {
      alignas(64) int32_t acc[2 * ROWS * kTileRows];
      Sums::template sums<SignedCodes, 2 * ROWS>(
          reinterpret_cast<const uint8_t*>(values) + tile * kTileRows * kAttentionSpan, tiles, queries.weights,
          kAttentionSpan, acc);
      for (int r = 0; r < ROWS; ++r) {
        combine(acc + 2 * r * kTileRows, sum + 2 * r, scale[r], state.out + (row + r) * width + tile * kTileRows);
      }
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
