// The ternary product of many tokens: a piece of a tile is decoded into L1 once, and multiplied by all of them.
//
// Include this inside a kernel file's target region, after ternary_driver.h.
//
// Inner provides, besides what TernaryDriver asks for,
//     kDecodedRows, kDecodedTiles     a register block: rows of q, even, 0: not this way; and tiles, 1 or kTilesAtOnce
//     kLeastDecodedRows               from so many rows of q on it pays for decoding into memory (bench/LOG.md)
//     kPieceBlocks, kPieceBytes       most blocks of a piece, and the bytes of their codes in a tile
//     decode(packed, blocks, codes)   codes, a byte each; false where their sums might not fit
//     piece<TILES, ROWS>(codes, blocks, q, q_stride, acc, tile_stride, first)    acc[ROWS][16] of each tile, set if
//                                     `first` or added to
//     piece_of_group<PLANES, TILES, ROWS>(codes, blocks, q, q_stride, group)    the same of a group, scaled and added
//     up
//
// Codes of tile i are kPieceBytes * i further.

namespace bitnet_ops {
namespace {

// Side by side, so that the activations of a piece are in L1 for all but the first.
constexpr int64_t kTilesAtOnce = 2;

// A group of inputs, for some rows of q and one or more tiles.
struct DecodedGroup {
  const int32_t* q_sum;  // of row t at t * stride
  const float* x_scale;  // likewise; unused with two planes
  int64_t stride;
  const float* scale;   // [tiles][16]
  float* sums;          // [tokens][16] of each tile
  int64_t tile_stride;  // of sums
};

template <class Isa, class Inner>
struct DecodedDriver {
  // Rows of q that codes are decoded for. Their sums, 64 bytes each, stay in L2 with the activations of a piece.
  static constexpr int64_t kMostRows = 128;
  static constexpr int64_t kTiles = kTilesAtOnce;
  static_assert(Inner::kDecodedTiles == 1 || Inner::kDecodedTiles == kTiles, "a register block is one tile, or all");

  static bool suits(const TernaryProduct& p) { return p.tokens * p.planes >= Inner::kLeastDecodedRows && p.blocks > 0; }

  // Some tiles and tokens.
  struct Rectangle {
    int64_t tile, tiles, token, tokens;
  };

  // One weight scale a row: sums are int32 until the last piece.
  template <int PLANES>
  struct WholeRows {
    static constexpr int kPlanes = PLANES;
    const TernaryProduct& p;
    const Rectangle& area;
    alignas(64) int32_t acc[kTiles][kMostRows * kTileRows];

    WholeRows(const TernaryProduct& p, const Rectangle& area) : p(p), area(area) {}

    int64_t piece_blocks() const { return Inner::kPieceBlocks; }
    void begin_piece(int64_t, int64_t) {}

    template <int TILES, int ROWS>
    void add(int64_t block, const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t i, int64_t token) {
      Inner::template piece<TILES, ROWS>(codes, blocks, q, p.q_stride, acc[i] + token * PLANES * kTileRows,
                                         kMostRows * kTileRows, block == 0);
    }

    void store(int64_t i, int64_t token) {
      store_rows<Isa>(p, acc[i] + token * PLANES * kTileRows, kTileRows, area.token + token,
                      (area.tile + i) * kTileRows);
    }
  };

  // A weight scale for each group. A piece is some groups.
  template <int PLANES, class Scale>
  struct InGroups {
    static_assert(Inner::kPieceBlocks * kBlockInputs >= kMaxGroupInputs, "a piece has room for a group");
    static constexpr int kPlanes = PLANES;
    static constexpr int64_t kCodeBytes = Inner::kPieceBytes / Inner::kPieceBlocks;  // of a block
    const TernaryProduct& p;
    const Rectangle& area;
    int64_t first_group;                                              // of the piece
    alignas(64) float scale[Inner::kPieceBlocks][kTiles][kTileRows];  // of its groups
    alignas(64) float sums[kTiles][kMostRows / PLANES * kTileRows];

    InGroups(const TernaryProduct& p, const Rectangle& area) : p(p), area(area) {
      for (int64_t i = 0; i < area.tiles; ++i) {
        std::memset(sums[i], 0, static_cast<size_t>(area.tokens * kTileRows) * sizeof(float));
      }
    }

    int64_t piece_blocks() const { return Inner::kPieceBlocks / p.group_blocks * p.group_blocks; }

    void begin_piece(int64_t block, int64_t blocks) {
      first_group = block / p.group_blocks;
      const int64_t groups = divide_up(blocks, p.group_blocks);
      for (int64_t i = 0; i < area.tiles; ++i) {
        const Scale* from = scales_of_tile<Scale>(p, area.tile + i) + first_group * kTileRows;
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t r = 0; r < kTileRows; r += Isa::kLanes) {
            Isa::store(scale[g][i] + r, Isa::load(from + g * kTileRows + r));
          }
        }
      }
    }

