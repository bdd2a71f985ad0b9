// The operators as PyTorch sees them: schemas, argument checks, memory, threads. The only file that
// knows torch, and only its stable ABI (torch/csrc/stable), so one binary serves torch >= 2.10.
//
// Threads: every operator has at most two parallel regions (quantise rows, then the product), cut
// into equal runs of rows or tiles. A cut never divides a sum, so results do not depend on it.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "kernel_table.h"
#include "scratch.h"
#include "tile16.h"

namespace bitnet_ops {
namespace {

using torch::stable::Tensor;

// ---- errors ---------------------------------------------------------------------------------------

// Every refusal reads: operator, argument, what was expected, what was given.
[[noreturn]] void refuse(const char* op, const char* argument, const std::string& expected, const std::string& given) {
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

const DTypeCodes& codes() {
  static const DTypeCodes all;
  return all;
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

std::string dtype_name(int32_t code) {
  const DTypeCodes& all = codes();
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

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ']';
  return text.str();
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

std::string describe(const Tensor& tensor) {
  return dtype_name(dtype_code(tensor)) + " " + shape_text(shape_of(tensor)) +
         (tensor.is_cpu() ? "" : " on another device");
}

bool shape_is(const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != expected.size()) return false;
  size_t i = 0;
  for (const int64_t size : expected) {
    if (sizes[i++] != size) return false;
  }
  return true;
}

// A CPU tensor of exactly this dtype and shape.
void check(const char* op, const char* argument, const Tensor& tensor, int32_t dtype,
           std::initializer_list<int64_t> shape) {
  if (tensor.is_cpu() && dtype_code(tensor) == dtype && shape_is(tensor, shape)) return;
  refuse(op, argument, "a CPU tensor " + dtype_name(dtype) + " " + shape_text(shape), describe(tensor));
}

DType check_float(const char* op, const char* argument, const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  if (tensor.is_cpu()) {
    if (code == codes().float32) return DType::kFloat32;
    if (code == codes().bfloat16) return DType::kBFloat16;
    if (code == codes().float16) return DType::kFloat16;
  }
  refuse(op, argument, "a CPU tensor of float32, bfloat16 or float16", describe(tensor));
}

int64_t last_size(const char* op, const char* argument, const Tensor& tensor, const char* expected) {
  const int64_t dim = tensor.dim();
  if (dim == 0) refuse(op, argument, expected, "a tensor without dimensions");
  return tensor.size(dim - 1);
}

void check_in_features(const char* op, const char* argument, int64_t in_features) {
  if (in_features <= kMaxInFeatures) return;
  refuse(op, argument, "at most " + std::to_string(kMaxInFeatures) + " in_features (int32 sums cannot overflow then)",
         std::to_string(in_features));
}

void check_layout(const char* op, const std::string& layout) {
  if (layout != "tile16") refuse(op, "layout", "'tile16'", "'" + layout + "'");
}

void check_size(const char* op, const char* argument, int64_t size) {
  if (size < 0) refuse(op, argument, "a size of at least 0", std::to_string(size));
  // Rounding up and multiplying out below must not wrap.
  if (size > std::numeric_limits<int32_t>::max()) refuse(op, argument, "a size below 2^31", std::to_string(size));
}

// ---- memory ---------------------------------------------------------------------------------------

size_t element_bytes(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 4; }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t blocks_of(int64_t in_features) { return round_up(in_features, kBlockInputs) / kBlockInputs; }

int64_t tiles_of(int64_t out_features) { return round_up(out_features, kTileRows) / kTileRows; }

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous CPU tensor, straight through the shim: the dispatcher would cost a microsecond more.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = shape_of(tensor);
  sizes.back() = last;
  return sizes;
}

int64_t rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

const char* row_at(const void* base, int64_t row, int64_t row_elements, DType dtype) {
  return static_cast<const char*>(base) + row * row_elements * static_cast<int64_t>(element_bytes(dtype));
}

char* row_at(void* base, int64_t row, int64_t row_elements, DType dtype) {
  return static_cast<char*>(base) + row * row_elements * static_cast<int64_t>(element_bytes(dtype));
}

// ---- threads --------------------------------------------------------------------------------------

// Waking a second thread costs a few microseconds, so a thread is given this much work at least.
constexpr double kNanosecondsPerThread = 8000.0;

// Runs work(begin, end) over [0, count) in equal parts; ns_per_item is a rough cost, which only
// decides how many threads are worth waking.
template <class Work>
void parallel(int64_t count, double ns_per_item, const Work& work) {
  if (count == 0) return;
  if (static_cast<double>(count) * ns_per_item < 2 * kNanosecondsPerThread) {
    work(int64_t{0}, count);
    return;
  }
  const double grain = kNanosecondsPerThread / ns_per_item;
  torch::stable::parallel_for(0, count, grain < 1.0 ? 1 : static_cast<int64_t>(grain), work);
}

// Rough costs for `parallel`, on one core of the machine in bench/LOG.md.
constexpr double kNsPerQuantizedElement = 0.15;
constexpr double kNsPerBlock = 3.0;        // 64 bytes at 20 GB/s
constexpr double kNsPerBlockToken = 1.5;   // four vpdpbusd, or eight with the scalar additions
constexpr double kNsPerWeightByte = 0.05;  // 20 GB/s
constexpr double kNsPerMultiply = 0.03;    // 16 lanes a cycle, half used

// ---- quantised rows ---------------------------------------------------------------------------------

struct QuantizedRows {
  int8_t* q;
  int64_t q_stride;
  int32_t* q_sum;
  float* x_scale;
};

// Room for `rows` quantised rows in this thread's scratch.
QuantizedRows reserve_rows(int64_t rows, int64_t in_features) {
  static thread_local Scratch scratch;
  const int64_t q_stride = round_up(in_features, kQuantizedRowAlignment);
  const size_t q_bytes = static_cast<size_t>(rows * q_stride);
  const size_t each = static_cast<size_t>(rows) * sizeof(int32_t);
  char* base = static_cast<char*>(scratch.reserve(q_bytes + 2 * each));
  return {reinterpret_cast<int8_t*>(base), q_stride, reinterpret_cast<int32_t*>(base + q_bytes),
          reinterpret_cast<float*>(base + q_bytes + each)};
}

// The operands; where the result goes, and how it is scaled, is for the operator to fill in.
TernaryProduct product_of(const QuantizedRows& rows, const Tensor& packed, int64_t tokens, int64_t out_features) {
  TernaryProduct product{};
  product.packed = data<uint8_t>(packed);
  product.blocks = packed.size(1);
  product.q = rows.q;
  product.q_stride = rows.q_stride;
  product.q_sum = rows.q_sum;
  product.tokens = tokens;
  product.out_features = out_features;
  return product;
}

void run_product(TernaryProduct& product, const KernelTable& table) {
  const int64_t tiles = tiles_of(product.out_features);
  // A kernel works on pairs of tiles when there are several tokens: threads share out whole pairs.
  const int64_t unit = product.tokens == 1 ? 1 : 2;
  const double tokens = static_cast<double>(product.tokens);
  const double ns_per_block = kNsPerBlock > kNsPerBlockToken * tokens ? kNsPerBlock : kNsPerBlockToken * tokens;
  const double ns_per_unit = static_cast<double>(unit * product.blocks + 1) * ns_per_block;
  parallel(round_up(tiles, unit) / unit, ns_per_unit, [&](int64_t begin, int64_t end) {
    const int64_t tile_end = end * unit < tiles ? end * unit : tiles;
    table.ternary_product(product, begin * unit, tile_end);
  });
}

// ---- operators --------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x_any) {
  constexpr const char* kOp = "quantize_activations";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  check_in_features(kOp, "x", in_features);
  const Tensor x = as_contiguous(x_any);
  const int64_t rows = rows_of(x);

  std::vector<int64_t> sizes = shape_of(x);
  const Tensor q = empty(sizes, codes().int8);
  sizes.pop_back();
  const Tensor x_scale = empty(sizes, codes().float32);

  const KernelTable& table = kernels();
  const void* in = data<void>(x);
  int8_t* out = mutable_data<int8_t>(q);
  float* scales = mutable_data<float>(x_scale);
  parallel(rows, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t unused_sum;
      table.quantize_row(row_at(in, row, in_features, dtype), dtype, in_features, out + row * in_features, in_features,
                         scales + row, &unused_sum);
    }
  });
  return {q, x_scale};
}

