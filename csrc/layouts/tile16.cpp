// tile16: 2 bits a weight, 16 rows side by side.

#include <cstring>

#include "layouts/layouts.h"

namespace bitnet_ops {
namespace {

// Four codes in the bytes of one word: all arithmetic below stays within its byte.
constexpr uint32_t kEachByte = 0x01010101u;

// w + 1 for four weights: -1 is 0xff, so (w & 3) + 1 is 4, 1, 2 and its low two bits are 0, 1, 2.
uint32_t encode4(const int8_t* w) {
  uint32_t bytes;
  std::memcpy(&bytes, w, sizeof bytes);
  return ((bytes & (3 * kEachByte)) + kEachByte) & (3 * kEachByte);
}

bool is_ternary(const int8_t* w, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= static_cast<uint8_t>(w[i] + 1) > 2;
  return bad == 0;
}

}  // namespace

bool pack_tile16(const int8_t* w, MatrixSize size, uint8_t* tile16, int64_t tile_begin, int64_t tile_end) {
  const int64_t in_features = size.in_features;
  const int64_t blocks = blocks_of(in_features);
  bool ternary = true;
  for (int64_t row = tile_begin * kTileRows; row < tile_end * kTileRows; ++row) {
    const int64_t count = row < size.out_features ? in_features : 0;
    const int8_t* weights = w + row * in_features;
    if (count != 0) ternary &= is_ternary(weights, count);
    uint8_t* out = tile16 + row / kTileRows * blocks * kBlockBytes + row % kTileRows * 4;
    for (int64_t b = 0; b < blocks; ++b, out += kBlockBytes) {
      int8_t padded[kBlockInputs] = {};  // padding holds weight 0, code 1
      const int64_t left = count - b * kBlockInputs;
      if (left > 0) {
        std::memcpy(padded, weights + b * kBlockInputs, static_cast<size_t>(left < kBlockInputs ? left : kBlockInputs));
      }
      const uint32_t word =
          encode4(padded) | encode4(padded + 4) << 2 | encode4(padded + 8) << 4 | encode4(padded + 12) << 6;
      std::memcpy(out, &word, sizeof word);
    }
  }
  return ternary;
}

bool unpack_tile16(const uint8_t* tile16, MatrixSize size, int8_t* w, int64_t tile_begin, int64_t tile_end) {
  const int64_t in_features = size.in_features;
  const int64_t blocks = blocks_of(in_features);
  const int64_t row_end = tile_end * kTileRows < size.out_features ? tile_end * kTileRows : size.out_features;
  bool ternary = true;
  for (int64_t row = tile_begin * kTileRows; row < row_end; ++row) {
    const uint8_t* in = tile16 + row / kTileRows * blocks * kBlockBytes + row % kTileRows * 4;
    int8_t* weights = w + row * in_features;
    for (int64_t b = 0; b < blocks; ++b, in += kBlockBytes) {
      int8_t decoded[kBlockInputs];
      for (int64_t i = 0; i < kBlockInputs; ++i) {
        decoded[i] = static_cast<int8_t>(((in[i % 4] >> (2 * (i / 4))) & 3) - 1);
      }
      const int64_t left = in_features - b * kBlockInputs;
      const int64_t count = left < kBlockInputs ? left : kBlockInputs;
      ternary &= is_ternary(decoded, count);
      std::memcpy(weights + b * kBlockInputs, decoded, static_cast<size_t>(count));
    }
  }
  return ternary;
}

}  // namespace bitnet_ops
