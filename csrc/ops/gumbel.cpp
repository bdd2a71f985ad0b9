#include "ops/gumbel.h"

#include <vector>

#include "run/gumbel.h"

namespace bitnet_ops {

Tensor gumbel_noise(const Tensor& seed_any, int64_t size) {
  constexpr const char* kOp = "gumbel_noise";
  if (!seed_any.is_cpu() || dtype_code(seed_any) != dtypes().int64) {
    refuse(kOp, "seed", "a CPU tensor of int64", describe(seed_any));
  }
  check_size(kOp, "size", size);
  const Tensor seed = as_contiguous(seed_any);
  std::vector<int64_t> shape = shape_of(seed);
  const int64_t rows = rows_of(seed) * (shape.empty() ? 1 : shape.back());
  shape.push_back(size);
  const Tensor noise = empty(shape, dtypes().float32);
  run_gumbel_noise(data<int64_t>(seed), rows, size, mutable_data<float>(noise));
  return noise;
}

}  // namespace bitnet_ops
