// Rows of a contiguous matrix whose storage type is known at run time only.
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

}  // namespace bitnet_ops
