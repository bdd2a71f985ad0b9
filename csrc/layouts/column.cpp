// column: the codes of one input, 256 rows to a panel.
//
// In a panel, byte 16*l + 4*u + d holds at bits 2p the code of row 64*p + 16*u + 4*l + d, that is of tile
// 4*p + u, row 4*l + d. Interleaving the bytes of four inputs within 16-byte lanes, as every
// vector unit can, then gives 16 consecutive rows x 4 inputs: a step of tile16.

#include <cstring>

#include "layouts/layouts.h"

namespace bitnet_ops {
namespace {

constexpr int64_t kSteps = 4;
constexpr int64_t kNeighbours = 4;

// From sixteen inputs of a panel the tile16 words of the 64 rows at bits 2P: word i, of four bytes (neighbours j),
// for the row that byte i stands for. P is a constant and the arrays are local, so that this is vectors of bytes.
template <int P>
void words_of_rows(const uint8_t (&in)[kBlockInputs][kBlockBytes], uint8_t (&words)[kBlockBytes * kNeighbours]) {
  const auto code = [](uint8_t byte, int step) { return ((byte >> (2 * P)) & 3) << (2 * step); };
  for (int64_t i = 0; i < kBlockBytes; ++i) {
    for (int64_t j = 0; j < kNeighbours; ++j) {
      words[kNeighbours * i + j] = static_cast<uint8_t>(code(in[j][i], 0) | code(in[4 + j][i], 1) |
                                                        code(in[8 + j][i], 2) | code(in[12 + j][i], 3));
    }
  }
}

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
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t in[kBlockInputs][kBlockBytes];
      for (int64_t i = 0; i < kBlockInputs; ++i) {
        const int64_t k = block * kBlockInputs + i;
        if (k < size.in_features) {
          std::memcpy(in[i], column + (k * panels + panel) * kBlockBytes, kBlockBytes);
        } else {
          std::memset(in[i], kZeroByte, kBlockBytes);
        }
      }
      uint8_t words[4][kBlockBytes * kNeighbours];
      words_of_rows<0>(in, words[0]);
      words_of_rows<1>(in, words[1]);
      words_of_rows<2>(in, words[2]);
      words_of_rows<3>(in, words[3]);
      for (int64_t t = 0; t < kPanelTiles; ++t) {
        const int64_t tile = panel * kPanelTiles + t;
        if (tile >= tiles) break;
        uint8_t* out = tile16 + (tile * blocks + block) * kBlockBytes;
        for (int64_t l = 0; l < 4; ++l) std::memcpy(out + 16 * l, words[t / 4] + 64 * l + 16 * (t % 4), 16);
      }
    }
  }
}

}  // namespace bitnet_ops
