// Compares every kernel of every table with the scalar table, bit for bit, without Python or torch.
//
// Built and run by tests/test_kernels.py, plain and under the address and undefined-behaviour
// sanitizers: every buffer here has exactly the size that kernel_table.h promises a kernel.
// Prints one line per instruction set; the exit status is the number of tables that differ.

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
#include "../../csrc/tile16.h"
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
      const TernaryProduct product{
          packed.data,       0,        q.data, 64, q_sum.data, 1, rows, dtype_of<T>(), out[i].data, x_scale.data,
          weight_scale.data, bias.data};
      (i == 0 ? scalar : tested)->ternary_product(product, 0, rows / kTileRows);
    }
    compare(out[0], out[1], "narrowing, low half " + std::to_string(low));
  }
}

enum Weights { kAnyByte, kAllMinus, kAllZero, kAllPlus, kAllThree, kWeightKinds };
enum Activations { kAnyInt8, kAll127, kAllMinus128, kActivationKinds };

struct ProductCase {
  int64_t out_features, in_features, tokens;
  Weights weights;
  Activations activations;
  bool bias;
  int64_t tile_begin, tile_end;
};

template <class T>
void test_product(const ProductCase& c, Random& random) {
  const int64_t blocks = (c.in_features + kBlockInputs - 1) / kBlockInputs;
  const int64_t tiles = (c.out_features + kTileRows - 1) / kTileRows;
  constexpr int64_t kAlign = kQuantizedRowAlignment;
  const int64_t q_stride = (c.in_features + kAlign - 1) / kAlign * kAlign;
  constexpr uint8_t kPatterns[] = {0, 0x00, 0x55, 0xaa, 0xff};
  Buffer<uint8_t> packed(tiles * blocks * kBlockBytes);
  for (size_t i = 0; i < packed.count; ++i)
    packed.data[i] = c.weights == kAnyByte ? random.byte() : kPatterns[c.weights];
  Buffer<int8_t> q(c.tokens * q_stride);
  Buffer<int32_t> q_sum(c.tokens);
  Buffer<float> x_scale(c.tokens), weight_scale(c.out_features), bias(c.out_features);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t k = 0; k < c.in_features; ++k) {
      const int8_t value = c.activations == kAnyInt8 ? static_cast<int8_t>(random.byte())
                                                     : static_cast<int8_t>(c.activations == kAll127 ? 127 : -128);
      q.data[t * q_stride + k] = value;
      q_sum.data[t] += value;
    }
    x_scale.data[t] = t == 1 ? std::nanf("") : random.uniform();
  }
  fill_row(weight_scale.data, c.out_features, kRandom, random);
  fill_row(bias.data, c.out_features, kRandom, random);
  Buffer<T> out[2] = {Buffer<T>(c.tokens * c.out_features), Buffer<T>(c.tokens * c.out_features)};
  for (int i = 0; i < 2; ++i) {
    // Results of other tiles are another thread's: they must stay as they are.
    std::memset(static_cast<void*>(out[i].data), 0x3c, out[i].count * sizeof(T));
    const TernaryProduct product{
        packed.data,    blocks,        q.data,      q_stride,     q_sum.data,        c.tokens,
        c.out_features, dtype_of<T>(), out[i].data, x_scale.data, weight_scale.data, c.bias ? bias.data : nullptr};
    (i == 0 ? scalar : tested)->ternary_product(product, c.tile_begin, c.tile_end);
  }
  compare(out[0], out[1],
          "ternary_product " + std::to_string(c.tokens) + "x" + std::to_string(c.in_features) + "x" +
              std::to_string(c.out_features) + ", weights " + std::to_string(c.weights) + ", activations " +
              std::to_string(c.activations) + ", dtype " + std::to_string(static_cast<int>(dtype_of<T>())));
}

// Sums, which are the same code for every output type.
void test_sums() {
  using T = int32_t;
  Random random;
  // Every token count up to two full groups of the widest kernel, and one more.
  for (int64_t tokens = 1; tokens <= 25; ++tokens) {
    test_product<T>({49, 145, tokens, kAnyByte, kAnyInt8, false, 0, 4}, random);
  }
  for (const int64_t in_features : {0, 1, 15, 16, 17, 63, 64, 65, 300}) {
    for (const int64_t tokens : {1, 2, 7}) {
      test_product<T>({33, in_features, tokens, kAnyByte, kAnyInt8, false, 0, 3}, random);
    }
  }
  for (int weights = 0; weights < kWeightKinds; ++weights) {
    for (int activations = 0; activations < kActivationKinds; ++activations) {
      for (const int64_t tokens : {1, 3}) {
        test_product<T>(
            {17, 600, tokens, static_cast<Weights>(weights), static_cast<Activations>(activations), false, 0, 2},
            random);
      }
    }
  }
  // The bound in kernel_table.h, at its edge: the longest row, the largest codes and activations.
  for (const int64_t tokens : {1, 2}) {
    test_product<T>({16, kMaxInFeatures, tokens, kAllThree, kAllMinus128, false, 0, 1}, random);
  }
}

// Scales, bias, rounding, and which elements are written.
template <class T>
void test_results() {
  Random random;
  for (const int64_t out_features : {1, 15, 16, 17, 32, 33, 48}) {
    for (const int64_t tokens : {1, 2, 7}) {
      for (const bool bias : {false, true}) {
        const int64_t tiles = (out_features + 15) / 16;
        test_product<T>({out_features, 30, tokens, kAnyByte, kAnyInt8, bias, 0, tiles}, random);
      }
    }
  }
  for (const int64_t tokens : {1, 5}) test_product<T>({80, 64, tokens, kAnyByte, kAnyInt8, true, 1, 4}, random);
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
  test_logits<float>();
  test_logits<BFloat16>();
  test_logits<Float16>();
}

// Packing knows no instruction set; its round trip on odd shapes is for the sanitizers.
void test_packing() {
  Random random;
  for (const int64_t out_features : {1, 16, 17, 40}) {
    for (const int64_t in_features : {0, 1, 16, 37}) {
      const int64_t tiles = (out_features + kTileRows - 1) / kTileRows;
      Buffer<int8_t> w(out_features * in_features), back(out_features * in_features);
      for (size_t i = 0; i < w.count; ++i) w.data[i] = static_cast<int8_t>(random.byte() % 3 - 1);
      Buffer<uint8_t> packed(tiles * ((in_features + 15) / 16) * kBlockBytes);
      const bool ternary = pack_tile16(w.data, out_features, in_features, packed.data, 0, tiles) &&
                           unpack_tile16(packed.data, out_features, in_features, back.data, 0, tiles);
      ++comparisons;
      if (!ternary || std::memcmp(w.data, back.data, w.count) != 0) report("packing");
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
  tested = scalar;
  test_packing();
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
