// Runs attention: stores the new keys and values, then shares heads, blocks of tokens and spans of keys out among
// threads. Between the operators, which check arguments, and the kernels, which know no threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "kernels/kernel_table.h"

namespace bitnet_ops {

// What queries are multiplied by, in units of ln 2 (Attention::scale): log2(e) times `scale`, or 1 / sqrt(head_dim).
inline float score_scale(std::optional<double> scale, int64_t head_dim) {
  constexpr double kLog2E = 1.4426950408889634;
  return static_cast<float>(kLog2E * scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

// Positions (start to start + tokens) lie within the tables of angles and within the cache.
void run_attention(const Attention& attention);

}  // namespace bitnet_ops
