// The packed layout tile16, both ways, in portable C++ (drawn in bitnet_ops/packing.py and
// DESIGN.md section 4). Packing happens once per model, so it needs no instruction set of its own.
#pragma once

#include <cstdint>

namespace bitnet_ops {

// Packs tiles [tile_begin, tile_end) of w [out_features][in_features], values -1, 0, 1, into
// packed [tiles][blocks][64]. False if some value is not ternary (the output is then meaningless).
bool pack_tile16(const int8_t* w, int64_t out_features, int64_t in_features, uint8_t* packed, int64_t tile_begin,
                 int64_t tile_end);

// The inverse. False if a code of a real row and column is 3, which stands for no weight.
bool unpack_tile16(const uint8_t* packed, int64_t out_features, int64_t in_features, int8_t* w, int64_t tile_begin,
                   int64_t tile_end);

}  // namespace bitnet_ops
