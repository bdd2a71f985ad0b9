// The operator that makes noise for sampling; bitnet_ops/ops/ documents it.
#pragma once

#include <cstdint>

#include "ops/tensors.h"

namespace bitnet_ops {

Tensor gumbel_noise(const Tensor& seed, int64_t size);

}  // namespace bitnet_ops
