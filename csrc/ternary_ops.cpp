#include "ternary_ops.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "kernel_table.h"
#include "scratch.h"
#include "sparse_order.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`, on one core of the machine in bench/LOG.md.
constexpr double kNsPerBlock = 3.0;       // 64 bytes at 20 GB/s
constexpr double kNsPerBlockRow = 1.5;    // four vpdpbusd, or eight with the scalar additions
constexpr double kNsPerCopiedBlock = 20;  // from one layout to another

// ---- layouts --------------------------------------------------------------------------------------

Layout check_layout(const char* op, const std::string& name) {
  if (name == "tile16") return Layout::kTile16;
  if (name == "tile16_base3") return Layout::kTile16Base3;
  if (name == "row") return Layout::kRow;
  if (name == "column") return Layout::kColumn;
  refuse(op, "layout", "'tile16', 'tile16_base3', 'row' or 'column'", "'" + name + "'");
}

int64_t most_in_features(Layout layout) { return layout == Layout::kColumn ? kMaxColumnInFeatures : kMaxInFeatures; }

std::vector<int64_t> packed_sizes(Layout layout, MatrixSize size) {
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

void check_packed(const char* op, const Tensor& packed, Layout layout, const std::string& layout_name,
                  MatrixSize size) {
  const std::vector<int64_t> sizes = packed_sizes(layout, size);
  if (packed.is_cpu() && dtype_code(packed) == codes().uint8 && shape_is(packed, {sizes[0], sizes[1], sizes[2]})) {
    return;
  }
  refuse(op, "packed",
         "a CPU tensor uint8 " + shape_text(sizes) + " (" + layout_name + " of out_features=" +
             std::to_string(size.out_features) + ", in_features=" + std::to_string(size.in_features) + ")",
         describe(packed));
}

void fill_tile16(Layout layout, const uint8_t* packed, MatrixSize size, uint8_t* tile16) {
  const int64_t units = layout == Layout::kColumn ? divide_up(size.out_features, kPanelRows) : tiles_of(size.out_features);
  const double blocks = static_cast<double>(blocks_of(size.in_features) + 1) *
                        static_cast<double>(layout == Layout::kColumn ? kPanelTiles : 1);
  parallel(units, blocks * kNsPerCopiedBlock, [&](int64_t begin, int64_t end) {
    if (layout == Layout::kTile16Base3) tile16_from_base3(packed, size, tile16, begin, end);
    if (layout == Layout::kRow) tile16_from_row(packed, size, tile16, begin, end);
    if (layout == Layout::kColumn) tile16_from_column(packed, size, tile16, begin, end);
  });
}

size_t tile16_bytes(MatrixSize size) {
  return static_cast<size_t>(tiles_of(size.out_features) * blocks_of(size.in_features) * kBlockBytes);
}

// ---- quantised rows -------------------------------------------------------------------------------

// Rows of q (two for a token with 16-bit activations), their sums over groups of inputs, and the scales.
struct QuantizedRows {
  int8_t* q;
  int64_t q_stride;
  int32_t* q_sum;
  float* x_scale;
};

// Room for them in this thread's scratch.
QuantizedRows reserve_rows(int64_t rows, int64_t groups, int64_t in_features) {
  static thread_local Scratch scratch;
  const int64_t q_stride = padded_in_features(in_features);
  const size_t q_bytes = static_cast<size_t>(rows * q_stride);
  const size_t sum_bytes = static_cast<size_t>(rows * (groups < 2 ? 2 : groups)) * sizeof(int32_t);
  char* base = static_cast<char*>(scratch.reserve(q_bytes + sum_bytes + static_cast<size_t>(rows) * sizeof(float)));
  return {reinterpret_cast<int8_t*>(base), q_stride, reinterpret_cast<int32_t*>(base + q_bytes),
          reinterpret_cast<float*>(base + q_bytes + sum_bytes)};
}

void sum_groups(const int8_t* q, int64_t in_features, int64_t group_size, int32_t* sums) {
  for (int64_t begin = 0, group = 0; begin < in_features; begin += group_size, ++group) {
    // Whole groups: q is zero from in_features on, and padded_in_features covers the last group.
    int32_t sum = 0;
    for (int64_t k = begin; k < begin + group_size; ++k) sum += q[k];
    sums[group] = sum;
  }
}

// ---- the product, by layout -------------------------------------------------------------------------

struct Product : TernaryProduct {
  MatrixSize size;
  Layout layout;
  int64_t rows() const { return tokens * planes; }
};

using TileKernel = void (*)(const TernaryProduct&, int64_t, int64_t);

void run_tiles(const Product& product, TileKernel kernel) {
  const int64_t tiles = tiles_of(product.out_features);
  // A kernel works on pairs of tiles when there are several rows: threads share out whole pairs.
  const int64_t unit = product.rows() == 1 ? 1 : 2;
  const double rows = static_cast<double>(product.rows());
  const double ns_per_block = kNsPerBlock > kNsPerBlockRow * rows ? kNsPerBlock : kNsPerBlockRow * rows;
  const double ns_per_unit = static_cast<double>(unit * product.blocks + 1) * ns_per_block;
  parallel(divide_up(tiles, unit), ns_per_unit, [&](int64_t begin, int64_t end) {
    const int64_t tile_end = end * unit < tiles ? end * unit : tiles;
    kernel(product, begin * unit, tile_end);
  });
}

// Many rows of q, or a layout that this instruction set has no loop for: on a tile16 copy.
void run_copy(Product& product, const KernelTable& table) {
  static thread_local Scratch scratch;
  uint8_t* tile16 = static_cast<uint8_t*>(scratch.reserve(tile16_bytes(product.size)));
  fill_tile16(product.layout, product.packed, product.size, tile16);
  product.packed = tile16;
  product.blocks = blocks_of(product.size.in_features);
  run_tiles(product, table.ternary_product);
}

// Sets results that are not wanted to zero, in storage of 2 or 4 bytes.
template <class Bits>
void zero_inactive(const bool* active, Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = active[i] ? out[i] : Bits{0};
}

void zero_inactive(const bool* active, const Product& product) {
  const int64_t count = product.tokens * product.out_features;
  if (element_bytes(product.out_dtype) == 2) {
    zero_inactive(active, static_cast<uint16_t*>(product.out), count);
  } else {
    zero_inactive(active, static_cast<uint32_t*>(product.out), count);
  }
}

// The rows of the matrix that some token wants (all of them if `active` is null). Results of others are
// undefined.
void run_rows(Product& product, const KernelTable& table, const bool* active) {
  static thread_local Scratch scratch;
  const size_t q_bytes = static_cast<size_t>(product.rows() * product.q_stride);
  const size_t list_bytes = static_cast<size_t>(product.out_features) * sizeof(int32_t);
  char* base = static_cast<char*>(scratch.reserve(q_bytes + list_bytes));
  int8_t* steps = reinterpret_cast<int8_t*>(base);
  for (int64_t row = 0; row < product.rows(); ++row) {
    to_step_order(product.q + row * product.q_stride, product.size.in_features, steps + row * product.q_stride);
  }
  product.q = steps;
  int32_t* list = nullptr;
  int64_t count = product.out_features;
  if (active != nullptr) {
    list = reinterpret_cast<int32_t*>(base + q_bytes);
    count = nonzero_positions(active, product.tokens, product.out_features, product.out_features, list);
    // A list of 90 % is still as fast as one stream (bench/LOG.md), so only all of them are no list.
    if (count == product.out_features) list = nullptr;
  }
  const double rows = static_cast<double>(product.rows());
  const double ns_per_block = kNsPerBlock > kNsPerBlockRow * rows ? kNsPerBlock : kNsPerBlockRow * rows;
  parallel(count, static_cast<double>(product.blocks + 1) * ns_per_block,
           [&](int64_t begin, int64_t end) { table.ternary_rows(product, list, begin, end); });
}

// The columns whose activation is not zero in some row of q.
void run_columns(Product& product, const KernelTable& table) {
  static thread_local Scratch scratch;
  const int64_t most = round_up(product.size.in_features, kColumnsAtOnce);
  const int64_t stride = round_up(most, kQuantizedRowAlignment);
  const size_t q_bytes = static_cast<size_t>(product.rows() * stride);
  char* base = static_cast<char*>(scratch.reserve(q_bytes + static_cast<size_t>(most) * sizeof(int32_t)));
  int8_t* gathered = reinterpret_cast<int8_t*>(base);
  int32_t* columns = reinterpret_cast<int32_t*>(base + q_bytes);
  const int64_t found =
      nonzero_positions(product.q, product.rows(), product.q_stride, product.size.in_features, columns);
  const int64_t count = round_up(found, kColumnsAtOnce);
  // Fill up with a column that is read anyway, multiplied by zero.
  for (int64_t i = found; i < count; ++i) columns[i] = columns[found - 1];
  for (int64_t row = 0; row < product.rows(); ++row) {
    const int8_t* q = product.q + row * product.q_stride;
    int8_t* out = gathered + row * stride;
    for (int64_t i = 0; i < found; ++i) out[i] = q[columns[i]];
    for (int64_t i = found; i < count; ++i) out[i] = 0;
  }
  product.q = gathered;
  product.q_stride = stride;
  const double rows = static_cast<double>(product.rows());
  const double ns_per_block = kNsPerBlock > kNsPerBlockRow * rows ? kNsPerBlock : kNsPerBlockRow * rows;
  parallel(product.blocks, static_cast<double>(count + 1) * ns_per_block, [&](int64_t begin, int64_t end) {
    table.ternary_columns(product, columns, count, begin, end);
  });
}

void run_product(Product& product, const KernelTable& table, const bool* active) {
  const bool few = product.rows() <= kMaxSparseRows;
  switch (product.layout) {
    case Layout::kTile16:
      return run_tiles(product, table.ternary_product);
    case Layout::kTile16Base3:
      if (table.ternary_product_base3 != nullptr) return run_tiles(product, table.ternary_product_base3);
      return run_copy(product, table);
    case Layout::kRow:
      return few ? run_rows(product, table, active) : run_copy(product, table);
    case Layout::kColumn:
      return few ? run_columns(product, table) : run_copy(product, table);
  }
}

// Everything but q, the results and their scales.
Product product_of(const QuantizedRows& rows, const Tensor& packed, Layout layout, MatrixSize size) {
  Product product{};
  product.size = size;
  product.layout = layout;
  product.packed = data<uint8_t>(packed);
  product.blocks = packed.size(1);
  product.q = rows.q;
  product.q_stride = rows.q_stride;
  product.q_sum = rows.q_sum;
  product.planes = 1;
  product.groups = 1;
  product.out_features = size.out_features;
  return product;
}

}  // namespace

