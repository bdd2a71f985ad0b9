// What the two 256-bit kernels share: float32 x 8 for float_algorithms.h, and the register block of
// the ternary product around the one step in which they differ, the dot product of four bytes.
//
// Include this inside a kernel file's target region, like float_algorithms.h.

namespace bitnet_ops {
namespace {

struct Ymm {
  using F32 = __m256;
  using I32 = __m256i;
  static constexpr int kLanes = 8;
  // 3 x 4 accumulators + 3 rows + 1 activation = 16 registers.
  static constexpr int kLogitsRows = 3;
  static constexpr int kLogitsTokens = 4;
  static constexpr int kLogitsTokensStreamed = 1;         // x 8 accumulators
  static constexpr int64_t kTokenGroupBytes = 128 << 10;  // half of the smallest common L2, 256 KB
  // 6 x 2 accumulators + 2 lanes + 1 scalar = 15 of 16 registers.
  static constexpr int kAttentionRows = 6;
  static constexpr int kAttentionRegisters = 2;

  static F32 zero() { return _mm256_setzero_ps(); }
  static F32 set1(float s) { return _mm256_set1_ps(s); }
  static F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
  static F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
  __attribute__((always_inline)) static void prefetch_far(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }
  __attribute__((always_inline)) static void prefetch_near(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  static F32 load(const BFloat16* p) {
    const __m128i half_u16x8 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_u16x8), 16));
  }
  static void load_even_odd(const BFloat16* p, F32& even, F32& odd) {
    const __m256i pair_u32x8 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pair_u32x8, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pair_u32x8, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F32 load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, F32 v) {
    // As from_float: integer rounding to even, and one NaN for all.
    const __m256i bits_u32x8 = _mm256_castps_si256(v);
    const __m256i kept_u32x8 = _mm256_and_si256(_mm256_srli_epi32(bits_u32x8, 16), _mm256_set1_epi32(1));
    const __m256i rounded_u32x8 = _mm256_add_epi32(bits_u32x8, _mm256_add_epi32(kept_u32x8, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i high_u32x8 = _mm256_blendv_epi8(_mm256_srli_epi32(rounded_u32x8, 16), _mm256_set1_epi32(kBFloat16NaN),
                                                  _mm256_castps_si256(nan));
    // packus works within 128-bit halves: 0-3 land in quadword 0, 4-7 in quadword 2.
    const __m256i packed_u16x16 = _mm256_packus_epi32(high_u32x8, high_u32x8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed_u16x16, 0x08)));
  }
  static void store(Float16* p, F32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static F32 load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F32 load(const int32_t* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F32 load_less(const int32_t* p, int32_t less) {
    const __m256i i32x8 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(i32x8, _mm256_set1_epi32(less)));
  }
  static F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
  static float fold_max(F32 v) {
    const __m128 f32x4 = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 f32x2 = _mm_max_ps(f32x4, _mm_movehl_ps(f32x4, f32x4));
    return _mm_cvtss_f32(_mm_max_ss(f32x2, _mm_movehdup_ps(f32x2)));
  }
  static F32 power_of_two(F32 v) {
    const __m256i exponent_u32x8 = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent_u32x8, _mm256_set1_epi32(kOneBits)));
  }
  static F32 zero_below(F32 x, F32 limit, F32 v) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), v); }
  static F32 choose_at_most(F32 x, F32 limit, F32 a, F32 b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, limit, _CMP_LE_OQ));
  }

  static float fold(F32 v) {
    const __m128 f32x4 = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 f32x2 = _mm_add_ps(f32x4, _mm_movehl_ps(f32x4, f32x4));
    return _mm_cvtss_f32(_mm_add_ss(f32x2, _mm_movehdup_ps(f32x2)));
  }

  template <int N>
  static void fold_all(F32 (&v)[N], float* out) {
    for (int i = 0; i < N; ++i) out[i] = fold(v[i]);
  }

  static I32 zero_i32() { return _mm256_setzero_si256(); }
  static int32_t sum(I32 v) {
    __m128i i32x4 = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    i32x4 = _mm_add_epi32(i32x4, _mm_shuffle_epi32(i32x4, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(i32x4, _mm_shuffle_epi32(i32x4, 0xb1)));
  }
  static I32 max_magnitude(I32 m, F32 v) {
    return _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(kAbsMask)));
  }
  static int32_t highest(I32 v) {
    __m128i i32x4 = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    i32x4 = _mm_max_epi32(i32x4, _mm_shuffle_epi32(i32x4, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(i32x4, _mm_shuffle_epi32(i32x4, 0xb1)));
  }
  static I32 quantize(F32 v, F32 s, int8_t* q, I32 sum) {
    // Rounding is explicit, half to even, whatever the caller's MXCSR says.
    const __m256 rounded_f32x8 = _mm256_round_ps(_mm256_mul_ps(v, s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i rounded_i32x8 = _mm256_cvtps_epi32(rounded_f32x8);
    const __m128i q_i16x8 =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded_i32x8), _mm256_extracti128_si256(rounded_i32x8, 1));
    const __m128i q_i8x16 = _mm_packs_epi16(q_i16x8, q_i16x8);  // saturates to [-128, 127]
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q), q_i8x16);
    return _mm256_add_epi32(sum, _mm256_cvtepi8_epi32(q_i8x16));
  }
};

