// The copy of a table in six bits, and the bounds of logits that it gives.

#include <vector>

#include "kernel_test.h"

namespace bitnet_ops {
namespace kernel_test {
namespace {

// The 16-bit forms of tokens, and bounds with room enough for the sums here.
struct ScreenedTokens {
  int64_t q_stride;
  Buffer<int8_t> q;
  Buffer<int32_t> group_sum;
  std::vector<ScreenedToken> tokens{};

  ScreenedTokens(int64_t in_features, int64_t count)
      : q_stride(padded_in_features(in_features)),
        q(2 * count * q_stride),
        group_sum(count * screen_groups(in_features)) {}

  void add(const float* x, int64_t in_features) {
    const int64_t t = static_cast<int64_t>(tokens.size());
    int8_t* hi = q.data + 2 * t * q_stride;
    float scale;
    int32_t unused_sums[2];
    scalar->quantize_row_16(x, DType::kFloat32, in_features, hi, hi + q_stride, q_stride, &scale, unused_sums);
    double square = 0, error_square = 0;
    for (int64_t k = 0; k < in_features; ++k) {
      const int32_t number = 256 * hi[k] + hi[q_stride + k];
      group_sum.data[t * screen_groups(in_features) + k / kScreenGroup] += number;
      const double error = x[k] - static_cast<double>(scale) * number;
      square += static_cast<double>(x[k]) * x[k];
      error_square += error * error;
    }
    const double norm = std::sqrt(square) * (1 + 1e-9);
    const double error = std::sqrt(error_square) * (1 + 1e-9) + 1e-14 * norm + kUnderflow;
    tokens.push_back(
        {scale, static_cast<float>(error * kBoundRounding), static_cast<float>((norm + error) * kBoundRounding)});
  }
};

// What a kernel makes of a screen.
struct ScreenResult {
  Buffer<float> upper, approximate;

  explicit ScreenResult(int64_t count) : upper(count), approximate(count) {}

