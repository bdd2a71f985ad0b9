// Attention, over every dtype of the cache.

#include <algorithm>
#include <set>

#include "kernel_test.h"

namespace bitnet_ops {
namespace kernel_test {
namespace {

struct AttentionCase {
  int64_t tokens, kv_heads, group, head_dim;
  int64_t start[2];  // of two sequences: the tokens before the call, or below 0 padding
  RowKind kind = kRandom;
  int64_t window = 0;
};

// Storage of exactly the promised sizes, in memory of the element type of the cache.
struct AttentionCache {
  Buffer<uint8_t> keys, values;
  Buffer<float> key_scale, value_scale;
  AttentionCache(const AttentionCase& c, int64_t capacity, int64_t bytes)
      : keys(2 * c.kv_heads * capacity * (bytes == 1 ? value_width(c.head_dim) : c.head_dim) * bytes),
        values(2 * c.kv_heads * capacity * value_width(c.head_dim) * bytes),
        key_scale(bytes == 1 ? 2 * c.kv_heads * capacity : 0),
        value_scale(bytes == 1 ? 2 * c.kv_heads * capacity : 0) {
    // NaN, or its like: what nobody wrote must not be read.
    std::memset(keys.data, 0xff, keys.count);
    std::memset(values.data, 0xff, values.count);
    std::memset(static_cast<void*>(key_scale.data), 0xff, key_scale.count * sizeof(float));
    std::memset(static_cast<void*>(value_scale.data), 0xff, value_scale.count * sizeof(float));
  }
};

// One call as csrc/ops/attention.cpp makes it, with other numbers of rows at once.
void run_attention(const KernelTable& table, Attention attention, int64_t tokens_at_once) {
  const int64_t rows = tokens_at_once * attention.group;
  const int64_t width = value_width(attention.head_dim);
  Buffer<float> max(rows), sum(rows), out(rows * width), part_max(rows), part_sum(rows), part_out(rows * width);
  Buffer<float> scratch(attention_scratch(rows, attention.head_dim)), store_scratch(2 * attention.head_dim);
  const AttentionState state{max.data, sum.data, out.data}, part{part_max.data, part_sum.data, part_out.data};
  for (int64_t b = 0; b < attention.batch; ++b) {
    for (int64_t h = 0; h < attention.kv_heads; ++h) {
      table.attention_store(attention, {b, h, 0, attention.tokens}, store_scratch.data);
      for (int64_t begin = 0; begin < attention.tokens; begin += tokens_at_once) {
        const int64_t end = begin + tokens_at_once < attention.tokens ? begin + tokens_at_once : attention.tokens;
        const AttentionRows at{b, h, begin, end};
        for (int64_t row = 0; row < rows; ++row) {
          max.data[row] = -kInfinity;
          sum.data[row] = 0.0f;
        }
        std::memset(out.data, 0, out.count * sizeof(float));
        const int64_t last = attention.start[b] + end - 1;
        table.attention_queries(attention, at, scratch.data);
        const int64_t first = first_seen(attention.window, attention.start[b] + begin) / kAttentionSpan;
        for (int64_t span = first; span * kAttentionSpan <= last; ++span) {
          table.attention_span(attention, at, span, part, scratch.data);
          table.attention_join(attention, at, span, state, part);
        }
        table.attention_finish(attention, at, state);
      }
    }
  }
}

// Tokens before `start` are stored by a call of their own. Scalar takes all tokens at once, the tested
// table some at a time.
void test_attention(const AttentionCase& c, CacheType type, Random& random) {
  const int64_t bytes = type == CacheType::kFloat32 ? 4 : type == CacheType::kBFloat16 ? 2 : 1;
  int64_t before = 0;
  for (const int64_t start : c.start) before = start > before ? start : before;
  const int64_t positions = before + c.tokens;
  const int64_t part = type == CacheType::kInt8 ? kAttentionSpan : kAttentionBlock;
  const int64_t capacity = divide_up(positions, part) * part;
  const int64_t heads = c.kv_heads * c.group;
  const int64_t half = c.head_dim / 2;
  Buffer<float> q(2 * positions * heads * c.head_dim), k(2 * positions * c.kv_heads * c.head_dim);
  Buffer<float> v(2 * positions * c.kv_heads * c.head_dim), cos(positions * half), sin(positions * half);
  for (int64_t row = 0; row < 2 * positions; ++row) {
    // The odd kinds in one token only.
    const RowKind kind = row == positions / 2 ? c.kind : kRandom;
    fill_row(q.data + row * heads * c.head_dim, heads * c.head_dim, kRandom, random);
    fill_row(k.data + row * c.kv_heads * c.head_dim, c.kv_heads * c.head_dim, kind, random);
    fill_row(v.data + row * c.kv_heads * c.head_dim, c.kv_heads * c.head_dim, kind, random);
  }
  for (int64_t i = 0; i < positions * half; ++i) {
    cos.data[i] = random.uniform();  // rotations need not be rotations to be compared
    sin.data[i] = random.uniform();
  }
  AttentionCache cache[2] = {{c, capacity, bytes}, {c, capacity, bytes}};
  Buffer<float> out[2] = {Buffer<float>(2 * c.tokens * heads * c.head_dim),
                          Buffer<float>(2 * c.tokens * heads * c.head_dim)};
  const auto attend = [&](int i, int64_t tokens_at_once) {
    const KernelTable& table = i == 0 ? *scalar : *tested;
    Attention attention{};
    const auto rows = [&](const Buffer<float>& x, int64_t row_heads, int64_t skip) {
      return TokenRows{x.data + skip * row_heads * c.head_dim, positions * row_heads * c.head_dim,
                       row_heads * c.head_dim};
    };
    attention.cos = cos.data;
    attention.sin = sin.data;
    attention.batch = 2;
    attention.kv_heads = c.kv_heads;
    attention.group = c.group;
    attention.head_dim = c.head_dim;
    attention.scale = 0.3f;
    attention.window = c.window;
    attention.cache = type;
    attention.capacity = capacity;
    attention.keys = cache[i].keys.data;
    attention.values = cache[i].values.data;
    attention.key_scale = cache[i].key_scale.data;
    attention.value_scale = cache[i].value_scale.data;
    const int64_t store_from[2] = {c.start[0] - before, c.start[1] - before};
    attention.start = store_from;
    attention.tokens = before;
    attention.k = rows(k, c.kv_heads, 0);
    attention.v = rows(v, c.kv_heads, 0);
    Buffer<float> store_scratch(2 * c.head_dim);
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        table.attention_store(attention, {b, h, 0, before}, store_scratch.data);
      }
    }
    attention.start = c.start;
    attention.tokens = c.tokens;
    attention.q = rows(q, heads, before);
    attention.k = rows(k, c.kv_heads, before);
    attention.v = rows(v, c.kv_heads, before);
    attention.out = out[i].data;
    std::memset(static_cast<void*>(out[i].data), 0x3c, out[i].count * sizeof(float));
    run_attention(table, attention, tokens_at_once);
  };
  attend(0, c.tokens);
  for (const int64_t tokens_at_once : std::set<int64_t>{1, std::min(c.tokens, int64_t{5}), c.tokens}) {
    attend(1, tokens_at_once);
    const std::string where = " " + std::to_string(c.tokens) + " tokens x " + std::to_string(c.kv_heads) + " x " +
                              std::to_string(c.group) + " heads of " + std::to_string(c.head_dim) + " after " +
                              std::to_string(c.start[0]) + " and " + std::to_string(c.start[1]) + ", kind " +
                              std::to_string(c.kind) + ", window " + std::to_string(c.window) + ", bytes " +
                              std::to_string(bytes);
    compare(out[0], out[1], "attention" + where);
    if (type == CacheType::kInt8) {
      compare(cache[0].key_scale, cache[1].key_scale, "attention key_scale" + where);
      compare(cache[0].value_scale, cache[1].value_scale, "attention value_scale" + where);
    }
    // A NaN may have any payload, so with one among the tokens only results are compared.
    ++comparisons;
    if (c.kind != kOneNaN && (std::memcmp(cache[0].keys.data, cache[1].keys.data, cache[0].keys.count) != 0 ||
                              std::memcmp(cache[0].values.data, cache[1].values.data, cache[0].values.count) != 0)) {
      report("attention's cache" + where);
    }
  }
}

}  // namespace

