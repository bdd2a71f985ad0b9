#include "ops/rows.h"

#include <string>
#include <vector>

#include "run/rows.h"

namespace bitnet_ops {

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x_any, int64_t bits) {
  constexpr const char* kOp = "quantize_activations";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  check_in_features(kOp, "x", in_features);
  check_activation_bits(kOp, "bits", bits);
  const Tensor x = as_contiguous(x_any);

  std::vector<int64_t> sizes = shape_of(x);
  const Tensor q = empty(sizes, bits == 16 ? dtypes().int16 : dtypes().int8);
  sizes.pop_back();
  const Tensor x_scale = empty(sizes, dtypes().float32);
  const Rows rows{data<void>(x), dtype, rows_of(x), in_features};
  if (bits == 16) {
    run_quantize_16(rows, mutable_data<int16_t>(q), mutable_data<float>(x_scale));
  } else {
    run_quantize(rows, mutable_data<int8_t>(q), mutable_data<float>(x_scale));
  }
  return {q, x_scale};
}

Tensor embedding(const Tensor& ids_any, const Tensor& weight_any) {
  constexpr const char* kOp = "embedding";
  if (!ids_any.is_cpu() || dtype_code(ids_any) != dtypes().int64) {
    refuse(kOp, "ids", "a CPU tensor int64", describe(ids_any));
  }
  const DType dtype = check_float(kOp, "weight", weight_any);
  if (weight_any.dim() != 2) refuse(kOp, "weight", "shape [vocabulary, features]", describe(weight_any));
  const Tensor ids = as_contiguous(ids_any);
  const Tensor weight = as_contiguous(weight_any);
  const Rows rows{data<void>(weight), dtype, weight.size(0), weight.size(1)};
  const int64_t* id = data<int64_t>(ids);
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i) {
    if (id[i] >= 0 && id[i] < rows.count) continue;
    refuse(kOp, "ids",
           "ids from 0 to " + std::to_string(rows.count - 1) + " (weight has " + std::to_string(rows.count) + " rows)",
           std::to_string(id[i]));
  }
  std::vector<int64_t> sizes = shape_of(ids);
  sizes.push_back(rows.elements);
  const Tensor out = empty(sizes, dtype_code(weight));
  if (out.numel() != 0) run_gather(rows, id, count, mutable_data<void>(out));
  return out;
}

Tensor rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps) {
  constexpr const char* kOp = "rms_norm";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t features = last_size(kOp, "x", x_any, "a tensor [..., features]");
  const DType weight_dtype = check_float(kOp, "weight", weight_any);
  if (!shape_is(weight_any, {features})) {
    refuse(kOp, "weight", "shape " + shape_text({features}) + " (the last size of x)", describe(weight_any));
  }
  if (!(eps >= 0.0)) refuse(kOp, "eps", "a number of at least 0", std::to_string(eps));
  const Tensor x = as_contiguous(x_any);
  const Tensor weight = as_contiguous(weight_any);
  const Tensor out = empty(shape_of(x), dtype_code(x));
  run_rms_norm({data<void>(x), dtype, rows_of(x), features}, data<void>(weight), weight_dtype, static_cast<float>(eps),
               mutable_data<void>(out));
  return out;
}

}  // namespace bitnet_ops
