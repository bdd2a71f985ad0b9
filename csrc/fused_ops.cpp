#include "fused_ops.h"

#include <cstring>

#include "dispatch.h"
#include "float_convert.h"
#include "packed_checks.h"
#include "scratch.h"
#include "ternary_run.h"

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

// A checked matrix; results go to `out`, of the dtype of x or of float32.
struct Matrix {
  Tensor packed;
  Tensor weight_scale;
  Layout layout;
  MatrixSize size;

  Matrix(const char* op, const char* packed_name, const char* scale_name, const Tensor& packed_any,
         const Tensor& weight_scale_any, const std::string& layout_name, MatrixSize size)
      : packed(as_contiguous(packed_any)),
        weight_scale(as_contiguous(weight_scale_any)),
        layout(check_layout(op, layout_name)),
        size(size) {
    check_in_features(op, "x", size.in_features, most_in_features(layout));
    check_packed(op, packed_name, packed, layout, layout_name, size);
    check(op, scale_name, weight_scale, codes().float32, {size.out_features});
  }

  Product product(const QuantizedRows& rows, int64_t tokens, DType out_dtype, void* out) const {
    Product product = product_of(rows, packed, layout, size, tokens);
    product.weight_scale = data<float>(weight_scale);
    product.out_dtype = out_dtype;
    product.out = out;
    return product;
  }
};

// A scale has one element a row of the matrix, which is how many rows there are.
int64_t rows_of_matrix(const char* op, const char* argument, const Tensor& weight_scale) {
  if (weight_scale.dim() != 1) refuse(op, argument, "a tensor float32 [out_features]", describe(weight_scale));
  return weight_scale.size(0);
}

template <class T>
void add_residual(const T* residual, T* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(to_float(residual[i]) + to_float(y[i]), y + i);
}

// relu(gate)^2 * up, rounded after each step as torch does; up is not looked at where the gate is closed.
template <class T>
void squared_relu_times(const T* gate, const T* up, T* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = to_float(gate[i]);
    if (g <= 0.0f) {
      from_float(0.0f, y + i);
      continue;
    }
    T square;
    from_float(g * g, &square);
    from_float(to_float(square) * to_float(up[i]), y + i);
  }
}

// The product first and the choice after it, for vectors. Where the gate is closed, up may be any bits.
void squared_relu_times(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float product = gate[i] * gate[i] * up[i];
    y[i] = gate[i] <= 0.0f ? 0.0f : product;
  }
}

// Calls f with a null pointer to the storage type of `dtype`.
template <class F>
void with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// A NaN opens a gate, for its product is NaN.
template <class T>
void open_gates(const T* gate, bool* open, int64_t count) {
  for (int64_t i = 0; i < count; ++i) open[i] = !(to_float(gate[i]) <= 0.0f);
}

constexpr double kNsPerElement = 0.3;  // of the elementwise loops here, reading and writing L2

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
  std::vector<Matrix> matrices;
  std::vector<Tensor> results;
  for (size_t i = 0; i < packed.size(); ++i) {
    check_size(kOp, "out_features", out_features[i]);
    const MatrixSize size{out_features[i], input.activations.in_features};
    matrices.emplace_back(kOp, "packed", "weight_scale", packed[i], weight_scale[i], layout, size);
    results.push_back(empty(with_last(input.x, out_features[i]), dtype_code(input.x)));
  }
  const int64_t tokens = input.activations.tokens;
  if (tokens == 0) return results;
  const KernelTable& table = kernels();
  const QuantizedRows rows = quantize_rows(input.activations, 1, 0, table);
  std::vector<Product> products;
  for (size_t i = 0; i < packed.size(); ++i) {
    if (out_features[i] == 0) continue;
    products.push_back(
        matrices[i].product(rows, tokens, input.activations.dtype, mutable_data<void>(results[i])));
  }
  if (!products.empty()) run_products(products, table);
  return results;
}

