// Brings whole matrices into a layout and out of it: shares tiles or panels out among threads. csrc/layouts has the
// loops; every way between layouts leads over tile16.
#pragma once

#include <cstdint>

#include "layouts/layouts.h"

namespace bitnet_ops {

// Each writes all of `out`, other memory than its input.

// w [out_features][in_features]. False if a value is not -1, 0 or 1; `out` is meaningless then.
bool run_pack(const int8_t* w, MatrixSize size, Layout layout, uint8_t* out);

// The same from 2-bit codes, rows x in_features() of them. False if a code is 3; `out` is meaningless then.
bool run_pack_two_bits(const TwoBitCodes& codes, Layout layout, uint8_t* out);

// The inverse of run_pack. False if a code is 3, which stands for no weight.
bool run_unpack(Layout layout, const uint8_t* packed, MatrixSize size, int8_t* out);

// From one layout to another one.
void run_repack(Layout layout, const uint8_t* packed, MatrixSize size, Layout wanted, uint8_t* out);

// The place of the first of `count` bytes that is none of packed weights: in base 3 one above 242, else one with a code
// 3. -1 where all are.
int64_t run_find_bad_byte(const uint8_t* packed, int64_t count, Layout layout);

}  // namespace bitnet_ops
