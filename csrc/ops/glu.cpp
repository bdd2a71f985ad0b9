#include "ops/glu.h"

#include "run/glu.h"

namespace bitnet_ops {

Activation activation_of(const char* op, const char* argument, const std::string& name) {
  if (name == "relu2") return Activation::kRelu2;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  refuse(op, argument, "'relu2', 'silu' or 'gelu_tanh'", "'" + name + "'");
}

Tensor glu(const Tensor& gate_any, const Tensor& up_any, const std::string& activation) {
  constexpr const char* kOp = "glu";
  const DType dtype = check_float(kOp, "gate", gate_any);
  const int64_t features = last_size(kOp, "gate", gate_any, "a tensor [..., features]");
  const int32_t code = dtype_code(gate_any);
  const std::vector<int64_t> sizes = shape_of(gate_any);
  if (!up_any.is_cpu() || dtype_code(up_any) != code || shape_of(up_any) != sizes) {
    refuse(kOp, "up", "a CPU tensor " + dtype_name(code) + " " + shape_text(sizes) + " (as gate)", describe(up_any));
  }
  const Activation wanted = activation_of(kOp, "activation", activation);
  const Tensor gate = as_contiguous(gate_any);
  const Tensor up = as_contiguous(up_any);
  const Tensor out = empty(sizes, code);
  run_glu(wanted, dtype, data<void>(gate), data<void>(up), mutable_data<void>(out), rows_of(gate), features);
  return out;
}

}  // namespace bitnet_ops
