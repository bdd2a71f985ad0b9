// What operators on packed weights ask of their arguments.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel_table.h"
#include "ops/tensors.h"
#include "run/ternary.h"

namespace bitnet_ops {

inline Layout check_layout(const char* op, const std::string& name, const char* argument = "layout") {
  if (name == "tile16") return Layout::kTile16;
  if (name == "tile16_base3") return Layout::kTile16Base3;
  if (name == "row") return Layout::kRow;
  if (name == "column") return Layout::kColumn;
  refuse(op, argument, "'tile16', 'tile16_base3', 'row' or 'column'", "'" + name + "'");
}

inline int64_t most_in_features(Layout layout) { return layout == Layout::kColumn ? kMaxColumnInFeatures : kMaxInFeatures; }

inline std::vector<int64_t> packed_sizes(Layout layout, MatrixSize size) {
  switch (layout) {
    case Layout::kTile16:
      return {tiles_of(size.out_features), blocks_of(size.in_features), kBlockBytes};
    case Layout::kTile16Base3:
      return {tiles_of(size.out_features), divide_up(size.in_features, kBase3BlockInputs), kBlockBytes};
    case Layout::kRow:
      return {size.out_features, divide_up(size.in_features, kChunkInputs), kBlockBytes};
    case Layout::kColumn:
      return {size.in_features, divide_up(size.out_features, kPanelRows), kBlockBytes};
  }
  return {};
}

inline void check_packed(const char* op, const char* argument, const Tensor& packed, Layout layout,
                         const std::string& layout_name, MatrixSize size) {
  const std::vector<int64_t> sizes = packed_sizes(layout, size);
  if (packed.is_cpu() && dtype_code(packed) == codes().uint8 && shape_is(packed, {sizes[0], sizes[1], sizes[2]})) {
    return;
  }
  refuse(op, argument,
         "a CPU tensor uint8 " + shape_text(sizes) + " (" + layout_name + " of out_features=" +
             std::to_string(size.out_features) + ", in_features=" + std::to_string(size.in_features) + ")",
         describe(packed));
}

// `weight_scale` may be null.
inline TernaryMatrix matrix_of(const Tensor& packed, const Tensor* weight_scale, Layout layout, MatrixSize size) {
  return {data<uint8_t>(packed), packed.size(1), weight_scale == nullptr ? nullptr : data<float>(*weight_scale), layout,
          size};
}

// A matrix and its scales, checked; the tensors keep what the view looks at.
struct CheckedMatrix {
  Tensor packed;
  Tensor weight_scale;
  Layout layout;
  MatrixSize size;

  CheckedMatrix(const char* op, const char* packed_name, const char* scale_name, const Tensor& packed_any,
                const Tensor& weight_scale_any, const std::string& layout_name, MatrixSize size)
      : packed(as_contiguous(packed_any)),
        weight_scale(as_contiguous(weight_scale_any)),
        layout(check_layout(op, layout_name)),
        size(size) {
    check_in_features(op, "x", size.in_features, most_in_features(layout));
    check_packed(op, packed_name, packed, layout, layout_name, size);
    check(op, scale_name, weight_scale, codes().float32, {size.out_features});
  }

  TernaryMatrix view() const { return matrix_of(packed, &weight_scale, layout, size); }
};

// A scale has one element a row of the matrix, which is how many rows there are.
inline int64_t rows_of_matrix(const char* op, const char* argument, const Tensor& weight_scale) {
  if (weight_scale.dim() != 1) refuse(op, argument, "a tensor float32 [out_features]", describe(weight_scale));
  return weight_scale.size(0);
}

}  // namespace bitnet_ops
