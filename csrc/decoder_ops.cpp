// The layers of a decoder, one operator after the other as bitnet_ops/model.py has them. The point is what is not
// here: between its operators a decoded token would otherwise run several milliseconds of Python, out of caches that
// the weights have just been streamed through (bench/LOG.md).

#include "decoder_ops.h"

#include <optional>

#include "attention_ops.h"
#include "fused_ops.h"

namespace bitnet_ops {
namespace {

// Places within a layer's part of the lists.
enum Norm { kInput, kAttnSub, kPostAttention, kFfnSub, kNorms };
enum Projection { kQ, kK, kV, kO, kGate, kUp, kDown, kProjections };

void check_count(const char* argument, size_t given, size_t expected) {
  if (given != expected) {
    refuse("decoder_layers", argument, std::to_string(expected) + " elements", std::to_string(given));
  }
}

}  // namespace

Tensor decoder_layers(const Tensor& x_any, const std::vector<Tensor>& norm_weight, double eps,
                      const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                      const std::vector<std::string>& layouts, const Tensor& cos, const Tensor& sin,
                      const Tensor& start, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                      const std::vector<Tensor>& key_scale, const std::vector<Tensor>& value_scale) {
  const size_t layers = keys.size();
  if (layers == 0) refuse("decoder_layers", "keys", "a tensor for each layer", "an empty list");
  if (dtype_code(x_any) != codes().float32) refuse("decoder_layers", "x", "a tensor float32", describe(x_any));
  check_count("norm_weight", norm_weight.size(), layers * kNorms);
  check_count("packed", packed.size(), layers * kProjections);
  check_count("weight_scale", weight_scale.size(), layers * kProjections);
  check_count("layouts", layouts.size(), layers * kProjections);
  check_count("values", values.size(), layers);
  check_count("value_scale", value_scale.size(), key_scale.size());
  if (!key_scale.empty()) check_count("key_scale", key_scale.size(), layers);
  for (const Tensor& scale : weight_scale) {
    if (scale.dim() != 1) refuse("decoder_layers", "weight_scale", "tensors float32 [out_features]", describe(scale));
  }

  Tensor x = x_any;
  for (size_t layer = 0; layer < layers; ++layer) {
    const Tensor* norm = norm_weight.data() + layer * kNorms;
    const Tensor* weight = packed.data() + layer * kProjections;
    const Tensor* scale = weight_scale.data() + layer * kProjections;
    const std::string* layout = layouts.data() + layer * kProjections;
    // One parallel region where q, k and v lie alike.
    const auto project = [&](size_t begin, size_t end) {
      std::vector<int64_t> out_features;
      for (size_t i = begin; i < end; ++i) out_features.push_back(scale[i].size(0));
      return norm_linears(x, norm[kInput], eps, {weight + begin, weight + end}, {scale + begin, scale + end},
                          out_features, layout[begin]);
    };
    std::vector<Tensor> qkv;
    if (layout[kQ] == layout[kK] && layout[kQ] == layout[kV]) {
      qkv = project(kQ, kV + 1);
    } else {
      for (size_t i = kQ; i <= kV; ++i) qkv.push_back(project(i, i + 1)[0]);
    }
    const auto scale_of = [layer](const std::vector<Tensor>& scales) {
      return scales.empty() ? std::nullopt : std::optional<Tensor>(scales[layer]);
    };
    const Tensor attended = cached_attention(qkv[kQ], qkv[kK], qkv[kV], cos, sin, start, keys[layer], values[layer],
                                             scale_of(key_scale), scale_of(value_scale));
    x = norm_linear_add(attended, norm[kAttnSub], eps, weight[kO], scale[kO], layout[kO], x);
    const Tensor gated = norm_squared_relu_glu(x, norm[kPostAttention], eps, weight[kGate], scale[kGate], layout[kGate],
                                               weight[kUp], scale[kUp], layout[kUp]);
    x = norm_linear_add(gated, norm[kFfnSub], eps, weight[kDown], scale[kDown], layout[kDown], x);
  }
  return x;
}

}  // namespace bitnet_ops
