// Runs ternary products: quantises the rows, chooses the loop for a layout, shares tiles, rows or panels out among
// threads. Between the operators, which check arguments, and the kernels, which know no threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include "kernels/kernel_table.h"

namespace bitnet_ops {

// Rows of q (two for a token with 16-bit activations), their sums over groups of inputs, and the scales.
struct QuantizedRows {
  int8_t* q;
  int64_t q_stride;
  int32_t* q_sum;
  float* x_scale;
};

// Room for them in this thread's scratch.
QuantizedRows reserve_rows(int64_t rows, int64_t groups, int64_t in_features);

// What is quantised: rows of a contiguous tensor, each normed first if norm_weight is not null.
struct Activations {
  const void* x;
  DType dtype;
  int64_t tokens;
  int64_t in_features;
  const float* norm_weight;
  float eps;
};

// Quantises all rows to 8 bits (one plane) or 16 (two), with sums over groups of inputs.
QuantizedRows quantize_rows(const Activations& activations, int64_t planes, int64_t group_size,
                            const KernelTable& table);

// A matrix on its own: checked, and of memory that outlives its products.
struct TernaryMatrix {
  const uint8_t* packed;
  int64_t blocks;            // as in TernaryProduct
  const void* weight_scale;  // [out_features], with groups [tiles][groups][16]; null for a product without scales
  Layout layout;
  MatrixSize size;
  DType scale_dtype = DType::kFloat32;
  const float* bias = nullptr;  // [out_features] or null
  int64_t planes = 1;           // of its activations: 1 for 8 bits, 2 for 16
  int64_t group_size = 0;       // inputs that share a scale; 0: one scale for a whole row

  int64_t groups() const { return group_size == 0 ? 1 : divide_up(size.in_features, group_size); }

  // Whether both multiply the same rows of q.
  bool quantizes_like(const TernaryMatrix& other) const {
    return size.in_features == other.size.in_features && planes == other.planes && group_size == other.group_size;
  }
};

struct Product : TernaryProduct {
  MatrixSize size;
  Layout layout;
  int64_t rows() const { return tokens * planes; }
};

// Everything but the results, of rows that were quantised as the matrix says.
Product product_of(const QuantizedRows& rows, const TernaryMatrix& matrix, int64_t tokens);

// `active` [tokens][out_features], for layout row: results that nobody wants are undefined afterwards. Null: all.
void run_product(Product& product, const KernelTable& table, const bool* active = nullptr);

// Several matrices on the same rows, in one parallel region where their layout allows.
void run_products(Product* products, size_t count, const KernelTable& table);

// Sets results that are not wanted to zero.
void zero_inactive(const bool* active, const Product& product);

// Between layouts.
size_t tile16_bytes(MatrixSize size);
void fill_tile16(Layout layout, const uint8_t* packed, MatrixSize size, uint8_t* tile16);

}  // namespace bitnet_ops
