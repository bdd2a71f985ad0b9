// AVX-512 VNNI without VBMI (Cascade Lake, Cooper Lake): see avx512.h.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/float_convert.h"
#include "kernels/kernel_table.h"

// This list equals the requirement in dispatch.cpp, feature for feature.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "kernels/float_algorithms.h"
#include "kernels/tile_sums.h"
#include "kernels/exponential.h"
#include "kernels/attention_int8.h"
#include "kernels/attention.h"
#include "kernels/glu.h"
#include "kernels/screen.h"
#include "kernels/ternary_driver.h"
#include "kernels/avx512.h"

namespace bitnet_ops {
namespace {

using Float = FloatKernels<Avx512>;
using Attend = AttentionKernels<Avx512, Avx512Sums>;

}  // namespace

extern const KernelTable kAvx512VnniKernels;
constexpr KernelTable kAvx512VnniKernels = {
    "avx512_vnni",
    Float::quantize_row,
    Float::quantize_row_16,
    TernaryDriver<Avx512, TileBlocks<Tile16Codes>>::ternary_product,
    nullptr,
    RowDriver<Sparse>::ternary_rows,
    ColumnDriver<Avx512, Sparse>::ternary_columns,
    Float::rms_norm_row,
    Float::widen_row,
    Float::logits,
    Attend::store,
    Attend::queries,
    Attend::span,
    Attend::join,
    Attend::finish,
    Float::logits_of_rows,
    ScreenRows<Avx512>::screen_rows,
    ScreenDriver<Avx512, Avx512Sums>::screen,
    GluKernels<Avx512>::row,
};

}  // namespace bitnet_ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
