// The epilogue that every kernel ends in: out = activation(accumulator + bias + residual).
// `scale` is folded into packed weights. identity, relu and relu6 are one clamp without a branch.
#pragma once

#include "args.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// e^x to 1 ulp or so: 2^n · p(r), |r| ≤ ln2/2, p of degree 6 (Taylor); saturates beyond the float range, keeps NaN.
KP_INLINE Vec exponential(Vec x) {
  x = at_most(at_least(x, broadcast(-87.0f)), broadcast(89.0f));
  const Vec n = round_to_integer(x * broadcast(1.44269504f));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_two(p, n);
}

KP_INLINE Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(zero() - x)); }

// erf by Abramowitz and Stegun, formula 7.1.26 (absolute error below 1.5e-7).
KP_INLINE Vec error_function(Vec x) {
  const Vec magnitude = with_sign_of(x, broadcast(1.0f));
  const Vec t = broadcast(1.0f) / fma(broadcast(0.3275911f), magnitude, broadcast(1.0f));
  Vec p = broadcast(1.061405429f);
  p = fma(p, t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const Vec tail = p * t * exponential(zero() - magnitude * magnitude);
  return with_sign_of(broadcast(1.0f) - tail, x);
}

KP_INLINE Vec hard_sigmoid(Vec x) {
  return at_most(at_least(x + broadcast(3.0f), zero()), broadcast(6.0f)) * broadcast(1.0f / 6);
}

// body(f), f being the activation of this kind as a function of a vector, of those that are no clamp.
template <class Body>
KP_INLINE void with_curve(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::silu: return body([](Vec x) { return x * sigmoid(x); });
    case Activation::hardswish: return body([](Vec x) { return x * hard_sigmoid(x); });
    case Activation::hardsigmoid: return body([](Vec x) { return hard_sigmoid(x); });
    case Activation::sigmoid: return body([](Vec x) { return sigmoid(x); });
    case Activation::gelu:
      return body([](Vec x) {
        const Vec half = x * broadcast(0.5f);
        return fma(half, error_function(x * broadcast(0.70710678f)), half);
      });
    default: return body([](Vec x) { return x; });
  }
}

struct ActivationFunction {
  Vec low, high;
  Activation kind;
  bool clamps;

  explicit ActivationFunction(Activation activation) : kind(activation) {
    const float infinity = __builtin_inff();
    low = broadcast(activation == Activation::identity ? -infinity : 0.0f);
    high = broadcast(activation == Activation::relu6 ? 6.0f : infinity);
    clamps = activation == Activation::identity || activation == Activation::relu || activation == Activation::relu6;
  }

  KP_INLINE Vec clamped(Vec x) const { return at_most(at_least(x, low), high); }

  KP_INLINE Vec operator()(Vec x) const {
    if (__builtin_expect(clamps, 1)) return clamped(x);
    return curved(kind, x);
  }

  __attribute__((noinline)) static Vec curved(Activation kind, Vec x) {
    with_curve(kind, [&x](const auto& curve) { x = curve(x); });
    return x;
  }
};

}  // namespace kernelpress::KERNELPRESS_ISA
