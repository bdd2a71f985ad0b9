#include "ops/lm_head.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "run/head.h"

namespace bitnet_ops {
namespace {

// x and the table, checked and contiguous.
struct CheckedHead {
  Tensor x;
  Tensor weight;
  HeadTable table;
  HeadTokens tokens;

  CheckedHead(const char* op, const Tensor& x_any, const Tensor& weight_any)
      : x(as_contiguous(x_any)), weight(as_contiguous(weight_any)) {
    const DType dtype = check_float(op, "x", x);
    const int64_t in_features = last_size(op, "x", x, "a tensor [..., in_features]");
    const DType weight_dtype = check_float(op, "weight", weight);
    if (weight.dim() != 2 || weight.size(1) != in_features) {
      refuse(op, "weight", "shape [vocabulary, " + std::to_string(in_features) + "] (in_features = the last size of x)",
             describe(weight));
    }
    table = {data<void>(weight), weight_dtype, weight.size(0), in_features};
    tokens = {data<void>(x), dtype, rows_of(x)};
  }
};

void check_copy(const char* op, const Tensor& weight, const Tensor& codes_any, const Tensor& bounds_any) {
  const int64_t tiles = tiles_of(weight.size(0));
  check(op, "codes", codes_any, dtypes().uint8, {tiles, screen_tile_bytes(screen_groups(weight.size(1)))});
  check(op, "bounds", bounds_any, dtypes().float32, {3, tiles * kTileRows});
  for (const auto& [name, tensor] : {std::pair("codes", &codes_any), std::pair("bounds", &bounds_any)}) {
    if (!tensor->is_contiguous()) refuse(op, name, "a contiguous tensor, as from screen_lm_head", "one that is not");
  }
}

void check_screen_features(const char* op, int64_t in_features) {
  if (in_features <= kMaxScreenFeatures) return;
  refuse(op, "weight",
         "at most " + std::to_string(kMaxScreenFeatures) + " columns (the bounds of rounding are derived for these)",
         std::to_string(in_features));
}

}  // namespace

Tensor lm_head(const Tensor& x, const Tensor& weight) {
  const CheckedHead head("lm_head", x, weight);
  const Tensor out = empty(with_last(head.x, head.table.vocabulary), dtypes().float32);
  if (out.numel() != 0) run_head(head.table, head.tokens, mutable_data<float>(out));
  return out;
}

std::tuple<Tensor, Tensor> screen_lm_head(const Tensor& weight_any) {
  constexpr const char* kOp = "screen_lm_head";
  const DType dtype = check_float(kOp, "weight", weight_any);
  if (weight_any.dim() != 2) refuse(kOp, "weight", "shape [vocabulary, in_features]", describe(weight_any));
  check_screen_features(kOp, weight_any.size(1));
  const Tensor weight = as_contiguous(weight_any);
  const HeadTable table{data<void>(weight), dtype, weight.size(0), weight.size(1)};
  const int64_t tiles = tiles_of(table.vocabulary);
  const Tensor code = empty({tiles, screen_tile_bytes(screen_groups(table.in_features))}, dtypes().uint8);
  const Tensor bounds = empty({3, tiles * kTileRows}, dtypes().float32);
  run_head_screen(table, mutable_data<uint8_t>(code), mutable_data<float>(bounds));
  return {code, bounds};
}

std::tuple<Tensor, Tensor, Tensor> lm_head_top_k(const Tensor& x_any, const Tensor& weight_any, int64_t k,
                                                 const std::optional<Tensor>& codes_any,
                                                 const std::optional<Tensor>& bounds_any, double temperature,
                                                 const std::optional<Tensor>& noise_any) {
  constexpr const char* kOp = "lm_head_top_k";
  const CheckedHead head(kOp, x_any, weight_any);
  if (k < 1) refuse(kOp, "k", "at least 1", std::to_string(k));
  if (!(temperature > 0.0)) refuse(kOp, "temperature", "a number above 0", std::to_string(temperature));
  if (codes_any.has_value() != bounds_any.has_value()) {
    refuse(kOp, "bounds", "both of codes and bounds, or none", codes_any.has_value() ? "codes alone" : "bounds alone");
  }
  const int64_t vocabulary = head.table.vocabulary;
  const int64_t tokens = head.tokens.count;
  HeadChoice choice{std::min(k, vocabulary), temperature, nullptr, nullptr, nullptr};
  if (codes_any.has_value()) {
    check_screen_features(kOp, head.table.in_features);
    check_copy(kOp, head.weight, *codes_any, *bounds_any);
    choice.codes = data<uint8_t>(*codes_any);
    choice.bounds = data<float>(*bounds_any);
  }
  std::optional<Tensor> noise;
  if (noise_any.has_value()) {
    if (!noise_any->is_cpu() || dtype_code(*noise_any) != dtypes().float32 ||
        shape_of(*noise_any) != with_last(head.x, vocabulary)) {
      refuse(kOp, "noise", "a CPU tensor float32 " + shape_text(with_last(head.x, vocabulary)), describe(*noise_any));
    }
    noise = as_contiguous(*noise_any);
    choice.noise = data<float>(*noise);
  }
  std::vector<int64_t> shape = shape_of(head.x);
  shape.pop_back();
  const Tensor rescored = empty(shape, dtypes().int64);
  const Tensor best = empty(with_last(head.x, choice.k), dtypes().float32);
  const Tensor ids = empty(with_last(head.x, choice.k), dtypes().int64);
  if (tokens == 0) return {best, ids, rescored};
  if (vocabulary == 0) {
    std::fill_n(mutable_data<int64_t>(rescored), tokens, 0);
    return {best, ids, rescored};
  }

  run_head_top_k(head.table, head.tokens, choice,
                 {mutable_data<float>(best), mutable_data<int64_t>(ids), mutable_data<int64_t>(rescored)});
  return {best, ids, rescored};
}

}  // namespace bitnet_ops
