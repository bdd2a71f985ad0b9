#include "run/decoder.h"

#include <algorithm>

#include "run/attention.h"
#include "run/dispatch.h"
#include "run/glu.h"
#include "run/parallel.h"
#include "run/rows.h"
#include "run/scratch.h"

namespace bitnet_ops {
namespace {

constexpr double kNsPerElement = 0.3;  // of the elementwise loops here, reading and writing L2

void run_norm(const Norm& norm, const float* x, int64_t rows, int64_t features, float* out) {
  const KernelTable& table = kernels();
  parallel(rows, static_cast<double>(features + 1) * kNsPerQuantizedElement, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      table.rms_norm_row(x + row * features, DType::kFloat32, norm.weight, norm.eps, features, out + row * features);
    }
  });
}

// The product of norm(x) with each of several projections.
void run_projections(const Norm& norm, const float* x, int64_t rows, const Projection* projections, float* const* outs,
                     size_t count) {
  const KernelTable& table = kernels();
  const int64_t in_features = projections[0].matrix.size.in_features;
  Activations shared{x, DType::kFloat32, rows, in_features, norm.weight, norm.eps};
  bool normed = false;
  Product products[kProjections];
  for (size_t i = 0; i < count;) {
    const Projection& first = projections[i];
    Activations activations = shared;
    size_t alike = 1;
    if (first.norm) {
      if (norm && !normed) {  // two norms in a row: what the first one gives is kept for all
        static thread_local Scratch scratch;
        float* kept = static_cast<float*>(scratch.reserve(static_cast<size_t>(rows * in_features) * sizeof(float)));
        run_norm(norm, x, rows, in_features, kept);
        shared.x = kept;
        shared.norm_weight = nullptr;
        normed = true;
      }
      activations = shared;
      activations.norm_weight = first.norm.weight;
      activations.eps = first.norm.eps;
    } else {
      while (i + alike < count && !projections[i + alike].norm &&
             projections[i + alike].matrix.quantizes_like(first.matrix)) {
        ++alike;
      }
    }
    const QuantizedRows quantized = quantize_rows(activations, first.matrix.planes, first.matrix.group_size, table);
    for (size_t j = 0; j < alike; ++j) {
      products[j] = product_of(quantized, projections[i + j].matrix, rows);
      products[j].out_dtype = DType::kFloat32;
      products[j].out = outs[i + j];
    }
    run_products(products, alike, table);
    i += alike;
  }
}

// residual + scale * post_norm(product of norm(x)).
void run_projection_add(const Norm& norm, const Projection& projection, const Norm& post_norm, float scale,
                        const float* x, const float* residual, int64_t rows, float* out) {
  run_projections(norm, x, rows, &projection, &out, 1);
  const int64_t features = projection.features();
  if (post_norm) run_norm(post_norm, out, rows, features, out);
  parallel(rows, static_cast<double>(features) * kNsPerElement, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * features; i < end * features; ++i) out[i] = residual[i] + scale * out[i];
  });
}

// activation(gate) * up, of the products of norm(x); `gate` holds the result.
void run_gated(const Layer& layer, const float* x, int64_t rows, float* gate, float* up) {
  const Norm& norm = layer.norms[kFeedForwardNorm];
  const Projection* both = layer.projections + kGate;
  const TernaryMatrix& up_matrix = both[1].matrix;
  const int64_t features = both[0].features();
  // Few tokens: rows of up whose gate is closed are never read. Many: together some gate is always open.
  const bool skips = layer.activation == Activation::kRelu2 && up_matrix.layout == Layout::kRow &&
                     rows * up_matrix.planes <= kMaxSparseRows && !both[0].norm && !both[1].norm &&
                     up_matrix.quantizes_like(both[0].matrix);
  if (skips) {
    const KernelTable& table = kernels();
    const Activations activations{x, DType::kFloat32, rows, up_matrix.size.in_features, norm.weight, norm.eps};
    const QuantizedRows quantized = quantize_rows(activations, up_matrix.planes, up_matrix.group_size, table);
    const auto product = [&](size_t i, float* out) {
      Product result = product_of(quantized, both[i].matrix, rows);
      result.out_dtype = DType::kFloat32;
      result.out = out;
      return result;
    };
    Product gate_product = product(0, gate);
    run_product(gate_product, table);
    static thread_local Scratch scratch;
    bool* open = static_cast<bool*>(scratch.reserve(static_cast<size_t>(rows * features)));
    // A NaN opens a gate, for its product is NaN.
    for (int64_t i = 0; i < rows * features; ++i) open[i] = !(gate[i] <= 0.0f);
    Product up_product = product(1, up);
    run_product(up_product, table, open);
  } else {
    float* const outs[] = {gate, up};
    run_projections(norm, x, rows, both, outs, 2);
  }
  run_glu(layer.activation, gate, up, gate, rows, features);
}

