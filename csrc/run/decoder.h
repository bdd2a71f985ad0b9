// The layers of a decoder, checked once and then run any number of times: between its operators a decoded token would
// run several milliseconds of Python, and between tensors still one or two of handing them on, all out of caches that
// the weights have just been streamed through (bench/LOG.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/attention.h"
#include "ops/packed_checks.h"
#include "ops/tensors.h"

namespace bitnet_ops {

// What the layers are made of, as bitnet_ops/ops/ documents it for the operator decoder_layers.
struct LayerTensors {
  std::vector<Tensor> norm_weight;
  double eps;
  std::vector<Tensor> packed;
  std::vector<Tensor> weight_scale;
  std::vector<std::string> layouts;
};

class DecoderLayers {
 public:
  // Throws what an operator throws at wrong arguments.
  explicit DecoderLayers(const LayerTensors& tensors);

  // Whether the tensors still have the memory that was checked: somebody may have given them other.
  bool is_current() const;

  // The operator. Keys and values are changed in place.
  Tensor run(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& start, const Tensor& keys,
             const Tensor& values, const std::optional<Tensor>& key_scale,
             const std::optional<Tensor>& value_scale) const;

 private:
  // Places within a layer's part of the lists.
  enum Norm { kInput, kAttnSub, kPostAttention, kFfnSub, kNorms };
  enum Projection { kQ, kK, kV, kO, kGate, kUp, kDown, kProjections };

  struct Layer {
    const float* norms[kNorms];
    TernaryMatrix matrices[kProjections];

    int64_t features(Projection projection) const { return matrices[projection].size.out_features; }
  };

  // Where a layer finds and leaves the residual stream, [rows][hidden_size], and memory for what is between.
  struct Stream {
    const float* in;
    float* middle;  // between attention and feed-forward
    float* out;     // may be `in`
    float* work;    // largest_attention_ or largest_feed_forward_ floats a row
  };

  const float* keep_norm(const Tensor& weight, int64_t features);
  TernaryMatrix keep_matrix(const Tensor& packed, const Tensor& weight_scale, const std::string& layout,
                            MatrixSize size);
  void keep(const Tensor& given, const Tensor& used);

  // Returns the first layer's part of the cache.
  CachePart check_heads_and_cache(AttentionSizes sizes, const Tensor& keys, const Tensor& values,
                                  const std::optional<Tensor>& key_scale,
                                  const std::optional<Tensor>& value_scale) const;
  void run_layer(const Layer& layer, Attention attention, const Stream& stream) const;

  struct Memory {
    Tensor given;
    Tensor kept;  // the same memory, which thus stays when `given` gets other; or a contiguous copy
    const void* address;
  };

  std::vector<Memory> memory_;
  bool copied_ = false;
  std::vector<Layer> layers_;
  float eps_;
  int64_t hidden_size_;
  int64_t largest_attention_ = 0;  // floats of q, k, v and the result, for a token
  int64_t largest_feed_forward_ = 0;
};

}  // namespace bitnet_ops
