// Rows of a contiguous matrix whose storage type is known at run time only: where they are, and what is done to each by
// itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

namespace bitnet_ops {

constexpr size_t element_bytes(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 4; }

inline const char* row_at(const void* base, int64_t row, int64_t row_elements, DType dtype) {
  return static_cast<const char*>(base) + row * row_elements * static_cast<int64_t>(element_bytes(dtype));
}

inline char* row_at(void* base, int64_t row, int64_t row_elements, DType dtype) {
  return static_cast<char*>(base) + row * row_elements * static_cast<int64_t>(element_bytes(dtype));
}

struct Rows {
  const void* x;
  DType dtype;
  int64_t count;
  int64_t elements;  // of a row
};

// Rows of q, and a scale for each.
void run_quantize(const Rows& rows, int8_t* q, float* x_scale);
void run_quantize_16(const Rows& rows, int16_t* q, float* x_scale);

// Rows ids[0 .. count) of a matrix with `all.count` rows, all ids among them; `out` has their dtype.
void run_gather(const Rows& all, const int64_t* ids, int64_t count, void* out);

// `out` has the dtype of the rows.
void run_rms_norm(const Rows& rows, const void* weight, DType weight_dtype, float eps, void* out);

}  // namespace bitnet_ops
