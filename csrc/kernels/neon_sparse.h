// The inner loops of layouts row and column (sparse_order.h, bitnet_ops/packing.py), around the one step in
// which the NEON kernels differ. Dot provides
//     dot(acc, code, q)                    adds sixteen products to the lanes of acc, four to each
//     dot_columns(acc, first, second, q)   lane i of acc is row i: adds its four codes in `first` times
//                                          q[0 .. 3] and its four in `second` times q[4 .. 7]
//
// Include this inside a kernel file's target region, after ternary_driver.h and neon.h.

namespace bitnet_ops {
namespace {

template <class Dot>
struct NeonSparse {
  // Layout row: a quarter of a chunk is one register of one row; activations come in step order.
  // At most 4 x 4 accumulators.
  template <int ROWS, int ASKS>
  static void row_sums(const uint8_t* row, int64_t chunks, const int8_t* q, int64_t q_stride,
                       const uint8_t* const* ahead, int32_t* acc) {
    int32x4_t acc_i32x4[ROWS][4];
    for (int t = 0; t < ROWS; ++t) {
      for (int i = 0; i < 4; ++i) acc_i32x4[t][i] = vdupq_n_s32(0);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int ask = 0; ask < ASKS; ++ask) Neon::prefetch_far(ahead[ask] + chunk * kBlockBytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t block_u8x16 = vld1q_u8(row + chunk * kBlockBytes + i * kQuarterBytes);
        const int8_t* q_quarter = q + chunk * kChunkInputs + i * kQuarterBytes;
        for (int t = 0; t < ROWS; ++t) {
          const int8_t* q_row = q_quarter + t * q_stride;
          int32x4_t sum_i32x4 = acc_i32x4[t][i];
          sum_i32x4 = Dot::dot(sum_i32x4, codes<0>(block_u8x16), vld1q_s8(q_row));
          sum_i32x4 = Dot::dot(sum_i32x4, codes<1>(block_u8x16), vld1q_s8(q_row + kBlockBytes));
          sum_i32x4 = Dot::dot(sum_i32x4, codes<2>(block_u8x16), vld1q_s8(q_row + 2 * kBlockBytes));
          acc_i32x4[t][i] = Dot::dot(sum_i32x4, codes<3>(block_u8x16), vld1q_s8(q_row + 3 * kBlockBytes));
        }
      }
    }
    for (int t = 0; t < ROWS; ++t) {
      acc[t] = vaddvq_s32(vaddq_s32(vaddq_s32(acc_i32x4[t][0], acc_i32x4[t][1]),  //
                                    vaddq_s32(acc_i32x4[t][2], acc_i32x4[t][3])));
    }
  }

  // Layout column: bytes of four columns, interleaved. Lanes of rows[u] are four rows, four inputs wide.
  static void interleave(const uint8_t* const* column, int64_t offset, uint8x16_t (&rows_u8x16)[4]) {
    const uint8x16_t a_u8x16 = vld1q_u8(column[0] + offset);
    const uint8x16_t b_u8x16 = vld1q_u8(column[1] + offset);
    const uint8x16_t c_u8x16 = vld1q_u8(column[2] + offset);
    const uint8x16_t d_u8x16 = vld1q_u8(column[3] + offset);
    const uint16x8_t ab_low = vreinterpretq_u16_u8(vzip1q_u8(a_u8x16, b_u8x16));
    const uint16x8_t ab_high = vreinterpretq_u16_u8(vzip2q_u8(a_u8x16, b_u8x16));
    const uint16x8_t cd_low = vreinterpretq_u16_u8(vzip1q_u8(c_u8x16, d_u8x16));
    const uint16x8_t cd_high = vreinterpretq_u16_u8(vzip2q_u8(c_u8x16, d_u8x16));
    rows_u8x16[0] = vreinterpretq_u8_u16(vzip1q_u16(ab_low, cd_low));
    rows_u8x16[1] = vreinterpretq_u8_u16(vzip2q_u16(ab_low, cd_low));
    rows_u8x16[2] = vreinterpretq_u8_u16(vzip1q_u16(ab_high, cd_high));
    rows_u8x16[3] = vreinterpretq_u8_u16(vzip2q_u16(ab_high, cd_high));
  }

  // Rows 64*P + 16*u + 4*l .. + 3 of a panel, u = 0 .. 3, of which `sums` is the first; see columns().
  template <int P>
  static void add_rows(const uint8x16_t (&first_u8x16)[4], const uint8x16_t (&second_u8x16)[4], int8x8_t q_i8x8,
                       int32_t* sums) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      int32_t* four = sums + 64 * P + 16 * u;
      vst1q_s32(four, Dot::dot_columns(vld1q_s32(four), codes<P>(first_u8x16[u]), codes<P>(second_u8x16[u]), q_i8x8));
    }
  }

  template <int ROWS>
  static void columns(const uint8_t* panel, const int32_t* columns, int64_t count, int64_t column_bytes, int64_t panels,
                      const int8_t* q, int64_t q_stride, int32_t* acc) {
    static_assert(kColumnsAtOnce == 8, "two interleaved fours");
    for (int64_t c = 0; c < count; c += kColumnsAtOnce) {
      const uint8_t* column[8];
      for (int i = 0; i < 8; ++i) column[i] = panel + columns[c + i] * column_bytes;
      const ColumnsAhead ahead(panel, columns, c, count, column_bytes, panels);
      // Row 64*p + 16*u + 4*l + d of a panel stands in byte 16*l + 4*u + d at bits 2p.
      for (int64_t quarter = 0; quarter < 4 * panels; ++quarter) {
        const int64_t l = quarter % 4;
        if (l == 0) {
          for (const uint8_t* next : ahead.column) Neon::prefetch_far(next + quarter * kQuarterBytes);
        }
        uint8x16_t first_u8x16[4];
        uint8x16_t second_u8x16[4];
        interleave(column, quarter * kQuarterBytes, first_u8x16);
        interleave(column + 4, quarter * kQuarterBytes, second_u8x16);
        for (int t = 0; t < ROWS; ++t) {
          const int8x8_t q_i8x8 = vld1_s8(q + t * q_stride + c);
          int32_t* sums = acc + (t * panels + quarter / 4) * kPanelRows + l * kQuarterRows;
          add_rows<0>(first_u8x16, second_u8x16, q_i8x8, sums);
          add_rows<1>(first_u8x16, second_u8x16, q_i8x8, sums);
          add_rows<2>(first_u8x16, second_u8x16, q_i8x8, sums);
          add_rows<3>(first_u8x16, second_u8x16, q_i8x8, sums);
        }
      }
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
