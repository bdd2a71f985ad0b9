#include "run/fused.h"

#include <type_traits>
#include <vector>

#include "run/dispatch.h"
#include "kernels/float_convert.h"
#include "run/scratch.h"
#include "run/parallel.h"
#include "run/rows.h"

namespace bitnet_ops {
namespace {

Product product_on(const QuantizedRows& rows, const TernaryMatrix& matrix, const Activations& activations, void* out) {
  Product product = product_of(rows, matrix, activations.tokens);
  product.out_dtype = activations.dtype;
  product.out = out;
  return product;
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

void run_linears(const Activations& activations, const TernaryMatrix* matrices, void* const* outs, size_t count) {
  const KernelTable& table = kernels();
  const QuantizedRows rows = quantize_rows(activations, 1, 0, table);
  static thread_local std::vector<Product> products;
  products.clear();
  for (size_t i = 0; i < count; ++i) {
    if (matrices[i].size.out_features != 0) products.push_back(product_on(rows, matrices[i], activations, outs[i]));
  }
  if (!products.empty()) run_products(products, table);
}

void run_linear_add(const Activations& activations, const TernaryMatrix& matrix, const void* residual, void* out) {
  const KernelTable& table = kernels();
  const QuantizedRows rows = quantize_rows(activations, 1, 0, table);
  Product product = product_on(rows, matrix, activations, out);
  run_product(product, table);
  const int64_t out_features = matrix.size.out_features;
  with_storage(activations.dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    parallel(activations.tokens, static_cast<double>(out_features) * kNsPerElement, [&](int64_t begin, int64_t end) {
      add_residual(static_cast<const T*>(residual) + begin * out_features, static_cast<T*>(out) + begin * out_features,
                   (end - begin) * out_features);
    });
  });
}

void run_squared_relu_glu(const Activations& activations, const TernaryMatrix& gate, const TernaryMatrix& up, void* out) {
  const KernelTable& table = kernels();
  const DType dtype = activations.dtype;
  const int64_t tokens = activations.tokens;
  const int64_t features = gate.size.out_features;
  const QuantizedRows rows = quantize_rows(activations, 1, 0, table);
  static thread_local Scratch scratch;
  const int64_t count = tokens * features;
  const int64_t result_bytes = round_up(count * static_cast<int64_t>(element_bytes(dtype)), kBlockBytes);
  char* base = static_cast<char*>(scratch.reserve(static_cast<size_t>(2 * result_bytes + count)));
  bool* open = reinterpret_cast<bool*>(base + 2 * result_bytes);
  Product gate_product = product_on(rows, gate, activations, base);
  Product up_product = product_on(rows, up, activations, base + result_bytes);
  // Few tokens: rows of up whose gate is closed are never read. Many: together some gate is always open.
  const bool skips = up.layout == Layout::kRow && tokens <= kMaxSparseRows;
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
      squared_relu_times(gates + begin * features, ups + begin * features, static_cast<T*>(out) + begin * features,
                         (end - begin) * features);
    });
  });
}

}  // namespace bitnet_ops
