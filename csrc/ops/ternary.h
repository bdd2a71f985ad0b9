// The operators on packed ternary weights; bitnet_ops/ops/ documents them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "ops/tensors.h"

namespace bitnet_ops {

Tensor ternary_matmul(const Tensor& q, const Tensor& packed, int64_t out_features, const std::string& layout);

Tensor ternary_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, int64_t out_features, const std::string& layout,
                      int64_t activation_bits, int64_t group_size, const std::optional<Tensor>& active);

}  // namespace bitnet_ops
