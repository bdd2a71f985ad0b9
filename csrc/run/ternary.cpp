#include "run/ternary.h"

#include <cstring>

#include "run/scratch.h"
#include "run/parallel.h"
#include "run/rows.h"
#include "run/sparse_order.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`, on one core of the machine in bench/LOG.md.
constexpr double kNsPerBlock = 3.0;       // 64 bytes at 20 GB/s
constexpr double kNsPerBlockRow = 1.5;    // four vpdpbusd, or eight with the scalar additions
constexpr double kNsPerCopiedBlock = 20;  // from one layout to another

double ns_per_block(int64_t rows) {
  const double multiplying = kNsPerBlockRow * static_cast<double>(rows);
  return kNsPerBlock > multiplying ? kNsPerBlock : multiplying;
}

void sum_groups(const int8_t* q, int64_t in_features, int64_t group_size, int32_t* sums) {
  for (int64_t begin = 0, group = 0; begin < in_features; begin += group_size, ++group) {
    // Whole groups: q is zero from in_features on, and padded_in_features covers the last group.
    int32_t sum = 0;
    for (int64_t k = begin; k < begin + group_size; ++k) sum += q[k];
    sums[group] = sum;
  }
}

// 8 bits, with a scale for each group of inputs; group_size 0 is one group.
void quantize_groups(const void* x, const Activations& a, int64_t group_size, const KernelTable& table, int8_t* q,
                     int64_t q_stride, float* x_scale, int32_t* q_sum) {
  const int64_t size = group_size == 0 || group_size > a.in_features ? a.in_features : group_size;
  int64_t begin = 0, group = 0;
  do {  // at least once: a row without inputs has zeros
    const int64_t left = a.in_features - begin;
    const bool last = left <= size;
    table.quantize_row(static_cast<const char*>(x) + static_cast<size_t>(begin) * element_bytes(a.dtype), a.dtype,
                       last ? left : size, q + begin, last ? q_stride - begin : size, x_scale + group, q_sum + group);
    begin += size;
    ++group;
  } while (begin < a.in_features);
}

using TileKernel = void (*)(const TernaryProduct&, int64_t, int64_t);

// The tiles of all products as one range, so that several small matrices are one parallel region.
void run_tiles(const Product* products, size_t count, TileKernel kernel) {
  // A kernel works on pairs of tiles when there are several rows: threads share out whole pairs.
  const int64_t unit = products[0].rows() == 1 ? 1 : 2;
  const auto units_of = [unit](const Product& product) { return divide_up(tiles_of(product.out_features), unit); };
  int64_t units = 0;
  for (size_t i = 0; i < count; ++i) units += units_of(products[i]);
  const double ns_per_unit = static_cast<double>(unit * products[0].blocks + 1) * ns_per_block(products[0].rows());
  parallel(units, ns_per_unit, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < count && end > 0; ++i) {
      const int64_t own = units_of(products[i]);
      if (begin < own) {
        const int64_t tiles = tiles_of(products[i].out_features);
        const int64_t tile_end = (end < own ? end : own) * unit;
        kernel(products[i], begin * unit, tile_end < tiles ? tile_end : tiles);
      }
      begin = begin > own ? begin - own : 0;
      end -= own;
    }
  });
}

// Many rows of q, or a layout that this instruction set has no loop for: on a tile16 copy.
void run_copy(Product& product, const KernelTable& table) {
  static thread_local Scratch scratch;
  uint8_t* tile16 = static_cast<uint8_t*>(scratch.reserve(tile16_bytes(product.size)));
  fill_tile16(product.layout, product.packed, product.size, tile16);
  product.packed = tile16;
  product.blocks = blocks_of(product.size.in_features);
  run_tiles(&product, 1, table.ternary_product);
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
  parallel(count, static_cast<double>(product.blocks + 1) * ns_per_block(product.rows()),
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
  parallel(product.blocks, static_cast<double>(count + 1) * ns_per_block(product.rows()),
           [&](int64_t begin, int64_t end) { table.ternary_columns(product, columns, count, begin, end); });
}

// Sets results that are not wanted to zero, in storage of 2 or 4 bytes.
template <class Bits>
void zero_inactive(const bool* active, Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = active[i] ? out[i] : Bits{0};
}

}  // namespace

