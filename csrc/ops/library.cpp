// The operators as PyTorch sees them: schemas, and which function is behind each. All of it stands on torch's stable
// ABI (torch/csrc/stable), so one binary serves torch >= 2.10.
//
// Threads: parallel regions are cut into equal runs of rows or tiles. A cut never divides a sum, so results do not
// depend on it.

#include <cstdint>

#include "ops/attention.h"
#include "ops/boxed.h"
#include "ops/decoder.h"
#include "ops/glu.h"
#include "ops/gumbel.h"
#include "ops/lm_head.h"
#include "ops/packing.h"
#include "ops/rows.h"
#include "ops/tensors.h"
#include "ops/ternary.h"
#include "run/parallel.h"

// The namespace of the operators. Builds that stand beside a wheel in one process have one of their own
// (.ci/hub_kernel.py); errors say `bitnet_ops` in all of them.
#ifndef BITNET_OPS_NAMESPACE
#define BITNET_OPS_NAMESPACE bitnet_ops
#endif

// torch's macros do not expand the name of a namespace; an argument of these is expanded.
#define BITNET_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define BITNET_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace bitnet_ops {
namespace {

// torch.set_num_threads holds for our threads too.
const bool uses_threads_of_torch = [] {
  thread_count = [] { return static_cast<int64_t>(torch::stable::get_num_threads()); };
  return true;
}();

}  // namespace
}  // namespace bitnet_ops

BITNET_LIBRARY(BITNET_OPS_NAMESPACE, m) {
  m.def("quantize_activations(Tensor x, int bits=8) -> (Tensor q, Tensor x_scale)");
  m.def("pack_ternary(Tensor w, str layout=\"tile16\") -> Tensor");
  m.def("pack_two_bits(Tensor codes, int width, bool high_first=False, str layout=\"tile16\") -> Tensor");
  m.def("unpack_ternary(Tensor packed, int out_features, int in_features, str layout=\"tile16\") -> Tensor");
  m.def("repack_ternary(Tensor packed, int out_features, int in_features, str layout, str wanted) -> Tensor");
  m.def("find_bad_byte(Tensor packed, str layout=\"tile16\") -> Tensor");
  m.def("ternary_matmul(Tensor q, Tensor packed, int out_features, str layout=\"tile16\") -> Tensor");
  m.def(
      "ternary_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_features, "
      "str layout=\"tile16\", int activation_bits=8, int group_size=0, Tensor? active=None) -> Tensor");
  m.def("embedding(Tensor ids, Tensor weight) -> Tensor");
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
      "decoder_layers(Tensor x, Tensor[] weights, int[] structure, float[] constants, Tensor cos, Tensor sin, "
      "Tensor? start=None, Tensor(a!)? keys=None, Tensor(b!)? values=None, Tensor(c!)? key_scale=None, "
      "Tensor(d!)? value_scale=None, int slot=0) -> Tensor");
  m.def("prepare_layers(Tensor[] weights, int[] structure, float[] constants) -> int");
  m.def(
      "run_prepared_layers(Tensor x, int prepared, Tensor cos, Tensor sin, Tensor? start=None, "
      "Tensor(a!)? keys=None, Tensor(b!)? values=None, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None, "
      "int slot=0) -> Tensor");
  m.def("release_layers(int prepared) -> ()");
}

BITNET_LIBRARY_IMPL(BITNET_OPS_NAMESPACE, CPU, m) {
  m.impl("quantize_activations", BITNET_BOX(&bitnet_ops::quantize_activations));
  m.impl("pack_ternary", BITNET_BOX(&bitnet_ops::pack_ternary));
  m.impl("pack_two_bits", BITNET_BOX(&bitnet_ops::pack_two_bits));
  m.impl("unpack_ternary", BITNET_BOX(&bitnet_ops::unpack_ternary));
  m.impl("repack_ternary", BITNET_BOX(&bitnet_ops::repack_ternary));
  m.impl("find_bad_byte", BITNET_BOX(&bitnet_ops::find_bad_byte));
  m.impl("ternary_matmul", BITNET_BOX(&bitnet_ops::ternary_matmul));
  m.impl("ternary_linear", BITNET_BOX(&bitnet_ops::ternary_linear));
  m.impl("embedding", BITNET_BOX(&bitnet_ops::embedding));
  m.impl("rms_norm", BITNET_BOX(&bitnet_ops::rms_norm));
  m.impl("glu", BITNET_BOX(&bitnet_ops::glu));
  m.impl("lm_head", BITNET_BOX(&bitnet_ops::lm_head));
  m.impl("screen_lm_head", BITNET_BOX(&bitnet_ops::screen_lm_head));
  m.impl("lm_head_top_k", BITNET_BOX(&bitnet_ops::lm_head_top_k));
  m.impl("gumbel_noise", BITNET_BOX(&bitnet_ops::gumbel_noise));
  m.impl("attention", BITNET_BOX(&bitnet_ops::attention));
  m.impl("cached_attention", BITNET_BOX(&bitnet_ops::cached_attention));
  m.impl("decoder_layers", BITNET_BOX(&bitnet_ops::decoder_layers));
  m.impl("prepare_layers", BITNET_BOX(&bitnet_ops::prepare_layers));
  m.impl("run_prepared_layers", BITNET_BOX(&bitnet_ops::run_prepared_layers));
}

BITNET_LIBRARY_IMPL(BITNET_OPS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("release_layers", BITNET_BOX(&bitnet_ops::release_layers));
}
