// The operators as PyTorch sees them: schemas, and the two that belong to none of the other files, packing_ops.cpp,
// ternary_ops.cpp, fused_ops.cpp, attention_ops.cpp, decoder_ops.cpp and lm_head_ops.cpp. All of it stands on torch's stable ABI
// (torch/csrc/stable), so one binary serves torch >= 2.10.
//
// Threads: parallel regions are cut into equal runs of rows or tiles. A cut never divides a sum, so results do not
// depend on it.

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/kernel_table.h"
#include "ops/attention.h"
#include "ops/decoder.h"
#include "ops/fused.h"
#include "ops/glu.h"
#include "ops/lm_head.h"
#include "ops/packing.h"
#include "ops/tensors.h"
#include "ops/ternary.h"
#include "run/dispatch.h"
#include "run/parallel.h"
#include "run/scratch.h"

namespace bitnet_ops {
namespace {

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x_any, int64_t bits) {
  constexpr const char* kOp = "quantize_activations";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  check_in_features(kOp, "x", in_features);
  check_activation_bits(kOp, "bits", bits);
  const Tensor x = as_contiguous(x_any);
  const int64_t rows = rows_of(x);

  std::vector<int64_t> sizes = shape_of(x);
  const Tensor q = empty(sizes, bits == 16 ? codes().int16 : codes().int8);
  sizes.pop_back();
  const Tensor x_scale = empty(sizes, codes().float32);

  const KernelTable& table = kernels();
  const void* in = data<void>(x);
  float* scales = mutable_data<float>(x_scale);
  if (bits == 16) {
    int16_t* out = mutable_data<int16_t>(q);
    static thread_local Scratch scratch;
    int8_t* hi = static_cast<int8_t*>(scratch.reserve(static_cast<size_t>(2 * in_features)));
    const int8_t* lo = hi + in_features;
    for (int64_t row = 0; row < rows; ++row) {
      int32_t unused_sums[2];
      table.quantize_row_16(row_at(in, row, in_features, dtype), dtype, in_features, hi, hi + in_features, in_features,
                            scales + row, unused_sums);
      for (int64_t k = 0; k < in_features; ++k) {
        out[row * in_features + k] = static_cast<int16_t>(256 * hi[k] + lo[k]);
      }
    }
    return {q, x_scale};
  }
  int8_t* out = mutable_data<int8_t>(q);
  parallel(rows, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t unused_sum;
      table.quantize_row(row_at(in, row, in_features, dtype), dtype, in_features, out + row * in_features, in_features,
                         scales + row, &unused_sum);
    }
  });
  return {q, x_scale};
}

Tensor rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps) {
  constexpr const char* kOp = "rms_norm";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t features = last_size(kOp, "x", x_any, "a tensor [..., features]");
  const DType weight_dtype = check_float(kOp, "weight", weight_any);
  if (!shape_is(weight_any, {features})) {
    refuse(kOp, "weight", "shape " + shape_text({features}) + " (the last size of x)", describe(weight_any));
  }
  if (!(eps >= 0.0)) refuse(kOp, "eps", "a number of at least 0", std::to_string(eps));
  const Tensor x = as_contiguous(x_any);
  const Tensor weight = as_contiguous(weight_any);
  const Tensor out = empty(shape_of(x), dtype_code(x));

  const KernelTable& table = kernels();
  const float* wide_weight = data<float>(weight);
  if (weight_dtype != DType::kFloat32) {
    static thread_local Scratch scratch;
    float* wide = static_cast<float*>(scratch.reserve(static_cast<size_t>(features) * sizeof(float)));
    table.widen_row(data<void>(weight), weight_dtype, features, wide, features);
    wide_weight = wide;
  }
  const void* in = data<void>(x);
  void* result = mutable_data<void>(out);
  const float narrow_eps = static_cast<float>(eps);
  parallel(rows_of(x), static_cast<double>(features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      table.rms_norm_row(row_at(in, row, features, dtype), dtype, wide_weight, narrow_eps, features,
                         row_at(result, row, features, dtype));
    }
  });
  return out;
}

// torch.set_num_threads holds for our threads too.
const bool uses_threads_of_torch = [] {
  thread_count = [] { return static_cast<int64_t>(torch::stable::get_num_threads()); };
  return true;
}();

}  // namespace
}  // namespace bitnet_ops

