// Attention over a cache of keys and values, once; an instruction set only supplies `Isa`.
//
// Include this inside a kernel file's target region, after attention_int8.h, which is about a cache of bytes.
//
// The order of every float operation, which decides the bits. Position p of a sequence is the p-th of its
// own tokens, so padding before the first one has no place here and cannot move anything: a sequence
// in a batch runs through the operations of the same sequence alone. A token at position p sees keys 0 .. p, or with a
// window of w max(0, p - w + 1) .. p; they fall into blocks of 64 and spans of 256, which begin at multiples of these
// numbers, whoever asks. A block or span without a key that a token sees has no part in the token's sums.
//
//     keys      0 ......... 63 | 64 ........ 127 | 128 ...... 191 | 192 ...... 255 | 256 ....
//     blocks         0         |        1        |       2        |       3        |   4
//     spans                                0                                       |   1
//
// For one query row (one token and head) and one block:
//     score[j]  = fma chain over d = 0, 1, ... of q[d] * key[j][d], from +0   (a lane is a key: no sums across lanes)
//     max'      = max(max, score of every visible key)
//     factor    = exp2(max - max'),  weight[j] = exp2(score[j] - max')
//     sum       = sum * factor + (the weights in 64 virtual lanes, folded as in float_algorithms.h)
//     out[i]    = fma chain over visible keys j in order of weight[j] * value[j][i], from out[i] * factor
// A span starts from max = -inf, sum = 0, out = 0. Spans join in order, so that threads may share them out:
//     max'      = max(max, max_s), sum = sum * exp2(max - max') + sum_s * exp2(max_s - max')
//     out[i]    = fma(out_s[i], exp2(max_s - max'), out[i] * exp2(max - max'))
// and at the end out[i] * (1 / sum). A key that a token does not see is never multiplied, not even by zero:
// 0 * NaN is NaN, and -0 + 0 is +0. Its weight in the folded sum is +0, and x + 0 = x for the others, which
// are not negative. So what prefill computes for a token is what decoding it computes.
//
// A NaN among the visible scores makes its weight NaN, hence sum and every out[i]; whether max(a, NaN)
// is a or NaN, in which instruction sets differ, therefore changes nothing.
//
// Isa provides, beside float_algorithms.h's and exponential.h's,
//     kAttentionRows, kAttentionRegisters    accumulators of a register block: rows x registers
//     max(a, b) fold_max(v)

namespace bitnet_ops {
namespace {

// How far ahead of its use the cache is asked for: as for rows of the LM head.
constexpr int64_t kCacheAheadBytes = kStreamAheadBytes;

// Asks for the keys and values that a span reads, in the order in which it reads them. Blocks of keys and of values lie
// apart, so a processor that follows streams by itself begins anew at each of them (bench/LOG.md).
template <class Isa>
class CacheStream {
 public:
  static constexpr int64_t kLine = 64;

  // `lines` cache lines that begin `step` bytes apart.
  void add(const void* begin, int64_t lines, int64_t step) {
    if (lines > 0) pieces_[count_++] = {static_cast<const char*>(begin), lines, step};
  }

  // The next lines, or as many as there are.
  __attribute__((always_inline)) void ask(int64_t lines) {
    while (lines > 0) {
      if (left_ == 0) {
        if (next_ == count_) return;
        at_ = pieces_[next_].begin;
        left_ = pieces_[next_].lines;
        step_ = pieces_[next_].step;
        ++next_;
      }
      const int64_t now = lines < left_ ? lines : left_;
      lines -= now;
      left_ -= now;
      for (int64_t i = 0; i < now; ++i, at_ += step_) {
        if (to_l1_) {
          Isa::prefetch_near(at_);
        } else {
          Isa::prefetch_far(at_);
        }
      }
    }
  }

 private:
  struct Piece {
    const char* begin;
    int64_t lines, step;
  };
  // Keys and values of each block of a span and of one more; keys of the last block of these in four pieces at most.
  static constexpr int kMostPieces = 2 * (static_cast<int>(kAttentionSpan / kAttentionBlock) + 1) + 3;

