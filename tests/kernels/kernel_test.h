// What the parts of the kernel test share: buffers of exact sizes, inputs that have gone wrong somewhere once, and
// the comparison of the tested table with scalar.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"
#include "platform/system.h"

namespace bitnet_ops {
namespace kernel_test {

// The parts: every kernel of `tested` against `scalar`.
void test_rows();
void test_products();
void test_logits();
void test_screens();
void test_attention();
void test_decoder();
// Layouts know no instruction set; their round trips on odd shapes are for the sanitizers.
void test_layouts();

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
    void* memory = allocate_aligned(64, count * sizeof(T) + (count == 0));
    if (memory == nullptr) std::abort();
    data = static_cast<T*>(memory);
    std::memset(memory, 0, count * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free_aligned(data); }
};

inline const KernelTable* scalar = nullptr;
inline const KernelTable* tested = nullptr;
inline long comparisons = 0;
inline long differences = 0;
inline uint64_t decoder_signature = 0;  // of what test_decoder computed last

inline void report(const std::string& what) {
  if (++differences <= 10) std::fprintf(stderr, "%s: %s differs from scalar\n", tested->isa, what.c_str());
}

inline bool same(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }
inline bool same(int32_t a, int32_t b) { return a == b; }
inline bool same(int8_t a, int8_t b) { return a == b; }
inline bool same(uint8_t a, uint8_t b) { return a == b; }
inline bool same(BFloat16 a, BFloat16 b) { return a.bits == b.bits; }
inline bool same(Float16 a, Float16 b) { return a.bits == b.bits || same(to_float(a), to_float(b)); }

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

inline float element(RowKind kind, int64_t k, int64_t count, Random& random) {
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

}  // namespace kernel_test
}  // namespace bitnet_ops
