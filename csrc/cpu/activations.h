// Functions of single numbers, 16 at a time: activations of an MLP and soft caps.
#pragma once

#include <cstdint>

#include "operands.h"

namespace {

// Its error is below 1e-7, and near 0 below 1e-7 of the result: a series there, powers elsewhere.
ALWAYS_INLINE V tanh(V x) {
  const V one = Simd::set1(1.0f), size = Simd::max(x, Simd::sub(Simd::zero(), x));
  const V square = Simd::mul(x, x);
  V series = Simd::set1(62.0f / 2835.0f);
  series = Simd::fma(series, square, Simd::set1(-17.0f / 315.0f));
  series = Simd::fma(series, square, Simd::set1(2.0f / 15.0f));
  series = Simd::fma(series, square, Simd::set1(-1.0f / 3.0f));
  series = Simd::fma(Simd::mul(series, square), x, x);
  // Beyond 20 it is 1, and powers must not underflow.
  const V power = exp2<float>(Simd::mul(Simd::min(size, Simd::set1(20.0f)), Simd::set1(-2.0f * kLog2E)));
  V far = Simd::div(Simd::sub(one, power), Simd::add(one, power));
  far = Simd::choose(Simd::at_least(x, Simd::zero()), far, Simd::sub(Simd::zero(), far));
  // A NaN stays one: it is not at least 0.25, and the series keeps it.
  return Simd::choose(Simd::at_least(size, Simd::set1(0.25f)), far, series);
}

// cap * tanh(x), for x that was divided by the cap.
ALWAYS_INLINE V capped(V x, V cap) { return Simd::mul(tanh(x), cap); }

// The normal distribution's integral up to x is exp(-x^2 / 2) t P(t) with t = 1 / (1 + 0.36 |x|) for x <= 0, the rest to
// 1 above; P was fitted by least squares of relative errors, the largest of which is 7e-7.
ALWAYS_INLINE V gelu(V x) {
  const V negated = Simd::sub(Simd::zero(), x), one = Simd::set1(1.0f);
  const V size = Simd::min(Simd::max(x, negated), Simd::set1(13.0f));
  const V t = Simd::div(one, Simd::fma(size, Simd::set1(0.36f), one));
  V p = Simd::set1(0.04765491f);
  p = Simd::fma(p, t, Simd::set1(-0.18181329f));
  p = Simd::fma(p, t, Simd::set1(0.18374359f));
  p = Simd::fma(p, t, Simd::set1(0.02462561f));
  p = Simd::fma(p, t, Simd::set1(0.1404237f));
  p = Simd::fma(p, t, Simd::set1(0.1416433f));
  p = Simd::fma(p, t, Simd::set1(0.14372227f));
  const V power = exp2<float>(Simd::mul(Simd::mul(size, size), Simd::set1(-0.5f * kLog2E)));
  const V below = Simd::mul(Simd::mul(p, t), power);
  return Simd::mul(x, Simd::choose(Simd::at_least(x, Simd::zero()), Simd::sub(one, below), below));
}

// x / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, 2016).
template <class A>
ALWAYS_INLINE V gelu_tanh(V x) {
  // Beyond 10 the quotient is x or nothing.
  const V near = Simd::max(Simd::min(x, Simd::set1(10.0f)), Simd::set1(-10.0f));
  constexpr float kFactor = -2.0f * 0.7978845608f * kLog2E;
  const V cubic = Simd::fma(Simd::mul(near, near), Simd::set1(0.044715f * kFactor), Simd::set1(kFactor));
  return Simd::div(x, Simd::add(Simd::set1(1.0f), exp2<A>(Simd::mul(near, cubic))));
}

template <class A>
ALWAYS_INLINE V silu(V x) {
  return Simd::div(x, Simd::add(Simd::set1(1.0f), exp2<A>(Simd::mul(x, Simd::set1(-kLog2E)))));
}

ALWAYS_INLINE V relu_squared(V x) {
  const V positive = Simd::max(Simd::zero(), x);  // a NaN is the second operand's
  return Simd::mul(positive, positive);
}

// Calls f(function) with the activation of V → V. `A` is what the results become.
template <class A, class F>
ALWAYS_INLINE void with_activation(int32_t activation, F&& f) {
  switch (activation) {
    case kSilu: return f([](V x) { return silu<A>(x); });
    case kGeluTanh: return f([](V x) { return gelu_tanh<A>(x); });
    case kGelu: return f([](V x) { return gelu(x); });
    default: return f([](V x) { return relu_squared(x); });
  }
}

}  // namespace
