// The operators of the language-model head; bitnet_ops/ops/ documents them.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "ops/tensors.h"

namespace bitnet_ops {

Tensor lm_head(const Tensor& x, const Tensor& weight);

std::tuple<Tensor, Tensor> screen_lm_head(const Tensor& weight);

std::tuple<Tensor, Tensor, Tensor> lm_head_top_k(const Tensor& x, const Tensor& weight, int64_t k,
                                                 const std::optional<Tensor>& codes,
                                                 const std::optional<Tensor>& bounds, double temperature,
                                                 const std::optional<Tensor>& noise);

}  // namespace bitnet_ops
