#include "attention_ops.h"

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernel_table.h"
#include "scratch.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`, on one core of the machine in bench/LOG.md.
constexpr double kNsPerMultiply = 0.025;     // 16 lanes a cycle
constexpr double kNsPerStoredElement = 0.5;  // rotated, converted, scattered

// Rows (tokens times heads of a group) that share a pass over the keys. A block of keys and values, widened,
// is 64 KB; for 96 rows of 128, queries and two softmax states are 147 KB more: all in an L2 of 256 KB.
constexpr int64_t kRowsAtOnce = 96;

// Below so many independent pieces of work, spans are shared out among threads as well.
constexpr int64_t kEnoughUnits = 32;

// ---- arguments ------------------------------------------------------------------------------------

struct Sizes {
  int64_t batch, tokens, heads, kv_heads, head_dim;
};

// The tensor with its rows contiguous; rows themselves may lie apart, as in a slice of q, k and v together.
Tensor with_whole_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) == 0 ? tensor : torch::stable::contiguous(tensor);
}

TokenRows rows_of_tokens(const Tensor& tensor) { return {data<float>(tensor), tensor.stride(0), tensor.stride(1)}; }

int64_t check_heads(const char* op, const char* argument, const Tensor& tensor, int64_t head_dim) {
  if (!tensor.is_cpu() || dtype_code(tensor) != codes().float32 || tensor.dim() != 3 || tensor.size(2) == 0 ||
      tensor.size(2) % head_dim != 0) {
    refuse(op, argument,
           "a CPU tensor float32 [batch, tokens, heads * " + std::to_string(head_dim) + "] (twice the last size of cos)",
           describe(tensor));
  }
  return tensor.size(2) / head_dim;
}

Sizes check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                   const Tensor& sin) {
  if (!cos.is_cpu() || dtype_code(cos) != codes().float32 || cos.dim() != 2 || cos.size(1) == 0) {
    refuse(op, "cos", "a CPU tensor float32 [positions, head_dim / 2]", describe(cos));
  }
  check(op, "sin", sin, codes().float32, {cos.size(0), cos.size(1)});
  const int64_t head_dim = 2 * cos.size(1);
  const int64_t heads = check_heads(op, "q", q, head_dim);
  const Sizes sizes{q.size(0), q.size(1), heads, check_heads(op, "k", k, head_dim), head_dim};
  if (sizes.heads % sizes.kv_heads != 0 || k.size(0) != sizes.batch || k.size(1) != sizes.tokens) {
    refuse(op, "k",
           "float32 [" + std::to_string(sizes.batch) + ", " + std::to_string(sizes.tokens) +
               ", kv_heads * head_dim] as q has them, with kv_heads a divisor of q's " + std::to_string(heads),
           describe(k));
  }
  check(op, "v", v, codes().float32, {sizes.batch, sizes.tokens, k.size(2)});
  return sizes;
}

// Positions must lie in the tables and in the cache. Padding, below 0, is in neither.
void check_positions(const char* op, const int64_t* start, const Sizes& sizes, int64_t positions, int64_t capacity) {
  const int64_t room = positions < capacity ? positions : capacity;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    if (start[b] <= room - sizes.tokens && start[b] >= -std::numeric_limits<int32_t>::max()) continue;
    refuse(op, "start",
           "positions from start to start + " + std::to_string(sizes.tokens) + " (the tokens) within the " +
               std::to_string(positions) + " of cos and the " + std::to_string(capacity) + " of the cache",
           std::to_string(start[b]));
  }
}

// ---- threads --------------------------------------------------------------------------------------

// A softmax state of `rows` rows in floats, its results at a cache line.
int64_t state_floats(int64_t rows, int64_t head_dim) {
  return round_up(2 * rows, kVirtualLanes) + rows * value_width(head_dim);
}

AttentionState state_at(float* memory, int64_t rows) {
  return {memory, memory + rows, memory + round_up(2 * rows, kVirtualLanes)};
}

void clear(const AttentionState& state, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    state.max[row] = -kInfinity;
    state.sum[row] = 0.0f;
  }
  std::memset(state.out, 0, static_cast<size_t>(rows * value_width(head_dim)) * sizeof(float));
}

// Blocks of tokens of one (sequence, kv head).
struct Units {
  const Attention& attention;
  int64_t tokens_at_once;
  int64_t blocks;
  int64_t count;