void test_attention() {
  Random random;
  const AttentionCase cases[] = {
      {1, 1, 1, 2, {0, 0}},       {1, 2, 4, 20, {70, 3}},   {3, 1, 3, 36, {-2, 61}},   {66, 2, 2, 12, {0, -66}},
      {40, 1, 5, 64, {230, -20}}, {1, 1, 4, 128, {300, 0}}, {13, 1, 4, 128, {250, 7}},
  };
  for (const CacheType type : {CacheType::kFloat32, CacheType::kBFloat16, CacheType::kInt8}) {
    for (const AttentionCase& c : cases) test_attention(c, type, random);
    for (int kind = 0; kind < kRowKinds; ++kind) {
      test_attention({6, 2, 2, 20, {64, -1}, static_cast<RowKind>(kind)}, type, random);
      test_attention({9, 1, 3, 12, {70, 0}, static_cast<RowKind>(kind), 7}, type, random);
    }
    for (const int64_t window : {1, 6, 63, 64, 65, 200, 256, 1000}) {
      test_attention({40, 1, 5, 20, {280, -20}, kRandom, window}, type, random);
      test_attention({1, 2, 4, 36, {300, 0}, kRandom, window}, type, random);
    }
  }
}

}  // namespace kernel_test
}  // namespace bitnet_ops
