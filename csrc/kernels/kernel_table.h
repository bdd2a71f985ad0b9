// What an instruction set offers: signatures and contracts, nothing else.
//
// The pointers and sizes below are all that crosses from csrc/run (which kernel, how the work is shared out) to
// csrc/kernels (instructions). A kernel never allocates, never starts a thread and never throws.
#pragma once

#include <cstdint>

#include "layouts/layouts.h"

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

// The column kernels multiply the codes of every input in place: 24576 K, and 24576 * 2^16 = 1.61e9.
constexpr int64_t kMaxColumnInFeatures = int64_t{1} << 16;

// Largest group of inputs with a weight scale of its own: ternary_driver.h has why.
constexpr int64_t kMaxGroupInputs = 256;

// Quantised rows (tokens * planes) that ternary_rows and ternary_columns take at a time.
constexpr int64_t kMaxSparseRows = 4;

// Columns that ternary_columns interleaves at a time; their number is a multiple of it.
constexpr int64_t kColumnsAtOnce = 8;

// How far ahead of a stream of weights kernels ask for memory, in bytes. It depends on the processor, not on the
// instruction set: dispatch.cpp sets it before anybody gets a table.
struct StreamAhead {
  int64_t far_bytes;   // towards L2; 0: not at all
  int64_t near_bytes;  // towards L1
};

// Requests towards L2 find room while those towards L1, of which there are fewer, are all under way.
constexpr StreamAhead kStreamThroughL2 = {12288, 1536};
constexpr StreamAhead kStreamToL1 = {0, 8192};

inline StreamAhead stream_ahead = kStreamThroughL2;

// acc[m][n] = sum_k q[m][k] * w[n][k] and, unless out_dtype is kInt32,
// out[m][n] = float(acc) * (x_scale[m] * weight_scale[n]) (+ bias[n]), rounded once to out_dtype.
//
// 16-bit activations are two planes, q = 256 * hi + lo, each of them rows of q like any other:
// acc = 256 * acc_hi + acc_lo, exactly, and float(acc) rounds that once.
//
// With group_blocks > 0 a weight scale belongs to group_blocks blocks of 16 inputs (the last group may
// be shorter): sum[m][n] = sum over groups g, in order, of float(acc_g) * weight_scale[g][n], each
// product and each sum rounded, and out = sum * x_scale[m] (+ bias[n]). That is for two planes. With one,
// activations have a scale for each group too: out = sum of float(acc_g) * (x_scale[m][g] * weight_scale[g][n]).
struct TernaryProduct {
  const uint8_t* packed;  // [tiles][blocks][64]; any alignment, 64 is fastest
  int64_t blocks;         // of a tile; for layout row the chunks of a row, for column the panels
  const int8_t* q;        // [tokens * planes][q_stride], 64-byte aligned, zeros from in_features on
  int64_t q_stride;       // bytes, see padded_in_features
  const int32_t* q_sum;   // [tokens * planes][groups], sums of q over each group
  int64_t tokens;
  int64_t planes;        // 1, or 2: rows 2m and 2m + 1 of q are hi and lo of token m
  int64_t group_blocks;  // 0: one scale for a whole row
  int64_t groups;        // 1 if group_blocks is 0
  int64_t out_features;
  DType out_dtype;           // kInt32 only with one plane and one group
  void* out;                 // [tokens][out_features], contiguous
  const float* x_scale;      // [tokens], with groups and one plane [tokens][groups]; unused for kInt32
  const void* weight_scale;  // [out_features], with groups [tiles][groups][16]; unused for kInt32
  DType scale_dtype;         // of weight_scale: kFloat32, with groups also kFloat16
  const float* bias;         // [out_features] or null
};

// Bytes from one quantised row to the next: whole chunks of layout `row`, which also cover the blocks of
// every other layout, and one cache line more, so that rows do not fall on the same lines of L1.
constexpr int64_t padded_in_features(int64_t in_features) {
  return divide_up(in_features, kChunkInputs) * kChunkInputs + kQuantizedRowAlignment;
}

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

// Attention. Keys come in blocks, and blocks in spans: attention.h has the order of all sums.
constexpr int64_t kAttentionBlock = kVirtualLanes;
// Threads share out spans where there is one token to compute: 256 keys and values of 128 bfloat16 are 128 KB,
// about 10 us of a core's stream, and joining two spans costs a hundredth of that.
constexpr int64_t kAttentionSpan = 4 * kAttentionBlock;
// Values are stored with zeros up to whole registers of every instruction set.
constexpr int64_t kValueAlignment = 16;
// Rows of the largest register block (see Isa::kAttentionRows).
constexpr int64_t kAttentionRegisterRows = 6;

constexpr float kInfinity = __builtin_inff();

constexpr int64_t value_width(int64_t head_dim) { return divide_up(head_dim, kValueAlignment) * kValueAlignment; }

enum class CacheType { kFloat32, kBFloat16, kInt8 };

