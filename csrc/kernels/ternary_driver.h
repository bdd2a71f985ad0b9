// The ternary product around an instruction set's inner loops: tiles, groups of tokens, results.
//
// Include this inside a kernel file's target region, like float_algorithms.h.
//
// A sum over codes is sum_k q[k] * (w[n][k] + 1); the row sum of q is taken off here. Two planes are two
// rows of q to an inner loop ("rows" below are rows of q), and one token here.
//
// Inner provides
//     kInputs                                 inputs of a block: 16, or 20 for base 3
//     kTiles, kRows                           largest register block, in tiles and rows of q; kRows is even
//     kRowsStreamed                           up to so many rows, tiles come one at a time
//     kQBytes                                 of q that stay in L2 while weights pass
//     kHasGroupScales                         whether matrices of this layout may have scales of groups
//     kRowsOfGroups                           0, or up to so many rows a tile with scales of groups has a loop of its
//     own: groups<PLANES, TOKENS>(p, tile, q, scales, token, sums)          sums[TOKENS][16] as `add_group` adds them
//     up,
//                                                                      scales[groups][16]
//     block<TILES, ROWS>(tile, tile_bytes, blocks, q, q_stride, acc)   acc[ROWS][TILES * 16]

namespace bitnet_ops {
namespace {

// float(256 * hi + lo) of two planes less their sums, rounded once: exact before that, for |256 * hi + lo| < 2^53.
inline float float_sum(const TernaryProduct& p, int32_t hi, int32_t lo, int64_t token) {
  const int32_t* q_sum = p.q_sum + 2 * token;
  return static_cast<float>(256.0 * static_cast<double>(hi - q_sum[0]) + static_cast<double>(lo - q_sum[1]));
}

// 16 results of a token, or `count` of them at the end: y = sums * factor (+ bias), where factor[i] = x_scale *
// weight_scale[i], or what `in_groups` left out if the sums have their weight scales already.
//
// Vectors by hand: GCC 12 unrolls loops of 16 before it would make vectors of them.
template <class Isa, class T>
void store_scaled(const TernaryProduct& p, const float* sums, int64_t token, int64_t row, int64_t count) {
  T* out = static_cast<T*>(p.out) + token * p.out_features + row;
  const bool grouped = p.group_blocks != 0;
  const float x_scale = grouped && p.planes == 1 ? 1.0f : p.x_scale[token];
  const float* row_scale = grouped ? nullptr : static_cast<const float*>(p.weight_scale) + row;
  if (count == kTileRows) {
    for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) {
      auto factor = Isa::set1(x_scale);
      if (!grouped) factor = Isa::mul(factor, Isa::load(row_scale + i));
      auto y = Isa::mul(Isa::load(sums + i), factor);
      if (p.bias != nullptr) y = Isa::add(y, Isa::load(p.bias + row + i));
      Isa::store(out + i, y);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float y = sums[i] * (grouped ? x_scale : x_scale * row_scale[i]);
    if (p.bias != nullptr) y = y + p.bias[row + i];
    from_float(y, out + i);
  }
}

template <class Isa>
void store_sums(const TernaryProduct& p, const float* sums, int64_t token, int64_t row, int64_t count) {
  switch (p.out_dtype) {
    case DType::kBFloat16:
      return store_scaled<Isa, BFloat16>(p, sums, token, row, count);
    case DType::kFloat16:
      return store_scaled<Isa, Float16>(p, sums, token, row, count);
    default:
      return store_scaled<Isa, float>(p, sums, token, row, count);
  }
}

// All 16 results of a tile from one plane, a scale a row: most of what a prompt writes, and no more than a load, six
// operations and a store for a register of them. The same operations as in store_scaled.
template <class Isa, class T>
inline __attribute__((always_inline)) void store_tile(const TernaryProduct& p, const int32_t* acc, int64_t token,
                                                      int64_t row) {
  T* out = static_cast<T*>(p.out) + token * p.out_features + row;
  const float* row_scale = static_cast<const float*>(p.weight_scale) + row;
  const auto x_scale = Isa::set1(p.x_scale[token]);
  const int32_t q_sum = p.q_sum[token];
  for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) {
    auto y = Isa::mul(Isa::load_less(acc + i, q_sum), Isa::mul(x_scale, Isa::load(row_scale + i)));
    if (p.bias != nullptr) y = Isa::add(y, Isa::load(p.bias + row + i));
    Isa::store(out + i, y);
  }
}

// Results of 16 neighbouring rows, acc[planes][plane_stride], or fewer at the end of the matrix.
template <class Isa>
inline __attribute__((always_inline)) void store_rows(const TernaryProduct& p, const int32_t* acc, int64_t plane_stride,
                                                      int64_t token, int64_t row) {
  const int64_t left = p.out_features - row;
  const int64_t count = left < kTileRows ? left : kTileRows;
  if (p.planes == 1 && count == kTileRows) {
    switch (p.out_dtype) {
      case DType::kFloat32:
        return store_tile<Isa, float>(p, acc, token, row);
      case DType::kBFloat16:
        return store_tile<Isa, BFloat16>(p, acc, token, row);
      case DType::kFloat16:
        return store_tile<Isa, Float16>(p, acc, token, row);
      default:
        break;
    }
  }
  if (p.out_dtype == DType::kInt32) {
    int32_t* out = static_cast<int32_t*>(p.out) + token * p.out_features + row;
    for (int64_t i = 0; i < count; ++i) out[i] = acc[i] - p.q_sum[token];
    return;
  }
  alignas(64) float sums[kTileRows];
  if (p.planes == 1) {
    const int32_t q_sum = p.q_sum[token];
    for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) Isa::store(sums + i, Isa::load_less(acc + i, q_sum));
  } else {
    for (int64_t i = 0; i < kTileRows; ++i) sums[i] = float_sum(p, acc[i], acc[plane_stride + i], token);
  }
  store_sums<Isa>(p, sums, token, row, count);
}

