#include "run/head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "platform/system.h"
#include "run/best_scores.h"
#include "run/dispatch.h"
#include "run/file_memory.h"
#include "run/parallel.h"
#include "run/rows.h"
#include "run/scratch.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`, on one core of the machine in bench/LOG.md.
constexpr double kNsPerWeightByte = 0.05;  // 20 GB/s
constexpr double kNsPerMultiply = 0.03;    // 16 lanes a cycle, half used

// Everything of Logits but `out`. The tokens, widened, belong to this thread until the next call.
Logits widened(const KernelTable& table, const HeadTokens& tokens, const HeadTable& head) {
  static thread_local Scratch activations;
  Logits logits{};
  logits.tokens = tokens.count;
  logits.x_stride = round_up(head.in_features, kVirtualLanes);
  float* wide =
      static_cast<float*>(activations.reserve(static_cast<size_t>(logits.tokens * logits.x_stride) * sizeof(float)));
  for (int64_t token = 0; token < logits.tokens; ++token) {
    table.widen_row(row_at(tokens.x, token, head.in_features, tokens.dtype), tokens.dtype, head.in_features,
                    wide + token * logits.x_stride, logits.x_stride);
  }
  logits.x = wide;
  logits.weight = head.weight;
  logits.weight_dtype = head.weight_dtype;
  logits.in_features = head.in_features;
  logits.vocabulary = head.vocabulary;
  return logits;
}

double ns_per_row(const Logits& p, int64_t tokens) {
  return static_cast<double>(p.in_features + 1) *
         (static_cast<double>(element_bytes(p.weight_dtype)) * kNsPerWeightByte +
          static_cast<double>(tokens) * kNsPerMultiply);
}

float* logits_scratch(const Logits& p) {
  static thread_local Scratch rows;
  return static_cast<float*>(rows.reserve(static_cast<size_t>(kLogitsScratchRows * p.x_stride) * sizeof(float)));
}

// A screened row costs 0.4 of one that is computed from bfloat16, and a survivor is read from here and there
// rather than in a stream. So a screen that drops 70 % is well worth it. After every sixteenth of the table it is
// looked at, and where more have survived, the rest of the table is computed without a screen. Then the whole
// costs little more than without: of the rows screened before the first look, a sixteenth or what the threads
// do at once, 0.4 of a row each is lost, while rows up to a later look cost 0.4 + 0.3 times the penalty of
// single rows, about 1. Survivors of several tokens count together; but then computing a row takes longer,
// too, from four tokens on about 0.75 times their number (bench/LOG.md).
constexpr double kMostSurvivors = 0.3;
constexpr double kMostSurvivorsPerToken = 0.15;
constexpr int64_t kLooks = 16;
// But among few rows many are the k best so far, and more are next to them: with Gaussian logits 0.09 a token
// after 64 k rows. For a large k a quarter of the table has to do.
constexpr int64_t kRowsPerPlace = 64;
constexpr int64_t kFewestLooks = 4;

// Rows that are read from a file together: 160 KB of bfloat16 with 2560 inputs, which stay in a core's second-level
// cache until they are multiplied.
constexpr int64_t kRowsFromFile = 32;

// With more tokens than these, multiplying takes so long that it does not matter where the table is read from.
constexpr int64_t kFewTokens = 8;

FileRows whole_table(const Logits& p) {
  const size_t row_bytes = static_cast<size_t>(p.in_features) * element_bytes(p.weight_dtype);
  return FileRows(p.weight, p.vocabulary, row_bytes, p.vocabulary);
}

// The logits of rows that follow each other.
void compute_logits(const KernelTable& table, const Logits& logits, const FileRows& file, int64_t row, int64_t end) {
  if (!file.sparing()) return table.logits(logits, row, end, logits_scratch(logits));
  static thread_local Scratch scratch;
  const int64_t row_bytes = logits.in_features * static_cast<int64_t>(element_bytes(logits.weight_dtype));
  char* copied = static_cast<char*>(scratch.reserve(static_cast<size_t>(kRowsFromFile * row_bytes)));
  for (int64_t count; row < end; row += count) {
    count = std::min(kRowsFromFile, end - row);
    const char* block = file.in_memory(row, count, logits.tokens <= kFewTokens);
    if (block == nullptr) file.copy(row, count, copied);
    Logits some = logits;
    some.weight = block != nullptr ? block : copied;
    some.out += row;
    table.logits(some, 0, count, logits_scratch(some));
  }
}

