// tile16_base3: five codes in base 3 to a byte, 1.6 bits a weight.
//
// A step is 16 rows x 4 inputs, one code for each of the 64 bytes of a block. A block of tile16 holds
// 4 steps, one of tile16_base3 holds 5, so 20 steps are 5 blocks of the one or 4 of the other.

#include <cstring>

#include "layouts/layouts.h"

namespace bitnet_ops {
namespace {

constexpr int64_t kSteps = 4;
constexpr int64_t kBase3Steps = 5;
constexpr int kPower[kBase3Steps] = {1, 3, 9, 27, 81};

// Takes digit `power` off every byte: bytes >= power count down at most twice. A byte beyond 242
// leaves a rest of up to 93, whose digit of 27 is then 3: no weight, but defined.
void take_digit(uint8_t* bytes, uint8_t* digit, int power) {
  for (int64_t i = 0; i < kBlockBytes; ++i) {
    const uint8_t byte = bytes[i];
    const uint8_t count = static_cast<uint8_t>((byte >= power) + (byte >= 2 * power) + (power == 27 && byte >= 81));
    digit[i] = count;
    bytes[i] = static_cast<uint8_t>(byte - count * power);
  }
}

// The bytes of a block, eight to a word: shifts and sums of codes 0, 1, 2 stay within a byte.
struct Block {
  static constexpr int64_t kWords = kBlockBytes / 8;
  uint64_t words[kWords];
};

constexpr uint64_t kCodes = 0x0303030303030303u;

struct ZeroBlock {
  uint8_t bytes[kBlockBytes];
  constexpr ZeroBlock() : bytes{} {
    for (uint8_t& byte : bytes) byte = kZeroByte;
  }
};
constexpr ZeroBlock kPaddingBlock;
constexpr const uint8_t* kPadding = kPaddingBlock.bytes;

// Three times each byte, plus the code at bits `shift` of the byte in tile16.
void append_digits(Block& sum, const uint8_t* tile16, int shift) {
  Block block;
  std::memcpy(block.words, tile16, kBlockBytes);
  for (int64_t i = 0; i < Block::kWords; ++i) {
    sum.words[i] = (sum.words[i] << 1) + sum.words[i] + ((block.words[i] >> shift) & kCodes);
  }
}

}  // namespace

void base3_from_tile16(const uint8_t* tile16, MatrixSize size, uint8_t* base3, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = blocks_of(size.in_features);
  const int64_t base3_blocks = divide_up(size.in_features, kBase3BlockInputs);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint8_t* in = tile16 + tile * blocks * kBlockBytes;
    uint8_t* out = base3 + tile * base3_blocks * kBlockBytes;
    for (int64_t b = 0; b < base3_blocks; ++b, out += kBlockBytes) {
      Block sum{};
      for (int64_t p = kBase3Steps - 1; p >= 0; --p) {
        const int64_t step = b * kBase3Steps + p;
        if (step < blocks * kSteps) {
          append_digits(sum, in + step / kSteps * kBlockBytes, static_cast<int>(2 * (step % kSteps)));
        } else {
          append_digits(sum, kPadding, 0);
        }
      }
      std::memcpy(out, sum.words, kBlockBytes);
    }
  }
}

void tile16_from_base3(const uint8_t* base3, MatrixSize size, uint8_t* tile16, int64_t tile_begin, int64_t tile_end) {
  const int64_t blocks = blocks_of(size.in_features);
  const int64_t base3_blocks = divide_up(size.in_features, kBase3BlockInputs);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint8_t* in = base3 + tile * base3_blocks * kBlockBytes;
    uint8_t* out = tile16 + tile * blocks * kBlockBytes;
    // Steps that base 3 does not reach are padding.
    if (blocks > 0) std::memset(out + (blocks - 1) * kBlockBytes, kZeroByte, kBlockBytes);
    for (int64_t b = 0; b < base3_blocks; ++b, in += kBlockBytes) {
      uint8_t bytes[kBlockBytes];
      uint8_t digit[kBlockBytes];
      std::memcpy(bytes, in, kBlockBytes);
      for (int64_t p = kBase3Steps - 1; p >= 0; --p) {
        take_digit(bytes, digit, kPower[p]);
        const int64_t step = b * kBase3Steps + p;
        if (step >= blocks * kSteps) continue;
        uint8_t* place = out + step / kSteps * kBlockBytes;
        const int shift = static_cast<int>(2 * (step % kSteps));
        const uint8_t others = static_cast<uint8_t>(~(3 << shift));
        for (int64_t i = 0; i < kBlockBytes; ++i) {
          place[i] = static_cast<uint8_t>((place[i] & others) | (digit[i] << shift));
        }
      }
    }
  }
}

}  // namespace bitnet_ops
