#include "ops/packing.h"

#include <atomic>
#include <cstring>

#include "ops/packed_checks.h"
#include "run/parallel.h"
#include "run/scratch.h"
#include "run/ternary.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`: a nanosecond a weight.
double ns_per_tile(MatrixSize size) { return static_cast<double>(size.in_features + 1) * kTileRows; }
double ns_per_panel(MatrixSize size) { return static_cast<double>(size.in_features + 1) * kPanelRows; }

// Room for a copy in between. Kept, because a model has many matrices, and memory that is taken and given back for each
// of them leaves holes between what stays.
uint8_t* tile16_scratch(MatrixSize size) {
  static thread_local Scratch scratch;
  return static_cast<uint8_t*>(scratch.reserve(tile16_bytes(size)));
}

// A packed matrix that was given, checked and contiguous.
struct Packed {
  MatrixSize size;
  Layout layout;
  Tensor tensor;

  Packed(const char* op, const Tensor& packed, int64_t out_features, int64_t in_features, const std::string& layout_name)
      : size{out_features, in_features}, layout(check_layout(op, layout_name)) {
    check_size(op, "out_features", out_features);
    check_size(op, "in_features", in_features);
    check_in_features(op, "in_features", in_features, most_in_features(layout));
    check_packed(op, "packed", packed, layout, layout_name, size);
    tensor = as_contiguous(packed);
  }

  // The matrix as tile16: every way between layouts leads over it.
  const uint8_t* tile16() {
    const uint8_t* given = data<uint8_t>(tensor);
    if (layout == Layout::kTile16) return given;
    uint8_t* copy = tile16_scratch(size);
    fill_tile16(layout, given, size, copy);
    return copy;
  }
};

// From tile16, which must not be `out`.
void from_tile16(const uint8_t* tile16, MatrixSize size, Layout layout, uint8_t* out) {
  if (layout == Layout::kColumn) {
    parallel(divide_up(size.out_features, kPanelRows), ns_per_panel(size),
             [&](int64_t begin, int64_t end) { column_from_tile16(tile16, size, out, begin, end); });
    return;
  }
  parallel(tiles_of(size.out_features), ns_per_tile(size), [&](int64_t begin, int64_t end) {
    if (layout == Layout::kTile16Base3) base3_from_tile16(tile16, size, out, begin, end);
    if (layout == Layout::kRow) row_from_tile16(tile16, size, out, begin, end);
  });
}

}  // namespace

Tensor pack_ternary(const Tensor& w_any, const std::string& layout_name) {
  constexpr const char* kOp = "pack_ternary";
  const Layout layout = check_layout(kOp, layout_name);
  if (!w_any.is_cpu() || dtype_code(w_any) != codes().int8 || w_any.dim() != 2) {
    refuse(kOp, "w", "a CPU tensor int8 [out_features, in_features]", describe(w_any));
  }
  const Tensor w = as_contiguous(w_any);
  const MatrixSize size{w.size(0), w.size(1)};
  check_in_features(kOp, "w", size.in_features, most_in_features(layout));
  const Tensor packed = empty(packed_sizes(layout, size), codes().uint8);
  const int8_t* in = data<int8_t>(w);
  uint8_t* out = mutable_data<uint8_t>(packed);
  uint8_t* tile16 = layout == Layout::kTile16 ? out : tile16_scratch(size);
  std::atomic<bool> ternary{true};
  parallel(tiles_of(size.out_features), ns_per_tile(size), [&](int64_t begin, int64_t end) {
    if (!pack_tile16(in, size, tile16, begin, end)) ternary = false;
  });
  if (!ternary) refuse(kOp, "w", "values -1, 0 and 1 only", "an int8 tensor with other values");
  if (layout != Layout::kTile16) from_tile16(tile16, size, layout, out);
  return packed;
}

Tensor unpack_ternary(const Tensor& packed_any, int64_t out_features, int64_t in_features,
                      const std::string& layout_name) {
  constexpr const char* kOp = "unpack_ternary";
  Packed packed(kOp, packed_any, out_features, in_features, layout_name);
  const Tensor w = empty({out_features, in_features}, codes().int8);
  const uint8_t* tile16 = packed.tile16();
  int8_t* out = mutable_data<int8_t>(w);
  std::atomic<bool> ternary{true};
  parallel(tiles_of(out_features), ns_per_tile(packed.size), [&](int64_t begin, int64_t end) {
    if (!unpack_tile16(tile16, packed.size, out, begin, end)) ternary = false;
  });
  if (!ternary) refuse(kOp, "packed", "codes 0, 1 and 2 only", "a code 3, which stands for no weight");
  return w;
}

Tensor repack_ternary(const Tensor& packed_any, int64_t out_features, int64_t in_features,
                      const std::string& layout_name, const std::string& wanted_name) {
  constexpr const char* kOp = "repack_ternary";
  Packed packed(kOp, packed_any, out_features, in_features, layout_name);
  const Layout wanted = check_layout(kOp, wanted_name, "wanted");
  check_in_features(kOp, "in_features", in_features, most_in_features(wanted));
  const Tensor result = empty(packed_sizes(wanted, packed.size), codes().uint8);
  uint8_t* out = mutable_data<uint8_t>(result);
  if (wanted == packed.layout) {
    const size_t bytes = static_cast<size_t>(result.numel());
    if (bytes != 0) std::memcpy(out, data<uint8_t>(packed.tensor), bytes);
  } else if (wanted == Layout::kTile16) {
    fill_tile16(packed.layout, data<uint8_t>(packed.tensor), packed.size, out);
  } else {
    from_tile16(packed.tile16(), packed.size, wanted, out);
  }
  return result;
}

}  // namespace bitnet_ops
