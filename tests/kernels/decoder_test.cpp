// Whole layers, as csrc/run/decoder.h runs them: every instruction set that this CPU has gives the bits of scalar, and
// a number made of these bits is the same on every architecture (tests/test_kernels.py knows it).

#include <vector>

#include "kernel_test.h"
#include "run/attention.h"
#include "run/decoder.h"
#include "run/dispatch.h"

namespace bitnet_ops {
namespace kernel_test {
namespace {

constexpr int64_t kHidden = 150, kHeads = 6, kKvHeads = 2, kHeadDim = 14, kInner = 84;
constexpr int64_t kBatch = 2, kTokens = 70, kCapacity = 128;

// Two layers that have every part between them, of numbers that are the same on every machine.
class Model {
 public:
  Model() {
    Layer first = layer(Activation::kSilu, 2, 64);
    first.norms[kQueryNorm] = norm(kHeadDim);
    first.norms[kKeyNorm] = norm(kHeadDim);
    first.window = 9;
    Layer second = layer(Activation::kRelu2, 1, 0);
    second.norms[kAttentionSubNorm] = norm(kHeads * kHeadDim);
    second.norms[kFeedForwardSubNorm] = norm(kInner);
    second.norms[kAttentionPostNorm] = norm(kHidden);
    second.norms[kFeedForwardPostNorm] = norm(kHidden);
    second.projections[kUp].norm = norm(kHidden);
    second.residual_scale = 0.5f;
    layers_ = {first, second};
  }

  // The residual stream after a prompt, and after one more token.
  std::vector<float> run() {
    Random random;
    std::vector<float> x(static_cast<size_t>(kBatch * kTokens * kHidden)), out(x.size());
    for (float& v : x) v = random.uniform();
    std::vector<float> angles(2 * kCapacity * kHeadDim / 2);
    for (float& v : angles) v = random.uniform();
    const float* cos = angles.data();
    const float* sin = cos + kCapacity * kHeadDim / 2;
    const size_t places = static_cast<size_t>(2 * kBatch * kKvHeads * kCapacity);
    Buffer<float> keys(static_cast<int64_t>(places) * kHeadDim);
    Buffer<float> values(static_cast<int64_t>(places) * value_width(kHeadDim));
    LayersCache cache{CacheType::kFloat32, kCapacity, keys.data, values.data, nullptr, nullptr, 0, 0, 0, 0};
    cache.key_bytes = static_cast<int64_t>(places / 2 * kHeadDim * sizeof(float));
    cache.value_bytes = static_cast<int64_t>(places / 2 * sizeof(float)) * value_width(kHeadDim);
    const int64_t begin[] = {0, -3}, next[] = {kTokens, kTokens - 3};
    run_layers(layers_.data(), 2, {kBatch, kTokens, begin, cos, sin, 0}, cache, 0, x.data(), out.data());
    std::vector<float> token(x.begin(), x.begin() + kBatch * kHidden);
    run_layers(layers_.data(), 2, {kBatch, 1, next, cos, sin, 0}, cache, 0, token.data(), token.data());
    // The rows of padding are no part of the result.
    for (int64_t i = 0; i < 3 * kHidden; ++i) out[static_cast<size_t>(kTokens * kHidden + i)] = 0.0f;
    out.insert(out.end(), token.begin(), token.end());
    return out;
  }

 private:
  const float* floats(int64_t count, float low) {
    auto& made = floats_.emplace_back(static_cast<size_t>(count));
    for (float& v : made) v = low + 0.5f * (random_.uniform() + 1.0f);
    return made.data();
  }

  // Scales [groups][out_features] as kernels read them.
  const float* in_tiles(const float* scales, int64_t groups, int64_t out_features) {
    auto& made = floats_.emplace_back(static_cast<size_t>(tiles_of(out_features) * groups * kTileRows));
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t row = 0; row < out_features; ++row) {
        const int64_t place = (row / kTileRows * groups + group) * kTileRows + row % kTileRows;
        made[static_cast<size_t>(place)] = scales[group * out_features + row];
      }
    }
    return made.data();
  }

  Norm norm(int64_t features) { return {floats(features, 0.5f), 1e-5f}; }

  Projection projection(int64_t out_features, int64_t in_features, int64_t planes, int64_t group_size) {
    Projection result;
    TernaryMatrix& m = result.matrix;
    m.size = {out_features, in_features};
    m.layout = Layout::kTile16;
    m.blocks = blocks_of(in_features);
    m.planes = planes;
    m.group_size = group_size;
    std::vector<int8_t> w(static_cast<size_t>(out_features * in_features));
    for (int8_t& v : w) v = static_cast<int8_t>(random_.byte() % 3 - 1);
    auto& packed = bytes_.emplace_back(static_cast<size_t>(tiles_of(out_features) * m.blocks * kBlockBytes));
    if (!pack_tile16(w.data(), m.size, packed.data(), 0, tiles_of(out_features))) report("packing");
    m.packed = packed.data();
    const float* scales = floats(m.groups() * out_features, 0.01f);
    m.weight_scale = group_size == 0 ? scales : in_tiles(scales, m.groups(), out_features);
    m.bias = floats(out_features, -0.5f);
    return result;
  }

  Layer layer(Activation activation, int64_t planes, int64_t group_size) {
    Layer result{};
    result.head_dim = kHeadDim;
    result.score_scale = score_scale(std::nullopt, kHeadDim);
    result.residual_scale = 1.0f;
    result.activation = activation;
    const MatrixSize sizes[kProjections] = {{kHeads * kHeadDim, kHidden},
                                            {kKvHeads * kHeadDim, kHidden},
                                            {kKvHeads * kHeadDim, kHidden},
                                            {kHidden, kHeads * kHeadDim},
                                            {kInner, kHidden},
                                            {kInner, kHidden},
                                            {kHidden, kInner}};
    for (int p = 0; p < kProjections; ++p) {
      result.projections[p] = projection(sizes[p].out_features, sizes[p].in_features, planes, group_size);
    }
    result.norms[kInputNorm] = norm(kHidden);
    result.norms[kFeedForwardNorm] = norm(kHidden);
    return result;
  }

  Random random_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<uint8_t>> bytes_;
  std::vector<Layer> layers_;
};

}  // namespace

void test_decoder() {
  const char* before = kernels().isa;
  if (!select(tested->isa)) return;  // what runs in another encoding cannot be chosen
  const std::vector<float> given = Model().run();
  select("scalar");
  const std::vector<float> expected = Model().run();
  select(before);
  ++comparisons;
  if (std::memcmp(given.data(), expected.data(), given.size() * sizeof(float)) != 0) report("a decoder's layers");
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const float v : given) {
    const uint32_t bits = float_bits(v);
    for (int byte = 0; byte < 4; ++byte) hash = (hash ^ (bits >> (8 * byte) & 0xff)) * 0x100000001b3u;
  }
  decoder_signature = hash;
}

}  // namespace kernel_test
}  // namespace bitnet_ops
