#include "ops/ternary.h"

#include <cstring>

#include "ops/packed_checks.h"
#include "run/dispatch.h"
#include "run/parallel.h"
#include "run/scratch.h"
#include "run/ternary.h"

namespace bitnet_ops {

Tensor ternary_matmul(const Tensor& q_any, const Tensor& packed_any, int64_t out_features,
                      const std::string& layout_name) {
  constexpr const char* kOp = "ternary_matmul";
  const Layout layout = check_layout(kOp, layout_name);
  check_size(kOp, "out_features", out_features);
  if (!q_any.is_cpu() || dtype_code(q_any) != dtypes().int8 || q_any.dim() != 2) {
    refuse(kOp, "q", "a CPU tensor int8 [tokens, in_features]", describe(q_any));
  }
  const int64_t tokens = q_any.size(0);
  const int64_t in_features = q_any.size(1);
  check_in_features(kOp, "q", in_features, most_in_features(layout));
  const MatrixSize size{out_features, in_features};
  check_packed(kOp, "packed", packed_any, layout, layout_name, size);
  const Tensor q = as_contiguous(q_any);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor out = empty({tokens, out_features}, dtypes().int32);
  if (tokens == 0 || out_features == 0) return out;

  const QuantizedRows rows = reserve_rows(tokens, 1, in_features);
  const int8_t* in = data<int8_t>(q);
  parallel(tokens, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int8_t* copy = rows.q + row * rows.q_stride;
      std::memcpy(copy, in + row * in_features, static_cast<size_t>(in_features));
      std::memset(copy + in_features, 0, static_cast<size_t>(rows.q_stride - in_features));
      int32_t sum = 0;
      for (int64_t k = 0; k < in_features; ++k) sum += copy[k];
      rows.q_sum[row] = sum;
    }
  });
  Product product = product_of(rows, matrix_of(packed, nullptr, layout, size), tokens);
  product.out_dtype = DType::kInt32;
  product.out = mutable_data<int32_t>(out);
  run_product(product, kernels());
  return out;
}

Tensor ternary_linear(const Tensor& x_any, const Tensor& packed_any, const Tensor& weight_scale_any,
                      const std::optional<Tensor>& bias_any, int64_t out_features, const std::string& layout_name,
                      int64_t activation_bits, int64_t group_size, const std::optional<Tensor>& active_any) {
  constexpr const char* kOp = "ternary_linear";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  const CheckedMatrix checked(kOp, "", packed_any, weight_scale_any, bias_any,
                              {{out_features, in_features}, layout_name, activation_bits, group_size});
  const TernaryMatrix& matrix = checked.view;
  if (active_any.has_value()) {
    if (matrix.layout != Layout::kRow) {
      refuse(kOp, "active", "None with layout '" + layout_name + "' (only layout 'row' skips rows)",
             describe(*active_any));
    }
    if (!active_any->is_cpu() || dtype_code(*active_any) != dtypes().boolean ||
        shape_of(*active_any) != with_last(x_any, out_features)) {
      refuse(kOp, "active", "a CPU tensor bool " + shape_text(with_last(x_any, out_features)), describe(*active_any));
    }
  }

  const Tensor x = as_contiguous(x_any);
  const std::optional<Tensor> active =
      active_any.has_value() ? std::optional<Tensor>(as_contiguous(*active_any)) : std::nullopt;
  const Tensor out = empty(with_last(x, out_features), dtype_code(x));
  const int64_t tokens = rows_of(x);
  if (tokens == 0 || out_features == 0) return out;

  const KernelTable& table = kernels();
  const Activations activations{data<void>(x), dtype, tokens, in_features, nullptr, 0.0f};
  const QuantizedRows rows = quantize_rows(activations, matrix.planes, matrix.group_size, table);
  Product product = product_of(rows, matrix, tokens);
  product.out_dtype = dtype;
  product.out = mutable_data<void>(out);
  const bool* wanted = active.has_value() ? data<bool>(*active) : nullptr;
  run_product(product, table, wanted);
  if (wanted != nullptr) zero_inactive(wanted, product);
  return out;
}

}  // namespace bitnet_ops