// The result of a single row anywhere in the matrix.
inline void store_row(const TernaryProduct& p, const int32_t* acc, int64_t plane_stride, int64_t token, int64_t row) {
  const int64_t place = token * p.out_features + row;
  if (p.out_dtype == DType::kInt32) {
    static_cast<int32_t*>(p.out)[place] = *acc - p.q_sum[token];
    return;
  }
  const float sum =
      p.planes == 1 ? static_cast<float>(*acc - p.q_sum[token]) : float_sum(p, *acc, acc[plane_stride], token);
  float y = sum * (p.x_scale[token] * static_cast<const float*>(p.weight_scale)[row]);
  if (p.bias != nullptr) y = y + p.bias[row];
  switch (p.out_dtype) {
    case DType::kBFloat16:
      return from_float(y, static_cast<BFloat16*>(p.out) + place);
    case DType::kFloat16:
      return from_float(y, static_cast<Float16*>(p.out) + place);
    default:
      static_cast<float*>(p.out)[place] = y;
  }
}

// sums[i] += float(acc[i]) * scale[i] of a group, for 16 rows of a token.
//
// A group has at most 256 inputs (kMaxGroupInputs), so every integer here is below 2^24 and exact in float32: a
// sum over codes is at most 2 * 128 * 256 = 2^16, and the two planes of 16-bit activations make at most
// 2^15 * 256 = 2^23 of it. What rounds is the product with the scale, and the addition.
template <class Isa, int PLANES, class Scale>
inline void add_group(const TernaryProduct& p, const int32_t* acc, int64_t plane_stride, int64_t token, int64_t group,
                      const Scale* scale, float* sums) {
  const int32_t* q_sum = p.q_sum + token * PLANES * p.groups + group;
  const auto hi_sum = Isa::set1(-static_cast<float>(q_sum[0]));
  for (int64_t i = 0; i < kTileRows; i += Isa::kLanes) {
    auto sum = Isa::add(Isa::load(acc + i), hi_sum);
    auto factor = Isa::load(scale + i);
    if constexpr (PLANES == 2) {
      const auto lo_sum = Isa::set1(-static_cast<float>(q_sum[p.groups]));
      sum = Isa::fma(Isa::set1(256.0f), sum, Isa::add(Isa::load(acc + plane_stride + i), lo_sum));
    } else {
      factor = Isa::mul(Isa::set1(p.x_scale[token * p.groups + group]), factor);
    }
    Isa::store(sums + i, Isa::add(Isa::load(sums + i), Isa::mul(sum, factor)));
  }
}

