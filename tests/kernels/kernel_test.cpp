// Compares every kernel of every table with the scalar table, bit for bit, without Python or torch.
//
// Built and run by tests/test_kernels.py, plain and under the address and undefined-behaviour
// sanitizers: every buffer here has exactly the size that kernel_table.h promises a kernel.
// Prints which instruction set is chosen, then one line for each; the exit status is the number of
// tables that differ.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu_features.h"
#include "../../csrc/dispatch.h"
#include "../../csrc/float_convert.h"
#include "../../csrc/kernel_table.h"
#include "../../csrc/sparse_order.h"
#if defined(__x86_64__) && defined(__linux__)
#include "emulate_vex_vpdpbusd.h"
#endif

using namespace bitnet_ops;

namespace {

// xorshift64*: the same numbers on every machine.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint64_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du;
  }
  uint8_t byte() { return static_cast<uint8_t>(next() >> 56); }
  float uniform() { return static_cast<float>(static_cast<int64_t>(next() >> 40)) * 0x1p-23f - 1.0f; }  // [-1, 1)
};

// Heap memory of exactly `count` elements at a 64-byte boundary, so that the sanitizer sees a byte too far.
template <class T>
struct Buffer {
  T* data;
  size_t count;
  explicit Buffer(int64_t n) : count(static_cast<size_t>(n)) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T) + (count == 0)) != 0) std::abort();
    data = static_cast<T*>(memory);
    std::memset(memory, 0, count * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

const KernelTable* scalar = nullptr;
const KernelTable* tested = nullptr;
long comparisons = 0;
long differences = 0;

void report(const std::string& what) {
  if (++differences <= 10) std::fprintf(stderr, "%s: %s differs from scalar\n", tested->isa, what.c_str());
}

bool same(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }
bool same(int32_t a, int32_t b) { return a == b; }
bool same(int8_t a, int8_t b) { return a == b; }
bool same(uint8_t a, uint8_t b) { return a == b; }
bool same(BFloat16 a, BFloat16 b) { return a.bits == b.bits; }
bool same(Float16 a, Float16 b) { return a.bits == b.bits || same(to_float(a), to_float(b)); }

template <class T>
void compare(const Buffer<T>& expected, const Buffer<T>& given, const std::string& what) {
  ++comparisons;
  for (size_t i = 0; i < expected.count; ++i) {
    if (!same(expected.data[i], given.data[i])) return report(what + ", element " + std::to_string(i));
  }
}

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}
template <>
constexpr DType dtype_of<Float16>() {
  return DType::kFloat16;
}
template <>
constexpr DType dtype_of<int32_t>() {
  return DType::kInt32;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows that have gone wrong somewhere, once.
enum RowKind { kRandom, kZero, kTies, kExtremes, kTiny, kHuge, kOneNaN, kOneInfinity, kRowKinds };

float element(RowKind kind, int64_t k, int64_t count, Random& random) {
  switch (kind) {
    case kZero:
      return k % 2 == 0 ? 0.0f : -0.0f;
    case kTies:
      return k == 0 ? 127.0f : static_cast<float>(k % 253 - 126) + 0.5f;  // scale 1: exact .5
    case kExtremes:
      return k % 2 == 0 ? 3.0f : -3.0f;
    case kTiny:
      return random.uniform() * 1e-39f;  // subnormal, below the floor of absmax
    case kHuge:
      return random.uniform() * 6e4f;  // near the end of float16
    case kOneNaN:
      return k == count / 2 ? std::nanf("") : random.uniform();
    case kOneInfinity:
      return k == count - 1 ? -kInfinity : random.uniform();
    default:
      return random.uniform() * 4.0f;
  }
}

template <class T>
void fill_row(T* row, int64_t count, RowKind kind, Random& random) {
  for (int64_t k = 0; k < count; ++k) from_float(element(kind, k, count, random), row + k);
}

// 0, one lane, around every register width, around 64 virtual lanes, and a few longer ones.
const int64_t kLengths[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 200, 257, 640};

template <class T>
void test_rows() {
  Random random;
  for (const int64_t length : kLengths) {
    for (int kind = 0; kind < kRowKinds; ++kind) {
      const std::string where = " of " + std::to_string(length) + ", kind " + std::to_string(kind) + ", dtype " +
                                std::to_string(static_cast<int>(dtype_of<T>()));
      Buffer<T> x(length);
      fill_row(x.data, length, static_cast<RowKind>(kind), random);
      for (const int64_t q_length : {length, (length + 63) / 64 * 64}) {
        Buffer<int8_t> q[2] = {Buffer<int8_t>(q_length), Buffer<int8_t>(q_length)};
        Buffer<float> x_scale[2] = {Buffer<float>(1), Buffer<float>(1)};
        Buffer<int32_t> q_sum[2] = {Buffer<int32_t>(1), Buffer<int32_t>(1)};
        for (int i = 0; i < 2; ++i) {
          std::memset(q[i].data, 0x7b, q[i].count);  // padding must be written, not assumed
          (i == 0 ? scalar : tested)
              ->quantize_row(x.data, dtype_of<T>(), length, q[i].data, q_length, x_scale[i].data, q_sum[i].data);
        }
        compare(q[0], q[1], "quantize_row q" + where);
        compare(x_scale[0], x_scale[1], "quantize_row x_scale" + where);
        compare(q_sum[0], q_sum[1], "quantize_row q_sum" + where);

        Buffer<int8_t> hi[2] = {Buffer<int8_t>(q_length), Buffer<int8_t>(q_length)};
        Buffer<int8_t> lo[2] = {Buffer<int8_t>(q_length), Buffer<int8_t>(q_length)};
        Buffer<int32_t> sums[2] = {Buffer<int32_t>(2), Buffer<int32_t>(2)};
        for (int i = 0; i < 2; ++i) {
          std::memset(hi[i].data, 0x7b, hi[i].count);
          std::memset(lo[i].data, 0x7b, lo[i].count);
          (i == 0 ? scalar : tested)
              ->quantize_row_16(x.data, dtype_of<T>(), length, hi[i].data, lo[i].data, q_length, x_scale[i].data,
                                sums[i].data);
        }
        compare(hi[0], hi[1], "quantize_row_16 hi" + where);
        compare(lo[0], lo[1], "quantize_row_16 lo" + where);
        compare(x_scale[0], x_scale[1], "quantize_row_16 x_scale" + where);
        compare(sums[0], sums[1], "quantize_row_16 sums" + where);
      }
      Buffer<float> weight(length);
      fill_row(weight.data, length, kRandom, random);
      Buffer<T> y[2] = {Buffer<T>(length), Buffer<T>(length)};
      Buffer<float> wide[2] = {Buffer<float>(length + 5), Buffer<float>(length + 5)};
      for (int i = 0; i < 2; ++i) {
        const KernelTable* table = i == 0 ? scalar : tested;
        table->rms_norm_row(x.data, dtype_of<T>(), weight.data, 1e-5f, length, y[i].data);
        std::memset(wide[i].data, 0x7b, wide[i].count * sizeof(float));
        table->widen_row(x.data, dtype_of<T>(), length, wide[i].data, length + 5);
      }
      compare(y[0], y[1], "rms_norm_row" + where);
      compare(wide[0], wide[1], "widen_row" + where);
    }
  }
}

// Every 16-bit pattern to float32, NaN payloads included.
template <class T>
void test_widening_every_value() {
  Buffer<T> x(65536);
  for (int64_t i = 0; i < 65536; ++i) x.data[i].bits = static_cast<uint16_t>(i);
  Buffer<float> wide[2] = {Buffer<float>(65536), Buffer<float>(65536)};
  scalar->widen_row(x.data, dtype_of<T>(), 65536, wide[0].data, 65536);
  tested->widen_row(x.data, dtype_of<T>(), 65536, wide[1].data, 65536);
  ++comparisons;
  if (std::memcmp(wide[0].data, wide[1].data, 65536 * sizeof(float)) != 0) report("widening of every value");
}

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

enum Weights { kAnyByte, kAllMinus, kAllZero, kAllPlus, kAllThree, kWeightKinds };
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
};

