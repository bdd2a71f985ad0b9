// What the two AVX-512 kernels share: float32 x 16 for float_algorithms.h, and the inner loops of the
// ternary product on vpdpbusd, for every layout.
//
// Include this inside a kernel file's target region, like float_algorithms.h.
//
// Instruction: vpdpbusd zmm, acc_i32x16[i] += sum over j of code_u8x64[4i+j] * q_i8x64[4i+j].
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 unsigned (docs/layouts.md).
// Overflow:    vpdpbusd adds four products to an int32 lane without saturating in between. With
//              shifted codes |acc| <= K * 3 * 128 = 384 K <= 1.0e8. With codes in place (few rows of q)
//              the bounds of kMaxInFeatures and kMaxColumnInFeatures in kernel_table.h, for any byte.
//
// tile16. One 64-byte block is one zmm; lane i is row i, and the four activations of step p are broadcast:
//
//     block_u8x64   | row 0: j=0..3 | row 1: j=0..3 | ... | row 15: j=0..3 |     >> 2p, & 3
//     q_i8x64       | q[4p .. 4p+3] | q[4p .. 4p+3] | ... | q[4p .. 4p+3]  |     16 inputs = p 0..3
//     acc_i32x16    |     row 0     |     row 1     | ... |     row 15     |
//
// row. A chunk is one zmm of one row; the activations come in step order, 64 to a step:
//
//     chunk_u8x64   | word 0: j=0..3  | word 1: j=0..3     | ... | word 15: j=0..3      |
//     q_i8x64       | q[4p .. 4p+3]   | q[16+4p .. 16+4p+3]| ... | q[240+4p .. 240+4p+3]|
//     acc_i32x16    |             sixteen parts of the same row, added up at the end    |
//
// column. Bytes of four columns a, b, c, d are interleaved, then it is a step of tile16:
//
//     unpacklo_epi8 x 2, unpacklo_epi16    | a0 b0 c0 d0 | a1 b1 c1 d1 | ...  one row, four inputs each

namespace bitnet_ops {
namespace {

struct Avx512 {
  using F32 = __m512;
  using I32 = __m512i;
  static constexpr int kLanes = 16;
  // 4 x 6 accumulators + 4 rows + 1 activation = 29 of 32 registers.
  static constexpr int kLogitsRows = 4;
  static constexpr int kLogitsTokens = 6;
  // Three tokens of 2560 floats are 30 KB: a fourth would not stay in an L1 of 32 KB.
  static constexpr int kLogitsTokensStreamed = 3;
  static constexpr int64_t kTokenGroupBytes = 512 << 10;  // half of a 1 MB L2 (Zen 4; 2 MB on newer Intel)
  // 6 x 4 accumulators + 4 lanes + 1 scalar = 29 of 32 registers.
  static constexpr int kAttentionRows = 6;
  static constexpr int kAttentionRegisters = 4;

