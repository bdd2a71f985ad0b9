// The loops of the ternary product around sdot, which neon_dotprod.cpp draws: four rows to a register,
// four inputs to an instruction. neon_i8mm.cpp uses them where tokens are few.
//
// Include this inside a kernel file's target region, after neon.h and neon_sparse.h.

#if defined(__clang__) && !defined(__apple_build_version__) && __clang_major__ < 16
#error "clang before 16 offers dotprod and i8mm only to whole files: use a newer one, or GCC"
#endif

namespace bitnet_ops {
namespace {

struct Sdot {
  static int32x4_t dot(int32x4_t acc_i32x4, int8x16_t code_i8x16, int8x16_t q_i8x16) {
    return vdotq_s32(acc_i32x4, code_i8x16, q_i8x16);
  }

  static int32x4_t dot_columns(int32x4_t acc_i32x4, int8x16_t first_i8x16, int8x16_t second_i8x16, int8x8_t q_i8x8) {
    return vdotq_lane_s32(vdotq_lane_s32(acc_i32x4, first_i8x16, q_i8x8, 0), second_i8x16, q_i8x8, 1);
  }
};

struct SdotLoops : NeonSparse<Sdot> {
  static constexpr int64_t kInputs = kBlockInputs;
  static constexpr int kTiles = 1;
  static constexpr int kRowsStreamed = 0;  // nothing to choose: kTiles is 1
  static constexpr bool kHasGroupScales = true;
  static constexpr int kRowsOfGroups = 0;
  static constexpr int kDecodedRows = 0;
  static constexpr int64_t kQBytes = kQBytesInL2;
  // Half a tile: 10 x 2 accumulators + 8 codes + 1 activation = 29 of 32 registers. Decoding then costs 12
  // instructions for 80 products; a whole tile and five rows of q would need 24.
  static constexpr int kRows = 10;
  // 2 x 12 accumulators + 2 activations + 1 quarter of a block + 1 code + 3 masks = 31 of 32 registers.
  static constexpr int kRowsInPlace = 2;

  template <int TILES, int ROWS>
  static void block(const uint8_t* tile, int64_t, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    static_assert(TILES == 1, "the driver asks for kTiles at most");
    if constexpr (ROWS <= kRowsInPlace) {
      block_in_place<ROWS>(tile, blocks, q, q_stride, acc);
    } else {
      block_shifted<ROWS>(tile, blocks, q, q_stride, acc);
      block_shifted<ROWS>(tile + 2 * kQuarterBytes, blocks, q, q_stride, acc + 2 * kQuarterRows);
    }
  }

  // Few rows of q: codes of p = 1 and 2 are multiplied where they stand in the byte, 4^p times too large,
  // into accumulators of their own: one instruction decodes a code instead of two, and twelve chains
  // a row cover the latency of sdot (3 cycles, four a cycle on Apple M1). Codes of p = 3 would be
  // negative there, but a shift alone decodes them, so they share the accumulators of p = 0.
  template <int ROWS>
  static void block_in_place(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const uint8x16_t mask1_u8x16 = vdupq_n_u8(0x03 << 2);
    const uint8x16_t mask2_u8x16 = vdupq_n_u8(0x03 << 4);
    int32x4_t acc_i32x4[ROWS][4];  // p = 0 and 3
    int32x4_t acc1_i32x4[ROWS][4];
    int32x4_t acc2_i32x4[ROWS][4];
#pragma GCC unroll 10
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc_i32x4[t][i] = acc1_i32x4[t][i] = acc2_i32x4[t][i] = vdupq_n_s32(0);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* address = tile + b * kBlockBytes;
      prefetch_near(address + kPrefetchBytes);
      int8x16_t q_i8x16[ROWS];
#pragma GCC unroll 10
      for (int t = 0; t < ROWS; ++t) q_i8x16[t] = vld1q_s8(q + t * q_stride + b * kBlockInputs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        keep_load_order();
        const uint8x16_t block_u8x16 = vld1q_u8(address + i * kQuarterBytes);
        const int8x16_t code0_i8x16 = codes<0>(block_u8x16);
        const int8x16_t code1_i8x16 = vreinterpretq_s8_u8(vandq_u8(block_u8x16, mask1_u8x16));
        const int8x16_t code2_i8x16 = vreinterpretq_s8_u8(vandq_u8(block_u8x16, mask2_u8x16));
        const int8x16_t code3_i8x16 = codes<3>(block_u8x16);
#pragma GCC unroll 10
        for (int t = 0; t < ROWS; ++t) {
          acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code0_i8x16, q_i8x16[t], 0);
          acc1_i32x4[t][i] = vdotq_laneq_s32(acc1_i32x4[t][i], code1_i8x16, q_i8x16[t], 1);
          acc2_i32x4[t][i] = vdotq_laneq_s32(acc2_i32x4[t][i], code2_i8x16, q_i8x16[t], 2);
          acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code3_i8x16, q_i8x16[t], 3);
        }
      }
    }
#pragma GCC unroll 10
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // Exact: every term of these sums is a multiple of 4 or 16.
        const int32x4_t sum_i32x4 = vsraq_n_s32(vsraq_n_s32(acc_i32x4[t][i], acc1_i32x4[t][i], 2), acc2_i32x4[t][i], 4);
        vst1q_s32(acc + t * kTileRows + i * kQuarterRows, sum_i32x4);
      }
    }
  }

  // More rows of q: the codes of half a tile stay in registers while they pass.
  template <int ROWS>
  static void block_shifted(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    constexpr int kQuarters = 2;
    int32x4_t acc_i32x4[ROWS][kQuarters];
#pragma GCC unroll 10
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < kQuarters; ++i) acc_i32x4[t][i] = vdupq_n_s32(0);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* address = tile + b * kBlockBytes;
      prefetch_near(address + kPrefetchBytes);
      int8x16_t code_i8x16[kQuarters][4];
