// Plain C++: the kernel that every other one must equal bit for bit, and the one for a CPU that has
// nothing better.
//
// Instruction: none; std::fma is one rounding everywhere (a library call where the CPU has no FMA).
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 (docs/layouts.md).
// Overflow:    |sum q*c| <= K * 3 * 128 = 384 K <= 384 * 2^18 = 1.0e8 < 2^31 for any byte.
//
//     byte 4r+j :  | p=3 | p=2 | p=1 | p=0 |      input k = 16*block + 4*p + j of row r

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"
#include "kernels/float_algorithms.h"
#include "kernels/tile_sums.h"
#include "kernels/exponential.h"
#include "kernels/attention_int8.h"
#include "kernels/attention.h"
#include "kernels/glu.h"
#include "kernels/screen.h"
#include "kernels/ternary_driver.h"
#include "kernels/ternary_decoded.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
namespace {

struct Scalar {
  using F32 = float;
  using I32 = int32_t;
  static constexpr int kLanes = 1;
  static constexpr int kLogitsRows = 1;
  static constexpr int kLogitsTokens = 1;
  static constexpr int kLogitsTokensStreamed = 1;
  static constexpr int64_t kTokenGroupBytes = 128 << 10;  // half of the smallest common L2, 256 KB
  static constexpr int kAttentionRows = 1;
  static constexpr int kAttentionRegisters = 4;  // chains enough to hide the latency of an FMA

  static F32 zero() { return 0.0f; }
  static F32 set1(float s) { return s; }
  static F32 add(F32 a, F32 b) { return a + b; }
  static F32 mul(F32 a, F32 b) { return a * b; }
  static F32 div(F32 a, F32 b) { return a / b; }
  static F32 fma(F32 a, F32 b, F32 c) { return std::fma(a, b, c); }
  template <class T>
  static F32 load(const T* p) {
    return to_float(*p);
  }
  template <class T>
  static void store(T* p, F32 v) {
    from_float(v, p);
  }
  static void load_even_odd(const BFloat16* p, F32& even, F32& odd) {
    even = to_float(p[0]);
    odd = to_float(p[1]);
  }
  static float fold(F32 v) { return v; }
  template <int N>
  static void fold_all(F32 (&v)[N], float* out) {
    for (int i = 0; i < N; ++i) out[i] = v[i];
  }
  static F32 load(const int8_t* p) { return static_cast<float>(*p); }
  static F32 load(const int32_t* p) { return static_cast<float>(*p); }
  static F32 load_less(const int32_t* p, int32_t less) { return static_cast<float>(*p - less); }
  static F32 max(F32 a, F32 b) { return a > b ? a : b; }
  static float fold_max(F32 v) { return v; }
  static F32 power_of_two(F32 v) { return bits_float((float_bits(v) << 23) + kOneBits); }
  static F32 zero_below(F32 x, F32 limit, F32 v) { return x < limit ? 0.0f : v; }
  static F32 choose_at_most(F32 x, F32 limit, F32 a, F32 b) { return x <= limit ? a : b; }
  __attribute__((always_inline)) static void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
  __attribute__((always_inline)) static void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

  static I32 zero_i32() { return 0; }
  static int32_t sum(I32 v) { return v; }
  static I32 max_magnitude(I32 m, F32 v) {
    const int32_t bits = static_cast<int32_t>(float_bits(v) & kAbsMask);
    return bits > m ? bits : m;
  }
  static int32_t highest(I32 v) { return v; }
  static I32 quantize(F32 v, F32 s, int8_t* q, I32 sum) {
    // Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds half to even;
    // |v * s| <= 127.0001 is far below the 2^22 that this holds for.
    constexpr float kRoundToInteger = 12582912.0f;
    const float rounded = (v * s + kRoundToInteger) - kRoundToInteger;
    const float clamped = rounded > 127.0f ? 127.0f : (rounded < -128.0f ? -128.0f : rounded);
    *q = static_cast<int8_t>(clamped);
    return sum + *q;
  }
};

struct Inner {
  static constexpr int64_t kInputs = kBlockInputs;
  static constexpr int kTiles = 1;
  static constexpr int kRowsStreamed = 0;  // nothing to choose: kTiles is 1
  static constexpr bool kHasGroupScales = true;
  static constexpr int kRowsOfGroups = 0;
  static constexpr int kDecodedRows = 0;
  static constexpr int kRows = 4;                         // a decoded code then serves four products
  static constexpr int64_t kQBytes = int64_t{128} << 10;  // half of the smallest common L2, 256 KB

