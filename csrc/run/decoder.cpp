#include "run/decoder.h"

#include <algorithm>

#include "run/attention.h"
#include "run/fused.h"
#include "run/scratch.h"

namespace bitnet_ops {
namespace {

constexpr const char* kOp = "decoder_layers";

void check_count(const char* argument, size_t given, size_t expected) {
  if (given != expected) {
    refuse(kOp, argument, std::to_string(expected) + " elements", std::to_string(given));
  }
}

// Fewer layers than the cache has room for are fine: a user may have taken some away.
void check_layers(const char* argument, const Tensor& tensor, size_t layers) {
  if (tensor.dim() == 0 || tensor.size(0) < static_cast<int64_t>(layers)) {
    refuse(kOp, argument, "a tensor [layers, ...] for at least " + std::to_string(layers) + " layers", describe(tensor));
  }
}

Tensor first_of(const Tensor& all) { return select(all, 0, 0); }

std::optional<Tensor> first_of(const std::optional<Tensor>& all) {
  return all.has_value() ? std::optional<Tensor>(first_of(*all)) : std::nullopt;
}

// The same memory as another tensor.
Tensor alias_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), sizes.data(), strides.data(), offset,
                                                        &handle));
  return Tensor(handle);
}

}  // namespace

void DecoderLayers::keep(const Tensor& given, const Tensor& used) {
  const bool copied = data<void>(given) != data<void>(used);
  copied_ = copied_ || copied;
  memory_.push_back({given, copied ? used : alias_of(given), data<void>(given)});
}

const float* DecoderLayers::keep_norm(const Tensor& weight, int64_t features) {
  check(kOp, "norm_weight", weight, codes().float32, {features});
  const Tensor used = as_contiguous(weight);
  keep(weight, used);
  return data<float>(used);
}

TernaryMatrix DecoderLayers::keep_matrix(const Tensor& packed, const Tensor& weight_scale, const std::string& layout,
                                         MatrixSize size) {
  const CheckedMatrix matrix(kOp, "packed", "weight_scale", packed, weight_scale, layout, size);
  keep(packed, matrix.packed);
  keep(weight_scale, matrix.weight_scale);
  return matrix.view();
}

DecoderLayers::DecoderLayers(const LayerTensors& tensors) {
  const size_t layers = tensors.norm_weight.size() / kNorms;
  if (layers == 0) refuse(kOp, "norm_weight", "four tensors for each layer", "fewer");
  check_count("norm_weight", tensors.norm_weight.size(), layers * kNorms);
  check_count("packed", tensors.packed.size(), layers * kProjections);
  check_count("weight_scale", tensors.weight_scale.size(), layers * kProjections);
  check_count("layouts", tensors.layouts.size(), layers * kProjections);
  if (!(tensors.eps >= 0.0)) refuse(kOp, "eps", "a number of at least 0", std::to_string(tensors.eps));
  eps_ = static_cast<float>(tensors.eps);
  if (tensors.norm_weight[0].dim() != 1) {
    refuse(kOp, "norm_weight", "tensors float32 [features]", describe(tensors.norm_weight[0]));
  }
  hidden_size_ = tensors.norm_weight[0].size(0);
  for (size_t i = 0; i < layers; ++i) {
    const Tensor* norm = tensors.norm_weight.data() + i * kNorms;
    const Tensor* packed = tensors.packed.data() + i * kProjections;
    const Tensor* scale = tensors.weight_scale.data() + i * kProjections;
    const std::string* layout = tensors.layouts.data() + i * kProjections;
    const int64_t q = rows_of_matrix(kOp, "weight_scale", scale[kQ]);
    const int64_t kv = rows_of_matrix(kOp, "weight_scale", scale[kK]);
    const int64_t inner = rows_of_matrix(kOp, "weight_scale", scale[kGate]);
    const MatrixSize sizes[kProjections] = {{q, hidden_size_},     {kv, hidden_size_},    {kv, hidden_size_},
                                            {hidden_size_, q},     {inner, hidden_size_}, {inner, hidden_size_},
                                            {hidden_size_, inner}};
    const int64_t features[kNorms] = {hidden_size_, q, hidden_size_, inner};
    Layer layer;
    for (size_t n = 0; n < kNorms; ++n) layer.norms[n] = keep_norm(norm[n], features[n]);
    for (size_t p = 0; p < kProjections; ++p) {
      layer.matrices[p] = keep_matrix(packed[p], scale[p], layout[p], sizes[p]);
    }
    layers_.push_back(layer);
    largest_attention_ = std::max(largest_attention_, 2 * q + 2 * kv);
    largest_feed_forward_ = std::max(largest_feed_forward_, inner);
  }
}

bool DecoderLayers::is_current() const {
  if (copied_) return false;  // of what may have changed since
  for (const Memory& memory : memory_) {
    if (data<void>(memory.given) != memory.address) return false;
  }
  return true;
}

