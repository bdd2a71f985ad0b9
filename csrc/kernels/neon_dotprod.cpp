// NEON with the dot product of Armv8.2 (Cortex-A76, Neoverse N1: Raspberry Pi 5, Graviton 2; Apple M1).
//
// Instruction: sdot by element, acc_i32x4[i] += sum over j of code_i8x16[4i+j] * q_i8x16[4p+j].
// Identity:    sum q*w = sum q*c - sum q, with the code c = w + 1 (docs/layouts.md).
// Overflow:    sdot adds four products to an int32 lane without saturating in between. With shifted
//              codes |acc| <= K * 3 * 128 = 384 K <= 1.0e8; with codes in place (few tokens)
//              |acc| <= K/4 * (3 << 4) * 128 = 1536 K <= 4.1e8 < 2^31 at K = 2^18, for any byte.
//
// A quarter of a block is one register, lane i is row i; the sixteen activations of the block are one
// register too, and the instruction itself takes the four of step p from there, without a broadcast:
//
//     code_i8x16    | row 0: j=0..3 | row 1: j=0..3 | row 2: j=0..3 | row 3: j=0..3 |     >> 2p, & 3
//     q_i8x16       | q[ 0 ..  3]   | q[ 4 ..  7]   | q[ 8 .. 11]   | q[12 .. 15]   |     lane p for all
//     acc_i32x4     |     row 0     |     row 1     |     row 2     |     row 3     |

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature. GCC 12 inlines the intrinsic
// only where all of armv8.2-a is enabled.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "kernels/float_algorithms.h"
#include "kernels/tile_sums.h"
#include "kernels/exponential.h"
#include "kernels/attention_int8.h"
#include "kernels/attention.h"
#include "kernels/glu.h"
#include "kernels/screen.h"
#include "kernels/ternary_driver.h"
#include "kernels/ternary_decoded.h"
#include "kernels/neon.h"
#include "kernels/neon_sparse.h"
#include "kernels/sdot.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
extern const KernelTable kNeonDotprodKernels;
constexpr KernelTable kNeonDotprodKernels = make_table<Neon, SdotLoops, SdotLoops, SdotSums>("neon_dotprod");

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
