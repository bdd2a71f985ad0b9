// The attention operators, which bitnet_ops/ops/ documents, and the checks that the decoder's layers share with them.
#pragma once

#include <optional>

#include "kernels/kernel_table.h"
#include "ops/tensors.h"

namespace bitnet_ops {

struct AttentionSizes {
  int64_t batch, tokens, heads, kv_heads, head_dim;
};

// Checks the tables of angles; returns head_dim.
int64_t check_tables(const char* op, const Tensor& cos, const Tensor& sin);

// What a layer has in a cache.
struct CachePart {
  CacheType type;
  int64_t capacity;
  void* keys;
  void* values;
  float* key_scale;
  float* value_scale;
};

CachePart check_cache(const char* op, const AttentionSizes& sizes, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale);

// Positions must lie in the tables and in the cache. Padding, below 0, is in neither.
void check_positions(const char* op, const int64_t* start, const AttentionSizes& sizes, int64_t positions,
                     int64_t capacity);

// What scores are multiplied with must be a number, and a window none (0) or at least a token's own position.
void check_scale_and_window(const char* op, const std::optional<double>& scale, int64_t window);

// All but q, k, v and out. Without a scale it is 1 / sqrt(head_dim).
Attention call_of(const AttentionSizes& sizes, const float* cos, const float* sin, const int64_t* start,
                  const CachePart& cache, std::optional<double> scale = std::nullopt, int64_t window = 0);

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& start, std::optional<double> scale, int64_t window);

Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                        const Tensor& start, const Tensor& keys, const Tensor& values,
                        const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
                        std::optional<double> scale, int64_t window);

}  // namespace bitnet_ops
