// Several steps of a decoder layer, on what operators have checked: the same kernels in the same order as the steps
// one by one, without the tensors between.
#pragma once

#include <cstddef>

#include "run/ternary.h"

namespace bitnet_ops {

// All results are [tokens][out_features] in the dtype of the activations; all of these have tokens.

// The product with each of several matrices.
void run_linears(const Activations& activations, const TernaryMatrix* matrices, void* const* outs, size_t count);

// residual + the product with a matrix. `out` is other memory than the residual's.
void run_linear_add(const Activations& activations, const TernaryMatrix& matrix, const void* residual, void* out);

// relu(gate)^2 * up, of the products with two matrices of equal size.
void run_squared_relu_glu(const Activations& activations, const TernaryMatrix& gate, const TernaryMatrix& up, void* out);

}  // namespace bitnet_ops
