// Our own exponential, once; an instruction set only supplies `Isa`. No library's: those differ in their last bits.
//
// Include this inside a kernel file's target region, like float_algorithms.h.
//
// Isa provides, beside float_algorithms.h's,
//     power_of_two(v)             2^n where the lowest bits of v's significand hold n + 0
//     zero_below(x, limit, v)     x < limit ? +0 : v

namespace bitnet_ops {
namespace {

// 1.5 * 2^23: the addition itself rounds to an integer, which then stands in the lowest bits.
constexpr float kToInteger = 12582912.0f;

// 2^n * 2^r, where `shifted` is n + kToInteger, |r| <= 1/2 or a little more. The polynomial's relative error is below
// 2.0e-9 (Remez; p(0) is exactly 1).
template <class Isa>
typename Isa::F32 exp2_of_parts(typename Isa::F32 shifted, typename Isa::F32 r) {
  using F32 = typename Isa::F32;
  F32 p = Isa::set1(0x1.41fbbcp-13f);
  p = Isa::fma(p, r, Isa::set1(0x1.5f3e52p-10f));
  p = Isa::fma(p, r, Isa::set1(0x1.3b2d4cp-7f));
  p = Isa::fma(p, r, Isa::set1(0x1.c6aee8p-5f));
  p = Isa::fma(p, r, Isa::set1(0x1.ebfbdcp-3f));
  p = Isa::fma(p, r, Isa::set1(0x1.62e430p-1f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  return Isa::mul(p, Isa::power_of_two(shifted));
}

// 2^x for x <= 0, or NaN; +0 below -126, where results would be subnormal. With n the integer nearest to x,
// 2^x = 2^n * 2^r. Rounding adds less than 1.1 ulp to the polynomial's error: at most 1.3e-7 in all, over every
// float32.
template <class Isa>
typename Isa::F32 exp2(typename Isa::F32 x) {
  using F32 = typename Isa::F32;
  const F32 shifted = Isa::add(x, Isa::set1(kToInteger));
  const F32 n = Isa::add(shifted, Isa::set1(-kToInteger));
  const F32 r = Isa::fma(n, Isa::set1(-1.0f), x);
  return Isa::zero_below(x, Isa::set1(-126.0f), exp2_of_parts<Isa>(shifted, r));
}

// e^x for x <= 0, or NaN; +0 where x * log2(e), rounded, is below -126. The product in two parts, high + low:
//
//     high = x * L,  low = (x * L - high) + x * (log2(e) - L)     L = log2(e) as a float32
//
// is off by less than 2^-40, and r = (high - n) + low by its rounding, 2^-25 at most, which changes the result by the
// 2^-25 * ln 2 = 2.1e-8th part: with exp2's error at most 1.6e-7 in all, or 2.7 * 2^-24.
template <class Isa>
typename Isa::F32 exp(typename Isa::F32 x) {
  using F32 = typename Isa::F32;
  const F32 log2e = Isa::set1(0x1.715476p+0f);
  const F32 high = Isa::mul(x, log2e);
  const F32 product_rest = Isa::fma(x, log2e, Isa::mul(high, Isa::set1(-1.0f)));
  const F32 low = Isa::fma(x, Isa::set1(0x1.4ae0cp-26f), product_rest);
  const F32 shifted = Isa::add(high, Isa::set1(kToInteger));
  const F32 n = Isa::add(shifted, Isa::set1(-kToInteger));
  const F32 r = Isa::add(Isa::fma(n, Isa::set1(-1.0f), high), low);
  return Isa::zero_below(high, Isa::set1(-126.0f), exp2_of_parts<Isa>(shifted, r));
}

}  // namespace
}  // namespace bitnet_ops
