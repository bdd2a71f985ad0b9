// The operators that take one row after another; bitnet_ops/ops/ documents them.
#pragma once

#include <cstdint>
#include <tuple>

#include "ops/tensors.h"

namespace bitnet_ops {

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x, int64_t bits);

Tensor embedding(const Tensor& ids, const Tensor& weight);

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);

}  // namespace bitnet_ops