// Weight scales of the groups of a tile, [groups][16]; rows of padding have some too, so a kernel reads whole tiles.
template <class Scale>
inline const Scale* scales_of_tile(const TernaryProduct& p, int64_t tile) {
  return static_cast<const Scale*>(p.weight_scale) + tile * p.groups * kTileRows;
}

// Scales are a stream of their own. With float16 and groups of 128 inputs this far ahead is 8 KB of codes ahead.
constexpr int64_t kScalesAheadBytes = 512;

template <class Isa, class Inner>
struct TernaryDriver {
  // Calls the inner block with `rows` as a compile-time number, 1 .. ROWS.
  template <int TILES, int ROWS>
  static void block_of(int64_t rows, const uint8_t* tile, int64_t tile_bytes, int64_t blocks, const int8_t* q,
                       int64_t q_stride, int32_t* acc) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return block_of<TILES, ROWS - 1>(rows, tile, tile_bytes, blocks, q, q_stride, acc);
    }
    Inner::template block<TILES, ROWS>(tile, tile_bytes, blocks, q, q_stride, acc);
  }

  // TILES tiles x `count` tokens, one weight scale a row.
  template <int TILES>
  static void whole_rows(const TernaryProduct& p, int64_t tile, int64_t token, int64_t count) {
    alignas(64) int32_t acc[Inner::kRows * TILES * kTileRows];
    const int64_t tile_bytes = p.blocks * kBlockBytes;
    block_of<TILES, Inner::kRows>(count * p.planes, p.packed + tile * tile_bytes, tile_bytes, p.blocks,
                                  p.q + token * p.planes * p.q_stride, p.q_stride, acc);
    constexpr int64_t kPlaneStride = TILES * kTileRows;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < TILES; ++i) {
        store_rows<Isa>(p, acc + t * p.planes * kPlaneStride + i * kTileRows, kPlaneStride, token + t,
                        (tile + i) * kTileRows);
      }
    }
  }

  // TILES tiles x TOKENS tokens with a weight scale for every group of blocks.
  template <int TILES, int PLANES, int TOKENS, class Scale>
  static void in_groups(const TernaryProduct& p, int64_t tile, int64_t token) {
    constexpr int64_t kPlaneStride = TILES * kTileRows;
    alignas(64) int32_t acc[TOKENS * PLANES * kPlaneStride];
    alignas(64) float sums[TOKENS * kPlaneStride] = {};
    const int64_t tile_bytes = p.blocks * kBlockBytes;
    const uint8_t* packed = p.packed + tile * tile_bytes;
    const int8_t* q = p.q + token * PLANES * p.q_stride;
    const int64_t rows_left = p.out_features - tile * kTileRows;
    if constexpr (TILES == 1 && TOKENS * PLANES <= Inner::kRowsOfGroups) {
      Inner::template groups<PLANES, TOKENS>(p, packed, q, scales_of_tile<Scale>(p, tile), token, sums);
    } else {
      for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t block = group * p.group_blocks;
        const int64_t blocks = p.blocks - block < p.group_blocks ? p.blocks - block : p.group_blocks;
        const Scale* scale[TILES];
        for (int64_t i = 0; i < TILES; ++i) {
          scale[i] = scales_of_tile<Scale>(p, tile + i) + group * kTileRows;
          Isa::prefetch_near(reinterpret_cast<const char*>(scale[i]) + kScalesAheadBytes);
        }
        Inner::template block<TILES, TOKENS * PLANES>(packed + block * kBlockBytes, tile_bytes, blocks,
                                                      q + block * Inner::kInputs, p.q_stride, acc);
        for (int64_t i = 0; i < TILES; ++i) {
          for (int64_t t = 0; t < TOKENS; ++t) {
            add_group<Isa, PLANES>(p, acc + t * PLANES * kPlaneStride + i * kTileRows, kPlaneStride, token + t, group,
                                   scale[i], sums + t * kPlaneStride + i * kTileRows);
          }
        }
      }
    }
    for (int64_t t = 0; t < TOKENS; ++t) {
      for (int64_t i = 0; i < TILES; ++i) {
        const int64_t left = rows_left - i * kTileRows;
        store_sums<Isa>(p, sums + t * kPlaneStride + i * kTileRows, token + t, (tile + i) * kTileRows,
                        left < kTileRows ? left : kTileRows);
      }
    }
  }

  // in_groups with `count` as a compile-time number, 1 .. TOKENS.
  template <int TILES, int PLANES, int TOKENS>
  static void in_groups_of(int64_t count, const TernaryProduct& p, int64_t tile, int64_t token) {
    if constexpr (TOKENS > 1) {
      if (count < TOKENS) return in_groups_of<TILES, PLANES, TOKENS - 1>(count, p, tile, token);
    }
    if (p.scale_dtype == DType::kFloat16) {
      in_groups<TILES, PLANES, TOKENS, Float16>(p, tile, token);
    } else {
      in_groups<TILES, PLANES, TOKENS, float>(p, tile, token);
    }
  }

  // TILES tiles x tokens [begin, end).
  template <int TILES>
  static void tiles(const TernaryProduct& p, int64_t tile, int64_t begin, int64_t end) {
    // Equal parts: 13 tokens run as 7 + 6, not as 12 + 1, because a block of one token pays for
    // decoding the weights alone.
    const int64_t most = Inner::kRows / p.planes;
    const int64_t parts = divide_up(end - begin, most);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = begin + (end - begin) * part / parts;
      const int64_t count = begin + (end - begin) * (part + 1) / parts - first;
      if constexpr (Inner::kHasGroupScales) {
        if (p.group_blocks != 0) {
          if (p.planes == 1) {
            in_groups_of<TILES, 1, Inner::kRows>(count, p, tile, first);
          } else {
            in_groups_of<TILES, 2, Inner::kRows / 2>(count, p, tile, first);
          }
          continue;
        }
      }
      whole_rows<TILES>(p, tile, first, count);
    }
  }

  static void ternary_product(const TernaryProduct& p, int64_t tile_begin, int64_t tile_end) {
    if (p.tokens * p.planes <= Inner::kRowsStreamed) {
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) tiles<1>(p, tile, 0, p.tokens);
      return;
    }
    // As many tokens as L2 keeps, in equal parts; all tiles pass over one part, then over the next.
    const int64_t kept = Inner::kQBytes / (p.planes * p.q_stride) + 1;
    const int64_t parts = divide_up(p.tokens, kept);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = p.tokens * part / parts;
      const int64_t end = p.tokens * (part + 1) / parts;
      int64_t tile = tile_begin;
      for (; tile + Inner::kTiles <= tile_end; tile += Inner::kTiles) tiles<Inner::kTiles>(p, tile, begin, end);
      for (; tile < tile_end; ++tile) tiles<1>(p, tile, begin, end);
    }
  }
};

