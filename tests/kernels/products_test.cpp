// Products with ternary matrices, in every layout; and the layouts themselves.

#include "run/sparse_order.h"
#include "kernel_test.h"

namespace bitnet_ops {
namespace kernel_test {
namespace {

// float32 to 16 bits around every rounding boundary: without inputs the result is the bias.
template <class T>
void test_narrowing() {
  const uint32_t low_halves[] = {0x0000, 0x0001, 0x0fff, 0x1000, 0x1001, 0x2fff,
                                 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (const uint32_t low : low_halves) {
    const int64_t rows = 65536;
    Buffer<float> bias(rows), weight_scale(rows), x_scale(1);
    Buffer<int8_t> q(64);
    Buffer<int32_t> q_sum(1);
    Buffer<uint8_t> packed(0);  // no inputs at all: blocks = 0
    for (int64_t i = 0; i < rows; ++i) bias.data[i] = bits_float(static_cast<uint32_t>(i) << 16 | low);
    Buffer<T> out[2] = {Buffer<T>(rows), Buffer<T>(rows)};
    for (int i = 0; i < 2; ++i) {
      TernaryProduct product{};
      product.packed = packed.data;
      product.q = q.data;
      product.q_stride = 64;
      product.q_sum = q_sum.data;
      product.tokens = product.planes = product.groups = 1;
      product.out_features = rows;
      product.out_dtype = dtype_of<T>();
      product.out = out[i].data;
      product.x_scale = x_scale.data;
      product.weight_scale = weight_scale.data;
      product.bias = bias.data;
      (i == 0 ? scalar : tested)->ternary_product(product, 0, rows / kTileRows);
    }
    compare(out[0], out[1], "narrowing, low half " + std::to_string(low));
  }
}

enum Weights { kAnyByte, kAllMinus, kAllZero, kAllPlus, kAllThree, kAnyTernary, kWeightKinds };
enum Activations { kAnyInt8, kMostlyZero, kAll127, kAllMinus128, kActivationKinds };

struct ProductCase {
  int64_t out_features, in_features, tokens;
  Weights weights = kAnyByte;
  Activations activations = kAnyInt8;
  bool bias = false;
  int64_t planes = 1;
  int64_t group_blocks = 0;
  // The part of one thread: everything, or from the second unit (tile, row or panel) to the last but one.
  bool part = false;
  bool half_scales = false;  // of groups, in float16
};

std::string name_of(const ProductCase& c, DType dtype) {
  std::string name = std::to_string(c.tokens) + "x" + std::to_string(c.in_features) + "x" +
                     std::to_string(c.out_features) + ", weights " + std::to_string(c.weights) + ", activations " +
                     std::to_string(c.activations) + ", dtype " + std::to_string(static_cast<int>(dtype));
  if (c.planes == 2) name += ", 16 bits";
  if (c.group_blocks != 0) name += ", groups of " + std::to_string(c.group_blocks) + " blocks";
  return name + (c.half_scales ? ", float16 scales" : "") + (c.part ? ", a part" : "");
}

// Operands in buffers of exactly the size that a kernel may read; what differs by layout is `packed`.
struct Operands {
  int64_t groups, scales, rows, q_stride;
  Buffer<int8_t> q;
  Buffer<int32_t> q_sum;
  Buffer<float> x_scale, weight_scale, bias;
  Buffer<Float16> half_scale;

  Operands(const ProductCase& c, Random& random)
      : groups(c.group_blocks == 0 ? 1 : divide_up(c.in_features, c.group_blocks * kBlockInputs)),
        scales(c.group_blocks == 0 ? c.out_features : tiles_of(c.out_features) * groups * kTileRows),
        rows(c.tokens * c.planes),
        q_stride(padded_in_features(c.in_features)),
        q(rows * q_stride),
        q_sum(rows * groups),
        x_scale(c.tokens * groups),
        weight_scale(scales),
        bias(c.out_features),
        half_scale(c.half_scales ? scales : 0) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < c.in_features; ++k) {
        const int8_t any = static_cast<int8_t>(random.byte());
        const int8_t value = c.activations == kAnyInt8 ? any
                             : c.activations == kMostlyZero
                                 ? static_cast<int8_t>(random.byte() < 50 ? any : 0)
                                 : static_cast<int8_t>(c.activations == kAll127 ? 127 : -128);
        q.data[row * q_stride + k] = value;
        q_sum.data[row * groups + (groups == 1 ? 0 : k / (c.group_blocks * kBlockInputs))] += value;
      }
    }
    for (int64_t i = 0; i < c.tokens * groups; ++i) x_scale.data[i] = i == 1 ? std::nanf("") : random.uniform();
    fill_row(weight_scale.data, scales, kRandom, random);
    fill_row(bias.data, c.out_features, kRandom, random);
    if (c.half_scales) fill_row(half_scale.data, scales, kRandom, random);
  }
};

template <class T>
TernaryProduct product_of(const ProductCase& c, const Operands& operands, const Buffer<uint8_t>& packed, int64_t blocks,
                          Buffer<T>& out) {
  TernaryProduct product{};
  product.packed = packed.data;
  product.blocks = blocks;
  product.q = operands.q.data;
  product.q_stride = operands.q_stride;
  product.q_sum = operands.q_sum.data;
  product.tokens = c.tokens;
  product.planes = c.planes;
  product.group_blocks = c.group_blocks;
  product.groups = operands.groups;
  product.out_features = c.out_features;
  product.out_dtype = dtype_of<T>();
  product.out = out.data;
  product.x_scale = operands.x_scale.data;
  product.weight_scale = operands.weight_scale.data;
  if (c.half_scales) {
    product.weight_scale = operands.half_scale.data;
    product.scale_dtype = DType::kFloat16;
  }
  product.bias = c.bias ? operands.bias.data : nullptr;
  // Results that are another thread's must stay as they are.
  std::memset(static_cast<void*>(out.data), 0x3c, out.count * sizeof(T));
  return product;
}

void fill_weights(Buffer<uint8_t>& packed, Weights weights, Random& random) {
  constexpr uint8_t kPatterns[] = {0, 0x00, 0x55, 0xaa, 0xff};
  for (size_t i = 0; i < packed.count; ++i) {
    const uint8_t any = random.byte();
    // Without code 3: its lower bit where the upper one is set.
    const uint8_t ternary = static_cast<uint8_t>(any & ~((any & 0xaa) >> 1));
    packed.data[i] = weights == kAnyByte ? any : weights == kAnyTernary ? ternary : kPatterns[weights];
  }
}

// Units [begin, end) of `count`.
struct Part {
  int64_t begin, end;
};
Part part_of(const ProductCase& c, int64_t count) { return c.part && count > 2 ? Part{1, count - 1} : Part{0, count}; }

template <class T>
void test_tile16(const ProductCase& c, Random& random) {
  const int64_t blocks = blocks_of(c.in_features);
  const int64_t tiles = tiles_of(c.out_features);
  Buffer<uint8_t> packed(tiles * blocks * kBlockBytes);
  fill_weights(packed, c.weights, random);
  const Operands operands(c, random);
  Buffer<T> out[2] = {Buffer<T>(c.tokens * c.out_features), Buffer<T>(c.tokens * c.out_features)};
  const Part part = part_of(c, tiles);
  for (int i = 0; i < 2; ++i) {
    const TernaryProduct product = product_of(c, operands, packed, blocks, out[i]);
    (i == 0 ? scalar : tested)->ternary_product(product, part.begin, part.end);
  }
  compare(out[0], out[1], "ternary_product " + name_of(c, dtype_of<T>()));
}

// The other layouts hold any bytes, too, and must equal scalar on their tile16 copy: that checks the scalar
// kernels of these layouts as well.
template <class T>
void test_base3(const ProductCase& c, Random& random) {
  if (tested->ternary_product_base3 == nullptr) return;
  const MatrixSize size{c.out_features, c.in_features};
  const int64_t tiles = tiles_of(c.out_features);
  const int64_t blocks = divide_up(c.in_features, kBase3BlockInputs);
  Buffer<uint8_t> packed(tiles * blocks * kBlockBytes), tile16(tiles * blocks_of(c.in_features) * kBlockBytes);
  for (size_t i = 0; i < packed.count; ++i) packed.data[i] = random.byte();
  tile16_from_base3(packed.data, size, tile16.data, 0, tiles);
  const Operands operands(c, random);
  Buffer<T> out[2] = {Buffer<T>(c.tokens * c.out_features), Buffer<T>(c.tokens * c.out_features)};
  const Part part = part_of(c, tiles);
  scalar->ternary_product(product_of(c, operands, tile16, blocks_of(c.in_features), out[0]), part.begin, part.end);
  tested->ternary_product_base3(product_of(c, operands, packed, blocks, out[1]), part.begin, part.end);
  compare(out[0], out[1], "ternary_product_base3 " + name_of(c, dtype_of<T>()));
}

template <class T>
void test_sparse(const ProductCase& c, Random& random) {
  const MatrixSize size{c.out_features, c.in_features};
  const int64_t tiles = tiles_of(c.out_features);
  const int64_t panels = divide_up(c.out_features, kPanelRows);
  const int64_t chunks = divide_up(c.in_features, kChunkInputs);
  Buffer<uint8_t> tile16(tiles * blocks_of(c.in_features) * kBlockBytes);
  Buffer<uint8_t> row(c.out_features * chunks * kBlockBytes), column(c.in_features * panels * kBlockBytes);
  fill_weights(tile16, c.weights, random);
  row_from_tile16(tile16.data, size, row.data, 0, tiles);
  column_from_tile16(tile16.data, size, column.data, 0, panels);
  const Operands operands(c, random);
  const int64_t results = c.tokens * c.out_features;
  Buffer<T> expected(results), out(results), untouched(results);
  scalar->ternary_product(product_of(c, operands, tile16, blocks_of(c.in_features), expected), 0, tiles);
  std::memset(static_cast<void*>(untouched.data), 0x3c, untouched.count * sizeof(T));
  const auto expect_only = [&](auto wanted, const char* kernel) {
    Buffer<T> only(results);
    for (int64_t i = 0; i < results; ++i) {
      only.data[i] = (wanted(i % c.out_features) ? expected : untouched).data[i];
    }
    compare(only, out, kernel + name_of(c, dtype_of<T>()));
  };

  // Rows: all of a part, then every third.
  Buffer<int8_t> steps(operands.rows * operands.q_stride);
  for (int64_t i = 0; i < operands.rows; ++i) {
    to_step_order(operands.q.data + i * operands.q_stride, c.in_features, steps.data + i * operands.q_stride);
  }
  const Part rows = part_of(c, c.out_features);
  TernaryProduct product = product_of(c, operands, row, chunks, out);
  product.q = steps.data;
  tested->ternary_rows(product, nullptr, rows.begin, rows.end);
  expect_only([&](int64_t n) { return n >= rows.begin && n < rows.end; }, "ternary_rows ");
  Buffer<int32_t> list(divide_up(c.out_features, 3));
  for (size_t i = 0; i < list.count; ++i) list.data[i] = static_cast<int32_t>(3 * i);
  product = product_of(c, operands, row, chunks, out);
  product.q = steps.data;
  tested->ternary_rows(product, list.data, 0, static_cast<int64_t>(list.count));
  expect_only([](int64_t n) { return n % 3 == 0; }, "ternary_rows, a list ");

  // Columns: those with an activation.
  Buffer<int32_t> columns(c.in_features + kColumnsAtOnce);
  const int64_t found =
      nonzero_positions(operands.q.data, operands.rows, operands.q_stride, c.in_features, columns.data);
  const int64_t count = divide_up(found, kColumnsAtOnce) * kColumnsAtOnce;
  for (int64_t i = found; i < count; ++i) columns.data[i] = columns.data[found - 1];
  Buffer<int8_t> gathered(operands.rows * count);
  for (int64_t i = 0; i < operands.rows; ++i) {
    for (int64_t k = 0; k < found; ++k) {
      gathered.data[i * count + k] = operands.q.data[i * operands.q_stride + columns.data[k]];
    }
  }
  product = product_of(c, operands, column, panels, out);
  product.q = gathered.data;
  product.q_stride = count;
  const Part part = part_of(c, panels);
  tested->ternary_columns(product, columns.data, count, part.begin, part.end);
  expect_only([&](int64_t n) { return n / kPanelRows >= part.begin && n / kPanelRows < part.end; }, "ternary_columns ");
}

// Sums, which are the same code for every output type.
void test_sums() {
  using T = int32_t;
  Random random;
  // Every token count up to two full groups of the widest kernel, and one more.
  for (int64_t tokens = 1; tokens <= 25; ++tokens) {
    test_tile16<T>({49, 145, tokens}, random);
    test_base3<T>({49, 145, tokens}, random);
    if (tokens <= kMaxSparseRows) test_sparse<T>({49, 545, tokens}, random);
  }
  for (const int64_t in_features : {0, 1, 15, 16, 17, 19, 20, 21, 63, 64, 65, 255, 256, 257, 300}) {
    for (const int64_t tokens : {1, 2, 7}) {
      test_tile16<T>({33, in_features, tokens}, random);
      test_base3<T>({33, in_features, tokens}, random);
      if (tokens <= kMaxSparseRows) test_sparse<T>({33, in_features, tokens}, random);
    }
  }
  for (int weights = 0; weights < kWeightKinds; ++weights) {
    for (int activations = 0; activations < kActivationKinds; ++activations) {
      for (const int64_t tokens : {1, 3}) {
        const ProductCase c{17, 600, tokens, static_cast<Weights>(weights), static_cast<Activations>(activations)};
        test_tile16<T>(c, random);
        test_base3<T>(c, random);
        test_sparse<T>(c, random);
      }
    }
  }
  // The bounds in kernel_table.h, at their edge: the longest row, the largest codes and activations.
  for (const int64_t tokens : {1, 2}) {
    test_tile16<T>({16, kMaxInFeatures, tokens, kAllThree, kAllMinus128}, random);
    test_base3<T>({16, kMaxInFeatures, tokens, kAllThree, kAllMinus128}, random);
  }
  test_sparse<T>({17, kMaxColumnInFeatures, 1, kAllThree, kAllMinus128}, random);
}

// Scales, bias, rounding, planes, groups, and which elements are written.
template <class T>
void test_results() {
  Random random;
  for (const int64_t out_features : {1, 15, 16, 17, 32, 33, 48, 255, 257}) {
    for (const int64_t tokens : {1, 2, 7}) {
      for (const bool bias : {false, true}) {
        const ProductCase c{out_features, 30, tokens, kAnyByte, kAnyInt8, bias};
        test_tile16<T>(c, random);
        test_base3<T>(c, random);
        if (tokens == 2) test_sparse<T>(c, random);
      }
    }
  }
  for (const int64_t tokens : {1, 5}) test_tile16<T>({80, 64, tokens, kAnyByte, kAnyInt8, true, 1, 0, true}, random);
  for (const int64_t tokens : {1, 4}) {
    test_base3<T>({80, 64, tokens, kAnyByte, kAnyInt8, true, 1, 0, true}, random);
    test_sparse<T>({1100, 64, tokens, kAnyByte, kMostlyZero, true, 1, 0, true}, random);
  }
}

// float(256 * hi + lo), and sums over groups: not for kInt32.
template <class T>
void test_planes_and_groups() {
  Random random;
  for (int64_t tokens = 1; tokens <= 13; ++tokens) {
    for (const int64_t group_blocks : {0, 3, 8, 16}) {
      for (const int64_t planes : {1, 2}) {
        if (planes == 1 && group_blocks == 0) continue;
        ProductCase c{40, 300, tokens, kAnyByte, kAnyInt8, true, planes, group_blocks};
        test_tile16<T>(c, random);
        if (group_blocks == 0) continue;
        c.half_scales = true;
        test_tile16<T>(c, random);
      }
    }
  }
  for (int weights = 0; weights < kWeightKinds; ++weights) {
    for (int activations = 0; activations < kActivationKinds; ++activations) {
      for (const int64_t tokens : {1, 2}) {
        const ProductCase c{20,   300, tokens, static_cast<Weights>(weights), static_cast<Activations>(activations),
                            true, 2};
        test_tile16<T>(c, random);
        test_base3<T>(c, random);
        test_sparse<T>(c, random);
      }
    }
  }
}

// Prompts: so many tokens that kernels decode weights into memory first, a piece of the inputs at a time, and take the
// rows of q in blocks of 16 or 32, and in parts that fit into a cache.
template <class T>
void test_prompts() {
  Random random;
  // Few sizes, because emulators are slow: rows of q around 16 and 32, and inputs around 64 and three pieces.
  for (const int64_t tokens : {16, 17, 31, 33, 300}) {
    for (const int64_t in_features : {63, 64, 65, 320, 1281}) {
      if (tokens == 300 && in_features > 65) continue;
      // A code 3 anywhere in a tile makes avx2 take other loops.
      for (const Weights weights : {kAnyByte, kAnyTernary}) {
        test_tile16<T>({in_features == 64 ? 16 : 33, in_features, tokens, weights}, random);
      }
      test_base3<T>({in_features == 64 ? 16 : 33, in_features, tokens}, random);
    }
  }
  for (int weights = 0; weights < kWeightKinds; ++weights) {
    for (int activations = 0; activations < kActivationKinds; ++activations) {
      test_tile16<T>({33, 600, 25, static_cast<Weights>(weights), static_cast<Activations>(activations)}, random);
      test_base3<T>({33, 130, 25, static_cast<Weights>(weights), static_cast<Activations>(activations)}, random);
    }
  }
}

// Likewise with two planes and groups. The longest rows have more groups than are decoded at a time.
template <class T>
void test_prompts_in_groups() {
  Random random;
  for (const int64_t tokens : {9, 17, 33}) {
    for (const int64_t group_blocks : {0, 4, 8, 12}) {  // the last leaves room in a piece of codes
      for (const int64_t planes : {1, 2}) {
        if (planes == 1 && group_blocks == 0) continue;
        for (const Weights weights : {kAnyByte, kAnyTernary}) {
          ProductCase c{40, tokens == 17 ? 1210 : 300, tokens, weights, kAnyInt8, true, planes, group_blocks};
          test_tile16<T>(c, random);
          if (group_blocks == 0) continue;
          c.half_scales = true;
          test_tile16<T>(c, random);
        }
      }
    }
  }
  // Sums of the largest groups at the edge of the lanes that avx2 keeps them in.
  for (const Weights weights : {kAllMinus, kAllPlus, kAllThree}) {
    for (const Activations activations : {kAll127, kAllMinus128}) {
      for (const int64_t planes : {1, 2}) {
        for (const int64_t tokens : {1, 2, 25}) {
          test_tile16<T>({33, 512, tokens, weights, activations, false, planes, 8}, random);
          test_tile16<T>({33, 512, tokens, weights, activations, false, planes, 16}, random);
        }
      }
    }
  }
}

}  // namespace