  explicit Units(const Attention& a)
      : attention(a),
        tokens_at_once(a.group < kRowsAtOnce ? kRowsAtOnce / a.group : 1),
        blocks(divide_up(a.tokens, tokens_at_once)),
        count(a.batch * a.kv_heads * blocks) {}

  int64_t rows() const { return attention.group * (tokens_at_once < attention.tokens ? tokens_at_once : attention.tokens); }

  AttentionRows at(int64_t unit) const {
    const int64_t head = unit / blocks;
    // Later tokens see more keys. First, last, second, last but one: any run of these is about average.
    const int64_t i = unit % blocks;
    const int64_t block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
    const int64_t begin = block * tokens_at_once;
    const int64_t end = begin + tokens_at_once;
    return {head / attention.kv_heads, head % attention.kv_heads, begin, end < attention.tokens ? end : attention.tokens};
  }

  int64_t spans(const AttentionRows& rows) const {
    const int64_t last = attention.start[rows.batch] + rows.token_end - 1;
    return last < 0 ? 0 : last / kAttentionSpan + 1;
  }
};

// Keys and values of a unit lie apart from those before, so the processor does not foresee the first of them. As much
// as kernels ask for ahead of themselves.
void ask_for_start(const Attention& attention, const AttentionRows& at, int64_t span) {
  constexpr int64_t kBytes = 12288;
  const int64_t element = attention.cache == CacheType::kFloat32 ? 4 : attention.cache == CacheType::kBFloat16 ? 2 : 1;
  const int64_t width = value_width(attention.head_dim);
  const int64_t place = (at.batch * attention.kv_heads + at.kv_head) * attention.capacity + span * kAttentionSpan;
  const int64_t key_width = attention.cache == CacheType::kInt8 ? width : attention.head_dim;
  const char* keys = static_cast<const char*>(attention.keys) + place * key_width * element;
  const char* values = static_cast<const char*>(attention.values) + place * width * element;
  for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(keys + byte, 0, 2);
  for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(values + byte, 0, 2);
}

void store_keys_and_values(const Attention& attention, const KernelTable& table) {
  const int64_t tokens_at_once = kAttentionBlock;
  const int64_t blocks = divide_up(attention.tokens, tokens_at_once);
  const int64_t tokens = attention.tokens < tokens_at_once ? attention.tokens : tokens_at_once;
  const double ns = 2.0 * kNsPerStoredElement * static_cast<double>(attention.head_dim * tokens);
  parallel(attention.batch * attention.kv_heads * blocks, ns, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(2 * attention.head_dim) * sizeof(float)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks;
      const int64_t first = i % blocks * tokens_at_once;
      const int64_t last = first + tokens_at_once;
      table.attention_store(attention,
                            {head / attention.kv_heads, head % attention.kv_heads, first,
                             last < attention.tokens ? last : attention.tokens},
                            memory);
    }
  });
}

// A unit's spans one after another.
void attend_whole_units(const Attention& attention, const KernelTable& table, const Units& units, double ns_per_span,
                        int64_t most_spans) {
  const int64_t rows = units.rows();
  const int64_t floats = state_floats(rows, attention.head_dim);
  parallel(units.count, ns_per_span * static_cast<double>(most_spans), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.reserve(
        static_cast<size_t>(2 * floats + attention_scratch(rows, attention.head_dim)) * sizeof(float)));
    const AttentionState state = state_at(memory, rows);
    const AttentionState part = state_at(memory + floats, rows);
    ask_for_start(attention, units.at(begin), 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const AttentionRows at = units.at(unit);
      if (unit + 1 < end) ask_for_start(attention, units.at(unit + 1), 0);
      clear(state, rows, attention.head_dim);
      table.attention_queries(attention, at, memory + 2 * floats);
      for (int64_t span = 0; span < units.spans(at); ++span) {
        table.attention_span(attention, at, span, part, memory + 2 * floats);
        table.attention_join(attention, at, span, state, part);
      }
      table.attention_finish(attention, at, state);
    }
  });
}

