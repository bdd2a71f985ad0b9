// The ternary product around an instruction set's inner loop: tiles, groups of tokens, results.
//
// Include this inside a kernel file's target region, like float_algorithms.h.
//
// Inner provides
//     kTiles, kTokens                         largest register block, in tiles and tokens
//     kTokensStreamed                         up to so many tokens, tiles come one at a time
//     block<TILES, TOKENS>(tile, blocks, q, q_stride, acc)   acc[TOKENS][TILES * 16]
// where a sum over codes is sum_k q[k] * (w[n][k] + 1); the row sum of q is taken off here.

namespace bitnet_ops {
namespace {

// 16 results of a token, or fewer at the end of a row: y = float(acc) * (x_scale * weight_scale) + bias.
template <class Isa, class T>
void store_scaled(const TernaryProduct& p, const int32_t* acc, int64_t token, int64_t row, int64_t count) {
  T* out = static_cast<T*>(p.out) + token * p.out_features + row;
  const int32_t q_sum = p.q_sum[token];
  const float x_scale = p.x_scale[token];
  alignas(64) float y[kTileRows];
  if (count == kTileRows) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      y[i] = static_cast<float>(acc[i] - q_sum) * (x_scale * p.weight_scale[row + i]);
    }
    if (p.bias != nullptr) {
      for (int64_t i = 0; i < kTileRows; ++i) y[i] = y[i] + p.bias[row + i];
    }
    for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) Isa::store(out + i, Isa::load(y + i));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    y[i] = static_cast<float>(acc[i] - q_sum) * (x_scale * p.weight_scale[row + i]);
    if (p.bias != nullptr) y[i] = y[i] + p.bias[row + i];
    from_float(y[i], out + i);
  }
}

template <class Isa>
void store_tile(const TernaryProduct& p, const int32_t* acc, int64_t token, int64_t tile) {
  const int64_t row = tile * kTileRows;
  const int64_t left = p.out_features - row;
  const int64_t count = left < kTileRows ? left : kTileRows;
  switch (p.out_dtype) {
    case DType::kFloat32:
      return store_scaled<Isa, float>(p, acc, token, row, count);
    case DType::kBFloat16:
      return store_scaled<Isa, BFloat16>(p, acc, token, row, count);
    case DType::kFloat16:
      return store_scaled<Isa, Float16>(p, acc, token, row, count);
    case DType::kInt32: {
      int32_t* out = static_cast<int32_t*>(p.out) + token * p.out_features + row;
      for (int64_t i = 0; i < count; ++i) out[i] = acc[i] - p.q_sum[token];
    }
  }
}

template <class Isa, class Inner>
struct TernaryDriver {
  // Calls the inner block with `tokens` as a compile-time number, 1 .. TOKENS.
  template <int TILES, int TOKENS>
  static void block_of(int64_t tokens, const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride,
                       int32_t* acc) {
    if constexpr (TOKENS > 1) {
      if (tokens < TOKENS) return block_of<TILES, TOKENS - 1>(tokens, tile, blocks, q, q_stride, acc);
    }
    Inner::template block<TILES, TOKENS>(tile, blocks, q, q_stride, acc);
  }

  template <int TILES>
  static void tiles(const TernaryProduct& p, int64_t tile) {
    alignas(64) int32_t acc[Inner::kTokens * TILES * kTileRows];
    const uint8_t* weights = p.packed + tile * p.blocks * kBlockBytes;
    // Equal groups: 13 tokens run as 7 + 6, not as 12 + 1, because a block of one token pays for
    // decoding the weights alone.
    const int64_t groups = (p.tokens + Inner::kTokens - 1) / Inner::kTokens;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = p.tokens * group / groups;
      const int64_t count = p.tokens * (group + 1) / groups - begin;
      block_of<TILES, Inner::kTokens>(count, weights, p.blocks, p.q + begin * p.q_stride, p.q_stride, acc);
      for (int64_t token = 0; token < count; ++token) {
        for (int64_t i = 0; i < TILES; ++i) {
          store_tile<Isa>(p, acc + (token * TILES + i) * kTileRows, begin + token, tile + i);
        }
      }
    }
  }

  static void ternary_product(const TernaryProduct& p, int64_t tile_begin, int64_t tile_end) {
    int64_t tile = tile_begin;
    if (p.tokens <= Inner::kTokensStreamed) {
      for (; tile < tile_end; ++tile) tiles<1>(p, tile);
      return;
    }
    for (; tile + Inner::kTiles <= tile_end; tile += Inner::kTiles) tiles<Inner::kTiles>(p, tile);
    for (; tile < tile_end; ++tile) tiles<1>(p, tile);
  }
};

}  // namespace
}  // namespace bitnet_ops