STABLE_TORCH_LIBRARY(bitnet_ops, m) {
  m.def("quantize_activations(Tensor x, int bits=8) -> (Tensor q, Tensor x_scale)");
  m.def("pack_ternary(Tensor w, str layout=\"tile16\") -> Tensor");
  m.def("unpack_ternary(Tensor packed, int out_features, int in_features, str layout=\"tile16\") -> Tensor");
  m.def(
      "repack_ternary(Tensor packed, int out_features, int in_features, str layout, str wanted) -> Tensor");
  m.def("ternary_matmul(Tensor q, Tensor packed, int out_features, str layout=\"tile16\") -> Tensor");
  m.def(
      "ternary_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_features, "
      "str layout=\"tile16\", int activation_bits=8, int group_size=0, Tensor? active=None) -> Tensor");
  m.def(
      "norm_linears(Tensor x, Tensor norm_weight, float eps, Tensor[] packed, Tensor[] weight_scale, "
      "int[] out_features, str layout=\"tile16\") -> Tensor[]");
  m.def(
      "norm_linear_add(Tensor x, Tensor norm_weight, float eps, Tensor packed, Tensor weight_scale, str layout, "
      "Tensor residual) -> Tensor");
  m.def(
      "norm_squared_relu_glu(Tensor x, Tensor norm_weight, float eps, Tensor gate, Tensor gate_scale, "
      "str gate_layout, Tensor up, Tensor up_scale, str up_layout) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("glu(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def("lm_head(Tensor x, Tensor weight) -> Tensor");
  m.def("screen_lm_head(Tensor weight) -> (Tensor codes, Tensor bounds)");
  m.def(
      "lm_head_top_k(Tensor x, Tensor weight, int k, Tensor? codes=None, Tensor? bounds=None, "
      "float temperature=1.0, Tensor? noise=None) -> (Tensor logits, Tensor ids, Tensor rescored)");
  m.def("gumbel_noise(Tensor seed, int size) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? start=None, float? scale=None, "
      "int window=0) -> Tensor");
  m.def(
      "cached_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor start, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None, float? scale=None, "
      "int window=0) -> Tensor");
  m.def(
      "decoder_layers(Tensor x, Tensor[] norm_weight, float eps, Tensor[] packed, Tensor[] weight_scale, "
      "str[] layouts, Tensor cos, Tensor sin, Tensor start, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> Tensor");
  m.def(
      "prepare_decoder_layers(Tensor[] norm_weight, float eps, Tensor[] packed, Tensor[] weight_scale, "
      "str[] layouts) -> int");
  m.def(
      "run_decoder_layers(Tensor x, int prepared, Tensor cos, Tensor sin, Tensor start, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> Tensor");
  m.def("release_decoder_layers(int prepared) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ops, CPU, m) {
  m.impl("quantize_activations", TORCH_BOX(&bitnet_ops::quantize_activations));
  m.impl("pack_ternary", TORCH_BOX(&bitnet_ops::pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&bitnet_ops::unpack_ternary));
  m.impl("repack_ternary", TORCH_BOX(&bitnet_ops::repack_ternary));
  m.impl("ternary_matmul", TORCH_BOX(&bitnet_ops::ternary_matmul));
  m.impl("ternary_linear", TORCH_BOX(&bitnet_ops::ternary_linear));
  m.impl("norm_linears", TORCH_BOX(&bitnet_ops::norm_linears));
  m.impl("norm_linear_add", TORCH_BOX(&bitnet_ops::norm_linear_add));
  m.impl("norm_squared_relu_glu", TORCH_BOX(&bitnet_ops::norm_squared_relu_glu));
  m.impl("rms_norm", TORCH_BOX(&bitnet_ops::rms_norm));
  m.impl("glu", TORCH_BOX(&bitnet_ops::glu));
  m.impl("lm_head", TORCH_BOX(&bitnet_ops::lm_head));
  m.impl("screen_lm_head", TORCH_BOX(&bitnet_ops::screen_lm_head));
  m.impl("lm_head_top_k", TORCH_BOX(&bitnet_ops::lm_head_top_k));
  m.impl("gumbel_noise", TORCH_BOX(&bitnet_ops::gumbel_noise));
  m.impl("attention", TORCH_BOX(&bitnet_ops::attention));
  m.impl("cached_attention", TORCH_BOX(&bitnet_ops::cached_attention));
  m.impl("decoder_layers", TORCH_BOX(&bitnet_ops::decoder_layers));
  m.impl("prepare_decoder_layers", TORCH_BOX(&bitnet_ops::prepare_decoder_layers));
  m.impl("run_decoder_layers", TORCH_BOX(&bitnet_ops::run_decoder_layers));
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ops, CompositeExplicitAutograd, m) {
  m.impl("release_decoder_layers", TORCH_BOX(&bitnet_ops::release_decoder_layers));
}
