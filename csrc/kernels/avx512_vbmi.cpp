// AVX-512 VNNI with VBMI (Ice Lake, Sapphire Rapids, Zen 4 and later): see avx512.h and avx512_base3.h.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
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
#include "kernels/avx512.h"
#include "kernels/avx512_base3.h"
#include "kernels/make_table.h"

namespace bitnet_ops {
extern const KernelTable kAvx512VbmiKernels;
constexpr KernelTable kAvx512VbmiKernels = make_table<Avx512, TileBlocks<Tile16Codes>, Sparse, Avx512Sums>(
    "avx512_vbmi", tile_product<Avx512, TileBlocks<Base3Codes>>);

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