Tensor norm_linear_add(const Tensor& x_any, const Tensor& norm_weight, double eps, const Tensor& packed,
                       const Tensor& weight_scale, const std::string& layout, const Tensor& residual_any) {
  constexpr const char* kOp = "norm_linear_add";
  const NormedInput input(kOp, x_any, norm_weight, eps);
  const int64_t out_features = rows_of_matrix(kOp, "weight_scale", weight_scale);
  const Matrix matrix(kOp, "packed", "weight_scale", packed, weight_scale, layout,
                      {out_features, input.activations.in_features});
  const std::vector<int64_t> sizes = with_last(input.x, out_features);
  if (!residual_any.is_cpu() || dtype_code(residual_any) != dtype_code(input.x) || shape_of(residual_any) != sizes) {
    refuse(kOp, "residual", "a CPU tensor " + dtype_name(dtype_code(input.x)) + " " + shape_text(sizes),
           describe(residual_any));
  }
  const Tensor residual = as_contiguous(residual_any);
  const Tensor out = empty(sizes, dtype_code(input.x));
  const int64_t tokens = input.activations.tokens;
  if (tokens == 0 || out_features == 0) return out;
  const KernelTable& table = kernels();
  const QuantizedRows rows = quantize_rows(input.activations, 1, 0, table);
  Product product = matrix.product(rows, tokens, input.activations.dtype, mutable_data<void>(out));
  run_product(product, table);
  with_storage(input.activations.dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    parallel(tokens, static_cast<double>(out_features) * kNsPerElement, [&](int64_t begin, int64_t end) {
      add_residual(data<T>(residual) + begin * out_features, mutable_data<T>(out) + begin * out_features,
                   (end - begin) * out_features);
    });
  });
  return out;
}

Tensor norm_squared_relu_glu(const Tensor& x_any, const Tensor& norm_weight, double eps, const Tensor& gate,
                             const Tensor& gate_scale, const std::string& gate_layout, const Tensor& up,
                             const Tensor& up_scale, const std::string& up_layout) {
  constexpr const char* kOp = "norm_squared_relu_glu";
  const NormedInput input(kOp, x_any, norm_weight, eps);
  const int64_t features = rows_of_matrix(kOp, "gate_scale", gate_scale);
  const MatrixSize size{features, input.activations.in_features};
  const Matrix gate_matrix(kOp, "gate", "gate_scale", gate, gate_scale, gate_layout, size);
  const Matrix up_matrix(kOp, "up", "up_scale", up, up_scale, up_layout, size);
  const Tensor out = empty(with_last(input.x, features), dtype_code(input.x));
  const int64_t tokens = input.activations.tokens;
  if (tokens == 0 || features == 0) return out;

  const KernelTable& table = kernels();
  const DType dtype = input.activations.dtype;
  const QuantizedRows rows = quantize_rows(input.activations, 1, 0, table);
  static thread_local Scratch scratch;
  const int64_t count = tokens * features;
  const int64_t result_bytes = round_up(count * static_cast<int64_t>(element_bytes(dtype)), kBlockBytes);
  char* base = static_cast<char*>(scratch.reserve(static_cast<size_t>(2 * result_bytes + count)));
  bool* open = reinterpret_cast<bool*>(base + 2 * result_bytes);
  Product gate_product = gate_matrix.product(rows, tokens, dtype, base);
  Product up_product = up_matrix.product(rows, tokens, dtype, base + result_bytes);
  // Few tokens: rows of up whose gate is closed are never read. Many: together some gate is always open.
  const bool skips = up_matrix.layout == Layout::kRow && tokens <= kMaxSparseRows;
  if (skips) {
    run_product(gate_product, table);
  } else {
    std::vector<Product> both{gate_product, up_product};
    run_products(both, table);
  }
  with_storage(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    const T* gates = reinterpret_cast<const T*>(base);
    const T* ups = reinterpret_cast<const T*>(base + result_bytes);
    if (skips) {
      open_gates(gates, open, count);
      run_product(up_product, table, open);
    }
    parallel(tokens, static_cast<double>(features) * kNsPerElement, [&](int64_t begin, int64_t end) {
      squared_relu_times(gates + begin * features, ups + begin * features, mutable_data<T>(out) + begin * features,
                         (end - begin) * features);
    });
  });
  return out;
}

}  // namespace bitnet_ops