// Tokens that share a pass over the table: their bounds are 1 MB each for 128256 rows.
constexpr int64_t kTokensAtOnce = 16;

// A run of rows: [begin, screened) are bounded, [screened, end) are computed already.
struct Part {
  int64_t begin, screened, end;
};

// Rows to compute from the table, those of one token after those of another, and their logits.
struct Chosen {
  std::vector<int32_t> rows{};
  std::vector<int64_t> first{};  // [tokens + 1]: where those of a token start
  std::vector<float> logits{};
};

struct Search {
  const KernelTable& table;
  Logits logits;         // of this group of tokens; out is `upper`
  const FileRows& file;  // the table, for passes over all of it
  const Screen* screen;  // null: everything is computed
  int64_t k;
  float* upper;                         // [tokens][vocabulary]: bounds, or logits where they are computed
  const float* approximate;             // [tokens][vocabulary], where rows are screened
  std::vector<Score> score{};           // of each token
  std::vector<KthLargest> threshold{};  // of each token: the k-th largest approximation or logit
  std::vector<Part> parts{};
  // Of all parts so far: rows screened, their survivors (or more), and whether to go on screening.
  int64_t rows = 0;
  int64_t survivors = 0;
  bool pays = true;
  std::mutex mutex{};  // of all from `threshold` on

  void compute(int64_t row, int64_t end) {
    if (row < end) compute_logits(table, logits, file, row, end);
  }

  // About: the k-th best logit is not known yet, but approximations are far better than their bounds.
  int64_t count_survivors(std::vector<KthLargest>& best, int64_t begin, int64_t end) const {
    int64_t survivors = 0;
    for (int64_t token = 0; token < logits.tokens; ++token) {
      const size_t t = static_cast<size_t>(token);
      score[t].where(upper + token * logits.vocabulary, begin, end, best[t].threshold(), kSurvives,
                     [&](int64_t) { ++survivors; });
    }
    return survivors;
  }

  void offer(std::vector<KthLargest>& best_of, const float* values, int64_t begin, int64_t end) const {
    for (int64_t token = 0; token < logits.tokens; ++token) {
      const Score& score_of = score[static_cast<size_t>(token)];
      KthLargest& best = best_of[static_cast<size_t>(token)];
      const float* scored = values + token * logits.vocabulary;
      // In steps, because the threshold rises.
      constexpr int64_t kStep = 1024;
      for (int64_t row = begin; row < end; row += kStep) {
        score_of.where(scored, row, std::min(row + kStep, end), best.threshold(), kIsBetter,
                       [&](int64_t id) { best.offer(score_of(scored[id], id)); });
      }
    }
  }

  bool too_many(int64_t survivors, int64_t rows) const {
    const double share = std::max(kMostSurvivors, kMostSurvivorsPerToken * static_cast<double>(logits.tokens));
    return rows >= rows_to_look() && static_cast<double>(survivors) > share * static_cast<double>(rows);
  }

  int64_t rows_to_look() const {
    return std::min(std::max(logits.vocabulary / kLooks, kRowsPerPlace * k), logits.vocabulary / kFewestLooks);
  }

