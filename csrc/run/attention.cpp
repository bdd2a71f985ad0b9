#include "run/attention.h"

#include <array>
#include <atomic>
#include <cstring>

#include "run/dispatch.h"
#include "run/scratch.h"
#include "run/parallel.h"
#include "run/rows.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`, on one core of the machine in bench/LOG.md.
constexpr double kNsPerMultiply = 0.025;     // 16 lanes a cycle
constexpr double kNsPerCachedByte = 0.05;    // keys and values, at 20 GB/s
constexpr double kNsPerStoredElement = 0.5;  // rotated, converted, scattered

// Rows (tokens times heads of a group) that share a pass over the keys. A block of keys and values, widened,
// is 64 KB; for 96 rows of 128, queries and two softmax states are 147 KB more: all in an L2 of 256 KB.
constexpr int64_t kRowsAtOnce = 96;

// Below so many independent pieces of work, spans are shared out among threads as well.
constexpr int64_t kEnoughUnits = 32;

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

  int64_t rows() const {
    return attention.group * (tokens_at_once < attention.tokens ? tokens_at_once : attention.tokens);
  }

  AttentionRows at(int64_t unit) const {
    const int64_t head = unit / blocks;
    // Later tokens see more keys. First, last, second, last but one: any run of these is about average.
    const int64_t i = unit % blocks;
    const int64_t block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
    const int64_t begin = block * tokens_at_once;
    const int64_t end = begin + tokens_at_once;
    return {head / attention.kv_heads, head % attention.kv_heads, begin,
            end < attention.tokens ? end : attention.tokens};
  }

  // Spans [first_span, end_span) hold what these rows see; those before lie below every row's window.
  int64_t first_span(const AttentionRows& rows) const {
    return first_seen(attention.window, attention.start[rows.batch] + rows.token_begin) / kAttentionSpan;
  }
  int64_t end_span(const AttentionRows& rows) const {
    const int64_t last = attention.start[rows.batch] + rows.token_end - 1;
    return last < 0 ? 0 : last / kAttentionSpan + 1;
  }
};

int64_t element_bytes(CacheType type) { return type == CacheType::kFloat32 ? 4 : type == CacheType::kBFloat16 ? 2 : 1; }

// Keys and values of a unit lie apart from those before, so the processor does not foresee the first of them. As much
// as kernels ask for ahead of themselves; of floats, kernels ask themselves.
void ask_for_start(const Attention& attention, const AttentionRows& at, int64_t span) {
  if (attention.cache != CacheType::kInt8) return;
  constexpr int64_t kBytes = 12288;
  const int64_t width = value_width(attention.head_dim);
  const int64_t place = (at.batch * attention.kv_heads + at.kv_head) * attention.capacity + span * kAttentionSpan;
  const char* keys = static_cast<const char*>(attention.keys) + place * width;
  const char* values = static_cast<const char*>(attention.values) + place * width;
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

// Of a single token, whoever attends to its key stores it: it is scattered over as many lines as it has elements, which
// then need not pass from one core to another. It lies in the last span.
bool stores_on_the_way(const Attention& attention) { return attention.tokens == 1; }

// A unit's spans one after another.
void attend_whole_units(const Attention& attention, const KernelTable& table, const Units& units, double ns_per_span,
                        int64_t most_spans) {
  const int64_t rows = units.rows();
  const int64_t floats = state_floats(rows, attention.head_dim);
  parallel(units.count, ns_per_span * static_cast<double>(most_spans), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(
        scratch.reserve(static_cast<size_t>(2 * floats + attention_scratch(rows, attention.head_dim)) * sizeof(float)));
    const AttentionState state = state_at(memory, rows);
    const AttentionState part = state_at(memory + floats, rows);
    ask_for_start(attention, units.at(begin), units.first_span(units.at(begin)));
    for (int64_t unit = begin; unit < end; ++unit) {
      const AttentionRows at = units.at(unit);
      if (unit + 1 < end) {
        const AttentionRows next = units.at(unit + 1);
        ask_for_start(attention, next, units.first_span(next));
      }
      clear(state, rows, attention.head_dim);
      if (stores_on_the_way(attention)) table.attention_store(attention, at, memory + 2 * floats);
      table.attention_queries(attention, at, memory + 2 * floats);
      for (int64_t span = units.first_span(at); span < units.end_span(at); ++span) {
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
    float* memory = static_cast<float*>(
        scratch.reserve(static_cast<size_t>(floats + attention_scratch(rows, attention.head_dim)) * sizeof(float)));
    const AttentionState state = state_at(memory, rows);
    int64_t unit_of_queries = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / most_spans;
      const AttentionRows at = units.at(unit);
      const int64_t first = units.first_span(at);
      const int64_t span = first + i % most_spans;
      if (span < units.end_span(at)) {
        if (stores_on_the_way(attention) && span + 1 == units.end_span(at)) {
          table.attention_store(attention, at, memory + floats);
          unit_of_queries = -1;  // their scratch has been used
        }
        if (unit != unit_of_queries) {
          ask_for_start(attention, at, span);
          table.attention_queries(attention, at, memory + floats);
          unit_of_queries = unit;
        }
        table.attention_span(attention, at, span, state_at(parts + i * floats, rows), memory + floats);
      }
      if (missing[static_cast<size_t>(unit)].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      clear(state, rows, attention.head_dim);
      for (int64_t s = first; s < units.end_span(at); ++s) {
        table.attention_join(attention, at, s, state, state_at(parts + (unit * most_spans + s - first) * floats, rows));
      }
      table.attention_finish(attention, at, state);
    }
  });
}

}  // namespace

void run_attention(const Attention& attention) {
  const KernelTable& table = kernels();
  if (!stores_on_the_way(attention)) store_keys_and_values(attention, table);
  const Units units(attention);
  int64_t most_spans = 1;
  for (int64_t b = 0; b < attention.batch; ++b) {
    const AttentionRows all{b, 0, 0, attention.tokens};
    const int64_t spans = units.end_span(all) - units.first_span(all);
    if (spans > most_spans) most_spans = spans;
  }
  int64_t keys = 0;  // of a span, at most
  for (int64_t b = 0; b < attention.batch; ++b) {
    const int64_t end = attention.start[b] + attention.tokens;
    if (end > keys) keys = end < kAttentionSpan ? end : kAttentionSpan;
  }
  // A token multiplies each key with few rows only, and waits for memory.
  const double elements = 2.0 * static_cast<double>(keys * attention.head_dim);
  const double multiplying = elements * kNsPerMultiply * static_cast<double>(units.rows());
  const double reading = elements * kNsPerCachedByte * static_cast<double>(element_bytes(attention.cache));
  const double ns_per_span = multiplying > reading ? multiplying : reading;
  if (units.blocks == 1 && units.count < kEnoughUnits && most_spans > 1) {
    attend_spans(attention, table, units, ns_per_span, most_spans);
  } else {
    attend_whole_units(attention, table, units, ns_per_span, most_spans);
  }
}

}  // namespace bitnet_ops
