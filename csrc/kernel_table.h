// What an instruction set offers: signatures and contracts, nothing else.
//
// The pointers and sizes below are all that crosses from ops.cpp (tensors, checks, threads) to
// kernels/* (instructions). A kernel never allocates, never starts a thread and never throws.
#pragma once

#include <cstdint>

namespace bitnet_ops {

// Storage types of activations, weights of the LM head, and results.
enum class DType { kFloat32, kBFloat16, kFloat16, kInt32 };

// The two 16-bit types as storage: distinct C++ types so that overloads can tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Layout tile16 (DESIGN.md section 4): one block of 64 bytes = 16 rows x 16 inputs.
constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockInputs = 16;
constexpr int64_t kBlockBytes = 64;

// Rows of quantised activations start at multiples of a cache line, so that no load splits one.
constexpr int64_t kQuantizedRowAlignment = 64;

// Float reductions run over this many virtual lanes (lane = index mod 64), see float_algorithms.h.
// Four zmm registers, eight ymm: enough independent chains to hide the latency of an FMA.
constexpr int64_t kVirtualLanes = 64;

// Largest in_features. A 2-bit code is at most 3 (valid codes at most 2, but a kernel must stay
// defined for any byte) and |q| <= 128. The decode kernels multiply codes in place, at most
// 3 * 64 = 192, for one input in four: |sum| <= K / 4 * 192 * 128 = 6144 K, and
// 6144 * 2^18 = 1.61e9 < 2^31 - 1 = 2.15e9. So int32 never overflows.
constexpr int64_t kMaxInFeatures = int64_t{1} << 18;

// acc[m][n] = sum_k q[m][k] * w[n][k] and, unless out_dtype is kInt32,
// out[m][n] = float(acc) * (x_scale[m] * weight_scale[n]) (+ bias[n]), rounded once to out_dtype.
struct TernaryProduct {
  const uint8_t* packed;  // tile16: [tiles][blocks][64]; any alignment, 64 is fastest
  int64_t blocks;         // ceil(in_features / 16)
  const int8_t* q;        // [tokens][q_stride], 64-byte aligned, zeros from in_features to 16 * blocks
  int64_t q_stride;       // bytes, a multiple of kQuantizedRowAlignment
  const int32_t* q_sum;   // [tokens], sum of each row of q
  int64_t tokens;
  int64_t out_features;
  DType out_dtype;
  void* out;                  // [tokens][out_features], contiguous
  const float* x_scale;       // [tokens];       unused for kInt32
  const float* weight_scale;  // [out_features]; unused for kInt32
  const float* bias;          // [out_features] or null
};

// logits[m][v] = sum_k x[m][k] * weight[v][k], float32, in the fixed order of 64 virtual lanes.
struct Logits {
  const float* x;    // [tokens][x_stride], 64-byte aligned, zeros from in_features to x_stride
  int64_t x_stride;  // floats, in_features rounded up to a multiple of kVirtualLanes
  int64_t tokens;
  const void* weight;  // [vocabulary][in_features], contiguous
  DType weight_dtype;  // kFloat32, kBFloat16 or kFloat16
  int64_t in_features;
  int64_t vocabulary;
  float* out;  // [tokens][vocabulary], contiguous
};

// Rows of the LM head that a kernel may widen to float32 at a time: the scratch that `logits` is
// given holds this many rows of x_stride floats. Eight rows of 2560 are 80 KB: they stay in L2.
constexpr int64_t kLogitsScratchRows = 8;

struct KernelTable {
  const char* isa;

  // Quantises one row of `in_features` elements: writes q[0 .. in_features), zeros up to `q_length`,
  // the scale that turns q back into x, and the sum of q. Numerics: reference.quantize_activations.
  void (*quantize_row)(const void* x, DType dtype, int64_t in_features, int8_t* q, int64_t q_length, float* x_scale,
                       int32_t* q_sum);

  // Rows of tiles [tile_begin, tile_end), every token. Tiles are independent of one another.
  void (*ternary_product)(const TernaryProduct& product, int64_t tile_begin, int64_t tile_end);

  // y = x / sqrt(mean(x^2) + eps) * weight for one row; y has the dtype of x.
  void (*rms_norm_row)(const void* x, DType dtype, const float* weight, float eps, int64_t features, void* y);

  // Copies one row to float32, with zeros from `features` to `length`.
  void (*widen_row)(const void* x, DType dtype, int64_t features, float* out, int64_t length);

  // Rows [row_begin, row_end) of the vocabulary, every token.
  void (*logits)(const Logits& logits, int64_t row_begin, int64_t row_end, float* scratch);
};

}  // namespace bitnet_ops