  static F32 zero() { return _mm512_setzero_ps(); }
  static F32 set1(float s) { return _mm512_set1_ps(s); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  __attribute__((always_inline)) static void prefetch_far(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }
  __attribute__((always_inline)) static void prefetch_near(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static F32 load(const BFloat16* p) {
    const __m256i half_u16x16 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_u16x16), 16));
  }
  static void load_even_odd(const BFloat16* p, F32& even, F32& odd) {
    const __m512i pair_u32x16 = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pair_u32x16, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pair_u32x16, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static F32 load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, F32 v) {
    // As from_float: integer rounding to even. vcvtneps2bf16 would flush subnormals to zero.
    const __m512i bits_u32x16 = _mm512_castps_si512(v);
    const __m512i kept_u32x16 = _mm512_and_si512(_mm512_srli_epi32(bits_u32x16, 16), _mm512_set1_epi32(1));
    const __m512i rounded_u32x16 =
        _mm512_add_epi32(bits_u32x16, _mm512_add_epi32(kept_u32x16, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high_u32x16 =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded_u32x16, 16), nan, _mm512_set1_epi32(kBFloat16NaN));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high_u32x16));
  }
  static void store(Float16* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static F32 load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F32 load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static F32 load_less(const int32_t* p, int32_t less) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(less)));
  }
  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static float fold_max(F32 v) { return _mm512_reduce_max_ps(v); }
  static F32 power_of_two(F32 v) {
    const __m512i exponent_u32x16 = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent_u32x16, _mm512_set1_epi32(kOneBits)));
  }
  static F32 zero_below(F32 x, F32 limit, F32 v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
  }
  static F32 choose_at_most(F32 x, F32 limit, F32 a, F32 b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ), b, a);
  }

  static float fold(F32 v) {
    const __m256 f32x8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 f32x4 = _mm_add_ps(_mm256_castps256_ps128(f32x8), _mm256_extractf128_ps(f32x8, 1));
    const __m128 f32x2 = _mm_add_ps(f32x4, _mm_movehl_ps(f32x4, f32x4));
    return _mm_cvtss_f32(_mm_add_ss(f32x2, _mm_movehdup_ps(f32x2)));
  }

  static void fold_all(F32 (&v)[1], float* out) { *out = fold(v[0]); }
  // Four folds at once: from four lanes on, the four vectors are transposed rather than reduced.
  static void fold_all(F32 (&v)[4], float* out) {
    __m128 f32x4[4];
    for (int i = 0; i < 4; ++i) {
      const __m256 f32x8 = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
      f32x4[i] = _mm_add_ps(_mm256_castps256_ps128(f32x8), _mm256_extractf128_ps(f32x8, 1));
    }
    // [a0+a2, a1+a3, b0+b2, b1+b3] and the same for c, d
    const __m128 ab_f32x4 = _mm_add_ps(_mm_movelh_ps(f32x4[0], f32x4[1]), _mm_movehl_ps(f32x4[1], f32x4[0]));
    const __m128 cd_f32x4 = _mm_add_ps(_mm_movelh_ps(f32x4[2], f32x4[3]), _mm_movehl_ps(f32x4[3], f32x4[2]));
    const __m128 even_f32x4 = _mm_shuffle_ps(ab_f32x4, cd_f32x4, 0x88);
    const __m128 odd_f32x4 = _mm_shuffle_ps(ab_f32x4, cd_f32x4, 0xdd);
    _mm_storeu_ps(out, _mm_add_ps(even_f32x4, odd_f32x4));
  }

  static I32 zero_i32() { return _mm512_setzero_si512(); }
  static int32_t sum(I32 v) { return _mm512_reduce_add_epi32(v); }
  static I32 max_magnitude(I32 m, F32 v) {
    return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(kAbsMask)));
  }
  static int32_t highest(I32 v) { return _mm512_reduce_max_epi32(v); }
  static I32 quantize(F32 v, F32 s, int8_t* q, I32 sum) {
    // Rounding is explicit, half to even, whatever the caller's MXCSR says.
    const __m512i rounded_i32x16 =
        _mm512_cvt_roundps_epi32(_mm512_mul_ps(v, s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i q_i8x16 = _mm512_cvtsepi32_epi8(rounded_i32x16);  // saturates to [-128, 127]
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), q_i8x16);
    return _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(q_i8x16));
  }
};

// Four activations in every lane; the compiler folds the load into vpdpbusd's broadcast operand.
inline __m512i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

// acc += code * q, four bytes of q for every lane: one instruction that reads and broadcasts them itself. From
// the intrinsic GCC 12 makes a broadcast of its own and copies accumulators back and forth, which costs
// a tenth to a fifth of the time at two to four rows of q (bench/LOG.md).
inline void dot(__m512i& acc_i32x16, __m512i code_u8x64, const int8_t* q) {
#if defined(__SANITIZE_ADDRESS__)  // which sees what an intrinsic reads, not what assembly does
  acc_i32x16 = _mm512_dpbusd_epi32(acc_i32x16, code_u8x64, broadcast4(q));
#else
  struct __attribute__((packed, may_alias)) Four {
    int32_t bytes;
  };
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc_i32x16) : "v"(code_u8x64), "m"(*reinterpret_cast<const Four*>(q)));
#endif
}

// The same with four bytes of q that are loaded already, for several products.
inline void dot(__m512i& acc_i32x16, __m512i code_u8x64, __m512i q_i8x64) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc_i32x16) : "v"(code_u8x64), "v"(q_i8x64));
}

inline __m512i load64(const void* p) { return _mm512_loadu_si512(p); }

inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// About 100 ns of one core's stream (40 GB/s): what a miss to memory takes.
constexpr int64_t kPrefetchBytes = 4096;

