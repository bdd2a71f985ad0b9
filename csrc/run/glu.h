// The gated linear unit's elementwise half, shared out among threads.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"

namespace bitnet_ops {

// out = activation(gate) * up, all three [rows][features]. `out` may be the memory of `gate` or of `up`.
void run_glu(Activation activation, const float* gate, const float* up, float* out, int64_t rows, int64_t features);

// The same in any storage type, which is rounded to once: in between everything is float32.
void run_glu(Activation activation, DType dtype, const void* gate, const void* up, void* out, int64_t rows,
             int64_t features);

}  // namespace bitnet_ops
