#include "ops/fused.h"

#include "run/fused.h"
#include "ops/packed_checks.h"

namespace bitnet_ops {
namespace {

// The checked input of an operator: rows of x, which the norm's weight goes with.
struct NormedInput {
  Tensor x;
  Tensor norm_weight;
  Activations activations;

  NormedInput(const char* op, const Tensor& x_any, const Tensor& norm_weight_any, double eps)
      : x(as_contiguous(x_any)), norm_weight(as_contiguous(norm_weight_any)) {
    const DType dtype = check_float(op, "x", x);
    const int64_t in_features = last_size(op, "x", x, "a tensor [..., in_features]");
    check(op, "norm_weight", norm_weight, codes().float32, {in_features});
    if (!(eps >= 0.0)) refuse(op, "eps", "a number of at least 0", std::to_string(eps));
    activations = {data<void>(x), dtype, rows_of(x), in_features, data<float>(norm_weight), static_cast<float>(eps)};
  }
};

}  // namespace

std::vector<Tensor> norm_linears(const Tensor& x_any, const Tensor& norm_weight, double eps,
                                 const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                                 const std::vector<int64_t>& out_features, const std::string& layout) {
  constexpr const char* kOp = "norm_linears";
  const NormedInput input(kOp, x_any, norm_weight, eps);
  if (packed.empty()) refuse(kOp, "packed", "at least one matrix", "an empty list");
  if (weight_scale.size() != packed.size() || out_features.size() != packed.size()) {
    refuse(kOp, "weight_scale and out_features", std::to_string(packed.size()) + " elements, as many as packed",
           std::to_string(weight_scale.size()) + " and " + std::to_string(out_features.size()));
  }
  std::vector<CheckedMatrix> matrices;
  std::vector<Tensor> results;
  for (size_t i = 0; i < packed.size(); ++i) {
    check_size(kOp, "out_features", out_features[i]);
    const MatrixSize size{out_features[i], input.activations.in_features};
    matrices.emplace_back(kOp, "packed", "weight_scale", packed[i], weight_scale[i], layout, size);
    results.push_back(empty(with_last(input.x, out_features[i]), dtype_code(input.x)));
  }
  if (input.activations.tokens == 0) return results;
  std::vector<TernaryMatrix> views;
  std::vector<void*> outs;
  for (size_t i = 0; i < packed.size(); ++i) {
    views.push_back(matrices[i].view());
    outs.push_back(mutable_data<void>(results[i]));
  }
  run_linears(input.activations, views.data(), outs.data(), views.size());
  return results;
}

Tensor norm_linear_add(const Tensor& x_any, const Tensor& norm_weight, double eps, const Tensor& packed,
                       const Tensor& weight_scale, const std::string& layout, const Tensor& residual_any) {
  constexpr const char* kOp = "norm_linear_add";
  const NormedInput input(kOp, x_any, norm_weight, eps);
  const int64_t out_features = rows_of_matrix(kOp, "weight_scale", weight_scale);
  const CheckedMatrix matrix(kOp, "packed", "weight_scale", packed, weight_scale, layout,
                      {out_features, input.activations.in_features});
  const std::vector<int64_t> sizes = with_last(input.x, out_features);
  if (!residual_any.is_cpu() || dtype_code(residual_any) != dtype_code(input.x) || shape_of(residual_any) != sizes) {
    refuse(kOp, "residual", "a CPU tensor " + dtype_name(dtype_code(input.x)) + " " + shape_text(sizes),
           describe(residual_any));
  }
  const Tensor residual = as_contiguous(residual_any);
  const Tensor out = empty(sizes, dtype_code(input.x));
  if (input.activations.tokens == 0 || out_features == 0) return out;
  run_linear_add(input.activations, matrix.view(), data<void>(residual), mutable_data<void>(out));
  return out;
}

Tensor norm_squared_relu_glu(const Tensor& x_any, const Tensor& norm_weight, double eps, const Tensor& gate,
                             const Tensor& gate_scale, const std::string& gate_layout, const Tensor& up,
                             const Tensor& up_scale, const std::string& up_layout) {
  constexpr const char* kOp = "norm_squared_relu_glu";
  const NormedInput input(kOp, x_any, norm_weight, eps);
  const int64_t features = rows_of_matrix(kOp, "gate_scale", gate_scale);
  const MatrixSize size{features, input.activations.in_features};
  const CheckedMatrix gate_matrix(kOp, "gate", "gate_scale", gate, gate_scale, gate_layout, size);
  const CheckedMatrix up_matrix(kOp, "up", "up_scale", up, up_scale, up_layout, size);
  const Tensor out = empty(with_last(input.x, features), dtype_code(input.x));
  if (input.activations.tokens == 0 || features == 0) return out;
  run_squared_relu_glu(input.activations, gate_matrix.view(), up_matrix.view(), mutable_data<void>(out));
  return out;
}

}  // namespace bitnet_ops
