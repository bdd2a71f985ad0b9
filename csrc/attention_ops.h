// The attention operators; bitnet_ops/ops/ documents them.
#pragma once

#include <optional>

#include "tensors.h"

namespace bitnet_ops {

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& start);

Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                        const Tensor& start, const Tensor& keys, const Tensor& values,
                        const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale);

}  // namespace bitnet_ops