// Four activations in every lane.
inline __m256i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void add_to(int32_t* acc, __m256i v_i32x8) {
  __m256i* p = reinterpret_cast<__m256i*>(acc);
  _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), v_i32x8));
}

// The first number in a place, or one more.
inline void put(int32_t* acc, __m256i v_i32x8, bool first) {
  if (first) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), v_i32x8);
  } else {
    add_to(acc, v_i32x8);
  }
}

// About 100 ns of one core's stream (40 GB/s): what a miss to memory takes.
constexpr int64_t kPrefetchBytes = 4096;

inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Codes of step p in the bytes of `packed`. A 16-bit shift moves bits across bytes, but only into places
// that the mask clears.
inline __m256i codes_of(__m256i packed_u8x32, int p) {
  return _mm256_and_si256(_mm256_srli_epi16(packed_u8x32, 2 * p), _mm256_set1_epi8(0x03));
}

// tile_sums.h: eight rows, inputs 4P .. 4P+3 of a block that begins 32 bytes earlier or here.
template <int P, class Codes>
inline __m256i code_of(Codes codes, const uint8_t* half) {
  return reinterpret_cast<__m256i>(CodesIn<32>::line<P>(codes, half));
}

// The inner loops of every layout. Dot provides
//     dot(acc, code_u8x32, q_i8x32)    adds code * q, four (or two) neighbours to a lane of acc
//     widen(acc)                       acc as int32 x 8
//     kDotsPerWidening                 how many times dot may add to acc before that
//     kRows                            rows of q in a register block, two accumulators each
//     kRowsInPlace, in_place(tile, begin, end, q, q_stride, ahead, low, high)    up to so many rows of q have a loop of
//                                      their own: sums of any number of blocks [begin, end), which are widened already
//     kDecodedRows                     likewise where codes are decoded already
//     piece(codes, blocks, q, q_stride, low, high)    if kDecodedRows: sums of up to 64 dots of decoded codes below 3
template <class Dot>
struct YmmLoops {
  // One tile is two ymm, rows 0-7 and rows 8-15.
  static constexpr int64_t kInputs = kBlockInputs;
  static constexpr int kTiles = 1;
  static constexpr int kRowsStreamed = 0;  // nothing to choose: kTiles is 1
  static constexpr int kRows = Dot::kRows;
  static constexpr int64_t kQBytes = int64_t{128} << 10;  // half of the smallest common L2, 256 KB
  static constexpr int64_t kBlocksPerWidening = Dot::kDotsPerWidening / 4;