  Piece pieces_[kMostPieces];
  int count_ = 0;
  int next_ = 0;
  const char* at_ = nullptr;
  int64_t left_ = 0;
  int64_t step_ = 0;
  const bool to_l1_ = stream_ahead.far_bytes == 0;
};

template <class Isa, class Sums>
struct AttentionKernels {
  using Int8 = Int8Attention<Isa, Sums>;
  using F32 = typename Isa::F32;
  using Float = FloatKernels<Isa>;
  using Stream = CacheStream<Isa>;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kRows = Isa::kAttentionRows;
  static constexpr int kRegisters = static_cast<int>(kAttentionBlock) / kLanes;  // of the scores of one row
  static constexpr int64_t kPanel = Isa::kAttentionRegisters * kLanes;
  static_assert(kAttentionBlock == kVirtualLanes, "the weights of a block fold like 64 virtual lanes");
  static_assert(kAttentionBlock % kPanel == 0 && kValueAlignment % kLanes == 0, "no register is part of a row");
  static_assert(kRows <= kAttentionRegisterRows, "scratch is sized for them");

  static float exp2_of(float x) {
    float lanes[kLanes];
    Isa::store(lanes, exp2<Isa>(Isa::set1(x)));
    return lanes[0];
  }

  // ---- rows x lanes -----------------------------------------------------------------------------

  // c[row][lane] = fma chain over k of a[row][k] * b[k][lane], from +0, or from c * factor[row] if given. For each
  // k asks for `lines` of the stream, if there is one.
  template <int ROWS, int REGISTERS, class T>
  static void block(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count, float* c,
                    int64_t c_stride, const float* factor, Stream* stream, int64_t lines) {
    F32 acc[ROWS][REGISTERS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < REGISTERS; ++i) {
        acc[r][i] =
            factor == nullptr ? Isa::zero() : Isa::mul(Isa::load(c + r * c_stride + i * kLanes), Isa::set1(factor[r]));
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      const T* b_row = b + k * b_stride;
      if (stream != nullptr) stream->ask(lines);
      F32 lanes[REGISTERS];
#pragma GCC unroll 16
      for (int i = 0; i < REGISTERS; ++i) lanes[i] = Isa::load(b_row + i * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const F32 scalar = Isa::set1(a[r * a_stride + k]);
#pragma GCC unroll 16
        for (int i = 0; i < REGISTERS; ++i) acc[r][i] = Isa::fma(scalar, lanes[i], acc[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < REGISTERS; ++i) Isa::store(c + r * c_stride + i * kLanes, acc[r][i]);
    }
  }

  template <int ROWS, int REGISTERS, class T>
  static void block_of(int rows, const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count,
                       float* c, int64_t c_stride, const float* factor, Stream* stream, int64_t lines) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) {
        return block_of<ROWS - 1, REGISTERS>(rows, a, a_stride, b, b_stride, count, c, c_stride, factor, stream, lines);
      }
    }
    block<ROWS, REGISTERS>(a, a_stride, b, b_stride, count, c, c_stride, factor, stream, lines);
  }

  // Lanes [0, width), a multiple of kLanes; at most kRows rows.
  template <class T>
  static void multiply(int rows, int64_t width, const float* a, int64_t a_stride, const T* b, int64_t b_stride,
                       int64_t count, float* c, int64_t c_stride, const float* factor, Stream* stream = nullptr) {
    // As much as these rows take is asked for while their first lanes pass: then all of them come from memory.
    const int64_t lines = divide_up(width * static_cast<int64_t>(sizeof(T)), Stream::kLine);
    int64_t lane = 0;
    for (; lane + kPanel <= width; lane += kPanel) {
      block_of<kRows, Isa::kAttentionRegisters>(rows, a, a_stride, b + lane, b_stride, count, c + lane, c_stride,
                                                factor, stream, lines);
      stream = nullptr;
    }
    for (; lane < width; lane += kLanes) {
      block_of<kRows, 1>(rows, a, a_stride, b + lane, b_stride, count, c + lane, c_stride, factor, stream, lines);
      stream = nullptr;
    }
  }

