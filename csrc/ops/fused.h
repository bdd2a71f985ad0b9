// Operators that do in one call what a decoder layer does in several; bitnet_ops/ops/ documents them. Each equals
// the composition of its parts bit for bit: the same kernels in the same order, without the tensors between.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/tensors.h"

namespace bitnet_ops {

std::vector<Tensor> norm_linears(const Tensor& x, const Tensor& norm_weight, double eps,
                                 const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                                 const std::vector<int64_t>& out_features, const std::string& layout);

Tensor norm_linear_add(const Tensor& x, const Tensor& norm_weight, double eps, const Tensor& packed,
                       const Tensor& weight_scale, const std::string& layout, const Tensor& residual);

Tensor norm_squared_relu_glu(const Tensor& x, const Tensor& norm_weight, double eps, const Tensor& gate,
                             const Tensor& gate_scale, const std::string& gate_layout, const Tensor& up,
                             const Tensor& up_scale, const std::string& up_layout);

}  // namespace bitnet_ops
