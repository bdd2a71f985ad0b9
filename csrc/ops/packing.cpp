#include "ops/packing.h"

#include <algorithm>
#include <cstring>

#include "ops/packed_checks.h"
#include "run/packing.h"

namespace bitnet_ops {
namespace {

// A packed matrix that was given, checked and contiguous.
struct Packed {
  MatrixSize size;
  Layout layout;
  Tensor tensor;

  Packed(const char* op, const Tensor& packed, int64_t out_features, int64_t in_features,
         const std::string& layout_name)
      : size{out_features, in_features}, layout(check_layout(op, layout_name)) {
    check_size(op, "out_features", out_features);
    check_size(op, "in_features", in_features);
    check_in_features(op, "in_features", in_features, most_in_features(layout));
    check_packed(op, "packed", packed, layout, layout_name, size);
    tensor = as_contiguous(packed);
  }
};

}  // namespace

Tensor pack_ternary(const Tensor& w_any, const std::string& layout_name) {
  constexpr const char* kOp = "pack_ternary";
  const Layout layout = check_layout(kOp, layout_name);
  if (!w_any.is_cpu() || dtype_code(w_any) != dtypes().int8 || w_any.dim() != 2) {
    refuse(kOp, "w", "a CPU tensor int8 [out_features, in_features]", describe(w_any));
  }
  const Tensor w = as_contiguous(w_any);
  const MatrixSize size{w.size(0), w.size(1)};
  check_in_features(kOp, "w", size.in_features, most_in_features(layout));
  const Tensor packed = empty(packed_sizes(layout, size), dtypes().uint8);
  if (!run_pack(data<int8_t>(w), size, layout, mutable_data<uint8_t>(packed))) {
    refuse(kOp, "w", "values -1, 0 and 1 only", "an int8 tensor with other values");
  }
  return packed;
}

Tensor pack_two_bits(const Tensor& codes_any, int64_t width, bool high_first, const std::string& layout_name) {
  constexpr const char* kOp = "pack_two_bits";
  const Layout layout = check_layout(kOp, layout_name);
  if (!codes_any.is_cpu() || dtype_code(codes_any) != dtypes().uint8 || codes_any.dim() != 3) {
    refuse(kOp, "codes", "a CPU tensor uint8 [out_features, parts, part_bytes]", describe(codes_any));
  }
  if (width != 1 && width != 16 && width != 32) refuse(kOp, "width", "1, 16 or 32", std::to_string(width));
  if (high_first && width == 1) refuse(kOp, "high_first", "False with width=1", "True");
  // The gaps between parts may stay, but bytes of a part lie together.
  const auto dense_parts = [](const Tensor& tensor) { return tensor.size(2) <= 1 || tensor.stride(2) == 1; };
  const Tensor codes = dense_parts(codes_any) ? codes_any : torch::stable::contiguous(codes_any);
  const int64_t unit = std::max<int64_t>(width, 4);
  if (codes.size(2) % unit != 0) {
    refuse(kOp, "codes", "a last size that " + std::to_string(unit) + " divides", describe(codes_any));
  }
  check_size(kOp, "codes", codes.size(0));
  const int64_t most = most_in_features(layout);
  if (codes.size(2) != 0 && codes.size(1) > most / 4 / codes.size(2)) {  // the product might wrap
    refuse(kOp, "codes", "at most " + std::to_string(most) + " weights in a row", describe(codes_any));
  }
  const TwoBitCodes view{data<uint8_t>(codes), codes.size(0), codes.stride(0), codes.size(1),
                         codes.stride(1),      codes.size(2), width,           high_first};
  const Tensor packed = empty(packed_sizes(layout, {view.rows, view.in_features()}), dtypes().uint8);
  if (!run_pack_two_bits(view, layout, mutable_data<uint8_t>(packed))) {
    refuse(kOp, "codes", "codes 0, 1 and 2 only", "a code 3, which stands for no weight");
  }
  return packed;
}

Tensor unpack_ternary(const Tensor& packed_any, int64_t out_features, int64_t in_features,
                      const std::string& layout_name) {
  constexpr const char* kOp = "unpack_ternary";
  const Packed packed(kOp, packed_any, out_features, in_features, layout_name);
  const Tensor w = empty({out_features, in_features}, dtypes().int8);
  if (!run_unpack(packed.layout, data<uint8_t>(packed.tensor), packed.size, mutable_data<int8_t>(w))) {
    refuse(kOp, "packed", "codes 0, 1 and 2 only", "a code 3, which stands for no weight");
  }
  return w;
}

Tensor repack_ternary(const Tensor& packed_any, int64_t out_features, int64_t in_features,
                      const std::string& layout_name, const std::string& wanted_name) {
  constexpr const char* kOp = "repack_ternary";
  const Packed packed(kOp, packed_any, out_features, in_features, layout_name);
  const Layout wanted = check_layout(kOp, wanted_name, "wanted");
  check_in_features(kOp, "in_features", in_features, most_in_features(wanted));
  const Tensor result = empty(packed_sizes(wanted, packed.size), dtypes().uint8);
  const uint8_t* in = data<uint8_t>(packed.tensor);
  uint8_t* out = mutable_data<uint8_t>(result);
  if (wanted != packed.layout) {
    run_repack(packed.layout, in, packed.size, wanted, out);
  } else if (result.numel() != 0) {
    std::memcpy(out, in, static_cast<size_t>(result.numel()));
  }
  return result;
}

Tensor find_bad_byte(const Tensor& packed_any, const std::string& layout_name) {
  constexpr const char* kOp = "find_bad_byte";
  const Layout layout = check_layout(kOp, layout_name);
  if (!packed_any.is_cpu() || dtype_code(packed_any) != dtypes().uint8) {
    refuse(kOp, "packed", "a CPU tensor uint8", describe(packed_any));
  }
  const Tensor packed = as_contiguous(packed_any);
  const Tensor place = empty({}, dtypes().int64);
  *mutable_data<int64_t>(place) = run_find_bad_byte(data<uint8_t>(packed), packed.numel(), layout);
  return place;
}

}  // namespace bitnet_ops
