// Activations rearranged for the layouts that skip: portable, once per call.
#pragma once

#include <cstdint>
#include <cstring>

#include "layouts/layouts.h"

namespace bitnet_ops {

// Step order, for layout row. Bits 2p of the 16 words of a chunk are the codes of step p: word b holds
// inputs 16*b + 4*p .. + 3. So within 256 inputs, groups of four go from [b][p] to [p][b].
inline void to_step_order(const int8_t* q, int64_t in_features, int8_t* steps) {
  constexpr int64_t kWords = 16;
  constexpr int64_t kSteps = 4;
  for (int64_t begin = 0; begin < in_features; begin += kChunkInputs) {
    uint32_t in[kWords][kSteps];
    uint32_t out[kSteps][kWords];
    std::memcpy(in, q + begin, sizeof in);
    for (int64_t p = 0; p < kSteps; ++p) {
      for (int64_t b = 0; b < kWords; ++b) out[p][b] = in[b][p];
    }
    std::memcpy(steps + begin, out, sizeof out);
  }
}

// Positions below `count` at which one of `rows` rows has a byte that is not zero, ascending. Returns their number.
inline int64_t nonzero_positions(const void* bytes, int64_t rows, int64_t stride, int64_t count, int32_t* positions) {
  constexpr uint64_t kEach = 0x0101010101010101u;
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += 8) {
    const size_t left = static_cast<size_t>(count - begin < 8 ? count - begin : 8);
    uint64_t any = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const char* from = static_cast<const char*>(bytes) + row * stride + begin;
      uint64_t word = 0;
      if (left == 8) {
        std::memcpy(&word, from, 8);  // a length that is known is one load
      } else {
        std::memcpy(&word, from, left);
      }
      any |= word;
    }
    // The top bit of every byte that is not zero.
    uint64_t marks = (((any & (0x7f * kEach)) + 0x7f * kEach) | any) & (0x80 * kEach);
    while (marks != 0) {
      positions[found++] = static_cast<int32_t>(begin + __builtin_ctzll(marks) / 8);
      marks &= marks - 1;
    }
  }
  return found;
}

}  // namespace bitnet_ops