// tile16: a byte is four codes. In place they are 4^p times too large, each p needs its own accumulator.
struct Tile16Codes {
  static constexpr int kSteps = 4;
  static constexpr bool kHasGroupScales = true;

  using Block = __m512i;

  static Block load(const uint8_t* block) { return load64(block); }
  static __m512i in_place(Block block_u8x64, int p) {
    return _mm512_and_si512(block_u8x64, _mm512_set1_epi8(static_cast<char>(0x03 << (2 * p))));
  }
  static __m512i shifted(Block block_u8x64, int p) {
    // A 16-bit shift moves bits across bytes, but only into places that the mask clears.
    return _mm512_and_si512(_mm512_srli_epi16(block_u8x64, static_cast<unsigned>(2 * p)), _mm512_set1_epi8(0x03));
  }
  // Of a sum of codes in place.
  static __m512i in_true_size(__m512i acc_i32x16, int p) {
    return _mm512_srai_epi32(acc_i32x16, static_cast<unsigned>(2 * p));
  }
};

// Layouts of tiles. Codes says how a byte holds its codes.
template <class Codes>
struct TileBlocks {
  static constexpr int kSteps = Codes::kSteps;
  static constexpr int64_t kInputs = 4 * kSteps;
  // 2 x 12 accumulators + 2 blocks + 2 decoded + 1 mask = 29 of 32 registers. Twelve rows of q pay for
  // one decoding; 24 chains cover the latency of vpdpbusd (4 or 5 cycles, up to two a cycle).
  static constexpr int kTiles = 2;
  static constexpr int kRows = 12;
  // Memory, not arithmetic, limits up to four rows; one tile at a time is then one stream, which
  // reads 1.5 to 1.8 times faster than two side by side (bench/LOG.md).
  static constexpr int kRowsStreamed = 4;
  static constexpr bool kHasGroupScales = Codes::kHasGroupScales;
  static constexpr int kRowsOfGroups = 16 / kSteps;       // 16 accumulators
  static constexpr int64_t kQBytes = int64_t{512} << 10;  // half of a 1 MB L2 (Zen 4; 2 MB on newer Intel)

  template <int TILES, int ROWS>
  static void block(const uint8_t* tile, int64_t tile_bytes, int64_t blocks, const int8_t* q, int64_t q_stride,
                    int32_t* acc) {
    if constexpr (TILES == 1 && ROWS * kSteps <= 16) {  // accumulators
      block_in_place<ROWS>(tile, blocks, q, q_stride, acc);
    } else {
      block_shifted<TILES, ROWS>(tile, tile_bytes, blocks, q, q_stride, acc);
    }
  }