std::string name_of(const ProductCase& c, DType dtype) {
  std::string name = std::to_string(c.tokens) + "x" + std::to_string(c.in_features) + "x" +
                     std::to_string(c.out_features) + ", weights " + std::to_string(c.weights) + ", activations " +
                     std::to_string(c.activations) + ", dtype " + std::to_string(static_cast<int>(dtype));
  if (c.planes == 2) name += ", 16 bits";
  if (c.group_blocks != 0) name += ", groups of " + std::to_string(c.group_blocks) + " blocks";
  return name + (c.part ? ", a part" : "");
}

// Operands in buffers of exactly the size that a kernel may read; what differs by layout is `packed`.
struct Operands {
  int64_t groups, rows, q_stride;
  Buffer<int8_t> q;
  Buffer<int32_t> q_sum;
  Buffer<float> x_scale, weight_scale, bias;

  Operands(const ProductCase& c, Random& random)
      : groups(c.group_blocks == 0 ? 1 : divide_up(c.in_features, c.group_blocks * kBlockInputs)),
        rows(c.tokens * c.planes),
        q_stride(padded_in_features(c.in_features)),
        q(rows * q_stride),
        q_sum(rows * groups),
        x_scale(c.tokens),
        weight_scale(groups * c.out_features),
        bias(c.out_features) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < c.in_features; ++k) {
        const int8_t any = static_cast<int8_t>(random.byte());
        const int8_t value = c.activations == kAnyInt8      ? any
                             : c.activations == kMostlyZero ? static_cast<int8_t>(random.byte() < 50 ? any : 0)
                                                            : static_cast<int8_t>(c.activations == kAll127 ? 127 : -128);
        q.data[row * q_stride + k] = value;
        q_sum.data[row * groups + (groups == 1 ? 0 : k / (c.group_blocks * kBlockInputs))] += value;
      }
    }
    for (int64_t t = 0; t < c.tokens; ++t) x_scale.data[t] = t == 1 ? std::nanf("") : random.uniform();
    fill_row(weight_scale.data, groups * c.out_features, kRandom, random);
    fill_row(bias.data, c.out_features, kRandom, random);
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
  product.bias = c.bias ? operands.bias.data : nullptr;
  // Results that are another thread's must stay as they are.
  std::memset(static_cast<void*>(out.data), 0x3c, out.count * sizeof(T));
  return product;
}