// ---- operators ------------------------------------------------------------------------------------

Tensor pack_ternary(const Tensor& w_any, const std::string& layout_name) {
  constexpr const char* kOp = "pack_ternary";
  const Layout layout = check_layout(kOp, layout_name);
  if (!w_any.is_cpu() || dtype_code(w_any) != codes().int8 || w_any.dim() != 2) {
    refuse(kOp, "w", "a CPU tensor int8 [out_features, in_features]", describe(w_any));
  }
  const Tensor w = as_contiguous(w_any);
  const MatrixSize size{w.size(0), w.size(1)};
  check_in_features(kOp, "w", size.in_features, most_in_features(layout));
  const int64_t tiles = tiles_of(size.out_features);
  const Tensor packed = empty(packed_sizes(layout, size), codes().uint8);
  const int8_t* in = data<int8_t>(w);
  uint8_t* out = mutable_data<uint8_t>(packed);
  // Packing happens once per model: the other layouts go by way of a tile16 copy.
  Scratch scratch;
  uint8_t* tile16 = layout == Layout::kTile16 ? out : static_cast<uint8_t*>(scratch.reserve(tile16_bytes(size)));

  std::atomic<bool> ternary{true};
  parallel(tiles, static_cast<double>(size.in_features + 1) * kTileRows, [&](int64_t begin, int64_t end) {
    if (!pack_tile16(in, size, tile16, begin, end)) ternary = false;
    if (layout == Layout::kTile16Base3) base3_from_tile16(tile16, size, out, begin, end);
    if (layout == Layout::kRow) row_from_tile16(tile16, size, out, begin, end);
  });
  if (!ternary) refuse(kOp, "w", "values -1, 0 and 1 only", "an int8 tensor with other values");
  if (layout == Layout::kColumn) {
    parallel(divide_up(size.out_features, kPanelRows), static_cast<double>(size.in_features + 1) * kPanelRows,
             [&](int64_t begin, int64_t end) { column_from_tile16(tile16, size, out, begin, end); });
  }
  return packed;
}

