// What operators on packed weights ask of their arguments.
#pragma once

#include <optional>
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

inline int64_t most_in_features(Layout layout) {
  return layout == Layout::kColumn ? kMaxColumnInFeatures : kMaxInFeatures;
}

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
  if (packed.is_cpu() && dtype_code(packed) == dtypes().uint8 && shape_is(packed, {sizes[0], sizes[1], sizes[2]})) {
    return;
  }
  refuse(op, argument,
         "a CPU tensor uint8 " + shape_text(sizes) + " (" + layout_name + " of out_features=" +
             std::to_string(size.out_features) + ", in_features=" + std::to_string(size.in_features) + ")",
         describe(packed));
}

// `weight_scale` may be null.
inline TernaryMatrix matrix_of(const Tensor& packed, const Tensor* weight_scale, Layout layout, MatrixSize size) {
  return {data<uint8_t>(packed), packed.size(1), weight_scale == nullptr ? nullptr : data<void>(*weight_scale), layout,
          size};
}

// What a projection is made of, as ternary_linear takes it.
struct ProjectionOptions {
  MatrixSize size;
  std::string layout = "tile16";
  int64_t activation_bits = 8;
  int64_t group_size = 0;
};

// A projection, checked; the tensors keep what the view looks at. `owner` goes in front of the arguments' names.
struct CheckedMatrix {
  Tensor packed;
  Tensor weight_scale;
  std::optional<Tensor> bias;
  TernaryMatrix view;

  CheckedMatrix(const char* op, const std::string& owner, const Tensor& packed_any, const Tensor& weight_scale_any,
                const std::optional<Tensor>& bias_any, const ProjectionOptions& options)
      : packed(packed_any), weight_scale(weight_scale_any), bias(bias_any) {
    const auto name = [&](const char* argument) { return owner + argument; };
    const auto [size, layout_name, activation_bits, group_size] = options;
    const Layout layout = check_layout(op, layout_name, name("layout").c_str());
    check_size(op, name("out_features").c_str(), size.out_features);
    check_in_features(op, "x", size.in_features, most_in_features(layout));
    check_activation_bits(op, name("activation_bits").c_str(), activation_bits);
    check_packed(op, name("packed").c_str(), packed, layout, layout_name, size);
    const bool half_scales = group_size != 0 && dtype_code(weight_scale) == dtypes().float16;
    if (group_size == 0) {
      check(op, name("weight_scale").c_str(), weight_scale, dtypes().float32, {size.out_features});
    } else {
      // A group of 256 products of 16 bits is below 2^24: float32 holds its sum exactly.
      if (group_size != 64 && group_size != 128 && group_size != 256) {
        refuse(op, name("group_size").c_str(), "0 (one scale a row), 64, 128 or 256", std::to_string(group_size));
      }
      if (layout != Layout::kTile16) {
        refuse(op, name("group_size").c_str(), "0 with layout '" + layout_name + "' (only tile16 has group scales)",
               std::to_string(group_size));
      }
      check(op, name("weight_scale").c_str(), weight_scale, half_scales ? dtypes().float16 : dtypes().float32,
            {tiles_of(size.out_features), divide_up(size.in_features, group_size), kTileRows});
    }
    if (bias.has_value()) check(op, name("bias").c_str(), *bias, dtypes().float32, {size.out_features});

    packed = as_contiguous(packed);
    weight_scale = as_contiguous(weight_scale);
    if (bias.has_value()) bias = as_contiguous(*bias);
    view = matrix_of(packed, &weight_scale, layout, size);
    if (half_scales) view.scale_dtype = DType::kFloat16;
    view.bias = bias.has_value() ? data<float>(*bias) : nullptr;
    view.planes = activation_bits == 16 ? 2 : 1;
    view.group_size = group_size;
  }
};

}  // namespace bitnet_ops