// [batch][tokens][heads * head_dim], a row per token; rows may lie apart.
struct TokenRows {
  const float* data;
  int64_t batch_stride;  // floats
  int64_t token_stride;
  const float* row(int64_t batch, int64_t token) const { return data + batch * batch_stride + token * token_stride; }
};

// The first position that a token at `position` sees: with a window, it sees that many, the last of them its own.
constexpr int64_t first_seen(int64_t window, int64_t position) {
  return window == 0 || position < window ? 0 : position - window + 1;
}

// Token t of sequence b stands at position start[b] + t; below 0 it is padding: it is not stored and its
// result is 0. A token sees the positions up to its own, from first_seen on.
struct Attention {
  TokenRows q, k, v;
  const float* cos;  // [positions][head_dim / 2]
  const float* sin;
  const int64_t* start;  // [batch]
  int64_t batch, tokens, kv_heads;
  int64_t group;     // query heads to a key-value head: head h reads h / group
  int64_t head_dim;  // even
  float scale;       // of scores, in units of ln 2: log2(e) times what q . k is multiplied with; taken into q
  int64_t window;    // positions that a token sees, its own among them; 0: all
  CacheType cache;
  int64_t capacity;  // positions of a sequence, a multiple of kAttentionBlock, for kInt8 of kAttentionSpan
  void* keys;        // [batch][kv_heads][capacity / kAttentionBlock][head_dim][kAttentionBlock], and for kInt8
  void* values;      // [batch][kv_heads][capacity][value_width(head_dim)]: spans as in kernels/attention_int8.h
  float* key_scale;  // [batch][kv_heads][capacity]; only for kInt8
  float* value_scale;
  float* out;  // [batch][tokens][kv_heads * group * head_dim], contiguous
};

// Rows (token, head of the group), tokens first.
struct AttentionRows {
  int64_t batch, kv_head, token_begin, token_end;
};

// A softmax under way for each of AttentionRows.
struct AttentionState {
  float* max;  // -inf at first, like 0 and 0 for the other two
  float* sum;
  float* out;  // [rows][value_width(head_dim)]
};

// Largest head_dim of an int8 cache, so that int32 sums cannot overflow.
constexpr int64_t kMaxInt8HeadDim = int64_t{1} << 16;

// Floats of scratch that attention_queries and attention_span need; attention_store needs two heads.
constexpr int64_t attention_scratch(int64_t rows, int64_t head_dim) {
  const int64_t width = value_width(head_dim);
  const int64_t scores = kAttentionRegisterRows * kAttentionBlock;
  // Queries, and a block of keys and values widened; or queries in two bytes an element, with a scale and two
  // sums, scores of a span, its weights in two bytes each, and a query.
  const int64_t of_floats = rows * head_dim + kAttentionBlock * (head_dim + width);
  const int64_t of_bytes = rows * (width / 2 + 3) + kAttentionRegisterRows * kAttentionSpan * 3 / 2 + head_dim;
  return scores + (of_floats > of_bytes ? of_floats : of_bytes);
}

// ---- the certified LM head: kernels/screen.h draws the copy and proves the bounds ---------------------

constexpr int64_t kScreenGroup = 64;  // inputs that share a factor
constexpr int64_t kScreenGroupBytes = kTileRows * kScreenGroup * 6 / 8;

constexpr int64_t screen_groups(int64_t in_features) { return divide_up(in_features, kScreenGroup); }

// A tile: factors of 16 rows, whole cache lines of them, then the groups.
constexpr int64_t screen_factor_bytes(int64_t groups) {
  return divide_up(groups * kTileRows, kBlockBytes) * kBlockBytes;
}
constexpr int64_t screen_tile_bytes(int64_t groups) { return screen_factor_bytes(groups) + groups * kScreenGroupBytes; }

// Largest in_features of a screen: the bounds of rounding are derived for it.
constexpr int64_t kMaxScreenFeatures = int64_t{1} << 16;

// More than what underflow can take from a logit, for norms up to 1; far below any logit that matters.
constexpr double kUnderflow = 0x1p-100;

// Rows of larger norms could overflow a sum of float32 (2^128) with a token of that norm: they are never screened out.
// Nor are tokens of larger norms screened.
constexpr double kLargestNorm = 0x1p60;

// What a bound is made of is rounded up by so much: several times what evaluating it in float32 may take from it.
constexpr double kBoundRounding = 1.0 + 0x1p-20;

// The copy of a table in six bits, and what its rows lose in it.
struct ScreenTable {
  const void* weight;  // [vocabulary][in_features], contiguous
  DType weight_dtype;
  int64_t in_features;
  int64_t vocabulary;
  uint8_t* codes;  // [tiles][screen_tile_bytes]
  float* scale;    // [tiles * kTileRows] each, and so:
  float* norm;
  float* residual;  // infinite for a row that is not finite or too large
};

// What the bounds need of one token.
struct ScreenedToken {
  float scale;  // h is about scale * (256 * hi + lo)
  float error;  // at least ||h - scale * (256 * hi + lo)||, underflow included
  float reach;  // at least ||h|| + error, below kLargestNorm
};