  // Few rows: codes are multiplied where they stand in the byte, each step into its own accumulator.
  // No shift inside the loop, and four chains for every row; the shifts at the end are exact. One row has two sets of
  // them, for even and odd blocks: with one, a block cannot take less time than a vpdpbusd.
  template <int ROWS>
  static void block_in_place(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    constexpr int kSets = ROWS == 1 ? 2 : 1;
    __m512i acc_i32x16[kSets][ROWS][kSteps];
#pragma GCC unroll 2
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 4
      for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 5
        for (int p = 0; p < kSteps; ++p) acc_i32x16[set][t][p] = _mm512_setzero_si512();
      }
    }
    if (stream_ahead.far_bytes != 0) {
      add_blocks(tile, blocks, q, q_stride, kStreamThroughL2, acc_i32x16);
    } else {
      add_blocks(tile, blocks, q, q_stride, kStreamToL1, acc_i32x16);
    }
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; ++t) {
      if constexpr (kSets == 2) {
#pragma GCC unroll 5
        for (int p = 0; p < kSteps; ++p) {
          acc_i32x16[0][t][p] = _mm512_add_epi32(acc_i32x16[0][t][p], acc_i32x16[1][t][p]);
        }
      }
      _mm512_storeu_si512(acc + t * kTileRows, add_steps(acc_i32x16[0][t]));
    }
  }

  // Inlined, because distances that are no constants cost base 3 a tenth of what it reads from cache.
  template <int SETS, int ROWS>
  __attribute__((always_inline)) static void add_blocks(const uint8_t* tile, int64_t blocks, const int8_t* q,
                                                        int64_t q_stride, const StreamAhead ahead,
                                                        __m512i (&acc_i32x16)[SETS][ROWS][kSteps]) {
    int64_t b = 0;
    for (; b + SETS <= blocks; b += SETS) {
#pragma GCC unroll 2
      for (int set = 0; set < SETS; ++set) add_block<ROWS>(tile, q, q_stride, b + set, ahead, acc_i32x16[set]);
    }
    if (b < blocks) add_block<ROWS>(tile, q, q_stride, b, ahead, acc_i32x16[0]);
  }

  // block_in_place and add_group for one group after the other, the sums in registers all the while. A group is 8
  // blocks or so; a call for each, and the way through memory, cost 1 to 3 % of a token (bench/LOG.md).
  //
  // All integers are exact (add_group says why), so they are put together before the conversion: the same bits.
  template <int PLANES, int TOKENS, class Scale>
  static void groups(const TernaryProduct& p, const uint8_t* tile, const int8_t* q, const Scale* scales, int64_t token,
                     float* sums) {
    constexpr int kRowsHere = PLANES * TOKENS;
    const StreamAhead ahead = stream_ahead;
    __m512 sum_f32x16[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) sum_f32x16[t] = _mm512_setzero_ps();
    const int32_t* q_sum = p.q_sum + token * PLANES * p.groups;
    const float* x_scale = p.x_scale + token * p.groups;  // read with one plane
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t first = group * p.group_blocks;
      const int64_t end = p.blocks - first < p.group_blocks ? p.blocks : first + p.group_blocks;
      prefetch_near(reinterpret_cast<const char*>(scales) + kScalesAheadBytes);
      __m512i acc_i32x16[kRowsHere][kSteps];
#pragma GCC unroll 4
      for (int t = 0; t < kRowsHere; ++t) {
#pragma GCC unroll 5
        for (int step = 0; step < kSteps; ++step) acc_i32x16[t][step] = _mm512_setzero_si512();
      }
      for (int64_t b = first; b < end; ++b) add_block<kRowsHere>(tile, q, p.q_stride, b, ahead, acc_i32x16);
      const __m512 scale_f32x16 = Avx512::load(scales);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const int32_t* of_token = q_sum + t * PLANES * p.groups + group;
        __m512i group_i32x16 = _mm512_sub_epi32(add_steps(acc_i32x16[t * PLANES]), _mm512_set1_epi32(of_token[0]));
        __m512 factor_f32x16 = scale_f32x16;
        if constexpr (PLANES == 2) {
          const __m512i low_i32x16 =
              _mm512_sub_epi32(add_steps(acc_i32x16[t * PLANES + 1]), _mm512_set1_epi32(of_token[p.groups]));
          group_i32x16 = _mm512_add_epi32(_mm512_slli_epi32(group_i32x16, 8), low_i32x16);
        } else {
          factor_f32x16 = _mm512_mul_ps(_mm512_set1_ps(x_scale[t * p.groups + group]), scale_f32x16);
        }
        sum_f32x16[t] = _mm512_add_ps(sum_f32x16[t], _mm512_mul_ps(_mm512_cvtepi32_ps(group_i32x16), factor_f32x16));
      }
      scales += kTileRows;
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) _mm512_storeu_ps(sums + t * kTileRows, sum_f32x16[t]);
  }

  template <int ROWS>
  static void add_block(const uint8_t* tile, const int8_t* q, int64_t q_stride, int64_t b, const StreamAhead ahead,
                        __m512i (&acc_i32x16)[ROWS][kSteps]) {
    const uint8_t* address = tile + b * kBlockBytes;
    ask_ahead<Avx512>(address, ahead);
    const typename Codes::Block codes = Codes::load(address);
    const int8_t* q_block = q + b * kInputs;
#pragma GCC unroll 5
    for (int p = 0; p < kSteps; ++p) {
      const __m512i code_u8x64 = Codes::in_place(codes, p);
#pragma GCC unroll 4
      for (int t = 0; t < ROWS; ++t) dot(acc_i32x16[t][p], code_u8x64, q_block + t * q_stride + 4 * p);
    }
  }

  static __m512i add_steps(const __m512i (&acc_i32x16)[kSteps]) {
    __m512i sum_i32x16 = acc_i32x16[0];
#pragma GCC unroll 5
    for (int p = 1; p < kSteps; ++p) {
      sum_i32x16 = _mm512_add_epi32(sum_i32x16, Codes::in_true_size(acc_i32x16[p], p));
    }
    return sum_i32x16;
  }

  // Tiles are read side by side, so the bytes to come after the end of one are not the next in memory
  // (another tile of this group is there) but those after the whole group.
  template <int TILES>
  static void prefetch(const uint8_t* tile, int64_t tile_bytes, int64_t offset) {
    int64_t ahead = offset + kPrefetchBytes;
    ahead += ahead < tile_bytes ? 0 : (TILES - 1) * tile_bytes;
    for (int i = 0; i < TILES; ++i) prefetch_near(tile + i * tile_bytes + ahead);
  }

  template <int TILES, int ROWS>
  static void block_shifted(const uint8_t* tile, int64_t tile_bytes, int64_t blocks, const int8_t* q, int64_t q_stride,
                            int32_t* acc) {
    __m512i acc_i32x16[ROWS][TILES];
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) acc_i32x16[t][i] = _mm512_setzero_si512();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      prefetch<TILES>(tile, tile_bytes, b * kBlockBytes);
      typename Codes::Block codes[TILES];
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) codes[i] = Codes::load(tile + i * tile_bytes + b * kBlockBytes);
      const int8_t* q_block = q + b * kInputs;
      if (ROWS > 8 && b % 4 == 0) {
#pragma GCC unroll 12
        for (int t = 0; t < ROWS; ++t) prefetch_near(q_block + t * q_stride + 256);
      }
