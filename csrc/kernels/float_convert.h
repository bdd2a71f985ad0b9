// bfloat16 and float16 by integer arithmetic: what a CPU without conversion instructions runs, and
// bit for bit what F16C computes (round half to even; a NaN stays a NaN and becomes quiet).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/kernel_table.h"

namespace bitnet_ops {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kAbsMask = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kOneBits = 0x3f800000u;  // 1.0f: the exponent's bias
// The one quiet NaN that PyTorch rounds every NaN to.
constexpr uint16_t kBFloat16NaN = 0x7fc0;

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0x1f) {  // infinity, or NaN made quiet (bit 22) as the hardware does
    return bits_float(sign | kInfinityBits | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u));
  }
  if (exponent != 0) return bits_float(sign | ((exponent + (127 - 15)) << 23) | (mantissa << 13));
  // Zero or subnormal: mantissa * 2^-24, exact in float32.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return bits_float(sign | float_bits(magnitude));
}

inline void from_float(float value, float* out) { *out = value; }

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_bits(value);
  if ((bits & kAbsMask) > kInfinityBits) {
    out->bits = kBFloat16NaN;
    return;
  }
  // Half a unit of the last kept place, less one, plus the last kept bit: ties go to even.
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_float(float value, Float16* out) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & kAbsMask;
  if (magnitude > kInfinityBits) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway between the largest float16 and 2^16
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal float16
    const uint32_t rebased = magnitude - ((127u - 15u) << 23);
    out->bits = static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  } else {
    // Subnormal: 0.5 has a unit in the last place of 2^-24, that of a subnormal float16, so adding it
    // lets the FPU round half to even, and the low bits of the sum are the result.
    const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    out->bits = static_cast<uint16_t>(sign | rounded);
  }
}

}  // namespace bitnet_ops
