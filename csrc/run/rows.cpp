#include "run/rows.h"

#include <cstring>

#include "run/dispatch.h"
#include "run/file_memory.h"
#include "run/parallel.h"
#include "run/scratch.h"

namespace bitnet_ops {
namespace {

double ns_per_row(const Rows& rows) { return static_cast<double>(rows.elements + 1) * kNsPerQuantizedElement; }

}  // namespace

void run_quantize(const Rows& rows, int8_t* q, float* x_scale) {
  const KernelTable& table = kernels();
  parallel(rows.count, ns_per_row(rows), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t unused_sum;
      table.quantize_row(row_at(rows.x, row, rows.elements, rows.dtype), rows.dtype, rows.elements,
                         q + row * rows.elements, rows.elements, x_scale + row, &unused_sum);
    }
  });
}

void run_quantize_16(const Rows& rows, int16_t* q, float* x_scale) {
  const KernelTable& table = kernels();
  static thread_local Scratch scratch;
  int8_t* hi = static_cast<int8_t*>(scratch.reserve(static_cast<size_t>(2 * rows.elements)));
  int8_t* lo = hi + rows.elements;
  for (int64_t row = 0; row < rows.count; ++row) {
    int32_t unused_sums[2];
    table.quantize_row_16(row_at(rows.x, row, rows.elements, rows.dtype), rows.dtype, rows.elements, hi, lo,
                          rows.elements, x_scale + row, unused_sums);
    for (int64_t k = 0; k < rows.elements; ++k) {
      q[row * rows.elements + k] = static_cast<int16_t>(256 * hi[k] + lo[k]);
    }
  }
}

void run_gather(const Rows& all, const int64_t* ids, int64_t count, void* out) {
  const size_t row_bytes = static_cast<size_t>(all.elements) * element_bytes(all.dtype);
  const FileRows file(all.x, all.count, row_bytes, count);
  parallel(count, ns_per_row(all), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* place = row_at(out, i, all.elements, all.dtype);
      if (file.in_file()) {
        file.copy(ids[i], 1, place);
      } else {
        std::memcpy(place, row_at(all.x, ids[i], all.elements, all.dtype), row_bytes);
      }
    }
  });
}

void run_rms_norm(const Rows& rows, const void* weight, DType weight_dtype, float eps, void* out) {
  const KernelTable& table = kernels();
  const float* wide_weight = static_cast<const float*>(weight);
  if (weight_dtype != DType::kFloat32) {
    static thread_local Scratch scratch;
    float* wide = static_cast<float*>(scratch.reserve(static_cast<size_t>(rows.elements) * sizeof(float)));
    table.widen_row(weight, weight_dtype, rows.elements, wide, rows.elements);
    wide_weight = wide;
  }
  parallel(rows.count, ns_per_row(rows), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      table.rms_norm_row(row_at(rows.x, row, rows.elements, rows.dtype), rows.dtype, wide_weight, eps, rows.elements,
                         row_at(out, row, rows.elements, rows.dtype));
    }
  });
}

}  // namespace bitnet_ops
