// The operators that bring ternary weights into a layout and out of it; bitnet_ops/ops/ documents them.
#pragma once

#include <cstdint>
#include <string>

#include "ops/tensors.h"

namespace bitnet_ops {

Tensor pack_ternary(const Tensor& w, const std::string& layout);

Tensor pack_two_bits(const Tensor& codes, int64_t width, bool high_first, const std::string& layout);

Tensor unpack_ternary(const Tensor& packed, int64_t out_features, int64_t in_features, const std::string& layout);

Tensor repack_ternary(const Tensor& packed, int64_t out_features, int64_t in_features, const std::string& layout,
                      const std::string& wanted);

Tensor find_bad_byte(const Tensor& packed, const std::string& layout);

}  // namespace bitnet_ops
