// Tensors, through libtorch's stable ABI: what an operator asks of one, in words and in bytes. With the other files of
// csrc/ops the only code that knows torch.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's headers, which -Wextra warns of
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernel_table.h"
#include "run/rows.h"

namespace bitnet_ops {

using torch::stable::Tensor;

// ---- errors ---------------------------------------------------------------------------------------

// Every refusal reads: operator, argument, what was expected, what was given.
[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& expected,
                                const std::string& given) {
  throw std::runtime_error(std::string("bitnet_ops::") + op + ": argument '" + argument + "': expected " + expected +
                           ", got " + given);
}

// dtype codes belong to the libtorch that is loaded, hence asked for once and kept.
struct DTypeCodes {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t int8 = aoti_torch_dtype_int8();
  int32_t uint8 = aoti_torch_dtype_uint8();
  int32_t int16 = aoti_torch_dtype_int16();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t boolean = aoti_torch_dtype_bool();
};

inline const DTypeCodes& dtypes() {
  static const DTypeCodes all;
  return all;
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline std::string dtype_name(int32_t code) {
  const DTypeCodes& all = dtypes();
  const std::pair<int32_t, const char*> names[] = {
      {all.float32, "float32"}, {all.bfloat16, "bfloat16"}, {all.float16, "float16"}, {all.float64, "float64"},
      {all.int8, "int8"},       {all.uint8, "uint8"},       {all.int16, "int16"},     {all.int32, "int32"},
      {all.int64, "int64"},     {all.boolean, "bool"},
  };
  for (const auto& [known, name] : names) {
    if (known == code) return name;
  }
  return "dtype code " + std::to_string(code);
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ']';
  return text.str();
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::string describe(const Tensor& tensor) {
  return dtype_name(dtype_code(tensor)) + " " + shape_text(shape_of(tensor)) +
         (tensor.is_cpu() ? "" : " on another device");
}

inline bool shape_is(const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != expected.size()) return false;
  size_t i = 0;
  for (const int64_t size : expected) {
    if (sizes[i++] != size) return false;
  }
  return true;
}

// A CPU tensor of exactly this dtype and shape.
inline void check(const char* op, const char* argument, const Tensor& tensor, int32_t dtype,
                  std::initializer_list<int64_t> shape) {
  if (tensor.is_cpu() && dtype_code(tensor) == dtype && shape_is(tensor, shape)) return;
  refuse(op, argument, "a CPU tensor " + dtype_name(dtype) + " " + shape_text(shape), describe(tensor));
}

inline DType check_float(const char* op, const char* argument, const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  if (tensor.is_cpu()) {
    if (code == dtypes().float32) return DType::kFloat32;
    if (code == dtypes().bfloat16) return DType::kBFloat16;
    if (code == dtypes().float16) return DType::kFloat16;
  }
  refuse(op, argument, "a CPU tensor of float32, bfloat16 or float16", describe(tensor));
}

inline int64_t last_size(const char* op, const char* argument, const Tensor& tensor, const char* expected) {
  const int64_t dim = tensor.dim();
  if (dim == 0) refuse(op, argument, expected, "a tensor without dimensions");
  return tensor.size(dim - 1);
}

inline void check_in_features(const char* op, const char* argument, int64_t in_features,
                              int64_t most = kMaxInFeatures) {
  if (in_features <= most) return;
  refuse(op, argument, "at most " + std::to_string(most) + " in_features (int32 sums cannot overflow then)",
         std::to_string(in_features));
}

inline void check_activation_bits(const char* op, const char* argument, int64_t bits) {
  if (bits != 8 && bits != 16) refuse(op, argument, "8 or 16", std::to_string(bits));
}

inline void check_size(const char* op, const char* argument, int64_t size) {
  if (size < 0) refuse(op, argument, "a size of at least 0", std::to_string(size));
  // Rounding up and multiplying out below must not wrap.
  if (size > std::numeric_limits<int32_t>::max()) refuse(op, argument, "a size below 2^31", std::to_string(size));
}

// ---- memory ---------------------------------------------------------------------------------------

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous CPU tensor, straight through the shim: the dispatcher would cost a microsecond more.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = shape_of(tensor);
  sizes.back() = last;
  return sizes;
}

inline int64_t rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

template <class T>
inline const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
inline T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace bitnet_ops