// Few units: their spans are shared out, and who ends the last one of a unit joins them.
void attend_spans(const Attention& attention, const KernelTable& table, const Units& units, double ns_per_span,
                  int64_t most_spans) {
  const int64_t rows = units.rows();
  const int64_t floats = state_floats(rows, attention.head_dim);
  static thread_local Scratch parts_scratch;
  float* parts = static_cast<float*>(
      parts_scratch.reserve(static_cast<size_t>(units.count * most_spans * floats) * sizeof(float)));
  std::array<std::atomic<int64_t>, kEnoughUnits> missing;
  for (int64_t unit = 0; unit < units.count; ++unit) missing[static_cast<size_t>(unit)] = most_spans;
  parallel(units.count * most_spans, ns_per_span, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.reserve(
        static_cast<size_t>(floats + attention_scratch(rows, attention.head_dim)) * sizeof(float)));
    const AttentionState state = state_at(memory, rows);
    int64_t unit_of_queries = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / most_spans;
      const int64_t span = i % most_spans;
      const AttentionRows at = units.at(unit);
      if (span < units.spans(at)) {
        if (unit != unit_of_queries) {
          ask_for_start(attention, at, span);
          table.attention_queries(attention, at, memory + floats);
          unit_of_queries = unit;
        }
        table.attention_span(attention, at, span, state_at(parts + i * floats, rows), memory + floats);
      }
      if (missing[static_cast<size_t>(unit)].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      clear(state, rows, attention.head_dim);
      for (int64_t s = 0; s < units.spans(at); ++s) {
        table.attention_join(attention, at, s, state, state_at(parts + (unit * most_spans + s) * floats, rows));
      }
      table.attention_finish(attention, at, state);
    }
  });
}

void run(const Attention& attention) {
  const KernelTable& table = kernels();
  store_keys_and_values(attention, table);
  const Units units(attention);
  int64_t most_spans = 1;
  for (int64_t b = 0; b < attention.batch; ++b) {
    const int64_t spans = units.spans({b, 0, 0, attention.tokens});
    if (spans > most_spans) most_spans = spans;
  }
  int64_t keys = 0;  // of a span, at most
  for (int64_t b = 0; b < attention.batch; ++b) {
    const int64_t end = attention.start[b] + attention.tokens;
    if (end > keys) keys = end < kAttentionSpan ? end : kAttentionSpan;
  }
  const double ns_per_span = kNsPerMultiply * 2.0 * static_cast<double>(keys * attention.head_dim * units.rows());
  if (units.blocks == 1 && units.count < kEnoughUnits && most_spans > 1) {
    attend_spans(attention, table, units, ns_per_span, most_spans);
  } else {
    attend_whole_units(attention, table, units, ns_per_span, most_spans);
  }
}

Attention make(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
               const int64_t* start, const Sizes& sizes, const Tensor& out) {
  Attention attention{};
  attention.q = rows_of_tokens(q);
  attention.k = rows_of_tokens(k);
  attention.v = rows_of_tokens(v);
  attention.cos = data<float>(cos);
  attention.sin = data<float>(sin);
  attention.start = start;
  attention.batch = sizes.batch;
  attention.tokens = sizes.tokens;
  attention.kv_heads = sizes.kv_heads;
  attention.group = sizes.heads / sizes.kv_heads;
  attention.head_dim = sizes.head_dim;
  attention.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(sizes.head_dim)));
  attention.out = mutable_data<float>(out);
  return attention;
}

}  // namespace

Tensor attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& cos_any,
                 const Tensor& sin_any, const std::optional<Tensor>& start_any) {
  constexpr const char* kOp = "attention";
  const Sizes sizes = check_inputs(kOp, q_any, k_any, v_any, cos_any, sin_any);
  if (start_any.has_value()) check(kOp, "start", *start_any, codes().int64, {sizes.batch});
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
  const Tensor out = empty({sizes.batch, sizes.tokens, sizes.heads * sizes.head_dim}, codes().float32);
  if (sizes.batch == 0 || sizes.tokens == 0) return out;

  // Keys and values are laid out as in a cache, for this call.
  const int64_t capacity = round_up(sizes.tokens, kAttentionBlock);
  const int64_t places = sizes.batch * sizes.kv_heads * capacity;
  const Tensor keys = empty({places * sizes.head_dim}, codes().float32);
  const Tensor values = empty({places * value_width(sizes.head_dim)}, codes().float32);
  Attention attention = make(q, k, v, cos, sin, start.data(), sizes, out);
  attention.cache = CacheType::kFloat32;
  attention.capacity = capacity;
  attention.keys = mutable_data<void>(keys);
  attention.values = mutable_data<void>(values);
  run(attention);
  return out;
}