void fill_weights(Buffer<uint8_t>& packed, Weights weights, Random& random) {
  constexpr uint8_t kPatterns[] = {0, 0x00, 0x55, 0xaa, 0xff};
  for (size_t i = 0; i < packed.count; ++i) packed.data[i] = weights == kAnyByte ? random.byte() : kPatterns[weights];
}

// Units [begin, end) of `count`.
struct Part {
  int64_t begin, end;
};
Part part_of(const ProductCase& c, int64_t count) {
  return c.part && count > 2 ? Part{1, count - 1} : Part{0, count};
}

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
    for (const int64_t group_blocks : {0, 4, 16}) {
      for (const int64_t planes : {1, 2}) {
        if (planes == 1 && group_blocks == 0) continue;
        test_tile16<T>({40, 300, tokens, kAnyByte, kAnyInt8, true, planes, group_blocks}, random);
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

template <class T>
void test_logits() {
  Random random;
  for (const int64_t in_features : {0, 1, 63, 64, 65, 100, 320}) {
    for (const int64_t tokens : {1, 2, 3, 4, 6, 7, 13}) {
      for (const int64_t vocabulary : {1, 3, 4, 9, 21}) {
        const int64_t stride = (in_features + kVirtualLanes - 1) / kVirtualLanes * kVirtualLanes;
        const int64_t begin = vocabulary > 9 ? 8 : 0;  // the part of one thread
        Buffer<float> x(tokens * stride), scratch(kLogitsScratchRows * stride);
        Buffer<T> weight(vocabulary * in_features);
        for (int64_t t = 0; t < tokens; ++t) fill_row(x.data + t * stride, in_features, kRandom, random);
        fill_row(weight.data, vocabulary * in_features, kRandom, random);
        Buffer<float> out[2] = {Buffer<float>(tokens * vocabulary), Buffer<float>(tokens * vocabulary)};
        for (int i = 0; i < 2; ++i) {
          const Logits logits{x.data, stride, tokens, weight.data, dtype_of<T>(), in_features, vocabulary, out[i].data};
          (i == 0 ? scalar : tested)->logits(logits, begin, vocabulary, scratch.data);
        }
        compare(
            out[0], out[1],
            "logits " + std::to_string(tokens) + "x" + std::to_string(in_features) + "x" + std::to_string(vocabulary));
      }
    }
  }
}

struct AttentionCase {
  int64_t tokens, kv_heads, group, head_dim;
  int64_t start[2];  // of two sequences: the tokens before the call, or below 0 padding
  RowKind kind = kRandom;
};

// Storage of exactly the promised sizes, in memory of the element type of the cache.
struct AttentionCache {
  Buffer<uint8_t> keys, values;
  Buffer<float> key_scale, value_scale;
  AttentionCache(const AttentionCase& c, int64_t capacity, int64_t bytes)
      : keys(2 * c.kv_heads * capacity * (bytes == 1 ? value_width(c.head_dim) : c.head_dim) * bytes),
        values(2 * c.kv_heads * capacity * value_width(c.head_dim) * bytes),
        key_scale(bytes == 1 ? 2 * c.kv_heads * capacity : 0),
        value_scale(bytes == 1 ? 2 * c.kv_heads * capacity : 0) {
    // NaN, or its like: what nobody wrote must not be read.
    std::memset(keys.data, 0xff, keys.count);
    std::memset(values.data, 0xff, values.count);
    std::memset(static_cast<void*>(key_scale.data), 0xff, key_scale.count * sizeof(float));
    std::memset(static_cast<void*>(value_scale.data), 0xff, value_scale.count * sizeof(float));
  }
};

// One call as attention_ops.cpp makes it, with other numbers of rows at once.
void run_attention(const KernelTable& table, Attention attention, int64_t tokens_at_once) {
  const int64_t rows = tokens_at_once * attention.group;
  const int64_t width = value_width(attention.head_dim);
  Buffer<float> max(rows), sum(rows), out(rows * width), part_max(rows), part_sum(rows), part_out(rows * width);
  Buffer<float> scratch(attention_scratch(rows, attention.head_dim)), store_scratch(2 * attention.head_dim);
  const AttentionState state{max.data, sum.data, out.data}, part{part_max.data, part_sum.data, part_out.data};
  for (int64_t b = 0; b < attention.batch; ++b) {
    for (int64_t h = 0; h < attention.kv_heads; ++h) {
      table.attention_store(attention, {b, h, 0, attention.tokens}, store_scratch.data);
      for (int64_t begin = 0; begin < attention.tokens; begin += tokens_at_once) {
        const int64_t end = begin + tokens_at_once < attention.tokens ? begin + tokens_at_once : attention.tokens;
        const AttentionRows at{b, h, begin, end};
        for (int64_t row = 0; row < rows; ++row) {
          max.data[row] = -kInfinity;
          sum.data[row] = 0.0f;
        }
        std::memset(out.data, 0, out.count * sizeof(float));
        const int64_t last = attention.start[b] + end - 1;
        table.attention_queries(attention, at, scratch.data);
        for (int64_t span = 0; span * kAttentionSpan <= last; ++span) {
          table.attention_span(attention, at, span, part, scratch.data);
          table.attention_join(attention, at, span, state, part);
        }
        table.attention_finish(attention, at, state);
      }
    }
  }
}

// Tokens before `start` are stored by a call of their own. Scalar takes all tokens at once, the tested
// table some at a time.
void test_attention(const AttentionCase& c, CacheType type, Random& random) {
  const int64_t bytes = type == CacheType::kFloat32 ? 4 : type == CacheType::kBFloat16 ? 2 : 1;
  int64_t before = 0;
  for (const int64_t start : c.start) before = start > before ? start : before;
  const int64_t positions = before + c.tokens;
  const int64_t part = type == CacheType::kInt8 ? kAttentionSpan : kAttentionBlock;
  const int64_t capacity = divide_up(positions, part) * part;
  const int64_t heads = c.kv_heads * c.group;
  const int64_t half = c.head_dim / 2;
  Buffer<float> q(2 * positions * heads * c.head_dim), k(2 * positions * c.kv_heads * c.head_dim);
  Buffer<float> v(2 * positions * c.kv_heads * c.head_dim), cos(positions * half), sin(positions * half);
  for (int64_t row = 0; row < 2 * positions; ++row) {
    // The odd kinds in one token only.
    const RowKind kind = row == positions / 2 ? c.kind : kRandom;
    fill_row(q.data + row * heads * c.head_dim, heads * c.head_dim, kRandom, random);
    fill_row(k.data + row * c.kv_heads * c.head_dim, c.kv_heads * c.head_dim, kind, random);
    fill_row(v.data + row * c.kv_heads * c.head_dim, c.kv_heads * c.head_dim, kind, random);
  }
  for (int64_t i = 0; i < positions * half; ++i) {
    cos.data[i] = random.uniform();  // rotations need not be rotations to be compared
    sin.data[i] = random.uniform();
  }
  AttentionCache cache[2] = {{c, capacity, bytes}, {c, capacity, bytes}};
  Buffer<float> out[2] = {Buffer<float>(2 * c.tokens * heads * c.head_dim),
                          Buffer<float>(2 * c.tokens * heads * c.head_dim)};
  for (const int64_t tokens_at_once : {c.tokens, int64_t{1}, int64_t{5}}) {
    for (int i = 0; i < 2; ++i) {
      const KernelTable& table = i == 0 ? *scalar : *tested;
      Attention attention{};
      const auto rows = [&](const Buffer<float>& x, int64_t row_heads, int64_t skip) {
        return TokenRows{x.data + skip * row_heads * c.head_dim, positions * row_heads * c.head_dim,
                         row_heads * c.head_dim};
      };
      attention.cos = cos.data;
      attention.sin = sin.data;
      attention.batch = 2;
      attention.kv_heads = c.kv_heads;
      attention.group = c.group;
      attention.head_dim = c.head_dim;
      attention.scale = 0.3f;
      attention.cache = type;
      attention.capacity = capacity;
      attention.keys = cache[i].keys.data;
      attention.values = cache[i].values.data;
      attention.key_scale = cache[i].key_scale.data;
      attention.value_scale = cache[i].value_scale.data;
      const int64_t store_from[2] = {c.start[0] - before, c.start[1] - before};
      attention.start = store_from;
      attention.tokens = before;
      attention.k = rows(k, c.kv_heads, 0);
      attention.v = rows(v, c.kv_heads, 0);
      Buffer<float> store_scratch(2 * c.head_dim);
      for (int64_t b = 0; b < 2; ++b) {
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          table.attention_store(attention, {b, h, 0, before}, store_scratch.data);
        }
      }
      attention.start = c.start;
      attention.tokens = c.tokens;
      attention.q = rows(q, heads, before);
      attention.k = rows(k, c.kv_heads, before);
      attention.v = rows(v, c.kv_heads, before);
      attention.out = out[i].data;
      std::memset(static_cast<void*>(out[i].data), 0x3c, out[i].count * sizeof(float));
      run_attention(table, attention, i == 0 ? c.tokens : tokens_at_once);
    }
    const std::string where = " " + std::to_string(c.tokens) + " tokens x " + std::to_string(c.kv_heads) + " x " +
                              std::to_string(c.group) + " heads of " + std::to_string(c.head_dim) + " after " +
                              std::to_string(c.start[0]) + " and " + std::to_string(c.start[1]) + ", kind " +
                              std::to_string(c.kind) + ", bytes " + std::to_string(bytes);
    compare(out[0], out[1], "attention" + where);
    if (type == CacheType::kInt8) {
      compare(cache[0].key_scale, cache[1].key_scale, "attention key_scale" + where);
      compare(cache[0].value_scale, cache[1].value_scale, "attention value_scale" + where);
    }
    // A NaN may have any payload, so with one among the tokens only results are compared.
    ++comparisons;
    if (c.kind != kOneNaN && (std::memcmp(cache[0].keys.data, cache[1].keys.data, cache[0].keys.count) != 0 ||
                              std::memcmp(cache[0].values.data, cache[1].values.data, cache[0].values.count) != 0)) {
      report("attention's cache" + where);
    }
  }
}

void test_attention() {
  Random random;
  const AttentionCase cases[] = {
      {1, 1, 1, 2, {0, 0}},       {1, 2, 4, 20, {70, 3}},   {3, 1, 3, 36, {-2, 61}},  {66, 2, 2, 12, {0, -66}},
      {40, 1, 5, 64, {230, -20}}, {1, 1, 4, 128, {300, 0}}, {13, 1, 4, 128, {250, 7}},
  };
  for (const CacheType type : {CacheType::kFloat32, CacheType::kBFloat16, CacheType::kInt8}) {
    for (const AttentionCase& c : cases) test_attention(c, type, random);
    for (int kind = 0; kind < kRowKinds; ++kind) {
      test_attention({6, 2, 2, 20, {64, -1}, static_cast<RowKind>(kind)}, type, random);
    }
  }
}

template <class T>
void test_logits_of_rows() {
  Random random;
  for (const int64_t in_features : {1, 64, 100, 320}) {
    for (const int64_t count : {1, 2, 3, 20}) {
      const int64_t vocabulary = 21;
      const int64_t stride = (in_features + kVirtualLanes - 1) / kVirtualLanes * kVirtualLanes;
      Buffer<float> x(stride), scratch(kLogitsScratchRows * stride), all(vocabulary);
      Buffer<T> weight(vocabulary * in_features);
      fill_row(x.data, in_features, kRandom, random);
      fill_row(weight.data, vocabulary * in_features, kRandom, random);
      const Logits logits{x.data, stride, 1, weight.data, dtype_of<T>(), in_features, vocabulary, all.data};
      scalar->logits(logits, 0, vocabulary, scratch.data);
      Buffer<int32_t> rows(count);
      Buffer<float> out[2] = {Buffer<float>(count), Buffer<float>(count)};
      for (int64_t i = 0; i < count; ++i) {
        rows.data[i] = static_cast<int32_t>(random.byte() % vocabulary);
        out[0].data[i] = all.data[rows.data[i]];
      }
      tested->logits_of_rows(logits, rows.data, count, out[1].data, scratch.data);
      compare(out[0], out[1], "logits_of_rows, " + std::to_string(count) + " of " + std::to_string(in_features));
    }
  }
}

// The 16-bit forms of tokens, and bounds with room enough for the sums here.
struct ScreenedTokens {
  int64_t q_stride;
  Buffer<int8_t> q;
  Buffer<int32_t> group_sum;
  std::vector<ScreenedToken> tokens{};

  ScreenedTokens(int64_t in_features, int64_t count)
      : q_stride(padded_in_features(in_features)),
        q(2 * count * q_stride),
        group_sum(count * screen_groups(in_features)) {}

  void add(const float* x, int64_t in_features) {
    const int64_t t = static_cast<int64_t>(tokens.size());
    int8_t* hi = q.data + 2 * t * q_stride;
    float scale;
    int32_t unused_sums[2];
    scalar->quantize_row_16(x, DType::kFloat32, in_features, hi, hi + q_stride, q_stride, &scale, unused_sums);
    double square = 0, error_square = 0;
    for (int64_t k = 0; k < in_features; ++k) {
      const int32_t number = 256 * hi[k] + hi[q_stride + k];
      group_sum.data[t * screen_groups(in_features) + k / kScreenGroup] += number;
      const double error = x[k] - static_cast<double>(scale) * number;
      square += static_cast<double>(x[k]) * x[k];
      error_square += error * error;
    }
    const double norm = std::sqrt(square) * (1 + 1e-9);
    tokens.push_back({scale, norm, std::sqrt(error_square) * (1 + 1e-9) + 1e-14 * norm + kUnderflow});
  }
};

// What a kernel makes of a screen.
struct ScreenResult {
  Buffer<float> upper, approximate;

  explicit ScreenResult(int64_t count) : upper(count), approximate(count) {}

  void run(const KernelTable& table, const Buffer<uint8_t>& codes, const Buffer<float>& bounds,
           const ScreenedTokens& tokens, int64_t in_features, int64_t vocabulary, int64_t begin) {
    const int64_t tiles = tiles_of(vocabulary);
    const float* scale = bounds.data;
    const Screen screen{codes.data,           screen_groups(in_features),
                        scale,                scale + tiles * kTileRows,
                        scale + 2 * tiles * kTileRows, tokens.q.data,
                        tokens.q_stride,      tokens.group_sum.data,
                        tokens.tokens.data(), static_cast<int64_t>(tokens.tokens.size()),
                        vocabulary,           upper.data,
                        approximate.data};
    table.screen(screen, begin, tiles);
  }
};

// The copy of a table, and the bounds of its logits, which must also hold.
template <class T>
void test_screen(int64_t vocabulary, int64_t in_features, Random& random) {
  const int64_t tiles = tiles_of(vocabulary);
  const int64_t groups = screen_groups(in_features);
  const int64_t rows = tiles * kTileRows;
  const int64_t length = groups * kScreenGroup;
  const int64_t begin = tiles > 2 ? 1 : 0;  // the part of one thread
  const std::string where = " of " + std::to_string(vocabulary) + "x" + std::to_string(in_features) + ", dtype " +
                            std::to_string(static_cast<int>(dtype_of<T>()));
  Buffer<T> weight(vocabulary * in_features);
  for (int64_t row = 0; row < vocabulary; ++row) {
    fill_row(weight.data + row * in_features, in_features, static_cast<RowKind>(row % kRowKinds), random);
  }
  const int64_t code_bytes = tiles * screen_tile_bytes(groups);
  Buffer<uint8_t> codes[2] = {Buffer<uint8_t>(code_bytes), Buffer<uint8_t>(code_bytes)};
  Buffer<float> bounds[2] = {Buffer<float>(3 * rows), Buffer<float>(3 * rows)};
  Buffer<float> wide(length);
  Buffer<int8_t> q_rows(length * kTileRows + groups);
  for (int i = 0; i < 2; ++i) {
    ScreenTable copy{weight.data, dtype_of<T>(), in_features, vocabulary, codes[i].data, bounds[i].data, nullptr, nullptr};
    copy.norm = copy.scale + rows;
    copy.residual = copy.norm + rows;
    (i == 0 ? scalar : tested)->screen_rows(copy, begin, tiles, wide.data, q_rows.data);
  }
  compare(codes[0], codes[1], "screen_rows codes" + where);
  compare(bounds[0], bounds[1], "screen_rows bounds" + where);

  // Every token count up to two groups of the widest kernel, and one more.
  for (int64_t count = 1; count <= 13; ++count) {
    Buffer<float> x(count * length);
    ScreenedTokens tokens(in_features, count);
    for (int64_t t = 0; t < count; ++t) {
      fill_row(x.data + t * length, in_features, t == 5 ? kHuge : kRandom, random);
      tokens.add(x.data + t * length, in_features);
    }
    ScreenResult result[2] = {ScreenResult(count * vocabulary), ScreenResult(count * vocabulary)};
    for (int i = 0; i < 2; ++i) {
      result[i].run(i == 0 ? *scalar : *tested, codes[0], bounds[0], tokens, in_features, vocabulary, begin);
    }
    compare(result[0].upper, result[1].upper, "screen upper" + where);
    compare(result[0].approximate, result[1].approximate, "screen approximate" + where);

    Buffer<float> scratch(kLogitsScratchRows * length), out(count * vocabulary);
    const Logits logits{x.data, length, count, weight.data, dtype_of<T>(), in_features, vocabulary, out.data};
    tested->logits(logits, 0, vocabulary, scratch.data);
    ++comparisons;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t place = t * vocabulary + begin * kTileRows; place < (t + 1) * vocabulary; ++place) {
        const double upper = result[1].upper.data[place];
        const double lower = 2.0 * result[1].approximate.data[place] - upper;  // as far on the other side, rounded
        const double slack = std::fabs(lower) * 1e-6;
        const float logit = out.data[place];
        if (logit > upper || logit < lower - slack) report("a logit beyond its bounds" + where);
      }
    }
  }
}