Tensor pack_ternary(const Tensor& w_any, const std::string& layout) {
  constexpr const char* kOp = "pack_ternary";
  check_layout(kOp, layout);
  if (!w_any.is_cpu() || dtype_code(w_any) != codes().int8 || w_any.dim() != 2) {
    refuse(kOp, "w", "a CPU tensor int8 [out_features, in_features]", describe(w_any));
  }
  const Tensor w = as_contiguous(w_any);
  const int64_t out_features = w.size(0);
  const int64_t in_features = w.size(1);
  check_in_features(kOp, "w", in_features);
  const int64_t tiles = tiles_of(out_features);
  const Tensor packed = empty({tiles, blocks_of(in_features), kBlockBytes}, codes().uint8);

  const int8_t* in = data<int8_t>(w);
  uint8_t* out = mutable_data<uint8_t>(packed);
  std::atomic<bool> ternary{true};
  parallel(tiles, static_cast<double>(in_features + 1) * kTileRows, [&](int64_t begin, int64_t end) {
    if (!pack_tile16(in, out_features, in_features, out, begin, end)) ternary = false;
  });
  if (!ternary) refuse(kOp, "w", "values -1, 0 and 1 only", "an int8 tensor with other values");
  return packed;
}

void check_packed(const char* op, const Tensor& packed, int64_t out_features, int64_t in_features) {
  if (packed.is_cpu() && dtype_code(packed) == codes().uint8 &&
      shape_is(packed, {tiles_of(out_features), blocks_of(in_features), kBlockBytes})) {
    return;
  }
  refuse(op, "packed",
         "a CPU tensor uint8 " + shape_text({tiles_of(out_features), blocks_of(in_features), kBlockBytes}) +
             " (tile16 of out_features=" + std::to_string(out_features) +
             ", in_features=" + std::to_string(in_features) + ")",
         describe(packed));
}