    template <int TILES, int ROWS>
    void add(int64_t, const uint8_t* codes, int64_t blocks, const int8_t* q, int64_t i, int64_t token) {
      const int64_t row = (area.token + token) * PLANES * p.groups + first_group;
      DecodedGroup terms{p.q_sum + row,
                         p.x_scale + row,
                         p.groups,
                         scale[0][i],
                         sums[i] + token * kTileRows,
                         kMostRows / PLANES * kTileRows};
      for (; blocks > 0; blocks -= p.group_blocks) {
        const int64_t of_group = blocks < p.group_blocks ? blocks : p.group_blocks;
        Inner::template piece_of_group<PLANES, TILES, ROWS>(codes, of_group, q, p.q_stride, terms);
        codes += of_group * kCodeBytes;
        q += of_group * Inner::kInputs;
        ++terms.q_sum;
        ++terms.x_scale;
        terms.scale += kTiles * kTileRows;
        __asm__ volatile("" ::: "memory");  // or GCC keeps sums for the next group, which takes registers from this one
      }
    }

    void store(int64_t i, int64_t token) {
      const int64_t row = (area.tile + i) * kTileRows;
      const int64_t left = p.out_features - row;
      store_sums<Isa>(p, sums[i] + token * kTileRows, area.token + token, row, left < kTileRows ? left : kTileRows);
    }
  };

  // Calls sums.add with the number of rows as a compile-time number, up to ROWS.
  template <int TILES, int ROWS, class Sums>
  static void add_of(int64_t rows, Sums& sums, int64_t block, const uint8_t* codes, int64_t blocks, const int8_t* q,
                     int64_t i, int64_t token) {
    if constexpr (ROWS > Sums::kPlanes) {
      if (rows < ROWS) return add_of<TILES, ROWS - Sums::kPlanes>(rows, sums, block, codes, blocks, q, i, token);
    }
    sums.template add<TILES, ROWS>(block, codes, blocks, q, i, token);
  }

  // False, and results are undefined, where a code is 3: the file is corrupt, and slower loops have to take it.
  template <class Sums>
  static bool multiply(const TernaryProduct& p, const Rectangle& area) {
    constexpr int64_t kMostTokens = Inner::kDecodedRows / Sums::kPlanes;
    alignas(64) uint8_t codes[kTiles][Inner::kPieceBytes];
    Sums sums(p, area);
    // Equal parts, the first `more` of them one token longer.
    const int64_t parts = divide_up(area.tokens, kMostTokens);
    const int64_t least = area.tokens / parts;
    const int64_t more = area.tokens % parts;
    for (int64_t block = 0; block < p.blocks; block += sums.piece_blocks()) {
      const int64_t left = p.blocks - block;
      const bool last = left <= sums.piece_blocks();
      const int64_t blocks = last ? left : sums.piece_blocks();
      for (int64_t i = 0; i < area.tiles; ++i) {
        const uint8_t* packed = p.packed + ((area.tile + i) * p.blocks + block) * kBlockBytes;
        if (!Inner::decode(packed, blocks, codes[i])) return false;
      }
      sums.begin_piece(block, blocks);
      const int8_t* q = p.q + area.token * Sums::kPlanes * p.q_stride + block * Inner::kInputs;
      for (int64_t part = 0, token = 0; part < parts; ++part) {
        const int64_t count = part < more ? least + 1 : least;
        const int8_t* q_part = q + token * Sums::kPlanes * p.q_stride;
        const int64_t rows = count * Sums::kPlanes;
        int64_t i = 0;
        for (; i + Inner::kDecodedTiles <= area.tiles; i += Inner::kDecodedTiles) {
          add_of<Inner::kDecodedTiles, Inner::kDecodedRows>(rows, sums, block, codes[i], blocks, q_part, i, token);
        }
        if constexpr (Inner::kDecodedTiles > 1) {
          for (; i < area.tiles; ++i) {
            add_of<1, Inner::kDecodedRows>(rows, sums, block, codes[i], blocks, q_part, i, token);
          }
        }
        if (last) {  // one after another: stores of all tokens at once would wait for memory
          for (int64_t t = token; t < token + count; ++t) {
            for (int64_t i = 0; i < area.tiles; ++i) sums.store(i, t);
          }
        }
        token += count;
      }
    }
    return true;
  }

  static bool multiply_any(const TernaryProduct& p, const Rectangle& area) {
    const bool two = p.planes == 2;
    if constexpr (Inner::kHasGroupScales) {
      if (p.group_blocks != 0 && p.scale_dtype == DType::kFloat16) {
        return two ? multiply<InGroups<2, Float16>>(p, area) : multiply<InGroups<1, Float16>>(p, area);
      }
      if (p.group_blocks != 0)
        return two ? multiply<InGroups<2, float>>(p, area) : multiply<InGroups<1, float>>(p, area);
    }
    return two ? multiply<WholeRows<2>>(p, area) : multiply<WholeRows<1>>(p, area);
  }

  static void ternary_product(const TernaryProduct& p, int64_t tile_begin, int64_t tile_end) {
    // All tiles pass over one part of the tokens, then over the next.
    const int64_t parts = divide_up(p.tokens, kMostRows / p.planes);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = p.tokens * part / parts;
      const int64_t end = p.tokens * (part + 1) / parts;
      for (int64_t tile = tile_begin; tile < tile_end; tile += kTiles) {
        const int64_t tiles = tile_end - tile < kTiles ? tile_end - tile : kTiles;
        if (multiply_any(p, {tile, tiles, begin, end - begin})) continue;
        for (int64_t i = 0; i < tiles; ++i) {
          TernaryDriver<Isa, Inner>::template tiles<1>(p, tile + i, begin, end);
        }
      }
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
