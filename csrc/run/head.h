// Runs the language-model head: all logits, or the k best of them without reading all of the table. Between the
// operators, which check arguments, and the kernels, which know no threads.
//
// run_head_top_k goes over the copy in six bits, which approximates every logit and bounds it (kernels/screen.h has the
// proof). The k best by approximation are computed from the table itself, by the code of run_head: the least of
// these k logits is a score that k tokens reach. A token whose upper bound is below it has k better ones,
// strictly, so it is not wanted, however ties are resolved; the others are computed as well. Where
// this cannot pay, the rest of the table is computed at once (see kMostSurvivors).
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"

namespace bitnet_ops {

struct HeadTable {
  const void* weight;  // [vocabulary][in_features], contiguous
  DType weight_dtype;
  int64_t vocabulary;  // above 0 for all but run_head_screen
  int64_t in_features;
};

struct HeadTokens {
  const void* x;  // [count][in_features], contiguous
  DType dtype;
  int64_t count;
};

// out [tokens][vocabulary].
void run_head(const HeadTable& head, const HeadTokens& tokens, float* out);

// Makes the copy of the table in six bits, in_features <= kMaxScreenFeatures: codes [tiles][screen_tile_bytes] and
// bounds [3][tiles * kTileRows], which are scale, norm and residual of ScreenTable. Best into memory that has not been
// written yet.
void run_head_screen(const HeadTable& head, uint8_t* codes, float* bounds);

// By which scores the k best are chosen, and from what.
struct HeadChoice {
  int64_t k;  // at least 1, at most vocabulary
  double temperature;
  const float* noise;    // [tokens][vocabulary], or null: see Score in best_scores.h
  const uint8_t* codes;  // of run_head_screen
  const float* bounds;   // likewise, or null: the whole table is read
};

struct HeadTopK {
  float* logits;      // [tokens][k], best first
  int64_t* ids;       // likewise
  int64_t* rescored;  // [tokens]: how many rows of the table were computed
};

void run_head_top_k(const HeadTable& head, const HeadTokens& tokens, const HeadChoice& choice, const HeadTopK& result);

}  // namespace bitnet_ops