  // One part of the table. It starts from what the parts before found: for the result that makes no difference,
  // but the more rows a threshold is made of, the fewer survive.
  void bound(int64_t tile_begin, int64_t tile_end) {
    std::vector<KthLargest> best;
    bool go_on;
    int64_t rows_before, survivors_before;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      for (KthLargest& all : threshold) best.emplace_back(k, all.threshold());
      go_on = pays;
      rows_before = rows;
      survivors_before = survivors;
    }
    const auto row_of = [&](int64_t tile) { return std::min(tile * kTileRows, logits.vocabulary); };
    const int64_t begin = row_of(tile_begin);
    const int64_t step = divide_up(rows_to_look(), kTileRows) + 1;
    int64_t own = 0;
    int64_t tile = tile_begin;
    while (tile < tile_end && go_on) {
      const int64_t next = std::min(tile + step, tile_end);
      table.screen(*screen, tile, next);
      offer(best, approximate, row_of(tile), row_of(next));
      // Survivors of a lower threshold are too many; they are counted anew only where that could matter.
      own += count_survivors(best, row_of(tile), row_of(next));
      tile = next;
      const int64_t seen = rows_before + row_of(tile) - begin;
      if (too_many(survivors_before + own, seen)) {
        own = count_survivors(best, begin, row_of(tile));
        go_on = !too_many(survivors_before + own, seen);
      }
    }
    compute(row_of(tile), row_of(tile_end));
    offer(best, upper, row_of(tile), row_of(tile_end));

    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t token = 0; token < best.size(); ++token) threshold[token].merge(best[token]);
    parts.push_back({begin, row_of(tile), row_of(tile_end)});
    rows += row_of(tile) - begin;
    survivors += own;
    if (too_many(survivors, rows)) {
      survivors = 0;
      for (const Part& part : parts) survivors += count_survivors(threshold, part.begin, part.screened);
      pays = pays && !too_many(survivors, rows);
    }
  }

  // The screened rows of each token with a value that survives its threshold, but for those chosen before, and their
  // logits. Rows of a token are in order.
  Chosen choose(const float* values, std::vector<KthLargest>& thresholds, const Chosen& before) const {
    Chosen chosen;
    chosen.first.push_back(0);
    for (int64_t token = 0; token < logits.tokens; ++token) {
      const size_t t = static_cast<size_t>(token);
      size_t next = static_cast<size_t>(before.first[t]);
      const size_t end = static_cast<size_t>(before.first[t + 1]);
      for (const Part& part : parts) {
        if (part.begin == part.screened) continue;
        score[t].where(values + token * logits.vocabulary, part.begin, part.screened, thresholds[t].threshold(),
                       kSurvives, [&](int64_t row) {
                         while (next < end && before.rows[next] < row) ++next;
                         if (next < end && before.rows[next] == row) return;
                         chosen.rows.push_back(static_cast<int32_t>(row));
                       });
      }
      chosen.first.push_back(static_cast<int64_t>(chosen.rows.size()));
    }
    chosen.logits.resize(chosen.rows.size());
    const FileRows file(logits.weight, logits.vocabulary, row_bytes(), chosen.first.back());
    parallel(chosen.first.back(), ns_per_row(logits, 1), [&](int64_t begin, int64_t end) {
      for (int64_t token = 0; token < logits.tokens; ++token) {
        const int64_t from = std::max(begin, chosen.first[static_cast<size_t>(token)]);
        const int64_t to = std::min(end, chosen.first[static_cast<size_t>(token) + 1]);
        if (from >= to) continue;
        Logits one = logits;
        one.x += token * one.x_stride;
        one.tokens = 1;
        compute_rows(one, file, chosen.rows.data() + from, to - from, chosen.logits.data() + from);
      }
    });
    return chosen;
  }

  size_t row_bytes() const { return static_cast<size_t>(logits.in_features) * element_bytes(logits.weight_dtype); }

  // The logits of some rows for one token.
  void compute_rows(const Logits& one, const FileRows& file, const int32_t* rows, int64_t count, float* out) const {
    if (!file.in_file()) return table.logits_of_rows(one, rows, count, out, logits_scratch(one));
    static thread_local Scratch scratch;
    char* copied = static_cast<char*>(scratch.reserve(static_cast<size_t>(kRowsFromFile) * row_bytes()));
    int32_t places[kRowsFromFile];
    for (int32_t i = 0; i < kRowsFromFile; ++i) places[i] = i;
    Logits some = one;
    some.weight = copied;
    for (int64_t begin = 0; begin < count; begin += kRowsFromFile) {
      const int64_t length = std::min(count - begin, kRowsFromFile);
      for (int64_t i = 0; i < length; ++i)
        file.copy(rows[begin + i], 1, copied + i * static_cast<int64_t>(row_bytes()));
      table.logits_of_rows(some, places, length, out + begin, logits_scratch(some));
    }
  }

  // Calls work(id, logit) for the chosen rows of one token.
  template <class Work>
  static void each(const Chosen& chosen, int64_t token, Work work) {
    const int64_t end = chosen.first[static_cast<size_t>(token) + 1];
    for (int64_t i = chosen.first[static_cast<size_t>(token)]; i < end; ++i) {
      work(chosen.rows[static_cast<size_t>(i)], chosen.logits[static_cast<size_t>(i)]);
    }
  }

  void run(float* out_logits, int64_t* out_ids, int64_t* out_rescored) {
    const int64_t tiles = tiles_of(logits.vocabulary);
    const double ns_per_tile = ns_per_row(logits, logits.tokens) * kTileRows;
    const std::vector<KthLargest> none(static_cast<size_t>(logits.tokens),
                                       {k, -std::numeric_limits<double>::infinity()});
    threshold = none;
    if (screen == nullptr) {
      parallel(tiles, ns_per_tile, [&](int64_t begin, int64_t end) {
        compute(begin * kTileRows, std::min(end * kTileRows, logits.vocabulary));
      });
      parts.push_back({0, 0, logits.vocabulary});
    } else {
      parallel(tiles, ns_per_tile, [&](int64_t begin, int64_t end) { bound(begin, end); });
    }
    std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });

    const Chosen nothing{{}, std::vector<int64_t>(static_cast<size_t>(logits.tokens) + 1, 0), {}};
    const Chosen likely = choose(approximate, threshold, nothing);
    std::vector<KthLargest> reached = none;
    if (screen != nullptr) {
      for (const Part& part : parts) offer(reached, upper, part.screened, part.end);
    }
    for (int64_t token = 0; token < logits.tokens; ++token) {
      const size_t t = static_cast<size_t>(token);
      each(likely, token, [&](int32_t id, float logit) { reached[t].offer(score[t](logit, id)); });
    }
    const Chosen possible = choose(upper, reached, likely);

    for (int64_t token = 0; token < logits.tokens; ++token) {
      const Score& score_of = score[static_cast<size_t>(token)];
      Best best(k);
      int64_t computed = 0;
      const auto offer_to_best = [&](int32_t id, float logit) {
        best.offer({score_of(logit, id), logit, id});
        ++computed;
      };
      for (const Part& part : parts) {
        for (int64_t row = part.screened; row < part.end; ++row) {
          offer_to_best(static_cast<int32_t>(row), upper[token * logits.vocabulary + row]);
        }
      }
      each(likely, token, offer_to_best);
      each(possible, token, offer_to_best);
      best.write(out_logits + token * k, out_ids + token * k);
      out_rescored[token] = computed;
    }
  }
};