Tensor unpack_ternary(const Tensor& packed_any, int64_t out_features, int64_t in_features,
                      const std::string& layout_name) {
  constexpr const char* kOp = "unpack_ternary";
  const Layout layout = check_layout(kOp, layout_name);
  check_size(kOp, "out_features", out_features);
  check_size(kOp, "in_features", in_features);
  check_in_features(kOp, "in_features", in_features, most_in_features(layout));
  const MatrixSize size{out_features, in_features};
  check_packed(kOp, packed_any, layout, layout_name, size);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor w = empty({out_features, in_features}, codes().int8);

  Scratch scratch;
  const uint8_t* tile16 = data<uint8_t>(packed);
  if (layout != Layout::kTile16) {
    uint8_t* copy = static_cast<uint8_t*>(scratch.reserve(tile16_bytes(size)));
    fill_tile16(layout, tile16, size, copy);
    tile16 = copy;
  }
  int8_t* out = mutable_data<int8_t>(w);
  std::atomic<bool> ternary{true};
  parallel(tiles_of(out_features), static_cast<double>(in_features + 1) * kTileRows, [&](int64_t begin, int64_t end) {
    if (!unpack_tile16(tile16, size, out, begin, end)) ternary = false;
  });
  if (!ternary) refuse(kOp, "packed", "codes 0, 1 and 2 only", "a code 3, which stands for no weight");
  return w;
}

