// The operator glu, which bitnet_ops/ops/ documents.
#pragma once

#include <string>

#include "kernels/kernel_table.h"
#include "ops/tensors.h"

namespace bitnet_ops {

// "relu2", "silu" or "gelu_tanh".
Activation activation_of(const char* op, const char* argument, const std::string& name);

Tensor glu(const Tensor& gate, const Tensor& up, const std::string& activation);

}  // namespace bitnet_ops
