// Sums of products of 16 rows of small integers with rows of bytes: what the screen of the LM head and attention
// to an int8 cache stand on. Here are the two ways in which the small integers are stored.
//
// Include this inside a kernel file's target region, before screen.h and attention.h.
//
// A tile is 16 rows; a block of it is 16 inputs. A line is 64 bytes, one for each of 16 rows x 4 inputs, so that a dot
// product of four bytes needs no horizontal sum and a tile is one sequential stream:
//
//     SignedCodes   4 lines   line p, byte 4 * r + j:  the number of row r, input 4 * p + j, as a signed byte
//
//     SixBitCodes   3 lines   line p, byte 4 * r + j:  bits 0..5  code of row r, input 4 * p + j, p = 0, 1, 2
//                                                      bits 6..7  bits 2 * p and 2 * p + 1 of the code of input 12 + j
//
//     line 0   | 1 0 |  input j      |
//     line 1   | 3 2 |  input 4 + j  |   and the bits 5 .. 0 of input 12 + j at the left
//     line 2   | 5 4 |  input 8 + j  |
//
// A code is a number and Codes::kZero. vpdpbusd multiplies codes, for it takes unsigned bytes; other instructions
// multiply numbers.
//
// Sums provides, for each instruction set,
//     kRows                most rows of q at a time, even
//     kExcess<Codes>       Codes::kZero where codes are multiplied, else 0
//     sums<Codes, ROWS>(codes, blocks, q, q_stride, acc)
//                          acc[ROWS][16] = sum over the inputs of (number + kExcess) * q
//
// Overflow: |acc| <= inputs * 255 * 128 = 32640 * inputs, which for 2^16 of them is 2.139e9 < 2^31 - 1.

namespace bitnet_ops {
namespace {

struct SignedCodes {
  static constexpr int32_t kZero = 128;
  static constexpr int64_t kLines = 4;
};

struct SixBitCodes {
  static constexpr int32_t kZero = 32;
  static constexpr int64_t kLines = 3;
};

// Line p of the codes of some rows of a block, in vectors of any width: four bytes are a row.
template <int BYTES>
struct CodesIn {
  typedef uint64_t Words __attribute__((vector_size(BYTES)));
  static constexpr uint64_t kEachByte = 0x0101010101010101u;

  // `rows` is the first byte of these rows in the block.
  template <int P>
  static Words line(SignedCodes, const uint8_t* rows) {
    return load<P>(rows) ^ kEachByte * SignedCodes::kZero;
  }
  template <int P>
  static Words line(SixBitCodes, const uint8_t* rows) {
    if constexpr (P < SixBitCodes::kLines) {
      return load<P>(rows) & kEachByte * 0x3f;
    } else {
      // Shifts move bits across bytes, but only into places that the masks clear.
      return (load<0>(rows) >> 6 & kEachByte * 0x03) | (load<1>(rows) >> 4 & kEachByte * 0x0c) |
             (load<2>(rows) >> 2 & kEachByte * 0x30);
    }
  }

 private:
  template <int P>
  static Words load(const uint8_t* rows) {
    Words words;
    std::memcpy(&words, rows + P * kBlockBytes, sizeof words);
    return words;
  }
};

// Asks for what comes after a line of codes. Requests stand between products: in bursts they cost a tenth
// (bench/LOG.md). `ahead` is the caller's copy of stream_ahead, so that it stays in registers.
template <class Isa>
inline void ask_ahead(const uint8_t* line, const StreamAhead ahead) {
  if (ahead.far_bytes != 0) Isa::prefetch_far(line + ahead.far_bytes);
  Isa::prefetch_near(line + ahead.near_bytes);
  __asm__ volatile("" ::: "memory");  // or the compiler gathers them
}

}  // namespace
}  // namespace bitnet_ops
