// column: the codes of one input, 256 rows to a panel.
//
// In a panel, byte 16*l + 4*u + d holds at bits 2p the code of row 64*p + 16*u + 4*l + d, that is of tile
// 4*p + u, row 4*l + d. Interleaving the bytes of four inputs within 16-byte lanes, as every
// vector unit can, then gives 16 consecutive rows x 4 inputs: a step of tile16.

#include <cstring>

#include "layouts.h"

namespace bitnet_ops {
namespace {

constexpr int64_t kSteps = 4;
constexpr int64_t kNeighbours = 4;

}  // namespace

void column_from_tile16(const uint8_t* tile16, MatrixSize size, uint8_t* column, int64_t panel_begin,
                        int64_t panel_end) {
  const int64_t blocks = blocks_of(size.in_features);
  const int64_t tiles = tiles_of(size.out_features);
  const int64_t panels = divide_up(size.out_features, kPanelRows);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    for (int64_t k = 0; k < size.in_features; ++k) {
      uint8_t* out = column + (k * panels + panel) * kBlockBytes;
      const int64_t block = k / kBlockInputs;
      const int shift = static_cast<int>(2 * (k / kNeighbours % kSteps));
      std::memset(out, 0, kBlockBytes);
      for (int64_t t = 0; t < kPanelTiles; ++t) {
        const int64_t tile = panel * kPanelTiles + t;
        const uint8_t* in = tile16 + (tile * blocks + block) * kBlockBytes + k % kNeighbours;
        uint8_t* place = out + t % 4 * 4;
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int code = tile < tiles ? (in[4 * r] >> shift) & 3 : 1;
          uint8_t& byte = place[r / 4 * 16 + r % 4];
          byte = static_cast<uint8_t>(byte | code << (2 * (t / 4)));
        }
      }
    }
  }
}

void tile16_from_column(const uint8_t* column, MatrixSize size, uint8_t* tile16, int64_t panel_begin,
                        int64_t panel_end) {
  const int64_t blocks = blocks_of(size.in_features);
  const int64_t tiles = tiles_of(size.out_features);
  const int64_t panels = divide_up(size.out_features, kPanelRows);
  uint8_t padding[kBlockBytes];
  std::memset(padding, kZeroByte, sizeof padding);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t* in[kBlockInputs];
      for (int64_t i = 0; i < kBlockInputs; ++i) {
        const int64_t k = block * kBlockInputs + i;
        in[i] = k < size.in_features ? column + (k * panels + panel) * kBlockBytes : padding;
      }
      for (int p = 0; p < 4; ++p) {
        if (panel * kPanelTiles + 4 * p >= tiles) break;
        // Byte i of neighbour j: the codes of its four steps, for the row that byte i stands for at p.
        uint32_t words[kBlockBytes];
        for (int64_t i = 0; i < kBlockBytes; ++i) {
          uint32_t word = 0;
          for (int j = 0; j < kNeighbours; ++j) {
            uint32_t byte = 0;
            for (int s = 0; s < kSteps; ++s) byte |= ((in[kNeighbours * s + j][i] >> (2 * p)) & 3u) << (2 * s);
            word |= byte << (8 * j);
          }
          words[i] = word;
        }
        for (int64_t u = 0; u < 4; ++u) {
          const int64_t tile = panel * kPanelTiles + 4 * p + u;
          if (tile >= tiles) break;
          uint8_t* out = tile16 + (tile * blocks + block) * kBlockBytes;
          for (int64_t l = 0; l < 4; ++l) std::memcpy(out + 16 * l, words + 16 * l + 4 * u, 16);
        }
      }
    }
  }
}

}  // namespace bitnet_ops