#pragma GCC unroll 5
      for (int p = 0; p < kSteps; ++p) {
        __m512i code_u8x64[TILES];
#pragma GCC unroll 2
        for (int i = 0; i < TILES; ++i) code_u8x64[i] = Codes::shifted(codes[i], p);
#pragma GCC unroll 12
        for (int t = 0; t < ROWS; ++t) {
          const int8_t* q_four = q_block + t * q_stride + 4 * p;
#pragma GCC unroll 2
          for (int i = 0; i < TILES; ++i) dot(acc_i32x16[t][i], code_u8x64[i], q_four);
        }
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) {
        _mm512_storeu_si512(acc + (t * TILES + i) * kTileRows, acc_i32x16[t][i]);
      }
    }
  }

  // Many tokens (ternary_decoded.h). What is left in the loop are loads and products: 12 rows of q and two lines of
  // codes are loaded for 24 products, which run two a cycle, as loads do.
  static constexpr int kDecodedRows = 12;
  static constexpr int kDecodedTiles = 2;
  static constexpr int64_t kLeastDecodedRows = 24;
  // Codes of two tiles are 16 or 20 KB: with as many inputs of 12 rows of q less than an L1 of 32 KB.
  static constexpr int64_t kPieceBlocks = 32;
  static constexpr int64_t kPieceBytes = kPieceBlocks * kSteps * kBlockBytes;

  // Codes of `blocks` blocks, a byte each: [blocks][kSteps][64].
  static bool decode(const uint8_t* packed, int64_t blocks, uint8_t* codes) {
    for (int64_t b = 0; b < blocks; ++b) {
      prefetch_near(packed + b * kBlockBytes + kPrefetchBytes);
      const typename Codes::Block block = Codes::load(packed + b * kBlockBytes);
#pragma GCC unroll 5
      for (int p = 0; p < kSteps; ++p) {
        _mm512_store_si512(codes + (b * kSteps + p) * kBlockBytes, Codes::shifted(block, p));
      }
    }
    return true;
  }

  // Adds codes * q to acc.
  template <int TILES, int ROWS>
  __attribute__((always_inline)) static void add_piece(const uint8_t* codes, int64_t blocks, const int8_t* q,
                                                       int64_t q_stride, __m512i (&acc_i32x16)[ROWS][TILES]) {
    // An address is that of every third row and 0, 1 or 2 times the distance of rows: so pointers fit the registers.
    constexpr int kPointers = (ROWS + 2) / 3;
    const int8_t* rows[kPointers];
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) rows[i] = q + 3 * i * q_stride;
    for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 5
      for (int p = 0; p < kSteps; ++p) {
        __m512i code_u8x64[TILES];
#pragma GCC unroll 2
        for (int i = 0; i < TILES; ++i) code_u8x64[i] = load64(codes + i * kPieceBytes + p * kBlockBytes);
#pragma GCC unroll 12
        for (int t = 0; t < ROWS; ++t) {
          const __m512i q_i8x64 = broadcast4(rows[t / 3] + t % 3 * q_stride + 4 * p);
#pragma GCC unroll 2
          for (int i = 0; i < TILES; ++i) dot(acc_i32x16[t][i], code_u8x64[i], q_i8x64);
        }
      }
      codes += kSteps * kBlockBytes;
