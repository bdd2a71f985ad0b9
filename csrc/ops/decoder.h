// The layers of a decoder as operators: with all their weights as arguments, and prepared beforehand, so that a call
// hands on no weights. bitnet_ops/ops/_decoder.py documents both.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/tensors.h"

namespace bitnet_ops {

Tensor decoder_layers(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<int64_t>& structure,
                      const std::vector<double>& constants, const Tensor& cos, const Tensor& sin,
                      const std::optional<Tensor>& start, const std::optional<Tensor>& keys,
                      const std::optional<Tensor>& values, const std::optional<Tensor>& key_scale,
                      const std::optional<Tensor>& value_scale, int64_t slot);

// Keeps the weights and returns a number for them, which run_prepared_layers takes instead until it is released.
int64_t prepare_layers(const std::vector<Tensor>& weights, const std::vector<int64_t>& structure,
                       const std::vector<double>& constants);

Tensor run_prepared_layers(const Tensor& x, int64_t prepared, const Tensor& cos, const Tensor& sin,
                           const std::optional<Tensor>& start, const std::optional<Tensor>& keys,
                           const std::optional<Tensor>& values, const std::optional<Tensor>& key_scale,
                           const std::optional<Tensor>& value_scale, int64_t slot);

void release_layers(int64_t prepared);

}  // namespace bitnet_ops
