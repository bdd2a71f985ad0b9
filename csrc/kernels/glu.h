// The gated linear unit's elementwise half, once; an instruction set only supplies `Isa`.
//
// Include this inside a kernel file's target region, after exponential.h and float_algorithms.h.
//
// Each operation is rounded to float32, and there is no sum, so an element has the same bits wherever it stands:
//
//     relu2      gate > 0 ? (gate * gate) * up : +0          NaN for a NaN gate
//     silu       (gate * sigmoid(gate)) * up
//     gelu_tanh  (gate * sigmoid(t)) * up,  t = (2 sqrt(2 / pi)) * (gate + 0.044715 * ((gate * gate) * gate))
//
// The last is the usual 0.5 gate (1 + tanh(t / 2)): 1 + tanh(z) = 2 sigmoid(2z).
//
//     e = exp(-|t|) in (0, 1],  sigmoid(t) = t > 0 ? 1 / (1 + e) : e / (1 + e)
//
// which never overflows, and loses nothing where it is small: 1 - sigmoid(-t) would.
//
// Error of sigmoid, with u = 2^-24 and exponential.h's 2.7 u: the sum 1 + e is off by u and by what e brings into it,
// at most half of it where e is 1; so 1 / (1 + e) is off by 2.7 u / 2 + 2 u, e / (1 + e) by 2.7 u + 2 u: less than 5 u,
// or by 2^-126 absolutely, where e becomes 0. Two products add 2 u: silu is off by 7 u, relatively, or 2^-126 |gate
// up|. The argument of gelu_tanh is off by less than 8 u |t|: 2 roundings of the cube, 2 of its factor and the product
// with it, 1 of the sum, whose terms have one sign, and 2 of the last factor and its product. That changes the sigmoid
// by 8 u |t| (1 - sigmoid(t)) of itself: little for t > 0, and far below 0 as much as any function of a float32
// argument.
//
// Isa provides, beside float_algorithms.h's and exponential.h's,
//     div(a, b)                         one IEEE division
//     choose_at_most(x, limit, a, b)    x <= limit ? a : b

namespace bitnet_ops {
namespace {

template <class Isa>
struct GluKernels {
  using F32 = typename Isa::F32;
  static constexpr int kLanes = Isa::kLanes;

  static F32 sigmoid(F32 t) {
    const F32 one = Isa::set1(1.0f);
    const F32 e = exp<Isa>(Isa::choose_at_most(t, Isa::zero(), t, Isa::mul(t, Isa::set1(-1.0f))));
    return Isa::div(Isa::choose_at_most(t, Isa::zero(), e, one), Isa::add(one, e));
  }

  // The product first and the choice after it. Where the gate is closed, up may be any bits.
  struct Relu2 {
    static F32 of(F32 gate, F32 up) {
      const F32 product = Isa::mul(Isa::mul(gate, gate), up);
      return Isa::choose_at_most(gate, Isa::zero(), Isa::zero(), product);
    }
  };

  struct Silu {
    static F32 of(F32 gate, F32 up) { return Isa::mul(Isa::mul(gate, sigmoid(gate)), up); }
  };

  struct GeluTanh {
    static F32 of(F32 gate, F32 up) {
      const F32 cube = Isa::mul(Isa::mul(gate, gate), gate);
      const F32 sum = Isa::add(gate, Isa::mul(Isa::set1(0.044715f), cube));
      const F32 t = Isa::mul(Isa::set1(0x1.988454p+0f), sum);  // 2 sqrt(2 / pi)
      return Isa::mul(Isa::mul(gate, sigmoid(t)), up);
    }
  };

  template <class Formula>
  static void row_of(const float* gate, const float* up, float* out, int64_t count) {
    const int64_t full = count - count % kLanes;
    for (int64_t i = 0; i < full; i += kLanes) Isa::store(out + i, Formula::of(Isa::load(gate + i), Isa::load(up + i)));
    if (full < count) {
      const int64_t rest = count - full;
      const F32 last = Formula::of(load_partial<Isa>(gate + full, rest), load_partial<Isa>(up + full, rest));
      store_partial<Isa>(out + full, last, rest);
    }
  }

  static void row(Activation activation, const float* gate, const float* up, float* out, int64_t count) {
    switch (activation) {
      case Activation::kSilu:
        return row_of<Silu>(gate, up, out, count);
      case Activation::kGeluTanh:
        return row_of<GeluTanh>(gate, up, out, count);
      default:
        return row_of<Relu2>(gate, up, out, count);
    }
  }
};

}  // namespace
}  // namespace bitnet_ops