  // Sums of blocks [begin, end): rows 0-7 of the tile, and 8-15. Above kRowsInPlace at most kBlocksPerWidening blocks,
  // and not widened yet.
  template <int ROWS>
  __attribute__((always_inline)) static void some_blocks(const uint8_t* tile, int64_t begin, int64_t end,
                                                         const int8_t* q, int64_t q_stride, __m256i (&low)[ROWS],
                                                         __m256i (&high)[ROWS]) {
    if constexpr (ROWS <= Dot::kRowsInPlace) {
      // Inlined for each kind of stream, so that distances are constants.
      if (stream_ahead.far_bytes != 0) {
        Dot::in_place(tile, begin, end, q, q_stride, kStreamThroughL2, low, high);
      } else {
        Dot::in_place(tile, begin, end, q, q_stride, kStreamToL1, low, high);
      }
    } else {
      const StreamAhead ahead = stream_ahead;
#pragma GCC unroll 6
      for (int t = 0; t < ROWS; ++t) {
        low[t] = _mm256_setzero_si256();
        high[t] = _mm256_setzero_si256();
      }
      for (int64_t b = begin; b < end; ++b) {
        const uint8_t* address = tile + b * kBlockBytes;
        StreamAhead here = ahead;
        __asm__ volatile("" : "+r"(here.far_bytes));  // or clang makes a loop for each case, and spills in one of them
        ask_ahead<Ymm>(address, here);
        const int8_t* q_block = q + b * kBlockInputs;
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          const __m256i low_u8x32 = codes_of(load32(address), p);
          const __m256i high_u8x32 = codes_of(load32(address + 32), p);
#pragma GCC unroll 6
          for (int t = 0; t < ROWS; ++t) {
            const __m256i q_i8x32 = broadcast4(q_block + t * q_stride + 4 * p);
            low[t] = Dot::dot(low[t], low_u8x32, q_i8x32);
            high[t] = Dot::dot(high[t], high_u8x32, q_i8x32);
          }
        }
      }
    }
  }

  // A function of its own, so that what is around it takes no registers from the loop.
  template <int TILES, int ROWS>
  __attribute__((noinline)) static void block(const uint8_t* tile, int64_t, int64_t blocks, const int8_t* q,
                                              int64_t q_stride, int32_t* acc) {
    static_assert(TILES == 1, "the driver asks for kTiles at most");
    if constexpr (ROWS <= Dot::kRowsInPlace) {
      __m256i low[ROWS];
      __m256i high[ROWS];
      some_blocks<ROWS>(tile, 0, blocks, q, q_stride, low, high);
#pragma GCC unroll 2
      for (int t = 0; t < ROWS; ++t) {
        put(acc + t * kTileRows, low[t], true);
        put(acc + t * kTileRows + 8, high[t], true);
      }
    } else {
      int64_t begin = 0;
      do {
        const int64_t end = blocks - begin < kBlocksPerWidening ? blocks : begin + kBlocksPerWidening;
        __m256i acc_low[ROWS];
        __m256i acc_high[ROWS];
        some_blocks<ROWS>(tile, begin, end, q, q_stride, acc_low, acc_high);
#pragma GCC unroll 6
        for (int t = 0; t < ROWS; ++t) {
          put(acc + t * kTileRows, Dot::widen(acc_low[t]), begin == 0);
          put(acc + t * kTileRows + 8, Dot::widen(acc_high[t]), begin == 0);
        }
        begin = end;
      } while (begin < blocks);
    }
  }

  // One group after the other, its sums in registers, as in avx512.h. Only where a group needs no widening on the way,
  // or in_place has done it.
  static constexpr bool kHasGroupScales = true;
  static constexpr int kRowsOfGroups = kBlocksPerWidening * kBlockInputs > kMaxGroupInputs ? kRows : Dot::kRowsInPlace;

  template <int PLANES, int TOKENS, class Scale>
  static void groups(const TernaryProduct& p, const uint8_t* tile, const int8_t* q, const Scale* scales, int64_t token,
                     float* sums) {
    const int32_t* q_sum = p.q_sum + token * PLANES * p.groups;
    const float* x_scale = p.x_scale + token * p.groups;  // read with one plane
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t begin = group * p.group_blocks;
      const int64_t end = p.blocks - begin < p.group_blocks ? p.blocks : begin + p.group_blocks;
      prefetch_near(reinterpret_cast<const char*>(scales) + kScalesAheadBytes);
      if constexpr (PLANES * TOKENS <= Dot::kRowsInPlace) {
        one_group<PLANES, TOKENS>(tile, begin, end, q, p.q_stride, q_sum + group, x_scale + group, p.groups, scales,
                                  sums);
      } else {
        one_group_apart<PLANES, TOKENS>(tile, begin, end, q, p.q_stride, q_sum + group, x_scale + group, p.groups,
                                        scales, sums);
      }
      scales += kTileRows;
    }
  }

  template <int PLANES, int TOKENS, class Scale>
  __attribute__((always_inline)) static void one_group(const uint8_t* tile, int64_t begin, int64_t end, const int8_t* q,
                                                       int64_t q_stride, const int32_t* q_sum, const float* x_scale,
                                                       int64_t stride, const Scale* scale, float* sums) {
    __m256i low_i32x8[PLANES * TOKENS];
    __m256i high_i32x8[PLANES * TOKENS];
    some_blocks<PLANES * TOKENS>(tile, begin, end, q, q_stride, low_i32x8, high_i32x8);
    add_scaled<PLANES>(low_i32x8, high_i32x8, q_sum, x_scale, stride, Ymm::load(scale), Ymm::load(scale + 8), sums);
  }

  // A function of its own, as `block` is.
  template <int PLANES, int TOKENS, class Scale>
  __attribute__((noinline)) static void one_group_apart(const uint8_t* tile, int64_t begin, int64_t end,
                                                        const int8_t* q, int64_t q_stride, const int32_t* q_sum,
                                                        const float* x_scale, int64_t stride, const Scale* scale,
                                                        float* sums) {
    one_group<PLANES, TOKENS>(tile, begin, end, q, q_stride, q_sum, x_scale, stride, scale, sums);
  }

  // Many tokens (ternary_decoded.h): a piece of a tile is decoded once, into L1, for all of them. With few rows of q
  // decoding hides behind products; with many it takes ports from them.
  static constexpr int kDecodedRows = Dot::kDecodedRows;
  static constexpr int kDecodedTiles = 1;
  static constexpr int64_t kLeastDecodedRows = 12;
  static constexpr int64_t kPieceBlocks = kMaxGroupInputs / kBlockInputs;
  static constexpr int64_t kPieceBytes = kPieceBlocks * 4 * kBlockBytes;

  // Codes of `blocks` blocks, a byte each: [blocks][step p][64]. Returns whether none is 3.
  static bool decode(const uint8_t* packed, int64_t blocks, uint8_t* codes) {
    __m256i threes_u8x32 = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b) {
      prefetch_near(packed + b * kBlockBytes + kPrefetchBytes);
      for (int half = 0; half < 2; ++half) {
        const __m256i packed_u8x32 = load32(packed + b * kBlockBytes + 32 * half);
        threes_u8x32 =
            _mm256_or_si256(threes_u8x32, _mm256_and_si256(packed_u8x32, _mm256_srli_epi16(packed_u8x32, 1)));
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(codes + (4 * b + p) * kBlockBytes + 32 * half),
                             codes_of(packed_u8x32, p));
        }
      }
    }
    return _mm256_testz_si256(threes_u8x32, _mm256_set1_epi8(0x55));
  }

  // acc[ROWS][16], set or added to.
  template <int TILES, int ROWS>
  static void piece(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc, int64_t,
                    bool first) {
    static_assert(TILES == 1, "the driver asks for kDecodedTiles at most");
    __m256i low[ROWS];
    __m256i high[ROWS];
    Dot::piece(codes, blocks, q, q_stride, low, high);
#pragma GCC unroll 8
    for (int t = 0; t < ROWS; ++t) {
      put(acc + t * kTileRows, Dot::widen(low[t]), first);
      put(acc + t * kTileRows + 8, Dot::widen(high[t]), first);
    }
  }

  // A piece that is a group: its sums, scaled, are added to those of the groups before. ternary_driver.h, add_group,
  // has the order, and why int32 and float32 are exact.
  template <int PLANES, int TILES, int ROWS>
  static void piece_of_group(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride,
                             const DecodedGroup& group) {
    static_assert(TILES == 1, "the driver asks for kDecodedTiles at most");
    __m256i low[ROWS];
    __m256i high[ROWS];
    Dot::piece(codes, blocks, q, q_stride, low, high);
#pragma GCC unroll 8
    for (int t = 0; t < ROWS; ++t) {
      low[t] = Dot::widen(low[t]);
      high[t] = Dot::widen(high[t]);
    }
    add_scaled<PLANES>(low, high, group.q_sum, group.x_scale, group.stride, Ymm::load(group.scale),
                       Ymm::load(group.scale + 8), group.sums);
  }

  // Adds the sums of a group, times its scale, to sums[tokens][16]; q_sum and x_scale of row t are at t * stride.
  template <int PLANES, int ROWS>
  __attribute__((always_inline)) static void add_scaled(const __m256i (&low)[ROWS], const __m256i (&high)[ROWS],
                                                        const int32_t* q_sum, const float* x_scale, int64_t stride,
                                                        __m256 low_scale_f32x8, __m256 high_scale_f32x8, float* sums) {
#pragma GCC unroll 8
    for (int t = 0; t < ROWS; t += PLANES) {
      float* out = sums + t / PLANES * kTileRows;
      const __m256i q_sum_i32x8 = _mm256_set1_epi32(q_sum[t * stride]);
      __m256i low_i32x8 = _mm256_sub_epi32(low[t], q_sum_i32x8);
      __m256i high_i32x8 = _mm256_sub_epi32(high[t], q_sum_i32x8);
      __m256 low_factor_f32x8 = low_scale_f32x8;
      __m256 high_factor_f32x8 = high_scale_f32x8;
      if constexpr (PLANES == 2) {
        const __m256i lo_sum_i32x8 = _mm256_set1_epi32(q_sum[(t + 1) * stride]);
        low_i32x8 = _mm256_add_epi32(_mm256_slli_epi32(low_i32x8, 8), _mm256_sub_epi32(low[t + 1], lo_sum_i32x8));
        high_i32x8 = _mm256_add_epi32(_mm256_slli_epi32(high_i32x8, 8), _mm256_sub_epi32(high[t + 1], lo_sum_i32x8));
      } else {
        const __m256 x_scale_f32x8 = Ymm::set1(x_scale[t * stride]);
        low_factor_f32x8 = Ymm::mul(x_scale_f32x8, low_factor_f32x8);
        high_factor_f32x8 = Ymm::mul(x_scale_f32x8, high_factor_f32x8);
      }
      Ymm::store(out, Ymm::add(Ymm::load(out), Ymm::mul(_mm256_cvtepi32_ps(low_i32x8), low_factor_f32x8)));
      Ymm::store(out + 8, Ymm::add(Ymm::load(out + 8), Ymm::mul(_mm256_cvtepi32_ps(high_i32x8), high_factor_f32x8)));
    }
  }

  // Layout row: half a chunk is one ymm of one row; activations come in step order.
  template <int ROWS, int ASKS>
  static void row_sums(const uint8_t* row, int64_t chunks, const int8_t* q, int64_t q_stride,
                       const uint8_t* const* ahead, int32_t* acc) {
    constexpr int64_t kChunksPerWidening = Dot::kDotsPerWidening / 4;
    __m256i total_i32x8[ROWS];
    for (int t = 0; t < ROWS; ++t) total_i32x8[t] = _mm256_setzero_si256();
    for (int64_t begin = 0; begin < chunks; begin += kChunksPerWidening) {
      const int64_t end = chunks - begin < kChunksPerWidening ? chunks : begin + kChunksPerWidening;
      __m256i acc_low[ROWS];
      __m256i acc_high[ROWS];
      for (int t = 0; t < ROWS; ++t) {
        acc_low[t] = _mm256_setzero_si256();
        acc_high[t] = _mm256_setzero_si256();
      }
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const uint8_t* address = row + chunk * kBlockBytes;
        for (int ask = 0; ask < ASKS; ++ask) Ymm::prefetch_far(ahead[ask] + chunk * kBlockBytes);
        const int8_t* q_chunk = q + chunk * kChunkInputs;
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          const __m256i low_u8x32 = codes_of(load32(address), p);
          const __m256i high_u8x32 = codes_of(load32(address + 32), p);
          for (int t = 0; t < ROWS; ++t) {
            const int8_t* q_step = q_chunk + t * q_stride + p * kBlockBytes;
            acc_low[t] = Dot::dot(acc_low[t], low_u8x32, load32(q_step));
            acc_high[t] = Dot::dot(acc_high[t], high_u8x32, load32(q_step + 32));
          }
        }
      }
      for (int t = 0; t < ROWS; ++t) {
        const __m256i both_i32x8 = _mm256_add_epi32(Dot::widen(acc_low[t]), Dot::widen(acc_high[t]));
        total_i32x8[t] = _mm256_add_epi32(total_i32x8[t], both_i32x8);
      }
    }
    for (int t = 0; t < ROWS; ++t) acc[t] = Ymm::sum(total_i32x8[t]);
  }

  // Bytes of four columns, interleaved: lanes of rows[u] are rows 16*u .. 16*u + 7 (or + 8), four inputs wide.
  static void interleave(const uint8_t* const* column, int64_t offset, __m256i (&rows_u8x32)[4]) {
    const __m256i a_u8x32 = load32(column[0] + offset);
    const __m256i b_u8x32 = load32(column[1] + offset);
    const __m256i c_u8x32 = load32(column[2] + offset);
    const __m256i d_u8x32 = load32(column[3] + offset);
    const __m256i ab_low = _mm256_unpacklo_epi8(a_u8x32, b_u8x32);
    const __m256i ab_high = _mm256_unpackhi_epi8(a_u8x32, b_u8x32);
    const __m256i cd_low = _mm256_unpacklo_epi8(c_u8x32, d_u8x32);
    const __m256i cd_high = _mm256_unpackhi_epi8(c_u8x32, d_u8x32);
    rows_u8x32[0] = _mm256_unpacklo_epi16(ab_low, cd_low);
    rows_u8x32[1] = _mm256_unpackhi_epi16(ab_low, cd_low);
    rows_u8x32[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
    rows_u8x32[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
  }

  template <int ROWS>
  static void columns(const uint8_t* panel, const int32_t* columns, int64_t count, int64_t column_bytes, int64_t panels,
                      const int8_t* q, int64_t q_stride, int32_t* acc) {
    static_assert(kColumnsAtOnce == 8, "two interleaved fours");
    for (int64_t c = 0; c < count; c += kColumnsAtOnce) {
      const uint8_t* column[8];
      for (int i = 0; i < 8; ++i) column[i] = panel + columns[c + i] * column_bytes;
      const ColumnsAhead ahead(panel, columns, c, count, column_bytes, panels);
      for (int64_t half = 0; half < 2 * panels; ++half) {
        if (half % 2 == 0) {
          for (const uint8_t* next : ahead.column) Ymm::prefetch_far(next + half * 32);
        }
        __m256i first_u8x32[4];
        __m256i second_u8x32[4];
        interleave(column, half * 32, first_u8x32);
        interleave(column + 4, half * 32, second_u8x32);
        for (int t = 0; t < ROWS; ++t) {
          const __m256i first_q_i8x32 = broadcast4(q + t * q_stride + c);
          const __m256i second_q_i8x32 = broadcast4(q + t * q_stride + c + 4);
          int32_t* sums = acc + (t * panels + half / 2) * kPanelRows + half % 2 * 8;
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
              __m256i sum = Dot::dot(_mm256_setzero_si256(), codes_of(first_u8x32[u], p), first_q_i8x32);
              sum = Dot::dot(sum, codes_of(second_u8x32[u], p), second_q_i8x32);
              add_to(sums + 64 * p + 16 * u, Dot::widen(sum));
            }
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