struct Screen {
  const uint8_t* codes;  // as in ScreenTable
  int64_t groups;
  const float* scale;
  const float* norm;
  const float* residual;
  const int8_t* q;  // [tokens][2][q_stride]: hi and lo; zeros from in_features on
  int64_t q_stride;
  const int32_t* group_sum;    // [tokens][groups]: of 256 * hi + lo
  const ScreenedToken* token;  // [tokens]
  int64_t tokens;
  int64_t vocabulary;
  float* upper;        // [tokens][vocabulary], at least the logit that `logits` would give
  float* approximate;  // likewise, the logit but for the error; where nothing is known, infinite (or NaN) and NaN
};

// What a gate goes through before it is multiplied: kernels/glu.h has the formulas.
enum class Activation { kRelu2, kSilu, kGeluTanh };

struct KernelTable {
  const char* isa;

  // Quantises one row of `in_features` elements: writes q[0 .. in_features), zeros up to `q_length`,
  // the scale that turns q back into x, and the sum of q. Numerics: reference.quantize_activations.
  void (*quantize_row)(const void* x, DType dtype, int64_t in_features, int8_t* q, int64_t q_length, float* x_scale,
                       int32_t* q_sum);

  // The same to 16 bits: hi and lo are rows of q_length, hi_lo_sum their two sums.
  void (*quantize_row_16)(const void* x, DType dtype, int64_t in_features, int8_t* hi, int8_t* lo, int64_t q_length,
                          float* x_scale, int32_t* hi_lo_sum);

  // Layout tile16: rows of tiles [tile_begin, tile_end), every token.
  void (*ternary_product)(const TernaryProduct& product, int64_t tile_begin, int64_t tile_end);

  // Layout tile16_base3, one group: likewise. Null where a tile16 copy is made instead.
  void (*ternary_product_base3)(const TernaryProduct& product, int64_t tile_begin, int64_t tile_end);

  // Layout row, one group, tokens * planes <= kMaxSparseRows: results of rows[begin .. end), or of rows
  // begin .. end themselves if `rows` is null; others are not touched. q is in step order, see sparse_order.h.
  void (*ternary_rows)(const TernaryProduct& product, const int32_t* rows, int64_t begin, int64_t end);

  // Layout column, one group, tokens * planes <= kMaxSparseRows: results of the rows of panels
  // [panel_begin, panel_end). Only inputs columns[0 .. count) are read, and q[i] belongs to columns[i];
  // count is a multiple of kColumnsAtOnce.
  void (*ternary_columns)(const TernaryProduct& product, const int32_t* columns, int64_t count, int64_t panel_begin,
                          int64_t panel_end);

  // y = x / sqrt(mean(x^2) + eps) * weight for one row; y has the dtype of x.
  void (*rms_norm_row)(const void* x, DType dtype, const float* weight, float eps, int64_t features, void* y);

  // Copies one row to float32, with zeros from `features` to `length`.
  void (*widen_row)(const void* x, DType dtype, int64_t features, float* out, int64_t length);

  // Rows [row_begin, row_end) of the vocabulary, every token.
  void (*logits)(const Logits& logits, int64_t row_begin, int64_t row_end, float* scratch);

  // Rotates the keys of these tokens and writes them and the values into the cache.
  void (*attention_store)(const Attention& attention, const AttentionRows& rows, float* scratch);

  // Makes the queries of these rows, which stay in scratch.
  void (*attention_queries)(const Attention& attention, const AttentionRows& rows, float* scratch);

  // Attends to the keys of one span alone: `state` is written, not read. Scratch holds what attention_queries made.
  void (*attention_span)(const Attention& attention, const AttentionRows& rows, int64_t span,
                         const AttentionState& state, float* scratch);

  // Takes what attention_span made of span number `span` into `state`. Spans come in order.
  void (*attention_join)(const Attention& attention, const AttentionRows& rows, int64_t span,
                         const AttentionState& state, const AttentionState& part);

  // Writes the results of these rows.
  void (*attention_finish)(const Attention& attention, const AttentionRows& rows, const AttentionState& state);

  // Rows rows[0 .. count) of one token, count > 0: out[i] is the logit of rows[i], the same bits as from `logits`;
  // logits.out is not used.
  void (*logits_of_rows)(const Logits& logits, const int32_t* rows, int64_t count, float* out, float* scratch);

  // Makes tiles [tile_begin, tile_end) of the copy. Scratch: `wide` of whole groups, and `q` of 16 times as many and
  // a byte for each group.
  void (*screen_rows)(const ScreenTable& table, int64_t tile_begin, int64_t tile_end, float* wide, int8_t* q);

  // Bounds and approximations of the logits of tiles [tile_begin, tile_end), every token.
  void (*screen)(const Screen& screen, int64_t tile_begin, int64_t tile_end);

  // out = activation(gate) * up. `out` may be the memory of `gate` or of `up`; any alignment.
  void (*glu_row)(Activation activation, const float* gate, const float* up, float* out, int64_t count);
};

}  // namespace bitnet_ops