// Rows and columns that are skipped end every stream that the hardware's prefetcher follows, so they are asked
// for by instruction, towards L2, and three times: a request that finds no free buffer is dropped, and
// asking again nearly doubles what a core reads (bench/LOG.md).
constexpr int kAsks = 3;
constexpr int64_t kAskAheadBytes[kAsks] = {40960, 20480, 5120};

// Layout row: Inner::row_sums<ROWS, ASKS>(row, chunks, q, q_stride, ahead, acc) adds up one row of the matrix for
// ROWS rows of q into acc[ROWS], and meanwhile asks for ASKS rows to come.
template <class Inner>
struct RowDriver {
  template <int ROWS, int ASKS, class RowAt>
  static void rows_at(const TernaryProduct& p, int64_t begin, int64_t end, const RowAt& row_at) {
    const int64_t row_bytes = p.blocks * kBlockBytes;
    int64_t distance[ASKS];
    for (int ask = 0; ask < ASKS; ++ask) distance[ask] = kAskAheadBytes[ask] / (row_bytes + 1) + 1;
    int32_t acc[kMaxSparseRows];
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* ahead[ASKS];
      for (int ask = 0; ask < ASKS; ++ask) {
        const int64_t next = i + distance[ask] < end ? i + distance[ask] : end - 1;
        ahead[ask] = p.packed + row_at(next) * row_bytes;
      }
      const int64_t row = row_at(i);
      Inner::template row_sums<ROWS, ASKS>(p.packed + row * row_bytes, p.blocks, p.q, p.q_stride, ahead, acc);
      for (int64_t token = 0; token < p.tokens; ++token) store_row(p, acc + token * p.planes, 1, token, row);
    }
  }

  template <int ROWS>
  static void rows_of(const TernaryProduct& p, const int32_t* rows, int64_t begin, int64_t end) {
    if (rows == nullptr) {
      rows_at<ROWS, 1>(p, begin, end, [](int64_t i) { return i; });  // a stream, which one request keeps going
    } else {
      rows_at<ROWS, kAsks>(p, begin, end, [rows](int64_t i) { return static_cast<int64_t>(rows[i]); });
    }
  }

  static void ternary_rows(const TernaryProduct& p, const int32_t* rows, int64_t begin, int64_t end) {
    static_assert(kMaxSparseRows == 4, "the cases below");
    switch (p.tokens * p.planes) {
      case 1:
        return rows_of<1>(p, rows, begin, end);
      case 2:
        return rows_of<2>(p, rows, begin, end);
      case 3:
        return rows_of<3>(p, rows, begin, end);
      default:
        return rows_of<4>(p, rows, begin, end);
    }
  }
};

