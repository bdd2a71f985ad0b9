// The layers of a decoder, one operator after the other as bitnet_ops/model.py has them. The point is what is not
// here: between its operators a decoded token would otherwise run several milliseconds of Python, out of caches that
// the weights have just been streamed through (bench/LOG.md).

#include "decoder_ops.h"

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

// Fewer layers than the cache has room for are fine: a user may have taken some away.
void check_layers(const char* argument, const Tensor& tensor, size_t layers) {
  if (tensor.dim() == 0 || tensor.size(0) < static_cast<int64_t>(layers)) {
    refuse("decoder_layers", argument, "a tensor [layers, ...] for at least " + std::to_string(layers) + " layers",
           describe(tensor));
  }
}

}  // namespace

Tensor decoder_layers(const Tensor& x_any, const std::vector<Tensor>& norm_weight, double eps,
                      const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                      const std::vector<std::string>& layouts, const Tensor& cos, const Tensor& sin,
                      const Tensor& start, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const size_t layers = norm_weight.size() / kNorms;
  if (layers == 0) refuse("decoder_layers", "norm_weight", "four tensors for each layer", "fewer");
  if (dtype_code(x_any) != codes().float32) refuse("decoder_layers", "x", "a tensor float32", describe(x_any));
  check_count("norm_weight", norm_weight.size(), layers * kNorms);
  check_count("packed", packed.size(), layers * kProjections);
  check_count("weight_scale", weight_scale.size(), layers * kProjections);
  check_count("layouts", layouts.size(), layers * kProjections);
  check_layers("keys", keys, layers);
  check_layers("values", values, layers);
  if (key_scale.has_value()) check_layers("key_scale", *key_scale, layers);
  if (value_scale.has_value()) check_layers("value_scale", *value_scale, layers);
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
    const auto of_layer = [layer](const Tensor& all) { return select(all, 0, static_cast<int64_t>(layer)); };
    const auto scale_of_layer = [&](const std::optional<Tensor>& all) {
      return all.has_value() ? std::optional<Tensor>(of_layer(*all)) : std::nullopt;
    };
    const Tensor attended = cached_attention(qkv[kQ], qkv[kK], qkv[kV], cos, sin, start, of_layer(keys), of_layer(values),
                                             scale_of_layer(key_scale), scale_of_layer(value_scale));
    x = norm_linear_add(attended, norm[kAttnSub], eps, weight[kO], scale[kO], layout[kO], x);
    const Tensor gated = norm_squared_relu_glu(x, norm[kPostAttention], eps, weight[kGate], scale[kGate], layout[kGate],
                                               weight[kUp], scale[kUp], layout[kUp]);
    x = norm_linear_add(gated, norm[kFfnSub], eps, weight[kDown], scale[kDown], layout[kDown], x);
  }
  return x;
}

}  // namespace bitnet_ops