Tensor ternary_matmul(const Tensor& q_any, const Tensor& packed_any, int64_t out_features,
                      const std::string& layout_name) {
  constexpr const char* kOp = "ternary_matmul";
  const Layout layout = check_layout(kOp, layout_name);
  check_size(kOp, "out_features", out_features);
  if (!q_any.is_cpu() || dtype_code(q_any) != codes().int8 || q_any.dim() != 2) {
    refuse(kOp, "q", "a CPU tensor int8 [tokens, in_features]", describe(q_any));
  }
  const int64_t tokens = q_any.size(0);
  const int64_t in_features = q_any.size(1);
  check_in_features(kOp, "q", in_features, most_in_features(layout));
  const MatrixSize size{out_features, in_features};
  check_packed(kOp, packed_any, layout, layout_name, size);
  const Tensor q = as_contiguous(q_any);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor out = empty({tokens, out_features}, codes().int32);
  if (tokens == 0 || out_features == 0) return out;

  const QuantizedRows rows = reserve_rows(tokens, 1, in_features);
  const int8_t* in = data<int8_t>(q);
  parallel(tokens, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int8_t* copy = rows.q + row * rows.q_stride;
      std::memcpy(copy, in + row * in_features, static_cast<size_t>(in_features));
      std::memset(copy + in_features, 0, static_cast<size_t>(rows.q_stride - in_features));
      int32_t sum = 0;
      for (int64_t k = 0; k < in_features; ++k) sum += copy[k];
      rows.q_sum[row] = sum;
    }
  });
  Product product = product_of(rows, packed, layout, size);
  product.tokens = tokens;
  product.out_dtype = DType::kInt32;
  product.out = mutable_data<int32_t>(out);
  run_product(product, kernels(), nullptr);
  return out;
}