// The columns to come while columns c .. c + 7 are added up.
struct ColumnsAhead {
  const uint8_t* column[kAsks * kColumnsAtOnce];

  ColumnsAhead(const uint8_t* panel, const int32_t* columns, int64_t c, int64_t count, int64_t column_bytes,
               int64_t panels) {
    for (int ask = 0; ask < kAsks; ++ask) {
      const int64_t begin = c + kAskAheadBytes[ask] / (panels * kBlockBytes) + 1;
      for (int64_t i = 0; i < kColumnsAtOnce; ++i) {
        const int64_t next = begin + i < count ? begin + i : count - 1;
        column[ask * kColumnsAtOnce + i] = panel + columns[next] * column_bytes;
      }
    }
  }
};

// Layout column: Inner::columns<ROWS>(panel, columns, count, column_bytes, panels, q, q_stride, acc) adds up
// `panels` neighbouring panels for ROWS rows of q into acc[ROWS][panels * 256].
template <class Isa, class Inner>
struct ColumnDriver {
  // Sums of a few panels stay in L1 while all columns pass: 8 KB with one row of q, 16 KB with four.
  static constexpr int64_t kSums = 4096;

  template <int ROWS>
  static void panels_of(const TernaryProduct& p, const int32_t* columns, int64_t count, int64_t panel_begin,
                        int64_t panel_end) {
    constexpr int64_t kPanels = kSums / ROWS / kPanelRows;
    alignas(64) int32_t acc[ROWS * kPanels * kPanelRows];
    const int64_t parts = divide_up(panel_end - panel_begin, kPanels);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = panel_begin + (panel_end - panel_begin) * part / parts;
      const int64_t panels = panel_begin + (panel_end - panel_begin) * (part + 1) / parts - begin;
      const int64_t plane_stride = panels * kPanelRows;
      std::memset(acc, 0, static_cast<size_t>(ROWS * plane_stride) * sizeof *acc);
      Inner::template columns<ROWS>(p.packed + begin * kBlockBytes, columns, count, p.blocks * kBlockBytes, panels, p.q,
                                    p.q_stride, acc);
      for (int64_t token = 0; token < p.tokens; ++token) {
        for (int64_t row = 0; row < plane_stride && begin * kPanelRows + row < p.out_features; row += kTileRows) {
          store_rows<Isa>(p, acc + token * p.planes * plane_stride + row, plane_stride, token,
                          begin * kPanelRows + row);
        }
      }
    }
  }

  static void ternary_columns(const TernaryProduct& p, const int32_t* columns, int64_t count, int64_t panel_begin,
                              int64_t panel_end) {
    static_assert(kMaxSparseRows == 4, "the cases below");
    switch (p.tokens * p.planes) {
      case 1:
        return panels_of<1>(p, columns, count, panel_begin, panel_end);
      case 2:
        return panels_of<2>(p, columns, count, panel_begin, panel_end);
      case 3:
        return panels_of<3>(p, columns, count, panel_begin, panel_end);
      default:
        return panels_of<4>(p, columns, count, panel_begin, panel_end);
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
