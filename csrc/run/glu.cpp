#include "run/glu.h"

#include "kernels/float_convert.h"
#include "run/dispatch.h"
#include "run/parallel.h"

namespace bitnet_ops {
namespace {

// Elements at a time: three pieces of float32 are 12 KB, which stay in L1 with what they are made of.
constexpr int64_t kPiece = 1024;

// Rough costs for `parallel`: reading and writing L2, and for 16 bits rounding element by element.
constexpr double kNsPerElement = 0.4;
constexpr double kNsPerSmallElement = 1.5;

// Rows are contiguous and no element knows another, so pieces of all rows together are shared out: of one long row too.
template <class Work>
void parallel_pieces(int64_t count, double ns_per_element, const Work& work) {
  parallel(divide_up(count, kPiece), static_cast<double>(kPiece) * ns_per_element,
           [&](int64_t begin, int64_t end) { work(begin * kPiece, end * kPiece < count ? end * kPiece : count); });
}

template <class T>
void glu_of_small(Activation activation, DType dtype, const T* gate, const T* up, T* out, int64_t count) {
  const KernelTable& table = kernels();
  parallel_pieces(count, kNsPerSmallElement, [&](int64_t begin, int64_t end) {
    float wide_gate[kPiece];
    float wide_up[kPiece];
    for (int64_t first = begin; first < end; first += kPiece) {
      const int64_t n = end - first < kPiece ? end - first : kPiece;
      table.widen_row(gate + first, dtype, n, wide_gate, n);
      table.widen_row(up + first, dtype, n, wide_up, n);
      table.glu_row(activation, wide_gate, wide_up, wide_up, n);
      for (int64_t i = 0; i < n; ++i) from_float(wide_up[i], out + first + i);
    }
  });
}

}  // namespace

void run_glu(Activation activation, const float* gate, const float* up, float* out, int64_t rows, int64_t features) {
  const KernelTable& table = kernels();
  parallel_pieces(rows * features, kNsPerElement, [&](int64_t begin, int64_t end) {
    table.glu_row(activation, gate + begin, up + begin, out + begin, end - begin);
  });
}

void run_glu(Activation activation, DType dtype, const void* gate, const void* up, void* out, int64_t rows,
             int64_t features) {
  const int64_t count = rows * features;
  switch (dtype) {
    case DType::kBFloat16:
      return glu_of_small(activation, dtype, static_cast<const BFloat16*>(gate), static_cast<const BFloat16*>(up),
                          static_cast<BFloat16*>(out), count);
    case DType::kFloat16:
      return glu_of_small(activation, dtype, static_cast<const Float16*>(gate), static_cast<const Float16*>(up),
                          static_cast<Float16*>(out), count);
    default:
      return run_glu(activation, static_cast<const float*>(gate), static_cast<const float*>(up),
                     static_cast<float*>(out), rows, features);
  }
}

}  // namespace bitnet_ops