Tensor ternary_linear(const Tensor& x_any, const Tensor& packed_any, const Tensor& weight_scale_any,
                      const std::optional<Tensor>& bias_any, int64_t out_features, const std::string& layout_name,
                      int64_t activation_bits, int64_t group_size, const std::optional<Tensor>& active_any) {
  constexpr const char* kOp = "ternary_linear";
  const Layout layout = check_layout(kOp, layout_name);
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  check_size(kOp, "out_features", out_features);
  check_in_features(kOp, "x", in_features, most_in_features(layout));
  check_activation_bits(kOp, "activation_bits", activation_bits);
  const MatrixSize size{out_features, in_features};
  check_packed(kOp, packed_any, layout, layout_name, size);
  int64_t groups = 1;
  if (group_size == 0) {
    check(kOp, "weight_scale", weight_scale_any, codes().float32, {out_features});
  } else {
    // A group of 256 products of 16 bits is below 2^24: float32 holds its sum exactly.
    if (group_size != 64 && group_size != 128 && group_size != 256) {
      refuse(kOp, "group_size", "0 (one scale a row), 64, 128 or 256", std::to_string(group_size));
    }
    if (layout != Layout::kTile16) {
      refuse(kOp, "group_size", "0 with layout '" + layout_name + "' (only tile16 has group scales)",
             std::to_string(group_size));
    }
    groups = divide_up(in_features, group_size);
    check(kOp, "weight_scale", weight_scale_any, codes().float32, {groups, out_features});
  }
  if (bias_any.has_value()) check(kOp, "bias", *bias_any, codes().float32, {out_features});
  if (active_any.has_value()) {
    if (layout != Layout::kRow) {
      refuse(kOp, "active", "None with layout '" + layout_name + "' (only layout 'row' skips rows)",
             describe(*active_any));
    }
    if (!active_any->is_cpu() || dtype_code(*active_any) != codes().boolean ||
        shape_of(*active_any) != with_last(x_any, out_features)) {
      refuse(kOp, "active", "a CPU tensor bool " + shape_text(with_last(x_any, out_features)), describe(*active_any));
    }
  }

  const Tensor x = as_contiguous(x_any);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor weight_scale = as_contiguous(weight_scale_any);
  const auto contiguous_or_none = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
  };
  const std::optional<Tensor> bias = contiguous_or_none(bias_any);
  const std::optional<Tensor> active = contiguous_or_none(active_any);
  const Tensor out = empty(with_last(x, out_features), dtype_code(x));
  const int64_t tokens = rows_of(x);
  if (tokens == 0 || out_features == 0) return out;

  const KernelTable& table = kernels();
  const int64_t planes = activation_bits == 16 ? 2 : 1;
  const QuantizedRows rows = reserve_rows(tokens * planes, groups, in_features);
  const void* in = data<void>(x);
  parallel(tokens, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const char* source = row_at(in, token, in_features, dtype);
      int8_t* q = rows.q + token * planes * rows.q_stride;
      int32_t* q_sum = rows.q_sum + token * planes * groups;
      int32_t whole_sum[2];
      if (planes == 1) {
        table.quantize_row(source, dtype, in_features, q, rows.q_stride, rows.x_scale + token, whole_sum);
      } else {
        table.quantize_row_16(source, dtype, in_features, q, q + rows.q_stride, rows.q_stride, rows.x_scale + token,
                              whole_sum);
      }
      for (int64_t plane = 0; plane < planes; ++plane) {
        if (group_size == 0) {
          q_sum[plane] = whole_sum[plane];
        } else {
          sum_groups(q + plane * rows.q_stride, in_features, group_size, q_sum + plane * groups);
        }
      }
    }
  });
  Product product = product_of(rows, packed, layout, size);
  product.tokens = tokens;
  product.planes = planes;
  product.groups = groups;
  product.group_blocks = group_size / kBlockInputs;
  product.out_dtype = dtype;
  product.out = mutable_data<void>(out);
  product.x_scale = rows.x_scale;
  product.weight_scale = data<float>(weight_scale);
  product.bias = bias.has_value() ? data<float>(*bias) : nullptr;
  const bool* wanted = active.has_value() ? data<bool>(*active) : nullptr;
  run_product(product, table, wanted);
  if (wanted != nullptr) zero_inactive(wanted, product);
  return out;
}

}  // namespace bitnet_ops