void test_products() {
  test_narrowing<BFloat16>();
  test_narrowing<Float16>();
  test_sums();
  test_results<int32_t>();
  test_results<float>();
  test_results<BFloat16>();
  test_results<Float16>();
  test_prompts<int32_t>();
  test_prompts_in_groups<float>();
  test_planes_and_groups<float>();
  test_planes_and_groups<BFloat16>();
  test_planes_and_groups<Float16>();
}

void test_layouts() {
  Random random;
  for (const int64_t out_features : {1, 16, 17, 40, 300}) {
    for (const int64_t in_features : {0, 1, 16, 37, 80, 300}) {
      const MatrixSize size{out_features, in_features};
      const int64_t tiles = tiles_of(out_features);
      const int64_t panels = divide_up(out_features, kPanelRows);
      Buffer<int8_t> w(out_features * in_features), back(out_features * in_features);
      for (size_t i = 0; i < w.count; ++i) w.data[i] = static_cast<int8_t>(random.byte() % 3 - 1);
      Buffer<uint8_t> tile16(tiles * blocks_of(in_features) * kBlockBytes);
      const auto check = [&](const char* layout) {
        const bool ternary = unpack_tile16(tile16.data, size, back.data, 0, tiles);
        ++comparisons;
        if (!ternary || std::memcmp(w.data, back.data, w.count) != 0) report(std::string("layout ") + layout);
        std::memset(tile16.data, 0xff, tile16.count);
      };
      Buffer<uint8_t> base3(tiles * divide_up(in_features, kBase3BlockInputs) * kBlockBytes);
      Buffer<uint8_t> row(out_features * divide_up(in_features, kChunkInputs) * kBlockBytes);
      Buffer<uint8_t> column(in_features * panels * kBlockBytes);
      if (!pack_tile16(w.data, size, tile16.data, 0, tiles)) report("packing");
      base3_from_tile16(tile16.data, size, base3.data, 0, tiles);
      row_from_tile16(tile16.data, size, row.data, 0, tiles);
      column_from_tile16(tile16.data, size, column.data, 0, panels);
      check("tile16");
      tile16_from_base3(base3.data, size, tile16.data, 0, tiles);
      check("tile16_base3");
      tile16_from_row(row.data, size, tile16.data, 0, tiles);
      check("row");
      tile16_from_column(column.data, size, tile16.data, 0, panels);
      check("column");
    }
  }
}

}  // namespace kernel_test
}  // namespace bitnet_ops