Tensor unpack_ternary(const Tensor& packed_any, int64_t out_features, int64_t in_features, const std::string& layout) {
  constexpr const char* kOp = "unpack_ternary";
  check_layout(kOp, layout);
  check_size(kOp, "out_features", out_features);
  check_size(kOp, "in_features", in_features);
  check_in_features(kOp, "in_features", in_features);
  check_packed(kOp, packed_any, out_features, in_features);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor w = empty({out_features, in_features}, codes().int8);

  const uint8_t* in = data<uint8_t>(packed);
  int8_t* out = mutable_data<int8_t>(w);
  std::atomic<bool> ternary{true};
  parallel(tiles_of(out_features), static_cast<double>(in_features + 1) * kTileRows, [&](int64_t begin, int64_t end) {
    if (!unpack_tile16(in, out_features, in_features, out, begin, end)) ternary = false;
  });
  if (!ternary) refuse(kOp, "packed", "codes 0, 1 and 2 only", "a code 3, which stands for no weight");
  return w;
}

Tensor ternary_matmul(const Tensor& q_any, const Tensor& packed_any, int64_t out_features) {
  constexpr const char* kOp = "ternary_matmul";
  check_size(kOp, "out_features", out_features);
  if (!q_any.is_cpu() || dtype_code(q_any) != codes().int8 || q_any.dim() != 2) {
    refuse(kOp, "q", "a CPU tensor int8 [tokens, in_features]", describe(q_any));
  }
  const int64_t tokens = q_any.size(0);
  const int64_t in_features = q_any.size(1);
  check_in_features(kOp, "q", in_features);
  check_packed(kOp, packed_any, out_features, in_features);
  const Tensor q = as_contiguous(q_any);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor out = empty({tokens, out_features}, codes().int32);
  if (tokens == 0) return out;

  const KernelTable& table = kernels();
  const QuantizedRows rows = reserve_rows(tokens, in_features);
  const int8_t* in = data<int8_t>(q);
  parallel(tokens, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int8_t* copy = rows.q + row * rows.q_stride;
      const int8_t* source = in + row * in_features;
      int32_t sum = 0;
      for (int64_t k = 0; k < in_features; ++k) {
        copy[k] = source[k];
        sum += source[k];
      }
      for (int64_t k = in_features; k < rows.q_stride; ++k) copy[k] = 0;
      rows.q_sum[row] = sum;
    }
  });
  TernaryProduct product = product_of(rows, packed, tokens, out_features);
  product.out_dtype = DType::kInt32;
  product.out = mutable_data<int32_t>(out);
  run_product(product, table);
  return out;
}

Tensor ternary_linear(const Tensor& x_any, const Tensor& packed_any, const Tensor& weight_scale_any,
                      const std::optional<Tensor>& bias_any, int64_t out_features) {
  constexpr const char* kOp = "ternary_linear";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  check_size(kOp, "out_features", out_features);
  check_in_features(kOp, "x", in_features);
  check_packed(kOp, packed_any, out_features, in_features);
  check(kOp, "weight_scale", weight_scale_any, codes().float32, {out_features});
  if (bias_any.has_value()) check(kOp, "bias", *bias_any, codes().float32, {out_features});

  const Tensor x = as_contiguous(x_any);
  const Tensor packed = as_contiguous(packed_any);
  const Tensor weight_scale = as_contiguous(weight_scale_any);
  const std::optional<Tensor> bias =
      bias_any.has_value() ? std::optional<Tensor>(as_contiguous(*bias_any)) : std::nullopt;
  const Tensor out = empty(with_last(x, out_features), dtype_code(x));
  const int64_t tokens = rows_of(x);
  if (tokens == 0 || out_features == 0) return out;

  const KernelTable& table = kernels();
  const QuantizedRows rows = reserve_rows(tokens, in_features);
  const void* in = data<void>(x);
  parallel(tokens, static_cast<double>(in_features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      table.quantize_row(row_at(in, row, in_features, dtype), dtype, in_features, rows.q + row * rows.q_stride,
                         rows.q_stride, rows.x_scale + row, rows.q_sum + row);
    }
  });
  TernaryProduct product = product_of(rows, packed, tokens, out_features);
  product.out_dtype = dtype;
  product.out = mutable_data<void>(out);
  product.x_scale = rows.x_scale;
  product.weight_scale = data<float>(weight_scale);
  product.bias = bias.has_value() ? data<float>(*bias) : nullptr;
  run_product(product, table);
  return out;
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

