#include "run/packing.h"

#include <algorithm>
#include <atomic>

#include "run/parallel.h"
#include "run/scratch.h"
#include "run/ternary.h"

namespace bitnet_ops {
namespace {

// Rough costs for `parallel`: a nanosecond a weight.
double ns_per_tile(MatrixSize size) { return static_cast<double>(size.in_features + 1) * kTileRows; }
double ns_per_panel(MatrixSize size) { return static_cast<double>(size.in_features + 1) * kPanelRows; }

// Room for a copy in between. Kept, because a model has many matrices, and memory that is taken and given back for each
// of them leaves holes between what stays.
uint8_t* tile16_scratch(MatrixSize size) {
  static thread_local Scratch scratch;
  return static_cast<uint8_t*>(scratch.reserve(tile16_bytes(size)));
}

// The matrix as tile16: itself, or a copy in this thread's scratch.
const uint8_t* as_tile16(Layout layout, const uint8_t* packed, MatrixSize size) {
  if (layout == Layout::kTile16) return packed;
  uint8_t* copy = tile16_scratch(size);
  fill_tile16(layout, packed, size, copy);
  return copy;
}

// From tile16, which must not be `out`.
void from_tile16(const uint8_t* tile16, MatrixSize size, Layout layout, uint8_t* out) {
  if (layout == Layout::kColumn) {
    parallel(divide_up(size.out_features, kPanelRows), ns_per_panel(size),
             [&](int64_t begin, int64_t end) { column_from_tile16(tile16, size, out, begin, end); });
    return;
  }
  parallel(tiles_of(size.out_features), ns_per_tile(size), [&](int64_t begin, int64_t end) {
    if (layout == Layout::kTile16Base3) base3_from_tile16(tile16, size, out, begin, end);
    if (layout == Layout::kRow) row_from_tile16(tile16, size, out, begin, end);
  });
}

// Fills `out` from the tiles that `pack(tile16, begin, end)` makes. False if one of its calls is; `out` is meaningless
// then.
template <class Pack>
bool by_way_of_tile16(MatrixSize size, Layout layout, uint8_t* out, double ns_per_unit, Pack pack) {
  uint8_t* tile16 = layout == Layout::kTile16 ? out : tile16_scratch(size);
  std::atomic<bool> ternary{true};
  parallel(tiles_of(size.out_features), ns_per_unit, [&](int64_t begin, int64_t end) {
    if (!pack(tile16, begin, end)) ternary = false;
  });
  if (ternary && layout != Layout::kTile16) from_tile16(tile16, size, layout, out);
  return ternary;
}

constexpr uint8_t kMostBase3 = 242;  // 3^5 - 1: five codes 2

bool is_bad(uint8_t byte, bool base3) { return base3 ? byte > kMostBase3 : (byte & (byte >> 1) & 0x55) != 0; }

// Whether one of the bytes is bad, in vectors.
template <bool BASE3>
bool any_bad(const uint8_t* bytes, int64_t count) {
  uint8_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad = static_cast<uint8_t>(bad | is_bad(bytes[i], BASE3));
  return bad != 0;
}

}  // namespace

bool run_pack(const int8_t* w, MatrixSize size, Layout layout, uint8_t* out) {
  return by_way_of_tile16(size, layout, out, ns_per_tile(size), [&](uint8_t* tile16, int64_t begin, int64_t end) {
    return pack_tile16(w, size, tile16, begin, end);
  });
}

bool run_pack_two_bits(const TwoBitCodes& codes, Layout layout, uint8_t* out) {
  const MatrixSize size{codes.rows, codes.in_features()};
  constexpr double kWeightsPerNs = 4.0;
  return by_way_of_tile16(
      size, layout, out, ns_per_tile(size) / kWeightsPerNs,
      [&](uint8_t* tile16, int64_t begin, int64_t end) { return tile16_from_two_bits(codes, tile16, begin, end); });
}

bool run_unpack(Layout layout, const uint8_t* packed, MatrixSize size, int8_t* out) {
  const uint8_t* tile16 = as_tile16(layout, packed, size);
  std::atomic<bool> ternary{true};
  parallel(tiles_of(size.out_features), ns_per_tile(size), [&](int64_t begin, int64_t end) {
    if (!unpack_tile16(tile16, size, out, begin, end)) ternary = false;
  });
  return ternary;
}

void run_repack(Layout layout, const uint8_t* packed, MatrixSize size, Layout wanted, uint8_t* out) {
  if (wanted == Layout::kTile16) return fill_tile16(layout, packed, size, out);
  from_tile16(as_tile16(layout, packed, size), size, wanted, out);
}

int64_t run_find_bad_byte(const uint8_t* packed, int64_t count, Layout layout) {
  const bool base3 = layout == Layout::kTile16Base3;
  constexpr int64_t kChunk = 16384;
  constexpr double kNsPerByte = 0.1;
  std::atomic<int64_t> first{count};
  parallel(divide_up(count, kChunk), kNsPerByte * kChunk, [&](int64_t chunk_begin, int64_t chunk_end) {
    for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      const int64_t begin = chunk * kChunk;
      const int64_t end = std::min(begin + kChunk, count);
      if (begin >= first.load(std::memory_order_relaxed)) return;
      if (!(base3 ? any_bad<true> : any_bad<false>)(packed + begin, end - begin)) continue;
      int64_t at = begin;
      while (!is_bad(packed[at], base3)) ++at;
      int64_t before = first.load();
      while (at < before && !first.compare_exchange_weak(before, at)) {
      }
      return;
    }
  });
  return first == count ? -1 : first.load();
}

}  // namespace bitnet_ops