template <class T>
void test_screens() {
  Random random;
  for (const int64_t in_features : {0, 1, 15, 17, 64, 65, 320}) {
    for (const int64_t vocabulary : {1, 16, 35}) test_screen<T>(vocabulary, in_features, random);
  }
}

// Sums of the largest codes (any byte may come) and activations, over the most inputs.
void test_screen_overflow() {
  const int64_t in_features = kMaxScreenFeatures;
  const int64_t groups = screen_groups(in_features);
  for (const uint8_t byte : {0x00, 0x7f, 0xff}) {
    for (const int8_t value : {-128, 127}) {
      Buffer<uint8_t> codes(screen_tile_bytes(groups));
      Buffer<float> bounds(3 * kTileRows);
      ScreenedTokens tokens(in_features, 1);
      std::memset(codes.data, byte, codes.count);
      for (int64_t i = 0; i < kTileRows; ++i) bounds.data[i] = 1.0f;
      for (int64_t k = 0; k < in_features; ++k) tokens.q.data[k] = tokens.q.data[tokens.q_stride + k] = value;
      for (int64_t g = 0; g < groups; ++g) tokens.group_sum.data[g] = 64 * 257 * value;
      tokens.tokens.push_back({1.0, 0.0, 0.0});
      ScreenResult result(kTileRows);
      result.run(*tested, codes, bounds, tokens, in_features, kTileRows, 0);
      // Three codes of four are 63 for 0x7f and 0xff, with the fourth 0x15 and 63; a factor is a signed byte.
      const double code = byte == 0 ? -32 : byte == 0xff ? 31 : (3 * 31 + 0x15 - 32) / 4.0;
      const double product = 257.0 * value * code * static_cast<double>(in_features) * static_cast<int8_t>(byte);
      ++comparisons;
      for (int64_t i = 0; i < kTileRows; ++i) {
        // 2^10 additions of equal numbers.
        if (std::fabs(result.approximate.data[i] - product) > std::fabs(product) * 0x1p-13) {
          report("screen at its largest sums");
        }
      }
    }
  }
}

