// tile16_base3 for the inner loops of avx512.h. vpermi2b, a table of 128 bytes in two registers, is AVX-512 VBMI.
//
// Include this inside a kernel file's target region, after avx512.h.

namespace bitnet_ops {
namespace {

struct Base3Table {
  alignas(64) uint8_t codes[128];
};

// A byte beyond 242 leaves a rest up to 93, whose last digit is 3, as in layouts/tile16_base3.cpp.
constexpr Base3Table make_base3_table() {
  Base3Table table{};
  for (int rest = 0; rest < 128; ++rest) {
    table.codes[rest] = static_cast<uint8_t>(rest % 3 | rest / 3 % 3 << 2 | rest / 9 % 3 << 4 | (rest / 27 & 3) << 6);
  }
  return table;
}
constexpr Base3Table kBase3Table = make_base3_table();

// tile16_base3: a byte is c0 + 3*c1 + 9*c2 + 27*c3 + 81*c4. Taking 81*c4 off leaves a rest below 128, and
// one permute of two registers (vpermi2b, 128 bytes) turns it into the four codes of a tile16 byte.
struct Base3Codes {
  static constexpr int kSteps = 5;
  static constexpr bool kHasGroupScales = false;  // csrc/ops/packed_checks.h

  struct Block {
    __m512i four_u8x64;     // c0 .. c3 as in a byte of tile16
    __m512i fifth81_u8x64;  // 81 * c4
  };

  static Block load(const uint8_t* block) {
    const __m512i block_u8x64 = load64(block);
    // The smallest of b, b - 81 and b - 162 that did not wrap around.
    const __m512i less_81 = _mm512_sub_epi8(block_u8x64, _mm512_set1_epi8(81));
    const __m512i less_162 = _mm512_sub_epi8(block_u8x64, _mm512_set1_epi8(static_cast<char>(162)));
    const __m512i rest_u8x64 = _mm512_min_epu8(block_u8x64, _mm512_min_epu8(less_81, less_162));
    return {_mm512_permutex2var_epi8(load64(kBase3Table.codes), rest_u8x64, load64(kBase3Table.codes + 64)),
            _mm512_sub_epi8(block_u8x64, rest_u8x64)};
  }
  static __m512i in_place(const Block& block, int p) {
    return p == 4 ? block.fifth81_u8x64 : Tile16Codes::in_place(block.four_u8x64, p);
  }
  static __m512i shifted(const Block& block, int p) {
    // 81 and 162 have 1 and 2 in their upper two bits.
    return p == 4 ? Tile16Codes::shifted(block.fifth81_u8x64, 3) : Tile16Codes::shifted(block.four_u8x64, p);
  }
  static __m512i in_true_size(__m512i acc_i32x16, int p) {
    // An exact division by an odd number is a multiplication by its inverse modulo 2^32.
    constexpr uint32_t kInverse81 = 0x781948b1u;
    static_assert(81u * kInverse81 == 1u, "81 * inverse = 1 modulo 2^32");
    return p == 4 ? _mm512_mullo_epi32(acc_i32x16, _mm512_set1_epi32(static_cast<int>(kInverse81)))
                  : Tile16Codes::in_true_size(acc_i32x16, p);
  }
};

}  // namespace
}  // namespace bitnet_ops