Tensor DecoderLayers::run(const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any, const Tensor& start_any,
                          const Tensor& keys, const Tensor& values, const std::optional<Tensor>& key_scale,
                          const std::optional<Tensor>& value_scale) const {
  if (!x_any.is_cpu() || dtype_code(x_any) != codes().float32 || x_any.dim() != 3 || x_any.size(2) != hidden_size_) {
    refuse(kOp, "x", "a tensor float32 [batch, tokens, " + std::to_string(hidden_size_) + "] on the CPU", describe(x_any));
  }
  check_layers("keys", keys, layers_.size());
  check_layers("values", values, layers_.size());
  if (key_scale.has_value()) check_layers("key_scale", *key_scale, layers_.size());
  if (value_scale.has_value()) check_layers("value_scale", *value_scale, layers_.size());
  const int64_t head_dim = check_tables(kOp, cos_any, sin_any);
  const int64_t batch = x_any.size(0), tokens = x_any.size(1);
  check(kOp, "start", start_any, codes().int64, {batch});
  const Tensor x = as_contiguous(x_any);
  const Tensor cos = as_contiguous(cos_any);
  const Tensor sin = as_contiguous(sin_any);
  const Tensor start = as_contiguous(start_any);

  const CachePart first = check_heads_and_cache({batch, tokens, 1, 1, head_dim}, keys, values, key_scale, value_scale);
  check_positions(kOp, data<int64_t>(start), {batch, tokens, 1, 1, head_dim}, cos.size(0), first.capacity);
  const Tensor out = empty(shape_of(x), codes().float32);
  const int64_t rows = batch * tokens;
  if (rows == 0 || hidden_size_ == 0) return out;

  const int64_t element = first.type == CacheType::kFloat32 ? 4 : first.type == CacheType::kBFloat16 ? 2 : 1;
  const auto part = [&](int64_t layer) -> CachePart {
    return {first.type,
            first.capacity,
            static_cast<char*>(first.keys) + layer * keys.stride(0) * element,
            static_cast<char*>(first.values) + layer * values.stride(0) * element,
            first.key_scale == nullptr ? nullptr : first.key_scale + layer * key_scale->stride(0),
            first.value_scale == nullptr ? nullptr : first.value_scale + layer * value_scale->stride(0)};
  };
  // The residual stream goes back and forth between `out` and `middle`.
  static thread_local Scratch scratch;
  const int64_t largest = std::max(largest_attention_, largest_feed_forward_);
  float* middle = static_cast<float*>(
      scratch.reserve(static_cast<size_t>(rows * (hidden_size_ + largest)) * sizeof(float)));
  const float* stream = data<float>(x);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const AttentionSizes sizes{batch, tokens, layer.features(kQ) / head_dim, layer.features(kK) / head_dim, head_dim};
    const Attention attention = call_of(sizes, data<float>(cos), data<float>(sin), data<int64_t>(start),
                                        part(static_cast<int64_t>(i)));
    run_layer(layer, attention, {stream, middle, mutable_data<float>(out), middle + rows * hidden_size_});
    stream = data<float>(out);
  }
  return out;
}

CachePart DecoderLayers::check_heads_and_cache(AttentionSizes sizes, const Tensor& keys, const Tensor& values,
                                               const std::optional<Tensor>& key_scale,
                                               const std::optional<Tensor>& value_scale) const {
  std::optional<CachePart> part;
  for (const Layer& layer : layers_) {
    const int64_t q = layer.features(kQ), kv = layer.features(kK);
    if (q == 0 || kv == 0 || kv % sizes.head_dim != 0 || q % kv != 0) {
      refuse(kOp, "weight_scale",
             "q_proj and k_proj of whole heads of " + std::to_string(sizes.head_dim) +
                 " (twice the last size of cos), those of k_proj a divisor of those of q_proj",
             std::to_string(q) + " and " + std::to_string(kv) + " features");
    }
    // Sizes and strides are the same for every layer's part, so what holds for the first holds for all.
    if (part.has_value() && kv == sizes.kv_heads * sizes.head_dim) continue;
    sizes.kv_heads = kv / sizes.head_dim;
    part = check_cache(kOp, sizes, first_of(keys), first_of(values), first_of(key_scale), first_of(value_scale));
  }
  return *part;
}

void DecoderLayers::run_layer(const Layer& layer, Attention attention, const Stream& stream) const {
  const int64_t rows = attention.batch * attention.tokens;
  const auto normed = [&](const float* x, int64_t features, const float* norm) {
    return Activations{x, DType::kFloat32, rows, features, norm, eps_};
  };
  const int64_t q_size = layer.features(kQ), kv_size = layer.features(kK);
  float* q = stream.work;
  float* k = q + rows * q_size;
  float* v = k + rows * kv_size;
  float* attended = v + rows * kv_size;
  void* const qkv[] = {q, k, v};
  run_linears(normed(stream.in, hidden_size_, layer.norms[kInput]), layer.matrices + kQ, qkv, 3);
  attention.q = {q, attention.tokens * q_size, q_size};
  attention.k = {k, attention.tokens * kv_size, kv_size};
  attention.v = {v, attention.tokens * kv_size, kv_size};
  attention.out = attended;
  run_attention(attention);
  run_linear_add(normed(attended, q_size, layer.norms[kAttnSub]), layer.matrices[kO], stream.in, stream.middle);

  float* gated = stream.work;
  run_squared_relu_glu(normed(stream.middle, hidden_size_, layer.norms[kPostAttention]), layer.matrices[kGate],
                       layer.matrices[kUp], gated);
  run_linear_add(normed(gated, layer.features(kGate), layer.norms[kFfnSub]), layer.matrices[kDown], stream.middle,
                 stream.out);
}

}  // namespace bitnet_ops