void fill_tile16(Layout layout, const uint8_t* packed, MatrixSize size, uint8_t* tile16) {
  const int64_t units =
      layout == Layout::kColumn ? divide_up(size.out_features, kPanelRows) : tiles_of(size.out_features);
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

QuantizedRows reserve_rows(int64_t rows, int64_t groups, int64_t in_features) {
  static thread_local Scratch scratch;
  const int64_t q_stride = padded_in_features(in_features);
  const size_t q_bytes = static_cast<size_t>(rows * q_stride);
  const size_t sum_bytes = static_cast<size_t>(rows * (groups < 2 ? 2 : groups)) * sizeof(int32_t);
  const size_t scale_bytes = static_cast<size_t>(rows * groups) * sizeof(float);
  char* base = static_cast<char*>(scratch.reserve(q_bytes + sum_bytes + scale_bytes));
  return {reinterpret_cast<int8_t*>(base), q_stride, reinterpret_cast<int32_t*>(base + q_bytes),
          reinterpret_cast<float*>(base + q_bytes + sum_bytes)};
}

QuantizedRows quantize_rows(const Activations& a, int64_t planes, int64_t group_size, const KernelTable& table) {
  const int64_t groups = group_size == 0 ? 1 : divide_up(a.in_features, group_size);
  const QuantizedRows rows = reserve_rows(a.tokens * planes, groups, a.in_features);
  const double passes = a.norm_weight == nullptr ? 1.0 : 2.0;
  parallel(a.tokens, static_cast<double>(a.in_features + 1) * passes * kNsPerQuantizedElement,
           [&](int64_t begin, int64_t end) {
             static thread_local Scratch scratch;
             const size_t row_bytes = static_cast<size_t>(a.in_features) * element_bytes(a.dtype);
             void* normed = a.norm_weight == nullptr ? nullptr : scratch.reserve(row_bytes);
             for (int64_t token = begin; token < end; ++token) {
               const void* source = row_at(a.x, token, a.in_features, a.dtype);
               if (normed != nullptr) {
                 table.rms_norm_row(source, a.dtype, a.norm_weight, a.eps, a.in_features, normed);
                 source = normed;
               }
               int8_t* q = rows.q + token * planes * rows.q_stride;
               int32_t* q_sum = rows.q_sum + token * planes * groups;
               if (planes == 1) {
                 quantize_groups(source, a, group_size, table, q, rows.q_stride, rows.x_scale + token * groups, q_sum);
                 continue;
               }
               int32_t whole_sum[2];
               table.quantize_row_16(source, a.dtype, a.in_features, q, q + rows.q_stride, rows.q_stride,
                                     rows.x_scale + token, whole_sum);
               for (int64_t plane = 0; plane < planes; ++plane) {
                 if (group_size == 0) {
                   q_sum[plane] = whole_sum[plane];
                 } else {
                   sum_groups(q + plane * rows.q_stride, a.in_features, group_size, q_sum + plane * groups);
                 }
               }
             }
           });
  return rows;
}

Product product_of(const QuantizedRows& rows, const TernaryMatrix& matrix, int64_t tokens) {
  Product product{};
  product.size = matrix.size;
  product.layout = matrix.layout;
  product.packed = matrix.packed;
  product.blocks = matrix.blocks;
  product.weight_scale = matrix.weight_scale;
  product.q = rows.q;
  product.q_stride = rows.q_stride;
  product.q_sum = rows.q_sum;
  product.x_scale = rows.x_scale;
  product.scale_dtype = matrix.scale_dtype;
  product.tokens = tokens;
  product.planes = matrix.planes;
  product.groups = matrix.groups();
  product.group_blocks = matrix.group_size / kBlockInputs;
  product.bias = matrix.bias;
  product.out_features = matrix.size.out_features;
  return product;
}

void run_product(Product& product, const KernelTable& table, const bool* active) {
  const bool few = product.rows() <= kMaxSparseRows;
  switch (product.layout) {
    case Layout::kTile16:
      return run_tiles(&product, 1, table.ternary_product);
    case Layout::kTile16Base3:
      if (table.ternary_product_base3 != nullptr) return run_tiles(&product, 1, table.ternary_product_base3);
      return run_copy(product, table);
    case Layout::kRow:
      return few ? run_rows(product, table, active) : run_copy(product, table);
    case Layout::kColumn:
      return few ? run_columns(product, table) : run_copy(product, table);
  }
}

void run_products(Product* products, size_t count, const KernelTable& table) {
  bool tiles = true;
  bool base3 = table.ternary_product_base3 != nullptr;
  for (size_t i = 0; i < count; ++i) {
    tiles = tiles && products[i].layout == Layout::kTile16;
    base3 = base3 && products[i].layout == Layout::kTile16Base3;
  }
  if (tiles) return run_tiles(products, count, table.ternary_product);
  if (base3) return run_tiles(products, count, table.ternary_product_base3);
  for (size_t i = 0; i < count; ++i) run_product(products[i], table);
}

void zero_inactive(const bool* active, const Product& product) {
  const int64_t count = product.tokens * product.out_features;
  if (element_bytes(product.out_dtype) == 2) {
    zero_inactive(active, static_cast<uint16_t*>(product.out), count);
  } else {
    zero_inactive(active, static_cast<uint32_t*>(product.out), count);
  }
}

}  // namespace bitnet_ops
