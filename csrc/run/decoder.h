// The layers of a decoder, one after another, on memory that operators have checked: which kernels run, in which order.
// bitnet_ops/decoder/model.py is the same in plain operators, and gives the same bits; bitnet_ops/decoder/plan.py hands
// the layers over.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"
#include "run/ternary.h"

namespace bitnet_ops {

// y = x / sqrt(mean(x^2) + eps) * weight. Without a weight there is no norm.
struct Norm {
  const float* weight = nullptr;
  float eps = 0.0f;

  explicit operator bool() const { return weight != nullptr; }
};

// A matrix, and the norm in front of it that belongs to it alone.
struct Projection {
  Norm norm;
  TernaryMatrix matrix;

  int64_t features() const { return matrix.size.out_features; }
};

// Places of a layer's projections and norms; plan.py writes them in this order.
enum ProjectionPlace { kQ, kK, kV, kO, kGate, kUp, kDown, kProjections };
enum NormPlace {
  kInputNorm,
  kQueryNorm,          // over each head
  kKeyNorm,            // likewise
  kAttentionSubNorm,   // in front of o
  kAttentionPostNorm,  // behind o
  kFeedForwardNorm,
  kFeedForwardSubNorm,   // in front of down
  kFeedForwardPostNorm,  // behind down
  kNorms
};

struct Layer {
  Norm norms[kNorms];
  Projection projections[kProjections];
  int64_t head_dim;
  int64_t rotation;   // number of its table of angles
  int64_t window;     // as in Attention
  float score_scale;  // as in Attention: in units of ln 2
  float residual_scale;
  Activation activation;

  int64_t heads() const { return projections[kQ].features() / head_dim; }
  int64_t kv_heads() const { return projections[kK].features() / head_dim; }
};

// A cache of all layers. The strides, from one layer to the next, are 0 where layers share the memory because nobody
// needs the keys afterwards.
struct LayersCache {
  CacheType type;
  int64_t capacity;
  void* keys;
  void* values;
  float* key_scale;
  float* value_scale;
  int64_t key_bytes, value_bytes;  // strides
  int64_t key_scale_stride, value_scale_stride;
};

// Token t of sequence b stands at position start[b] + t.
struct TokenPositions {
  int64_t batch, tokens;
  const int64_t* start;
  const float* cos;  // [tables][positions][head_dim / 2]
  const float* sin;
  int64_t table_stride;  // positions * head_dim / 2
};

// in and out: [batch * tokens][hidden_size]; out may be in. Layer i has part first_slot + i of the cache.
void run_layers(const Layer* layers, size_t count, const TokenPositions& positions, const LayersCache& cache,
                int64_t first_slot, const float* in, float* out);

}  // namespace bitnet_ops
