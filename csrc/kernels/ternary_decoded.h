// The ternary product of many tokens: a piece of a tile is decoded into L1 once, and multiplied by all of them.
//
// Include this inside a kernel file's target region, after ternary_driver.h.
//
// Inner provides, besides what TernaryDriver asks for,
//     kDecodedRows                                          rows of q in a register block; 0: not this way
//     kPieceBlocks, kPieceBytes                             most blocks of a piece, and the bytes of their codes
//     decode(packed, blocks, codes)                         codes, a byte each
//     piece<ROWS>(codes, blocks, q, q_stride, acc, first)   acc[ROWS][16], set if `first` or added to

namespace bitnet_ops {
namespace {

template <class Isa, class Inner>
struct DecodedDriver {
  // Rows of q at a time: their sums, 64 bytes each, and a piece of codes stay in L1.
  static constexpr int64_t kMostRows = 128;
  // From so many on it pays for decoding into memory (bench/LOG.md).
  static constexpr int64_t kLeastRows = 12;

  static bool suits(const TernaryProduct& p) { return p.tokens * p.planes >= kLeastRows && p.blocks > 0; }

  // Calls Inner::piece with `rows` as a compile-time number, 1 .. ROWS.
  template <int ROWS>
  static void piece_of(int64_t rows, const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t q_stride,
                       int32_t* acc, bool first) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return piece_of<ROWS - 1>(rows, codes, blocks, q, q_stride, acc, first);
    }
    Inner::template piece<ROWS>(codes, blocks, q, q_stride, acc, first);
  }

  // acc[rows][16] of blocks [block, block + blocks) of a tile.
  static void multiply(const TernaryProduct& p, const uint8_t* packed, int64_t block, int64_t blocks, int64_t first_row,
                       int64_t rows, int32_t* acc, bool first) {
    alignas(64) uint8_t codes[Inner::kPieceBytes];
    const int64_t most = Inner::decode(packed + block * kBlockBytes, blocks, codes);
    for (int64_t begin = 0; begin < blocks; begin += most) {
      const int64_t count = blocks - begin < most ? blocks - begin : most;
      multiply_piece(p, codes + begin * 4 * kBlockBytes, block + begin, count, first_row, rows, acc, first && begin == 0);
    }
  }

  static void multiply_piece(const TernaryProduct& p, const uint8_t* codes, int64_t block, int64_t blocks, int64_t first_row,
                       int64_t rows, int32_t* acc, bool first) {
    const int8_t* q = p.q + first_row * p.q_stride + block * Inner::kInputs;
    const int64_t parts = divide_up(rows, int64_t{Inner::kDecodedRows});
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = rows * part / parts;
      const int64_t end = rows * (part + 1) / parts;
      piece_of<Inner::kDecodedRows>(end - begin, codes, blocks, q + begin * p.q_stride, p.q_stride,
                                    acc + begin * kTileRows, first);
    }
  }

  static void whole_rows(const TernaryProduct& p, int64_t tile, int64_t token, int64_t tokens) {
    alignas(64) int32_t acc[kMostRows * kTileRows];
    const uint8_t* packed = p.packed + tile * p.blocks * kBlockBytes;
    for (int64_t block = 0; block < p.blocks; block += Inner::kPieceBlocks) {
      const int64_t blocks = p.blocks - block < Inner::kPieceBlocks ? p.blocks - block : Inner::kPieceBlocks;
      multiply(p, packed, block, blocks, token * p.planes, tokens * p.planes, acc, block == 0);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      store_rows<Isa>(p, acc + t * p.planes * kTileRows, kTileRows, token + t, tile * kTileRows);
    }
  }

  template <int PLANES, class Scale>
  static void in_groups(const TernaryProduct& p, int64_t tile, int64_t token, int64_t tokens) {
    alignas(64) int32_t acc[kMostRows * kTileRows];
    alignas(64) float sums[kMostRows * kTileRows];
    std::memset(sums, 0, static_cast<size_t>(tokens * kTileRows) * sizeof *sums);
    const uint8_t* packed = p.packed + tile * p.blocks * kBlockBytes;
    const int64_t left = p.out_features - tile * kTileRows;
    const int64_t count = left < kTileRows ? left : kTileRows;
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t begin = group * p.group_blocks;
      const int64_t end = p.blocks - begin < p.group_blocks ? p.blocks : begin + p.group_blocks;
      for (int64_t block = begin; block < end; block += Inner::kPieceBlocks) {
        const int64_t blocks = end - block < Inner::kPieceBlocks ? end - block : Inner::kPieceBlocks;
        multiply(p, packed, block, blocks, token * PLANES, tokens * PLANES, acc, block == begin);
      }
      Scale scale[kTileRows] = {};  // a copy: at the end of the matrix there are fewer
      std::memcpy(scale, static_cast<const Scale*>(p.weight_scale) + group * p.out_features + tile * kTileRows,
                  static_cast<size_t>(count) * sizeof *scale);
      for (int64_t t = 0; t < tokens; ++t) {
        add_group<Isa, PLANES>(p, acc + t * PLANES * kTileRows, kTileRows, token + t, group, scale,
                               sums + t * kTileRows);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      store_sums<Isa>(p, sums + t * kTileRows, token + t, tile * kTileRows, count);
    }
  }

  template <int PLANES>
  static void in_groups_of(const TernaryProduct& p, int64_t tile, int64_t token, int64_t tokens) {
    if (p.scale_dtype == DType::kFloat16) return in_groups<PLANES, Float16>(p, tile, token, tokens);
    return in_groups<PLANES, float>(p, tile, token, tokens);
  }

  static void ternary_product(const TernaryProduct& p, int64_t tile_begin, int64_t tile_end) {
    // As many rows of q as L2 keeps, in equal parts; all tiles pass over one part, then over the next.
    const int64_t kept = Inner::kQBytes / p.q_stride + 1;
    const int64_t tokens = (kept < kMostRows ? kept : kMostRows) / p.planes;
    const int64_t parts = divide_up(p.tokens, tokens < 1 ? 1 : tokens);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = p.tokens * part / parts;
      const int64_t count = p.tokens * (part + 1) / parts - begin;
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        if (p.group_blocks == 0) {
          whole_rows(p, tile, begin, count);
        } else if (p.planes == 1) {
          in_groups_of<1>(p, tile, begin, count);
        } else {
          in_groups_of<2>(p, tile, begin, count);
        }
      }
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