#pragma GCC unroll 4
      for (int i = 0; i < kPointers; ++i) {
        rows[i] += kInputs;
        __asm__("" : "+r"(rows[i]));  // or GCC makes twelve pointers of them again
      }
    }
  }

  template <int TILES, int ROWS>
  static void piece(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc,
                    int64_t tile_stride, bool first) {
    __m512i acc_i32x16[ROWS][TILES];
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) {
        acc_i32x16[t][i] = first ? _mm512_setzero_si512() : load64(acc + i * tile_stride + t * kTileRows);
      }
    }
    add_piece(codes, blocks, q, q_stride, acc_i32x16);
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) _mm512_store_si512(acc + i * tile_stride + t * kTileRows, acc_i32x16[t][i]);
    }
  }

  // A piece that is a group: its sums, scaled, are added to those of the groups before. ternary_driver.h, add_group,
  // has the order, and why int32 and float32 are exact.
  template <int PLANES, int TILES, int ROWS>
  static void piece_of_group(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride,
                             const DecodedGroup& group) {
    __m512i acc_i32x16[ROWS][TILES];
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) {
      // From minus the sums of q, so that codes become weights. Negated as a vector: a number that is in memory is
      // broadcast by the load.
      const __m512i less_i32x16 =
          _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(group.q_sum[t * group.stride]));
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) acc_i32x16[t][i] = less_i32x16;
    }
    add_piece(codes, blocks, q, q_stride, acc_i32x16);
    __m512 scale_f32x16[TILES];
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i) scale_f32x16[i] = Avx512::load(group.scale + i * kTileRows);
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; t += PLANES) {
#pragma GCC unroll 2
      for (int i = 0; i < TILES; ++i) {
        float* out = group.sums + i * group.tile_stride + t / PLANES * kTileRows;
        __m512i sum_i32x16 = acc_i32x16[t][i];
        __m512 factor_f32x16 = scale_f32x16[i];
        if constexpr (PLANES == 2) {
          sum_i32x16 = _mm512_add_epi32(_mm512_slli_epi32(sum_i32x16, 8), acc_i32x16[t + 1][i]);
        } else {
          factor_f32x16 = _mm512_mul_ps(_mm512_set1_ps(group.x_scale[t * group.stride]), factor_f32x16);
        }
        const __m512 scaled_f32x16 = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_i32x16), factor_f32x16);
        Avx512::store(out, _mm512_add_ps(Avx512::load(out), scaled_f32x16));
      }
    }
  }
};

// Layouts that skip: one row, or eight columns, at a time.
struct Sparse {
  template <int ROWS, int ASKS>
  static void row_sums(const uint8_t* row, int64_t chunks, const int8_t* q, int64_t q_stride,
                       const uint8_t* const* ahead, int32_t* acc) {
    __m512i acc_i32x16[ROWS][4];
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) acc_i32x16[t][p] = _mm512_setzero_si512();
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int ask = 0; ask < ASKS; ++ask) Avx512::prefetch_far(ahead[ask] + chunk * kBlockBytes);
      const __m512i chunk_u8x64 = load64(row + chunk * kBlockBytes);
      const int8_t* q_chunk = q + chunk * kChunkInputs;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const __m512i code_u8x64 = Tile16Codes::in_place(chunk_u8x64, p);