  template <int TILES, int ROWS>
  static void block(const uint8_t* tile, int64_t, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    static_assert(TILES == 1, "the driver asks for kTiles at most");
    for (int64_t i = 0; i < ROWS * kTileRows; ++i) acc[i] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t byte = 0; byte < kBlockBytes; ++byte) {
        const int32_t codes = tile[b * kBlockBytes + byte];
        const int64_t row = byte / 4;
        const int64_t j = byte % 4;
        for (int64_t p = 0; p < 4; ++p) {
          const int32_t code = (codes >> (2 * p)) & 3;
          for (int64_t t = 0; t < ROWS; ++t) {
            acc[t * kTileRows + row] += code * q[t * q_stride + b * kBlockInputs + 4 * p + j];
          }
        }
      }
    }
  }

  template <int ROWS, int ASKS>
  static void row_sums(const uint8_t* row, int64_t chunks, const int8_t* q, int64_t q_stride, const uint8_t* const*,
                       int32_t* acc) {
    for (int64_t t = 0; t < ROWS; ++t) acc[t] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t byte = 0; byte < kBlockBytes; ++byte) {
        const int32_t codes = row[chunk * kBlockBytes + byte];
        for (int64_t p = 0; p < 4; ++p) {
          const int32_t code = (codes >> (2 * p)) & 3;
          for (int64_t t = 0; t < ROWS; ++t) {
            acc[t] += code * q[t * q_stride + chunk * kChunkInputs + p * kBlockBytes + byte];
          }
        }
      }
    }
  }

  template <int ROWS>
  static void columns(const uint8_t* panel, const int32_t* columns, int64_t count, int64_t column_bytes, int64_t panels,
                      const int8_t* q, int64_t q_stride, int32_t* acc) {
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* column = panel + columns[i] * column_bytes;
      for (int64_t byte = 0; byte < panels * kBlockBytes; ++byte) {
        // Row 64*p + 16*u + 4*l + d of a panel stands in byte 16*l + 4*u + d at bits 2p.
        const int64_t l = byte / 16 % 4;
        const int64_t u = byte / 4 % 4;
        const int64_t row = byte / kBlockBytes * kPanelRows + 16 * u + 4 * l + byte % 4;
        for (int64_t p = 0; p < 4; ++p) {
          const int32_t code = (column[byte] >> (2 * p)) & 3;
          for (int64_t t = 0; t < ROWS; ++t) acc[t * panels * kPanelRows + row + 64 * p] += code * q[t * q_stride + i];
        }
      }
    }
  }
};

// tile_sums.h
struct ScalarSums {
  template <class Codes>
  static constexpr int32_t kExcess = 0;
  static constexpr int kRows = 2;

  static int32_t code(SignedCodes, const uint8_t* block, int64_t p, int64_t byte) {
    return block[p * kBlockBytes + byte] ^ SignedCodes::kZero;
  }
  static int32_t code(SixBitCodes, const uint8_t* block, int64_t p, int64_t byte) {
    if (p < 3) return block[p * kBlockBytes + byte] & 0x3f;
    return block[byte] >> 6 | block[kBlockBytes + byte] >> 6 << 2 | block[2 * kBlockBytes + byte] >> 6 << 4;
  }

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    for (int64_t i = 0; i < ROWS * kTileRows; ++i) acc[i] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * Codes::kLines * kBlockBytes;
      for (int64_t p = 0; p < 4; ++p) {
        for (int64_t byte = 0; byte < kBlockBytes; ++byte) {
          const int32_t number = code(Codes{}, block, p, byte) - Codes::kZero;
          for (int64_t t = 0; t < ROWS; ++t) {
            acc[t * kTileRows + byte / 4] += number * q[t * q_stride + b * kBlockInputs + 4 * p + byte % 4];
          }
        }
      }
    }
  }
};

}  // namespace

extern const KernelTable kScalarKernels;
constexpr KernelTable kScalarKernels = make_table<Scalar, Inner, Inner, ScalarSums>("scalar");

}  // namespace bitnet_ops
