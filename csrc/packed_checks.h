// What operators on packed weights ask of their arguments.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"
#include "tensors.h"

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

}  // namespace bitnet_ops