#pragma GCC unroll 4
        for (int t = 0; t < ROWS; ++t) {
          acc_i32x16[t][p] =
              _mm512_dpbusd_epi32(acc_i32x16[t][p], code_u8x64, load64(q_chunk + t * q_stride + p * kBlockBytes));
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; ++t) {
      acc[t] = _mm512_reduce_add_epi32(TileBlocks<Tile16Codes>::add_steps(acc_i32x16[t]));
    }
  }

  // Bytes of four columns, interleaved: lane i of steps[u] is row 16*u + i, four inputs wide.
  static void interleave(const uint8_t* const (&column)[4], int64_t offset, __m512i (&rows_u8x64)[4]) {
    const __m512i a_u8x64 = load64(column[0] + offset);
    const __m512i b_u8x64 = load64(column[1] + offset);
    const __m512i c_u8x64 = load64(column[2] + offset);
    const __m512i d_u8x64 = load64(column[3] + offset);
    const __m512i ab_low = _mm512_unpacklo_epi8(a_u8x64, b_u8x64);
    const __m512i ab_high = _mm512_unpackhi_epi8(a_u8x64, b_u8x64);
    const __m512i cd_low = _mm512_unpacklo_epi8(c_u8x64, d_u8x64);
    const __m512i cd_high = _mm512_unpackhi_epi8(c_u8x64, d_u8x64);
    rows_u8x64[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    rows_u8x64[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    rows_u8x64[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    rows_u8x64[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
  }

  // Sums stay 4^p times too large until all columns have passed.
  template <int ROWS>
  static void columns(const uint8_t* panel, const int32_t* columns, int64_t count, int64_t column_bytes, int64_t panels,
                      const int8_t* q, int64_t q_stride, int32_t* acc) {
    static_assert(kColumnsAtOnce == 8, "two interleaved fours");
    for (int64_t c = 0; c < count; c += kColumnsAtOnce) {
      const uint8_t* column[2][4];
      for (int i = 0; i < 8; ++i) column[i / 4][i % 4] = panel + columns[c + i] * column_bytes;
      const ColumnsAhead ahead(panel, columns, c, count, column_bytes, panels);
      for (int64_t n = 0; n < panels; ++n) {
        for (const uint8_t* next : ahead.column) Avx512::prefetch_far(next + n * kBlockBytes);
        __m512i first_u8x64[4];
        __m512i second_u8x64[4];
        interleave(column[0], n * kBlockBytes, first_u8x64);
        interleave(column[1], n * kBlockBytes, second_u8x64);
        for (int t = 0; t < ROWS; ++t) {
          const __m512i first_q_i8x64 = broadcast4(q + t * q_stride + c);
          const __m512i second_q_i8x64 = broadcast4(q + t * q_stride + c + 4);
          int32_t* sums = acc + (t * panels + n) * kPanelRows;
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
            const __m512i mask_u8x64 = _mm512_set1_epi8(static_cast<char>(0x03 << (2 * p)));
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
              int32_t* place = sums + 64 * p + 16 * u;
              __m512i sum_i32x16 = load64(place);
              sum_i32x16 = _mm512_dpbusd_epi32(sum_i32x16, _mm512_and_si512(first_u8x64[u], mask_u8x64), first_q_i8x64);
              sum_i32x16 =
                  _mm512_dpbusd_epi32(sum_i32x16, _mm512_and_si512(second_u8x64[u], mask_u8x64), second_q_i8x64);
              _mm512_storeu_si512(place, sum_i32x16);
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < ROWS * panels * 4; ++i) {
      for (int64_t r = 0; r < 64; ++r) acc[64 * i + r] >>= 2 * (i % 4);
    }
  }
};

// tile_sums.h: four lines of codes, then a product for each row of q.
struct Avx512Sums {
  template <class Codes>
  static constexpr int32_t kExcess = Codes::kZero;
  static constexpr int kRows = 12;  // as many chains, which cover the latency of vpdpbusd

  template <int P, class Codes>
  static __m512i code(Codes codes, const uint8_t* block) {
    return reinterpret_cast<__m512i>(CodesIn<64>::line<P>(codes, block));
  }

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const StreamAhead ahead = stream_ahead;
    __m512i acc_i32x16[ROWS];
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) acc_i32x16[t] = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * Codes::kLines * kBlockBytes;
      const __m512i code_u8x64[4] = {code<0>(Codes{}, block), code<1>(Codes{}, block), code<2>(Codes{}, block),
                                     code<3>(Codes{}, block)};
      const int8_t* q_block = q + b * kBlockInputs;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        if (p < Codes::kLines) ask_ahead<Avx512>(block + p * kBlockBytes, ahead);
#pragma GCC unroll 12
        for (int t = 0; t < ROWS; ++t) dot(acc_i32x16[t], code_u8x64[p], q_block + t * q_stride + 4 * p);
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < ROWS; ++t) _mm512_storeu_si512(acc + t * kTileRows, acc_i32x16[t]);
  }
};

}  // namespace
}  // namespace bitnet_ops