// 16-bit forms of the tokens and what the bounds need of them. 16 bits, because with 8 the error of the
// token would be as large as that of the table, and twice the bound leaves ten times the survivors.
struct QuantizedTokens {
  int64_t q_stride;
  const int8_t* q;
  std::vector<int32_t> group_sum;  // [tokens][groups]
  std::vector<ScreenedToken> tokens;
  bool in_range = true;

  QuantizedTokens(const KernelTable& table, const Logits& logits)
      : q_stride(padded_in_features(logits.in_features)),
        group_sum(static_cast<size_t>(logits.tokens * screen_groups(logits.in_features)), 0),
        tokens(static_cast<size_t>(logits.tokens)) {
    static thread_local Scratch scratch;
    int8_t* rows = static_cast<int8_t*>(scratch.reserve(static_cast<size_t>(2 * logits.tokens * q_stride)));
    q = rows;
    for (int64_t t = 0; t < logits.tokens; ++t) {
      const float* x = logits.x + t * logits.x_stride;
      int8_t* hi = rows + 2 * t * q_stride;
      int8_t* lo = hi + q_stride;
      int32_t* sums = group_sum.data() + t * screen_groups(logits.in_features);
      ScreenedToken& token = tokens[static_cast<size_t>(t)];
      float scale;
      int32_t unused_sums[2];
      table.quantize_row_16(x, DType::kFloat32, logits.in_features, hi, lo, q_stride, &scale, unused_sums);
      double square = 0.0;
      double error_square = 0.0;
      for (int64_t k = 0; k < logits.in_features; ++k) {
        const int32_t number = 256 * hi[k] + lo[k];
        sums[k / kScreenGroup] += number;
        const double value = x[k];
        const double error = value - static_cast<double>(scale) * number;  // the product is exact
        square += value * value;
        error_square += error * error;
      }
      // 2^16 additions in float64 are off by 2^-37 at most; a difference by 2^-53 of `value`.
      constexpr double kSumRounding = 1.0 + 0x1p-30;
      const double norm = std::sqrt(square) * kSumRounding;
      const double error = std::sqrt(error_square) * kSumRounding + 0x1p-50 * norm + kUnderflow;
      token = {scale, static_cast<float>(error * kBoundRounding), static_cast<float>((norm + error) * kBoundRounding)};
      in_range = in_range && norm + error < kLargestNorm;  // false for NaN
    }
  }
};

}  // namespace