Attention attention_of(const Layer& layer, const TokenPositions& positions, const LayersCache& cache, int64_t slot) {
  Attention attention{};
  attention.cos = positions.cos + layer.rotation * positions.table_stride;
  attention.sin = positions.sin + layer.rotation * positions.table_stride;
  attention.start = positions.start;
  attention.batch = positions.batch;
  attention.tokens = positions.tokens;
  attention.kv_heads = layer.kv_heads();
  attention.group = layer.heads() / layer.kv_heads();
  attention.head_dim = layer.head_dim;
  attention.scale = layer.score_scale;
  attention.window = layer.window;
  attention.cache = cache.type;
  attention.capacity = cache.capacity;
  attention.keys = static_cast<char*>(cache.keys) + slot * cache.key_bytes;
  attention.values = static_cast<char*>(cache.values) + slot * cache.value_bytes;
  attention.key_scale = cache.key_scale == nullptr ? nullptr : cache.key_scale + slot * cache.key_scale_stride;
  attention.value_scale = cache.value_scale == nullptr ? nullptr : cache.value_scale + slot * cache.value_scale_stride;
  return attention;
}

// Floats between the steps of a layer, for a token: queries, keys, values and what attention gives, or gates and ups.
int64_t work_floats(const Layer& layer) {
  const Projection* p = layer.projections;
  return std::max(2 * p[kQ].features() + 2 * p[kK].features(), 2 * p[kGate].features());
}

// `middle` is the residual stream between attention and feed-forward, `out` may be `in`.
void run_layer(const Layer& layer, Attention attention, const float* in, float* middle, float* work, float* out) {
  const int64_t rows = attention.batch * attention.tokens;
  const Projection* p = layer.projections;
  const Norm* norms = layer.norms;
  const int64_t q_size = p[kQ].features(), kv_size = p[kK].features();
  float* q = work;
  float* k = q + rows * q_size;
  float* v = k + rows * kv_size;
  float* attended = v + rows * kv_size;
  float* const outs[] = {q, k, v};
  run_projections(norms[kInputNorm], in, rows, p + kQ, outs, 3);
  if (norms[kQueryNorm]) run_norm(norms[kQueryNorm], q, rows * layer.heads(), layer.head_dim, q);
  if (norms[kKeyNorm]) run_norm(norms[kKeyNorm], k, rows * layer.kv_heads(), layer.head_dim, k);
  attention.q = {q, attention.tokens * q_size, q_size};
  attention.k = {k, attention.tokens * kv_size, kv_size};
  attention.v = {v, attention.tokens * kv_size, kv_size};
  attention.out = attended;
  run_attention(attention);
  run_projection_add(norms[kAttentionSubNorm], p[kO], norms[kAttentionPostNorm], layer.residual_scale, attended, in,
                     rows, middle);

  float* gate = work;
  float* up = gate + rows * p[kGate].features();
  run_gated(layer, middle, rows, gate, up);
  run_projection_add(norms[kFeedForwardSubNorm], p[kDown], norms[kFeedForwardPostNorm], layer.residual_scale, gate,
                     middle, rows, out);
}

}  // namespace

void run_layers(const Layer* layers, size_t count, const TokenPositions& positions, const LayersCache& cache,
                int64_t first_slot, const float* in, float* out) {
  const int64_t rows = positions.batch * positions.tokens;
  const int64_t hidden_size = layers[0].projections[kQ].matrix.size.in_features;
  int64_t work = 0;
  for (size_t i = 0; i < count; ++i) work = std::max(work, work_floats(layers[i]));
  static thread_local Scratch scratch;
  float* middle =
      static_cast<float*>(scratch.reserve(static_cast<size_t>(rows * (hidden_size + work)) * sizeof(float)));
  for (size_t i = 0; i < count; ++i) {
    const Attention attention = attention_of(layers[i], positions, cache, first_slot + static_cast<int64_t>(i));
    run_layer(layers[i], attention, in, middle, middle + rows * hidden_size, out);
    in = out;
  }
}

}  // namespace bitnet_ops