void test_table() {
  test_rows<float>();
  test_rows<BFloat16>();
  test_rows<Float16>();
  test_widening_every_value<BFloat16>();
  test_widening_every_value<Float16>();
  test_narrowing<BFloat16>();
  test_narrowing<Float16>();
  test_sums();
  test_results<int32_t>();
  test_results<float>();
  test_results<BFloat16>();
  test_results<Float16>();
  test_planes_and_groups<float>();
  test_planes_and_groups<BFloat16>();
  test_planes_and_groups<Float16>();
  test_logits<float>();
  test_logits<BFloat16>();
  test_logits<Float16>();
  test_logits_of_rows<float>();
  test_logits_of_rows<BFloat16>();
  test_logits_of_rows<Float16>();
  test_screens<float>();
  test_screens<BFloat16>();
  test_screens<Float16>();
  test_screen_overflow();
  test_attention();
}

// Layouts know no instruction set; their round trips on odd shapes are for the sanitizers.
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

}  // namespace

int main() {
  size_t count;
  const Candidate* list = candidates(&count);
  for (size_t i = 0; i < count; ++i) {
    if (std::strcmp(list[i].table->isa, "scalar") == 0) scalar = list[i].table;
  }
  std::printf("chosen: %s\n", kernels().isa);
  tested = scalar;
  test_layouts();
  int failed = differences != 0;
  for (size_t i = 0; i < count; ++i) {
    tested = list[i].table;
    comparisons = differences = 0;
    bool runs = list[i].supported;
    long emulated = 0;
#if defined(__x86_64__) && defined(__linux__)
    constexpr uint32_t kNeeded = kAvx2 | kFma | kF16c;
    if (!runs && std::strcmp(tested->isa, "avx_vnni") == 0 && (cpu_features() & kNeeded) == kNeeded) {
      vex_emulation::install();
      runs = true;
      test_table();
      emulated = vex_emulation::executed;
      if (emulated == 0) report("nothing was emulated: this kernel");
    } else if (runs) {
      test_table();
    }
#else
    if (runs) test_table();
#endif
    if (!runs) {
      std::printf("%s: not supported by this CPU\n", tested->isa);
      continue;
    }
    std::printf("%s: %ld comparisons, %ld differences", tested->isa, comparisons, differences);
    if (emulated != 0) std::printf(", %ld instructions emulated", emulated);
    std::printf("\n");
    failed += differences != 0;
  }
  return failed;
}
