#include "ops/attention.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "run/attention.h"

namespace bitnet_ops {
namespace {

// The tensor with its rows contiguous; rows themselves may lie apart, as in a slice of q, k and v together.
Tensor with_whole_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) == 0 ? tensor : torch::stable::contiguous(tensor);
}

TokenRows rows_of_tokens(const Tensor& tensor) { return {data<float>(tensor), tensor.stride(0), tensor.stride(1)}; }

int64_t check_heads(const char* op, const char* argument, const Tensor& tensor, int64_t head_dim) {
  if (!tensor.is_cpu() || dtype_code(tensor) != dtypes().float32 || tensor.dim() != 3 || tensor.size(2) == 0 ||
      tensor.size(2) % head_dim != 0) {
    refuse(
        op, argument,
        "a CPU tensor float32 [batch, tokens, heads * " + std::to_string(head_dim) + "] (twice the last size of cos)",
        describe(tensor));
  }
  return tensor.size(2) / head_dim;
}

AttentionSizes check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                            const Tensor& sin) {
  const int64_t head_dim = check_tables(op, cos, sin);
  const int64_t heads = check_heads(op, "q", q, head_dim);
  const AttentionSizes sizes{q.size(0), q.size(1), heads, check_heads(op, "k", k, head_dim), head_dim};
  if (sizes.heads % sizes.kv_heads != 0 || k.size(0) != sizes.batch || k.size(1) != sizes.tokens) {
    refuse(op, "k",
           "float32 [" + std::to_string(sizes.batch) + ", " + std::to_string(sizes.tokens) +
               ", kv_heads * head_dim] as q has them, with kv_heads a divisor of q's " + std::to_string(heads),
           describe(k));
  }
  check(op, "v", v, dtypes().float32, {sizes.batch, sizes.tokens, k.size(2)});
  return sizes;
}

void run_on(Attention attention, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
  attention.q = rows_of_tokens(q);
  attention.k = rows_of_tokens(k);
  attention.v = rows_of_tokens(v);
  attention.out = mutable_data<float>(out);
  run_attention(attention);
}

}  // namespace

int64_t check_tables(const char* op, const Tensor& cos, const Tensor& sin) {
  if (!cos.is_cpu() || dtype_code(cos) != dtypes().float32 || cos.dim() != 2 || cos.size(1) == 0) {
    refuse(op, "cos", "a CPU tensor float32 [positions, head_dim / 2]", describe(cos));
  }
  check(op, "sin", sin, dtypes().float32, {cos.size(0), cos.size(1)});
  return 2 * cos.size(1);
}

void check_positions(const char* op, const int64_t* start, const AttentionSizes& sizes, int64_t positions,
                     int64_t capacity) {
  const int64_t room = positions < capacity ? positions : capacity;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    if (start[b] <= room - sizes.tokens && start[b] >= -std::numeric_limits<int32_t>::max()) continue;
    refuse(op, "start",
           "positions from start to start + " + std::to_string(sizes.tokens) + " (the tokens) within the " +
               std::to_string(positions) + " of cos and the " + std::to_string(capacity) + " of the cache",
           std::to_string(start[b]));
  }
}

CachePart check_cache(const char* op, const AttentionSizes& sizes, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const int32_t type = dtype_code(keys);
  // An int8 cache has spans of keys and of values as kernels/attention_int8.h draws them.
  const bool bytes = type == dtypes().int8;
  const int64_t width = value_width(sizes.head_dim);
  const int64_t parts = keys.dim() > 2 ? keys.size(2) : 0;
  const int64_t capacity = parts * (bytes ? kAttentionSpan : kAttentionBlock);
  const bool keys_fit = bytes ? shape_is(keys, {sizes.batch, sizes.kv_heads, parts, kAttentionSpan * width})
                              : shape_is(keys, {sizes.batch, sizes.kv_heads, parts, sizes.head_dim, kAttentionBlock});
  if (!keys.is_cpu() || (type != dtypes().float32 && type != dtypes().bfloat16 && !bytes) || !keys_fit ||
      !keys.is_contiguous()) {
    refuse(op, "keys",
           "a contiguous CPU tensor float32 or bfloat16 " +
               shape_text({sizes.batch, sizes.kv_heads, -1, sizes.head_dim, kAttentionBlock}) +
               " (batch, kv_heads, blocks, head_dim, keys of a block), or int8 " +
               shape_text({sizes.batch, sizes.kv_heads, -1, kAttentionSpan * width}) +
               " (batch, kv_heads, spans, bytes of a span)",
           describe(keys));
  }
  if (bytes && sizes.head_dim > kMaxInt8HeadDim) {
    refuse(op, "keys", "int8 for a head_dim of at most " + std::to_string(kMaxInt8HeadDim),
           std::to_string(sizes.head_dim));
  }
  const auto check_storage = [&](const char* argument, const Tensor& tensor, int32_t dtype,
                                 std::initializer_list<int64_t> shape) {
    check(op, argument, tensor, dtype, shape);
    if (!tensor.is_contiguous()) refuse(op, argument, "a contiguous tensor", describe(tensor) + " with other strides");
  };
  if (bytes) {
    check_storage("values", values, type, {sizes.batch, sizes.kv_heads, parts, kAttentionSpan * width});
  } else {
    check_storage("values", values, type, {sizes.batch, sizes.kv_heads, capacity, width});
  }
  const auto check_scale = [&](const char* argument, const std::optional<Tensor>& scale) {
    if (scale.has_value() != bytes) {
      refuse(op, argument, "a tensor where keys are int8, None otherwise", scale.has_value() ? "a tensor" : "None");
    }
    if (scale.has_value()) check_storage(argument, *scale, dtypes().float32, {sizes.batch, sizes.kv_heads, capacity});
  };
  check_scale("key_scale", key_scale);
  check_scale("value_scale", value_scale);
  return {type == dtypes().float32    ? CacheType::kFloat32
          : type == dtypes().bfloat16 ? CacheType::kBFloat16
                                      : CacheType::kInt8,
          capacity,
          mutable_data<void>(keys),
          mutable_data<void>(values),
          key_scale.has_value() ? mutable_data<float>(*key_scale) : nullptr,
          value_scale.has_value() ? mutable_data<float>(*value_scale) : nullptr};
}

