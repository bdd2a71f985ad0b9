// Codes of two bits as files have them (GGUF), straight to tile16: never a byte for each weight.
//
// Runs of `width` bytes hold 4 * width codes, the one of weight width * n + m in byte m, at bits 2n or 6 - 2n. In a
// block of tile16 a row has a word of four bytes: the code of input 4p + j is in byte j, at bits 2p. Either way this is
// a transposition of a square of 4 x 4 codes:
//
//   width 1       byte n of a word has inputs 4n .. 4n + 3, and p = n: bytes of one word against places in a byte
//   width 16 h    word p of 16 bytes has inputs 16 h n + 4p + j in byte j, for four blocks n: words against places
//
// so two rounds of exchanges do for all codes at once, whatever the instruction set.

#include <cstring>

#include "layouts/layouts.h"

namespace bitnet_ops {
namespace {

constexpr int kSquare = 4;  // words, bytes of a word, codes of a byte
constexpr int64_t kWordBytes = 4;

uint32_t load(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// Code n of byte m and code m of byte n change places.
uint32_t transposed(uint32_t word) {
  uint32_t change = (word ^ (word >> 6)) & 0x00CC00CCu;  // the low bits of n and m
  word ^= change ^ (change << 6);
  change = (word ^ (word >> 12)) & 0x0000F0F0u;  // the high ones
  return word ^ change ^ (change << 12);
}

// The codes of `a` at the places that `mask` leaves out, and those of `b` at the others.
void exchange(uint32_t& a, uint32_t& b, int shift, uint32_t mask) {
  const uint32_t change = ((a >> shift) ^ b) & mask;
  b ^= change;
  a ^= change << shift;
}

// Code n of each byte of word p and code p of the same byte of word n change places.
void transpose(uint32_t (&words)[kSquare]) {
  exchange(words[0], words[1], 2, 0x33333333u);
  exchange(words[2], words[3], 2, 0x33333333u);
  exchange(words[0], words[2], 4, 0x0F0F0F0Fu);
  exchange(words[1], words[3], 4, 0x0F0F0F0Fu);
}

// The codes of one row. Returns bits that are not 0 where a code is 3.
uint32_t row_from_sequence(const uint8_t* in, int64_t count, uint8_t* out) {
  uint32_t bad = 0;
  for (int64_t at = 0; at < count; at += kWordBytes, out += kBlockBytes) {
    const uint32_t word = load(in + at);
    bad |= word & (word >> 1) & 0x55555555u;
    const uint32_t turned = transposed(word);
    std::memcpy(out, &turned, sizeof turned);
  }
  return bad;
}

uint32_t row_from_runs(const uint8_t* in, int64_t count, int64_t width, bool high_first, uint8_t* out) {
  constexpr int64_t kSquareBytes = kSquare * kWordBytes;
  const int64_t squares = width / kSquareBytes;  // of a run
  uint32_t bad = 0;
  for (int64_t run = 0; run < count; run += width) {
    for (int64_t h = 0; h < squares; ++h) {
      uint32_t words[kSquare];
      for (int p = 0; p < kSquare; ++p) {
        words[p] = load(in + run + h * kSquareBytes + p * kWordBytes);
        bad |= words[p] & (words[p] >> 1) & 0x55555555u;
      }
      transpose(words);
      for (int n = 0; n < kSquare; ++n) {
        std::memcpy(out + (n * squares + h) * kBlockBytes, &words[high_first ? kSquare - 1 - n : n], kWordBytes);
      }
    }
    out += kSquare * squares * kBlockBytes;
  }
  return bad;
}

}  // namespace

bool tile16_from_two_bits(const TwoBitCodes& codes, uint8_t* tile16, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = blocks_of(codes.in_features());
  uint32_t bad = 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    uint8_t* out = tile16 + tile * blocks * kBlockBytes;
    const int64_t first = tile * kTileRows;
    const int64_t rows = codes.rows - first < kTileRows ? codes.rows - first : kTileRows;
    if (rows < kTileRows) std::memset(out, kZeroByte, static_cast<size_t>(blocks * kBlockBytes));
    for (int64_t row = 0; row < rows; ++row) {
      uint8_t* place = out + row * kWordBytes;
      for (int64_t part = 0; part < codes.parts; ++part) {
        const uint8_t* in = codes.bytes + (first + row) * codes.row_stride + part * codes.part_stride;
        bad |= codes.width == 1 ? row_from_sequence(in, codes.part_bytes, place)
                                : row_from_runs(in, codes.part_bytes, codes.width, codes.high_first, place);
        place += codes.part_bytes / kWordBytes * kBlockBytes;
      }
    }
  }
  return bad == 0;
}

}  // namespace bitnet_ops
