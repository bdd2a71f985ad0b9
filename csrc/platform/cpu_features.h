// What this CPU can execute and this operating system saves on a context switch.
#pragma once

#include <cstdint>

namespace bitnet_ops {

// One bit per feature that some kernel's target string names, or that decides between kernels or how they read.
enum CpuFeature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvxVnni = 1u << 3,
  kAvx512F = 1u << 4,
  kAvx512Bw = 1u << 5,
  kAvx512Dq = 1u << 6,
  kAvx512Vl = 1u << 7,
  kAvx512Vnni = 1u << 8,
  kAvx512Vbmi = 1u << 9,
  kAmxTile = 1u << 10,
  kAmxInt8 = 1u << 11,
  kStreamsToL1 = 1u << 12,  // reads a stream fastest if asked towards L1 alone: how kernels ask, not what is possible

  kArmV82 = 1u << 16,  // what armv8.2-a lets a compiler use: atomics (LSE), CRC32, rounding multiplies (RDM)
  kDotprod = 1u << 17,
  kI8mm = 1u << 18,
  kFastI8mm = 1u << 19,  // i8mm multiplies faster than dotprod: decides an order, not what is possible
};

// The set of features that are safe to use, as a sum of CpuFeature bits. Never throws.
uint32_t cpu_features();

}  // namespace bitnet_ops