void check_scale_and_window(const char* op, const std::optional<double>& scale, int64_t window) {
  if (scale.has_value() && !std::isfinite(*scale)) {
    refuse(op, "scale", "a finite number, or None for 1 / sqrt(head_dim)", std::to_string(*scale));
  }
  if (window < 0) refuse(op, "window", "a number of positions, or 0 for all", std::to_string(window));
}

Attention call_of(const AttentionSizes& sizes, const float* cos, const float* sin, const int64_t* start,
                  const CachePart& cache, std::optional<double> scale, int64_t window) {
  Attention attention{};
  attention.cos = cos;
  attention.sin = sin;
  attention.start = start;
  attention.batch = sizes.batch;
  attention.tokens = sizes.tokens;
  attention.kv_heads = sizes.kv_heads;
  attention.group = sizes.heads / sizes.kv_heads;
  attention.head_dim = sizes.head_dim;
  attention.scale = score_scale(scale, sizes.head_dim);
  attention.window = window;
  attention.cache = cache.type;
  attention.capacity = cache.capacity;
  attention.keys = cache.keys;
  attention.values = cache.values;
  attention.key_scale = cache.key_scale;
  attention.value_scale = cache.value_scale;
  return attention;
}

Tensor attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& cos_any,
                 const Tensor& sin_any, const std::optional<Tensor>& start_any, std::optional<double> scale,
                 int64_t window) {
  constexpr const char* kOp = "attention";
  const AttentionSizes sizes = check_inputs(kOp, q_any, k_any, v_any, cos_any, sin_any);
  if (start_any.has_value()) check(kOp, "start", *start_any, dtypes().int64, {sizes.batch});
  check_scale_and_window(kOp, scale, window);
  const Tensor q = with_whole_rows(q_any);
  const Tensor k = with_whole_rows(k_any);
  const Tensor v = with_whole_rows(v_any);
  const Tensor cos = as_contiguous(cos_any);
  const Tensor sin = as_contiguous(sin_any);
  std::vector<int64_t> start(static_cast<size_t>(sizes.batch), 0);
  if (start_any.has_value() && sizes.batch > 0) {
    const Tensor given = as_contiguous(*start_any);
    start.assign(data<int64_t>(given), data<int64_t>(given) + sizes.batch);
  }
  check_positions(kOp, start.data(), sizes, cos.size(0), sizes.tokens);
  const Tensor out = empty({sizes.batch, sizes.tokens, sizes.heads * sizes.head_dim}, dtypes().float32);
  if (sizes.batch == 0 || sizes.tokens == 0) return out;

  // Keys and values are laid out as in a cache, for this call.
  const int64_t capacity = round_up(sizes.tokens, kAttentionBlock);
  const int64_t places = sizes.batch * sizes.kv_heads * capacity;
  const Tensor keys = empty({places * sizes.head_dim}, dtypes().float32);
  const Tensor values = empty({places * value_width(sizes.head_dim)}, dtypes().float32);
  const CachePart cache{CacheType::kFloat32,        capacity, mutable_data<void>(keys),
                        mutable_data<void>(values), nullptr,  nullptr};
  run_on(call_of(sizes, data<float>(cos), data<float>(sin), start.data(), cache, scale, window), q, k, v, out);
  return out;
}

Tensor cached_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& cos_any,
                        const Tensor& sin_any, const Tensor& start_any, const Tensor& keys, const Tensor& values,
                        const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
                        std::optional<double> scale, int64_t window) {
  constexpr const char* kOp = "cached_attention";
  const AttentionSizes sizes = check_inputs(kOp, q_any, k_any, v_any, cos_any, sin_any);
  check(kOp, "start", start_any, dtypes().int64, {sizes.batch});
  check_scale_and_window(kOp, scale, window);
  const CachePart cache = check_cache(kOp, sizes, keys, values, key_scale, value_scale);

  const Tensor q = with_whole_rows(q_any);
  const Tensor k = with_whole_rows(k_any);
  const Tensor v = with_whole_rows(v_any);
  const Tensor cos = as_contiguous(cos_any);
  const Tensor sin = as_contiguous(sin_any);
  const Tensor start = as_contiguous(start_any);
  check_positions(kOp, data<int64_t>(start), sizes, cos.size(0), cache.capacity);
  const Tensor out = empty({sizes.batch, sizes.tokens, sizes.heads * sizes.head_dim}, dtypes().float32);
  if (sizes.batch == 0 || sizes.tokens == 0) return out;

  run_on(call_of(sizes, data<float>(cos), data<float>(sin), data<int64_t>(start), cache, scale, window), q, k, v, out);
  return out;
}

}  // namespace bitnet_ops