void run_head(const HeadTable& head, const HeadTokens& tokens, float* out) {
  const KernelTable& table = kernels();
  Logits logits = widened(table, tokens, head);
  logits.out = out;
  const FileRows file = whole_table(logits);
  // Threads share out groups of as many rows as a kernel widens at a time.
  parallel(divide_up(logits.vocabulary, kLogitsScratchRows), ns_per_row(logits, logits.tokens) * kLogitsScratchRows,
           [&](int64_t begin, int64_t end) {
             compute_logits(table, logits, file, begin * kLogitsScratchRows,
                            std::min(end * kLogitsScratchRows, logits.vocabulary));
           });
}

void run_head_screen(const HeadTable& head, uint8_t* codes, float* bounds) {
  const int64_t tiles = tiles_of(head.vocabulary);
  const int64_t groups = screen_groups(head.in_features);
  const int64_t rows = tiles * kTileRows;
  // A copy of 251 MB then costs 120 page faults instead of 61000, and reading it loses less of the bus to address
  // translation (bench/LOG.md).
  prefer_huge_pages(codes, static_cast<size_t>(tiles * screen_tile_bytes(groups)));
  const ScreenTable copy{head.weight, head.weight_dtype, head.in_features, head.vocabulary, codes,
                         bounds,      bounds + rows,     bounds + 2 * rows};

  const KernelTable& table = kernels();
  const int64_t length = groups * kScreenGroup;
  // Two passes over a row in L1, and a transposition: several times what quantising activations costs.
  constexpr double kNsPerElement = 0.5;
  parallel(tiles, static_cast<double>(kTileRows * (length + 1)) * kNsPerElement, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    constexpr int64_t kBytes = static_cast<int64_t>(sizeof(float)) + kTileRows;
    float* wide = static_cast<float*>(scratch.reserve(static_cast<size_t>(length * kBytes + groups)));
    table.screen_rows(copy, begin, end, wide, reinterpret_cast<int8_t*>(wide + length));
  });
}

void run_head_top_k(const HeadTable& head, const HeadTokens& tokens, const HeadChoice& choice, const HeadTopK& result) {
  const KernelTable& table = kernels();
  const Logits all = widened(table, tokens, head);
  const int64_t k = choice.k;
  const FileRows file = whole_table(all);
  static thread_local Scratch scratch;
  for (int64_t token = 0; token < tokens.count; token += kTokensAtOnce) {
    const int64_t count = std::min(tokens.count - token, kTokensAtOnce);
    const int64_t results = count * head.vocabulary;
    float* upper = static_cast<float*>(scratch.reserve(static_cast<size_t>(2 * results) * sizeof(float)));
    Search search{table, all, file, nullptr, k, upper, upper + results};
    search.logits.x += token * all.x_stride;
    search.logits.tokens = count;
    search.logits.out = upper;
    for (int64_t t = token; t < token + count; ++t) {
      const float* row = choice.noise == nullptr ? nullptr : choice.noise + t * head.vocabulary;
      search.score.push_back({choice.temperature, row});
    }
    std::optional<QuantizedTokens> quantized;
    Screen screen{};
    if (choice.bounds != nullptr) {
      const int64_t rows = tiles_of(head.vocabulary) * kTileRows;  // of a row of `bounds`
      quantized.emplace(table, search.logits);
      screen = {choice.codes,
                screen_groups(head.in_features),
                choice.bounds,
                choice.bounds + rows,
                choice.bounds + 2 * rows,
                quantized->q,
                quantized->q_stride,
                quantized->group_sum.data(),
                quantized->tokens.data(),
                count,
                head.vocabulary,
                upper,
                upper + results};
      if (quantized->in_range) search.screen = &screen;
    }
    search.run(result.logits + token * k, result.ids + token * k, result.rescored + token);
  }
}

}  // namespace bitnet_ops