  void run(const KernelTable& table, const Buffer<uint8_t>& codes, const Buffer<float>& bounds,
           const ScreenedTokens& tokens, int64_t in_features, int64_t vocabulary, int64_t begin) {
    const int64_t tiles = tiles_of(vocabulary);
    const float* scale = bounds.data;
    const Screen screen{codes.data,
                        screen_groups(in_features),
                        scale,
                        scale + tiles * kTileRows,
                        scale + 2 * tiles * kTileRows,
                        tokens.q.data,
                        tokens.q_stride,
                        tokens.group_sum.data,
                        tokens.tokens.data(),
                        static_cast<int64_t>(tokens.tokens.size()),
                        vocabulary,
                        upper.data,
                        approximate.data};
    table.screen(screen, begin, tiles);
  }
};

// The copy of a table, and the bounds of its logits, which must also hold.
template <class T>
void test_screen(int64_t vocabulary, int64_t in_features, Random& random) {
  const int64_t tiles = tiles_of(vocabulary);
  const int64_t groups = screen_groups(in_features);
  const int64_t rows = tiles * kTileRows;
  const int64_t length = groups * kScreenGroup;
  const int64_t begin = tiles > 2 ? 1 : 0;  // the part of one thread
  const std::string where = " of " + std::to_string(vocabulary) + "x" + std::to_string(in_features) + ", dtype " +
                            std::to_string(static_cast<int>(dtype_of<T>()));
  Buffer<T> weight(vocabulary * in_features);
  for (int64_t row = 0; row < vocabulary; ++row) {
    fill_row(weight.data + row * in_features, in_features, static_cast<RowKind>(row % kRowKinds), random);
  }
  const int64_t code_bytes = tiles * screen_tile_bytes(groups);
  Buffer<uint8_t> codes[2] = {Buffer<uint8_t>(code_bytes), Buffer<uint8_t>(code_bytes)};
  Buffer<float> bounds[2] = {Buffer<float>(3 * rows), Buffer<float>(3 * rows)};
  Buffer<float> wide(length);
  Buffer<int8_t> q_rows(length * kTileRows + groups);
  for (int i = 0; i < 2; ++i) {
    ScreenTable copy{weight.data,   dtype_of<T>(),  in_features, vocabulary,
                     codes[i].data, bounds[i].data, nullptr,     nullptr};
    copy.norm = copy.scale + rows;
    copy.residual = copy.norm + rows;
    (i == 0 ? scalar : tested)->screen_rows(copy, begin, tiles, wide.data, q_rows.data);
  }
  compare(codes[0], codes[1], "screen_rows codes" + where);
  compare(bounds[0], bounds[1], "screen_rows bounds" + where);

  // Every token count up to two groups of the widest kernel, and one more.
  for (int64_t count = 1; count <= 13; ++count) {
    Buffer<float> x(count * length);
    ScreenedTokens tokens(in_features, count);
    for (int64_t t = 0; t < count; ++t) {
      fill_row(x.data + t * length, in_features, t == 5 ? kHuge : kRandom, random);
      tokens.add(x.data + t * length, in_features);
    }
    ScreenResult result[2] = {ScreenResult(count * vocabulary), ScreenResult(count * vocabulary)};
    for (int i = 0; i < 2; ++i) {
      result[i].run(i == 0 ? *scalar : *tested, codes[0], bounds[0], tokens, in_features, vocabulary, begin);
    }
    compare(result[0].upper, result[1].upper, "screen upper" + where);
    compare(result[0].approximate, result[1].approximate, "screen approximate" + where);

    Buffer<float> scratch(kLogitsScratchRows * length), out(count * vocabulary);
    const Logits logits{x.data, length, count, weight.data, dtype_of<T>(), in_features, vocabulary, out.data};
    tested->logits(logits, 0, vocabulary, scratch.data);
    ++comparisons;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t place = t * vocabulary + begin * kTileRows; place < (t + 1) * vocabulary; ++place) {
        const double upper = result[1].upper.data[place];                      // infinite or NaN if nothing is known
        const double lower = 2.0 * result[1].approximate.data[place] - upper;  // as far on the other side, rounded
        const float logit = out.data[place];
        if (logit > upper || logit < lower - std::fabs(upper) * 1e-6) report("a logit beyond its bounds" + where);
      }
    }
  }
}

template <class T>
void test_screens_of() {
  Random random;
  for (const int64_t in_features : {0, 1, 15, 17, 64, 65, 320}) {
    for (const int64_t vocabulary : {1, 16, 35}) test_screen<T>(vocabulary, in_features, random);
  }
}

// Sums of the largest codes (any byte may come) and activations, over the most inputs.
void test_screen_overflow() {
  const int64_t in_features = kMaxScreenFeatures;
  const int64_t groups = screen_groups(in_features);
  for (const uint8_t byte : {0x00, 0x7f, 0xff}) {
    for (const int8_t value : {-128, 127}) {
      Buffer<uint8_t> codes(screen_tile_bytes(groups));
      Buffer<float> bounds(3 * kTileRows);
      ScreenedTokens tokens(in_features, 1);
      std::memset(codes.data, byte, codes.count);
      for (int64_t i = 0; i < kTileRows; ++i) bounds.data[i] = 1.0f;  // scales; the bound is 0
      for (int64_t k = 0; k < in_features; ++k) tokens.q.data[k] = tokens.q.data[tokens.q_stride + k] = value;
      for (int64_t g = 0; g < groups; ++g) tokens.group_sum.data[g] = 64 * 257 * value;
      tokens.tokens.push_back({1.0f, 0.0f, 0.0f});
      ScreenResult result(kTileRows);
      result.run(*tested, codes, bounds, tokens, in_features, kTileRows, 0);
      // Three codes of four are 63 for 0x7f and 0xff, with the fourth 0x15 and 63; a factor is a signed byte.
      const double code = byte == 0 ? -32 : byte == 0xff ? 31 : (3 * 31 + 0x15 - 32) / 4.0;
      const double product = 257.0 * value * code * static_cast<double>(in_features) * static_cast<int8_t>(byte);
      ++comparisons;
      for (int64_t i = 0; i < kTileRows; ++i) {
        // 2^10 additions of equal numbers.
        if (std::fabs(result.approximate.data[i] - product) > std::fabs(product) * 0x1p-13) {
          report("screen at its largest sums");
        }
      }
    }
  }
}

}  // namespace

void test_screens() {
  test_screens_of<float>();
  test_screens_of<BFloat16>();
  test_screens_of<Float16>();
  test_screen_overflow();
}

}  // namespace kernel_test
}  // namespace bitnet_ops