Tensor cached_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& cos_any,
                        const Tensor& sin_any, const Tensor& start_any, const Tensor& keys, const Tensor& values,
                        const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  constexpr const char* kOp = "cached_attention";
  const Sizes sizes = check_inputs(kOp, q_any, k_any, v_any, cos_any, sin_any);
  check(kOp, "start", start_any, codes().int64, {sizes.batch});
  const int32_t type = dtype_code(keys);
  // An int8 cache has spans of keys and of values as kernels/attention_int8.h draws them.
  const bool bytes = type == codes().int8;
  const int64_t width = value_width(sizes.head_dim);
  const int64_t parts = keys.dim() > 2 ? keys.size(2) : 0;
  const int64_t capacity = parts * (bytes ? kAttentionSpan : kAttentionBlock);
  const bool keys_fit = bytes ? shape_is(keys, {sizes.batch, sizes.kv_heads, parts, kAttentionSpan * width})
                              : shape_is(keys, {sizes.batch, sizes.kv_heads, parts, sizes.head_dim, kAttentionBlock});
  if (!keys.is_cpu() || (type != codes().float32 && type != codes().bfloat16 && !bytes) || !keys_fit ||
      !keys.is_contiguous()) {
    refuse(kOp, "keys",
           "a contiguous CPU tensor float32 or bfloat16 " +
               shape_text({sizes.batch, sizes.kv_heads, -1, sizes.head_dim, kAttentionBlock}) +
               " (batch, kv_heads, blocks, head_dim, keys of a block), or int8 " +
               shape_text({sizes.batch, sizes.kv_heads, -1, kAttentionSpan * width}) +
               " (batch, kv_heads, spans, bytes of a span)",
           describe(keys));
  }
  if (bytes && sizes.head_dim > kMaxInt8HeadDim) {
    refuse(kOp, "keys", "int8 for a head_dim of at most " + std::to_string(kMaxInt8HeadDim),
           std::to_string(sizes.head_dim));
  }
  const auto check_storage = [&](const char* argument, const Tensor& tensor, int32_t dtype,
                                 std::initializer_list<int64_t> shape) {
    check(kOp, argument, tensor, dtype, shape);
    if (!tensor.is_contiguous()) refuse(kOp, argument, "a contiguous tensor", describe(tensor) + " with other strides");
  };
  if (bytes) {
    check_storage("values", values, type, {sizes.batch, sizes.kv_heads, parts, kAttentionSpan * width});
  } else {
    check_storage("values", values, type, {sizes.batch, sizes.kv_heads, capacity, width});
  }
  const auto check_scale = [&](const char* argument, const std::optional<Tensor>& scale) {
    if (scale.has_value() != bytes) {
      refuse(kOp, argument, "a tensor where keys are int8, None otherwise", scale.has_value() ? "a tensor" : "None");
    }
    if (scale.has_value()) check_storage(argument, *scale, codes().float32, {sizes.batch, sizes.kv_heads, capacity});
  };
  check_scale("key_scale", key_scale);
  check_scale("value_scale", value_scale);

  const Tensor q = with_whole_rows(q_any);
  const Tensor k = with_whole_rows(k_any);
  const Tensor v = with_whole_rows(v_any);
  const Tensor cos = as_contiguous(cos_any);
  const Tensor sin = as_contiguous(sin_any);
  const Tensor start = as_contiguous(start_any);
  check_positions(kOp, data<int64_t>(start), sizes, cos.size(0), capacity);
  const Tensor out = empty({sizes.batch, sizes.tokens, sizes.heads * sizes.head_dim}, codes().float32);
  if (sizes.batch == 0 || sizes.tokens == 0) return out;

  Attention attention = make(q, k, v, cos, sin, data<int64_t>(start), sizes, out);
  attention.cache = type == codes().float32    ? CacheType::kFloat32
                    : type == codes().bfloat16 ? CacheType::kBFloat16
                                               : CacheType::kInt8;
  attention.capacity = capacity;
  attention.keys = mutable_data<void>(keys);
  attention.values = mutable_data<void>(values);
  attention.key_scale = key_scale.has_value() ? mutable_data<float>(*key_scale) : nullptr;
  attention.value_scale = value_scale.has_value() ? mutable_data<float>(*value_scale) : nullptr;
  run(attention);
  return out;
}

}  // namespace bitnet_ops