#pragma GCC unroll 2
      for (int i = 0; i < kQuarters; ++i) {
        const uint8x16_t block_u8x16 = vld1q_u8(address + i * kQuarterBytes);
        code_i8x16[i][0] = codes<0>(block_u8x16);
        code_i8x16[i][1] = codes<1>(block_u8x16);
        code_i8x16[i][2] = codes<2>(block_u8x16);
        code_i8x16[i][3] = codes<3>(block_u8x16);
      }
#pragma GCC unroll 10
      for (int t = 0; t < ROWS; ++t) {
        keep_load_order();
        const int8x16_t q_i8x16 = vld1q_s8(q + t * q_stride + b * kBlockInputs);
#pragma GCC unroll 2
        for (int i = 0; i < kQuarters; ++i) {
          acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code_i8x16[i][0], q_i8x16, 0);
          acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code_i8x16[i][1], q_i8x16, 1);
          acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code_i8x16[i][2], q_i8x16, 2);
          acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code_i8x16[i][3], q_i8x16, 3);
        }
      }
    }
#pragma GCC unroll 10
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < kQuarters; ++i) vst1q_s32(acc + t * kTileRows + i * kQuarterRows, acc_i32x4[t][i]);
    }
  }
};

// tile_sums.h
struct SdotSums {
  template <class Codes>
  static constexpr int32_t kExcess = 0;
  static constexpr int kRows = 4;  // 4 x 4 accumulators + 4 activations + 4 codes + 4 masks = 28 of 32 registers

  template <class Codes, int ROWS>
  static void sums(const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    int32x4_t acc_i32x4[ROWS][4];
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc_i32x4[t][i] = vdupq_n_s32(0);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block = codes + b * Codes::kLines * kBlockBytes;
      int8x16_t q_i8x16[ROWS];
#pragma GCC unroll 4
      for (int t = 0; t < ROWS; ++t) q_i8x16[t] = vld1q_s8(q + t * q_stride + b * kBlockInputs);
      step<0, Codes, ROWS>(block, q_i8x16, acc_i32x4);
      step<1, Codes, ROWS>(block, q_i8x16, acc_i32x4);
      step<2, Codes, ROWS>(block, q_i8x16, acc_i32x4);
      step<3, Codes, ROWS>(block, q_i8x16, acc_i32x4);
    }
#pragma GCC unroll 4
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) vst1q_s32(acc + t * kTileRows + i * kQuarterRows, acc_i32x4[t][i]);
    }
  }

 private:
  // Inputs 4P .. 4P+3 of a block.
  template <int P, class Codes, int ROWS>
  static void step(const uint8_t* block, const int8x16_t (&q_i8x16)[ROWS], int32x4_t (&acc_i32x4)[ROWS][4]) {
    if (P < Codes::kLines) ask_ahead<Neon>(block + P * kBlockBytes, kStreamThroughL2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int8x16_t code_i8x16 = number_of<P>(Codes{}, block + i * kQuarterBytes);
#pragma GCC unroll 4
      for (int t = 0; t < ROWS; ++t) {
        acc_i32x4[t][i] = vdotq_laneq_s32(acc_i32x4[t][i], code_i8x16, q_i8x16[t], P);
      }
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
