#include "run/gumbel.h"

#include <cstring>

#include "run/parallel.h"

namespace bitnet_ops {
namespace {

// ln(x) of a positive normal float: ln(m 2^e) = e ln 2 + 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)).
// With |z| <= 0.1716 the series left out, 2 z^11 / 11, is below 2^-30 of the sum. Nothing but additions,
// products and one division, each rounded as IEEE says, so that every CPU makes the same noise.
inline float natural_log(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const int32_t exponent = static_cast<int32_t>(bits - kSqrtHalf) >> 23;
  const uint32_t mantissa = bits - (static_cast<uint32_t>(exponent) << 23);
  float m;
  std::memcpy(&m, &mantissa, sizeof m);
  const float z = (m - 1.0f) / (m + 1.0f);
  const float zz = z * z;
  const float series = ((((1.0f / 9) * zz + 1.0f / 7) * zz + 1.0f / 5) * zz + 1.0f / 3) * zz;
  return static_cast<float>(exponent) * 0.693147181f + 2.0f * (z + z * series);
}

// Number `index` of the stream of `seed`: SplitMix64 (Steele, Lea, Flood 2014), whose state is a counter.
inline uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// -ln(-ln(u)) for u uniform in (0, 1). What wins is u next to 1, that is, a small e = -ln(u): there it comes from
// w = 1 - u, which keeps its relative precision down to 2^-41: e = 2 artanh(w / (2 - w)) is natural_log's
// series for m = 1 / (1 - w).
inline float gumbel(uint64_t bits) {
  constexpr float kSmall = 0.25f;
  const float w = (static_cast<float>(static_cast<int64_t>(bits >> 24)) + 0.5f) * 0x1p-40f;  // (0, 1]
  const float z = w / (2.0f - w);
  const float zz = z * z;
  const float series = ((((1.0f / 9) * zz + 1.0f / 7) * zz + 1.0f / 5) * zz + 1.0f / 3) * zz;
  const float near_one = 2.0f * (z + z * series);
  const float u = 1.0f - w;
  const float elsewhere = -natural_log(u < 0x1p-24f ? 0x1p-24f : u);
  return -natural_log(w < kSmall ? near_one : elsewhere);
}

}  // namespace

void run_gumbel_noise(const int64_t* seeds, int64_t rows, int64_t size, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint64_t seed = static_cast<uint64_t>(seeds[row]);
    float* of_row = out + row * size;
    constexpr double kNsPerNumber = 5.0;
    parallel(size, kNsPerNumber, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) of_row[i] = gumbel(random_bits(seed, static_cast<uint64_t>(i)));
    });
  }
}

}  // namespace bitnet_ops
