// The layers of a decoder as operators: with all their weights as arguments, which bitnet_ops/ops/ documents; and
// prepared beforehand, so that a call hands on no weights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/tensors.h"

namespace bitnet_ops {

Tensor decoder_layers(const Tensor& x, const std::vector<Tensor>& norm_weight, double eps,
                      const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                      const std::vector<std::string>& layouts, const Tensor& cos, const Tensor& sin,
                      const Tensor& start, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale);

// Keeps the weights and returns a number for them, which run_decoder_layers takes instead until it is released.
int64_t prepare_decoder_layers(const std::vector<Tensor>& norm_weight, double eps, const std::vector<Tensor>& packed,
                               const std::vector<Tensor>& weight_scale, const std::vector<std::string>& layouts);

Tensor run_decoder_layers(const Tensor& x, int64_t prepared, const Tensor& cos, const Tensor& sin, const Tensor& start,
                          const Tensor& keys, const Tensor& values, const std::optional<Tensor>& key_scale,
                          const std::optional<Tensor>& value_scale);

void release_decoder_layers(int64_t prepared);

}  // namespace bitnet_ops
