// All layers of a decoder in one call; bitnet_ops/ops/ documents it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tensors.h"

namespace bitnet_ops {

Tensor decoder_layers(const Tensor& x, const std::vector<Tensor>& norm_weight, double eps,
                      const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                      const std::vector<std::string>& layouts, const Tensor& cos, const Tensor& sin,
                      const Tensor& start, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale);

}  // namespace bitnet_ops