  // ---- rotation ---------------------------------------------------------------------------------

  static F32 load_upto(const float* x, int64_t count) {
    return count == kLanes ? Isa::load(x) : load_partial<Isa>(x, count);
  }
  static void store_upto(float* x, F32 v, int64_t count) {
    if (count == kLanes) return Isa::store(x, v);
    store_partial<Isa>(x, v, count);
  }

  // out = (low * cos - high * sin, high * cos + low * sin) * scale, each operation rounded: rotate-half.
  static void rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, float scale, float* out) {
    const int64_t half = head_dim / 2;
    const F32 factor = Isa::set1(scale);
    const F32 minus = Isa::set1(-1.0f);
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i < kLanes ? half - i : kLanes;
      const F32 low = load_upto(x + i, count);
      const F32 high = load_upto(x + half + i, count);
      const F32 c = load_upto(cos + i, count);
      const F32 s = load_upto(sin + i, count);
      // fma with -1 is a subtraction, one rounding.
      const F32 new_low = Isa::mul(Isa::fma(minus, Isa::mul(high, s), Isa::mul(low, c)), factor);
      const F32 new_high = Isa::mul(Isa::add(Isa::mul(high, c), Isa::mul(low, s)), factor);
      store_upto(out + i, new_low, count);
      store_upto(out + half + i, new_high, count);
    }
  }

  // ---- the cache --------------------------------------------------------------------------------

  // A vector of the cache in its storage type.
  template <class T>
  static void convert(const float* x, int64_t count, T* out) {
    const int64_t full = count - count % kLanes;
    for (int64_t i = 0; i < full; i += kLanes) Isa::store(out + i, Isa::load(x + i));
    if (full < count) store_partial<Isa>(out + full, load_partial<Isa>(x + full, count - full), count - full);
  }

  // One token's key, rotated, and value. `place` is its position among those of all heads; `converted` is scratch.
  template <class T>
  static void store_token(const Attention& p, int64_t position, int64_t place, const float* key, const float* value,
                          T* converted) {
    const int64_t d = p.head_dim;
    const int64_t width = value_width(d);
    T* keys = static_cast<T*>(p.keys) + (place - position % kAttentionBlock) * d + position % kAttentionBlock;
    // Every element is in a line of its own: asked for together, they do not wait for each other.
    for (int64_t i = 0; i < d; ++i) Isa::prefetch_near(keys + i * kAttentionBlock);
    convert(key, d, converted);
    for (int64_t i = 0; i < d; ++i) keys[i * kAttentionBlock] = converted[i];
    T* values = static_cast<T*>(p.values) + place * width;
    convert(value, d, values);
    std::memset(static_cast<void*>(values + d), 0, static_cast<size_t>(width - d) * sizeof(T));
  }
  // Quantised as activations are.
  static void store_token(const Attention& p, int64_t position, int64_t place, const float* key, const float* value,
                          int8_t* converted) {
    const int64_t d = p.head_dim;
    const int64_t span = (place - position % kAttentionSpan) * value_width(d);
    int32_t unused_sum;
    Float::quantize_row_of(key, d, converted, d, p.key_scale + place, &unused_sum);
    Int8::store_key(converted, d, position, static_cast<int8_t*>(p.keys) + span);
    Float::quantize_row_of(value, d, converted, d, p.value_scale + place, &unused_sum);
    Int8::store_value(converted, d, position, static_cast<int8_t*>(p.values) + span);
  }

  template <class T>
  static void store_of(const Attention& p, const AttentionRows& rows, float* scratch) {
    const int64_t d = p.head_dim;
    const int64_t head = rows.batch * p.kv_heads + rows.kv_head;
    for (int64_t token = rows.token_begin; token < rows.token_end; ++token) {
      const int64_t position = p.start[rows.batch] + token;
      if (position < 0) continue;  // padding
      rotate(p.k.row(rows.batch, token) + rows.kv_head * d, p.cos + position * (d / 2), p.sin + position * (d / 2), d,
             1.0f, scratch);
      store_token(p, position, head * p.capacity + position, scratch, p.v.row(rows.batch, token) + rows.kv_head * d,
                  reinterpret_cast<T*>(scratch + d));
    }
  }

  static void store(const Attention& p, const AttentionRows& rows, float* scratch) {
    switch (p.cache) {
      case CacheType::kBFloat16:
        return store_of<BFloat16>(p, rows, scratch);
      case CacheType::kInt8:
        return store_of<int8_t>(p, rows, scratch);
      default:
        return store_of<float>(p, rows, scratch);
    }
  }

  // ---- queries ----------------------------------------------------------------------------------

  // In scratch, behind the scores of a register block.
  static float* queries_in(float* scratch) { return scratch + kAttentionRegisterRows * kAttentionBlock; }

  // Rotates and scales the queries of these rows.
  static void queries(const Attention& p, const AttentionRows& rows, float* scratch) {
    const int64_t d = p.head_dim;
    const int64_t count = p.group * (rows.token_end - rows.token_begin);
    float* q = queries_in(scratch);
    const Int8Queries integers(q, count, d);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t token = rows.token_begin + row / p.group;
      const int64_t position = p.start[rows.batch] + token;
      if (position < 0) continue;
      float* rotated = p.cache == CacheType::kInt8 ? integers.rotated : q + row * d;
      rotate(p.q.row(rows.batch, token) + (rows.kv_head * p.group + row % p.group) * d, p.cos + position * (d / 2),
             p.sin + position * (d / 2), d, p.scale, rotated);
      if (p.cache == CacheType::kInt8) Int8::store_query(rotated, d, integers, row);
    }
  }

  // ---- one span ---------------------------------------------------------------------------------

  // One block: scores become the weights that values are multiplied with. Step by step for all rows, whose
  // long chains of dependent instructions then overlap.
  static void soften(int rows, float* scores, const int64_t* hidden, const int64_t* visible, float* max, float* sum,
                     float* factor) {
    // Enough for kRows, and whole registers.
    constexpr int kFactors = (kRows + kLanes - 1) / kLanes * kLanes;
    float fall[kFactors] = {};
    for (int i = 0; i < rows; ++i) {
      float* score = scores + i * kAttentionBlock;
      for (int64_t j = 0; j < hidden[i]; ++j) score[j] = -kInfinity;
      for (int64_t j = visible[i]; j < kAttentionBlock; ++j) score[j] = -kInfinity;
      F32 highest = Isa::load(score);
      for (int r = 1; r < kRegisters; ++r) highest = Isa::max(highest, Isa::load(score + r * kLanes));
      const float block_max = Isa::fold_max(highest);
      const float new_max = max[i] > block_max ? max[i] : block_max;
      fall[i] = max[i] - new_max;
      max[i] = new_max;
    }
    for (int i = 0; i < kFactors; i += kLanes) Isa::store(factor + i, exp2<Isa>(Isa::load(fall + i)));
    for (int i = 0; i < rows; ++i) {
      float* score = scores + i * kAttentionBlock;
      const F32 minus_max = Isa::set1(-max[i]);
      F32 weight[kRegisters];
      for (int r = 0; r < kRegisters; ++r) {
        weight[r] = exp2<Isa>(Isa::add(Isa::load(score + r * kLanes), minus_max));
        Isa::store(score + r * kLanes, weight[r]);
      }
      sum[i] = sum[i] * factor[i] + Float::fold_registers(weight);
    }
  }

  static int64_t position_of(const Attention& p, const AttentionRows& rows, int64_t row) {
    return p.start[rows.batch] + rows.token_begin + row / p.group;
  }

  // Of keys key, key + 1, ... row `row` of `rows` sees those from number `hidden` to number `visible`, which may lie
  // below 0 or beyond a block. Rows follow their tokens: both numbers grow with them.
  static int64_t visible_keys(const Attention& p, const AttentionRows& rows, int64_t row, int64_t key) {
    return position_of(p, rows, row) + 1 - key;
  }
  static int64_t hidden_keys(const Attention& p, const AttentionRows& rows, int64_t row, int64_t key) {
    return first_seen(p.window, position_of(p, rows, row)) - key;
  }
  static bool sees(const Attention& p, const AttentionRows& rows, int64_t row, int64_t key, int64_t count) {
    return visible_keys(p, rows, row, key) > 0 && hidden_keys(p, rows, row, key) < count;
  }

  // Rows [begin, end) are those that see any of `count` keys from `key` on.
  struct Seers {
    int64_t begin;
    int64_t end;
    Seers(const Attention& p, const AttentionRows& rows, int64_t key, int64_t count)
        : begin(0), end(p.group * (rows.token_end - rows.token_begin)) {
      while (begin < end && visible_keys(p, rows, begin, key) <= 0) ++begin;
      while (begin < end && hidden_keys(p, rows, end - 1, key) >= count) --end;
    }
  };

  static void seen_keys(const Attention& p, const AttentionRows& rows, int64_t row, int count, int64_t key,
                        int64_t keys, int64_t* hidden, int64_t* visible) {
    for (int i = 0; i < count; ++i) {
      const int64_t first = hidden_keys(p, rows, row + i, key);
      const int64_t end = visible_keys(p, rows, row + i, key);
      hidden[i] = first > 0 ? first : 0;
      visible[i] = end < keys ? end : keys;
    }
  }

  // Keys (or rows of values) of one block against all rows, from the cache itself or widened from it.
  template <class T>
  static void attend_block(const Attention& p, const AttentionRows& rows, int64_t key, const float* q, const T* keys,
                           const T* values, const AttentionState& state, float* scores, Stream* stream) {
    const int64_t width = value_width(p.head_dim);
    const Seers seers(p, rows, key, kAttentionBlock);
    for (int64_t row = seers.begin; row < seers.end; row += kRows) {
      const int n = static_cast<int>(seers.end - row < kRows ? seers.end - row : kRows);
      int64_t hidden[kRows];
      int64_t visible[kRows];
      seen_keys(p, rows, row, n, key, kAttentionBlock, hidden, visible);
      // All rows see keys [begin, least), if there are any.
      const int64_t least = visible[0];
      const int64_t begin = hidden[n - 1] < least ? hidden[n - 1] : least;
      const int64_t most = divide_up(visible[n - 1], kLanes) * kLanes;
      const float one = 1.0f;
      float* out = state.out + row * width;
      multiply(n, most, q + row * p.head_dim, p.head_dim, keys, kAttentionBlock, p.head_dim, scores, kAttentionBlock,
               nullptr, stream);
      float factor[kRows + kLanes];
      soften(n, scores, hidden, visible, state.max + row, state.sum + row, factor);
      // Keys in order for each row: those before the common ones alone, then the common ones, then the rest alone.
      for (int i = 0; i < n; ++i) {
        if (hidden[i] < begin) {
          multiply(1, width, scores + i * kAttentionBlock + hidden[i], kAttentionBlock, values + hidden[i] * width,
                   width, begin - hidden[i], out + i * width, width, factor + i);
          factor[i] = one;
        }
      }
      multiply(n, width, scores + begin, kAttentionBlock, values + begin * width, width, least - begin, out, width,
               factor, stream);
      stream = nullptr;  // the rows that are left find this block in the cache
      for (int i = 1; i < n; ++i) {
        const int64_t from = hidden[i] > least ? hidden[i] : least;
        if (visible[i] > from) {
          multiply(1, width, scores + i * kAttentionBlock + from, kAttentionBlock, values + from * width, width,
                   visible[i] - from, out + i * width, width, &one);
        }
      }
    }
  }

  template <class T>
  static void widen_block(const T* keys, const T* values, int64_t head_dim, int64_t width, int64_t visible,
                          float* wide_keys, float* wide_values) {
    for (int64_t i = 0; i < head_dim * kAttentionBlock; i += kLanes) Isa::store(wide_keys + i, Isa::load(keys + i));
    for (int64_t i = 0; i < visible * width; i += kLanes) Isa::store(wide_values + i, Isa::load(values + i));
  }

  template <class T>
  static void attend_block_of(const Attention& p, const AttentionRows& rows, int64_t key, int64_t end,
                              const AttentionState& state, float* scratch, Stream& stream) {
    const int64_t d = p.head_dim;
    const int64_t width = value_width(d);
    const int64_t count = p.group * (rows.token_end - rows.token_begin);
    const int64_t place = (rows.batch * p.kv_heads + rows.kv_head) * p.capacity + key;
    const T* keys = static_cast<const T*>(p.keys) + place * d;
    const T* values = static_cast<const T*>(p.values) + place * width;
    float* q = queries_in(scratch);
    // Widening costs about as much as it saves one register block; few rows read the cache itself.
    if (p.cache == CacheType::kFloat32 || count <= 2 * kRows) {
      return attend_block(p, rows, key, q, keys, values, state, scratch, &stream);
    }
    float* wide_keys = q + count * d;
    float* wide_values = wide_keys + kAttentionBlock * d;
    widen_block(keys, values, d, width, end - key < kAttentionBlock ? end - key : kAttentionBlock, wide_keys,
                wide_values);
    attend_block<float>(p, rows, key, q, wide_keys, wide_values, state, scratch, nullptr);
  }

  template <class T>
  static void span_of(const Attention& p, const AttentionRows& rows, int64_t index, const AttentionState& state,
                      float* scratch) {
    const int64_t count = p.group * (rows.token_end - rows.token_begin);
    for (int64_t row = 0; row < count; ++row) {
      state.max[row] = -kInfinity;
      state.sum[row] = 0.0f;
    }
    std::memset(state.out, 0, static_cast<size_t>(count * value_width(p.head_dim)) * sizeof(float));
    const int64_t seen = visible_keys(p, rows, count - 1, 0);
    const int64_t end = seen < (index + 1) * kAttentionSpan ? seen : (index + 1) * kAttentionSpan;
    // Blocks before everybody's window are not read.
    const int64_t first = first_seen(p.window, position_of(p, rows, 0));
    const int64_t from_first = first - first % kAttentionBlock;
    const int64_t begin = from_first > index * kAttentionSpan ? from_first : index * kAttentionSpan;
    Stream stream;
    for (int64_t key = begin; key < end; key += kAttentionBlock) {
      const int64_t keys = end - key < kAttentionBlock ? end - key : kAttentionBlock;
      add_block<T>(p, rows.batch * p.kv_heads + rows.kv_head, key, keys, stream);
    }
    // Where this thread most likely goes on.
    if (p.tokens == 1 && seen > end) {
      add_block<T>(p, rows.batch * p.kv_heads + rows.kv_head, end, kAttentionBlock, stream);
    } else if (p.tokens == 1 && rows.kv_head + 1 < p.kv_heads) {
      add_block<T>(p, rows.batch * p.kv_heads + rows.kv_head + 1, from_first, kAttentionBlock, stream);
    }
    stream.ask(kCacheAheadBytes / Stream::kLine);
    for (int64_t key = begin; key < end; key += kAttentionBlock) {
      attend_block_of<T>(p, rows, key, end, state, scratch, stream);
    }
  }

  // Keys [key, key + keys) of a block and their values, for head `head` of all sequences.
  template <class T>
  static void add_block(const Attention& p, int64_t head, int64_t key, int64_t keys, Stream& stream) {
    constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T));
    constexpr int64_t kRowBytes = kAttentionBlock * kBytes;  // of an element of the keys
    const int64_t place = head * p.capacity + key;
    const int64_t width = value_width(p.head_dim);
    const char* of_keys = reinterpret_cast<const char*>(static_cast<const T*>(p.keys) + place * p.head_dim);
    const int64_t used = divide_up(keys * kBytes, Stream::kLine) * Stream::kLine;
    if (used == kRowBytes) {
      stream.add(of_keys, p.head_dim * kRowBytes / Stream::kLine, Stream::kLine);
    } else {
      for (int64_t byte = 0; byte < used; byte += Stream::kLine) stream.add(of_keys + byte, p.head_dim, kRowBytes);
    }
    stream.add(static_cast<const T*>(p.values) + place * width, keys * width * kBytes / Stream::kLine, Stream::kLine);
  }

  static void span_int8(const Attention& p, const AttentionRows& rows, int64_t index, const AttentionState& state,
                        float* scratch) {
    const int64_t count = p.group * (rows.token_end - rows.token_begin);
    const int64_t width = value_width(p.head_dim);
    const int64_t key = index * kAttentionSpan;
    const int64_t place = (rows.batch * p.kv_heads + rows.kv_head) * p.capacity + key;
    const Int8Queries queries(queries_in(scratch), count, p.head_dim);
    const Seers seers(p, rows, key, kAttentionSpan);
    for (int64_t row = seers.begin; row < seers.end; row += Int8::kRows) {
      const int n = static_cast<int>(seers.end - row < Int8::kRows ? seers.end - row : Int8::kRows);
      int64_t hidden[Int8::kRows];
      int64_t visible[Int8::kRows];
      seen_keys(p, rows, row, n, key, kAttentionSpan, hidden, visible);
      Int8::template attend<Int8::kRows>(n, queries, row, hidden, visible,
                                         static_cast<const int8_t*>(p.keys) + place * width,
                                         static_cast<const int8_t*>(p.values) + place * width, p.key_scale + place,
                                         p.value_scale + place, width, state);
    }
  }

  static void span(const Attention& p, const AttentionRows& rows, int64_t index, const AttentionState& state,
                   float* scratch) {
    switch (p.cache) {
      case CacheType::kBFloat16:
        return span_of<BFloat16>(p, rows, index, state, scratch);
      case CacheType::kInt8:
        return span_int8(p, rows, index, state, scratch);
      default:
        return span_of<float>(p, rows, index, state, scratch);
    }
  }

  // ---- all spans --------------------------------------------------------------------------------

  static void join(const Attention& p, const AttentionRows& rows, int64_t index, const AttentionState& state,
                   const AttentionState& part) {
    const int64_t width = value_width(p.head_dim);
    const int64_t count = p.group * (rows.token_end - rows.token_begin);
    for (int64_t row = 0; row < count; ++row) {
      if (!sees(p, rows, row, index * kAttentionSpan, kAttentionSpan)) continue;
      const float max = state.max[row] > part.max[row] ? state.max[row] : part.max[row];
      const float factor = exp2_of(state.max[row] - max);
      const float part_factor = exp2_of(part.max[row] - max);
      state.max[row] = max;
      state.sum[row] = state.sum[row] * factor + part.sum[row] * part_factor;
      float* out = state.out + row * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        const F32 before = Isa::mul(Isa::load(out + i), Isa::set1(factor));
        Isa::store(out + i, Isa::fma(Isa::load(part.out + row * width + i), Isa::set1(part_factor), before));
      }
    }
  }

  static void finish(const Attention& p, const AttentionRows& rows, const AttentionState& state) {
    const int64_t d = p.head_dim;
    const int64_t count = p.group * (rows.token_end - rows.token_begin);
    const int64_t full = d - d % kLanes;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t token = rows.token_begin + row / p.group;
      const int64_t head = rows.kv_head * p.group + row % p.group;
      float* out = p.out + ((rows.batch * p.tokens + token) * p.kv_heads * p.group + head) * d;
      if (p.start[rows.batch] + token < 0) {  // padding
        std::memset(out, 0, static_cast<size_t>(d) * sizeof(float));
        continue;
      }
      const F32 inverse = Isa::set1(1.0f / state.sum[row]);
      const float* sums = state.out + row * value_width(d);
      for (int64_t i = 0; i < full; i += kLanes) Isa::store(out + i, Isa::mul(Isa::load(sums + i), inverse));
      if (full < d) store_partial<Isa>(out + full, Isa::mul(Isa::load(sums + full), inverse), d - full);
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