Tensor lm_head(const Tensor& x_any, const Tensor& weight_any) {
  constexpr const char* kOp = "lm_head";
  const DType dtype = check_float(kOp, "x", x_any);
  const int64_t in_features = last_size(kOp, "x", x_any, "a tensor [..., in_features]");
  const DType weight_dtype = check_float(kOp, "weight", weight_any);
  if (weight_any.dim() != 2 || weight_any.size(1) != in_features) {
    refuse(kOp, "weight", "shape [vocabulary, " + std::to_string(in_features) + "] (in_features = the last size of x)",
           describe(weight_any));
  }
  const Tensor x = as_contiguous(x_any);
  const Tensor weight = as_contiguous(weight_any);
  const int64_t vocabulary = weight.size(0);
  const Tensor out = empty(with_last(x, vocabulary), codes().float32);
  const int64_t tokens = rows_of(x);
  if (tokens == 0 || vocabulary == 0) return out;

  const KernelTable& table = kernels();
  static thread_local Scratch activations;
  Logits logits{};
  logits.x_stride = round_up(in_features, kVirtualLanes);
  float* wide = static_cast<float*>(activations.reserve(static_cast<size_t>(tokens * logits.x_stride) * sizeof(float)));
  const void* in = data<void>(x);
  for (int64_t token = 0; token < tokens; ++token) {
    table.widen_row(row_at(in, token, in_features, dtype), dtype, in_features, wide + token * logits.x_stride,
                    logits.x_stride);
  }
  logits.x = wide;
  logits.tokens = tokens;
  logits.weight = data<void>(weight);
  logits.weight_dtype = weight_dtype;
  logits.in_features = in_features;
  logits.vocabulary = vocabulary;
  logits.out = mutable_data<float>(out);

  // Threads share out groups of as many rows as a kernel widens at a time.
  const int64_t groups = round_up(vocabulary, kLogitsScratchRows) / kLogitsScratchRows;
  const double ns_per_row =
      static_cast<double>(in_features + 1) * (static_cast<double>(element_bytes(weight_dtype)) * kNsPerWeightByte +
                                              static_cast<double>(tokens) * kNsPerMultiply);
  parallel(groups, ns_per_row * kLogitsScratchRows, [&](int64_t begin, int64_t end) {
    static thread_local Scratch rows;
    float* scratch =
        static_cast<float*>(rows.reserve(static_cast<size_t>(kLogitsScratchRows * logits.x_stride) * sizeof(float)));
    const int64_t row_end = end * kLogitsScratchRows < vocabulary ? end * kLogitsScratchRows : vocabulary;
    table.logits(logits, begin * kLogitsScratchRows, row_end, scratch);
  });
  return out;
}

}  // namespace
}  // namespace bitnet_ops

STABLE_TORCH_LIBRARY(bitnet_ops, m) {
  m.def("quantize_activations(Tensor x) -> (Tensor q, Tensor x_scale)");
  m.def("pack_ternary(Tensor w, str layout=\"tile16\") -> Tensor");
  m.def("unpack_ternary(Tensor packed, int out_features, int in_features, str layout=\"tile16\") -> Tensor");
  m.def("ternary_matmul(Tensor q, Tensor packed, int out_features) -> Tensor");
  m.def("ternary_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_features) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("lm_head(Tensor x, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitnet_ops, CPU, m) {
  m.impl("quantize_activations", TORCH_BOX(&bitnet_ops::quantize_activations));
  m.impl("pack_ternary", TORCH_BOX(&bitnet_ops::pack_ternary));
  m.impl("unpack_ternary", TORCH_BOX(&bitnet_ops::unpack_ternary));
  m.impl("ternary_matmul", TORCH_BOX(&bitnet_ops::ternary_matmul));
  m.impl("ternary_linear", TORCH_BOX(&bitnet_ops::ternary_linear));
  m.impl("rms_norm", TORCH_BOX(&bitnet_ops::rms_norm));
  m.impl("lm_head", TORCH_BOX(&bitnet_ops::lm_head));
}
