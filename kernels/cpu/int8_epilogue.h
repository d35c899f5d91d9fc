// What the int8 kernels end in; kernels/reference/int8_quantize.py has the same steps, and gives the same bits.
//
//   value = fma(float(sum), scale[n], bias[n])                      one rounding
//   value = fma(residual − its zero point, its scale, value)        of an int8 residual; a float one is added
//   y     = activation(value), or saturate(round(activation(value) / output scale) + output zero point)
//
// sigmoid, SiLU and GELU approximate what torch computes, so that a value near a tie may turn over there.
#pragma once

#include "epilogue.h"
#include "simd_int8.h"

namespace kernelpress::KERNELPRESS_ISA {

// Where results go, and how: cast, or quantised by `1 / scale` rounded to float32.
struct Int8Output {
  void* y;
  int64_t y_stride;
  bool is_int8;
  ActivationFunction activation;
  Vec inverse_scale, zero_point;

  template <class Args>
  explicit Int8Output(const Args& a)
      : y(a.y),
        y_stride(a.y_stride),
        is_int8(a.y_is_int8 != 0),
        activation(a.activation),
        inverse_scale(broadcast(static_cast<float>(1.0 / a.output_scale))),
        zero_point(broadcast(static_cast<float>(a.output_zero_point))) {}

  // A sixth of x, rounded once, as torch divides; the float kernels multiply by the inverse. The remainder of a product with the inverse
  // corrects it (Markstein 1990), in floats that do not overflow: what int8 holds is far from that.
  KP_INLINE Vec sixth(Vec x) const {
    if (!is_int8) return x / broadcast(6.0f);
    const Vec inverse = broadcast(1.0f / 6), bounded = at_most(x, broadcast(3.4e38f)), quotient = bounded * inverse;
    return fma_rounded_once(fma_rounded_once(quotient, broadcast(-6.0f), bounded), inverse, quotient);
  }

  KP_INLINE Vec hard_swish(Vec x) const { return sixth(x * at_most(at_least(x + broadcast(3.0f), zero()), broadcast(6.0f))); }

  KP_INLINE Vec activated(Vec x) const {
    if (__builtin_expect(activation.clamps, 1)) return activation(x);
    if (activation.kind == Activation::hardswish) return hard_swish(x);
    if (activation.kind == Activation::hardsigmoid) return sixth(at_most(at_least(x + broadcast(3.0f), zero()), broadcast(6.0f)));
    return ActivationFunction::curved(activation.kind, x);
  }

  KP_INLINE Ints quantized(Vec value) const {
    const Vec steps = zero_for_nan(round_to_integer(value * inverse_scale)) + zero_point;
    return rounded(at_most(at_least(steps, broadcast(-128.0f)), broadcast(127.0f)));
  }

  // Of the channels from `channel` on, the first `lanes`; `activate` is what `activated` does.
  template <class Activate>
  KP_INLINE void write(Vec value, int64_t pixel, int64_t channel, int64_t lanes, const Activate& activate) const {
    value = activate(value);
    const int64_t at = pixel * y_stride + channel;
    if (is_int8) store_int8_up_to(static_cast<int8_t*>(y) + at, quantized(value), lanes);
    else store_up_to(static_cast<float*>(y) + at, value, lanes);
  }

  KP_INLINE void write(Vec value, int64_t pixel, int64_t channel, int64_t lanes) const {
    write(value, pixel, channel, lanes, [this](Vec x) { return activated(x); });
  }
};

// With the scale of each output channel, (input scale) · (weight scale), bias and residual; the latter has the output's type.
struct Int8Epilogue : Int8Output {
  const float *scale, *bias;
  const void* residual;
  int64_t residual_stride;
  Vec residual_scale, residual_zero_point;
  ByteRange bytes;  // what an activation that clamps leaves, else all

  template <class Args>
  explicit Int8Epilogue(const Args& a)
      : Int8Output(a),
        scale(a.scale),
        bias(a.bias),
        residual(a.residual),
        residual_stride(a.residual_stride),
        residual_scale(broadcast(static_cast<float>(a.residual_scale))),
        residual_zero_point(broadcast(static_cast<float>(a.residual_zero_point))) {
    const float inverse = static_cast<float>(1.0 / a.output_scale), z = static_cast<float>(a.output_zero_point);
    const float six = std::nearbyintf(6.0f * inverse) + z;
    const bool is_relu = a.activation == Activation::relu || a.activation == Activation::relu6;
    bytes = byte_range(static_cast<int32_t>(z), is_relu ? static_cast<int32_t>(z) : -128,
                       a.activation == Activation::relu6 && six < 127.0f ? static_cast<int32_t>(six) : 127);
  }

  // Whether results are int8, and none of `columns` channels of sums with `depth` terms can be NaN or reach 2^30 steps: no activation
  // gives more than its argument, or than 1.
  bool gives_bounded_bytes(int64_t channel, int64_t columns, int64_t depth) const {
    if (!is_int8) return false;
    const Vec sign = broadcast(1.0f), largest_sum = broadcast(32640.0f * static_cast<float>(depth));
    Vec largest = zero();
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec plus = bias ? load_up_to(bias + channel + c, columns - c) : zero();
      const Vec product = with_sign_of(load_up_to(scale + channel + c, columns - c), sign) * largest_sum;
      largest = maximum_keeping_nan(largest, product + with_sign_of(plus, sign));
    }
    float values[kLanes];
    store(values, (largest + broadcast(255.0f) * residual_scale + broadcast(1.0f)) * inverse_scale);
    for (float value : values) {
      if (!(value < 1073741824.0f)) return false;
    }
    return true;
  }

  KP_INLINE Vec plus_residual(Vec value, Ints steps) const {
    return fma_rounded_once(to_floats(steps) - residual_zero_point, residual_scale, value);
  }
  KP_INLINE Vec plus_residual(Vec value, const int8_t* steps, int64_t lanes) const {
    return plus_residual(value, load_int8_up_to(steps, lanes));
  }

  // `sums` are exact integers rounded to float, times a scale of their row where there is one.
  template <class Activate>
  KP_INLINE void finish(Vec sums, int64_t pixel, int64_t channel, int64_t lanes, const Activate& activate) const {
    const Vec plus = bias ? load_up_to(bias + channel, lanes) : zero();
    Vec value = fma_rounded_once(sums, load_up_to(scale + channel, lanes), plus);
    if (residual) {
      const int64_t at = pixel * residual_stride + channel;
      if (is_int8) value = plus_residual(value, static_cast<const int8_t*>(residual) + at, lanes);
      else value = value + load_up_to(static_cast<const float*>(residual) + at, lanes);
    }
    write(value, pixel, channel, lanes, activate);
  }

  KP_INLINE void finish(Vec sums, int64_t pixel, int64_t channel, int64_t lanes) const {
    finish(sums, pixel, channel, lanes, [this](Vec x) { return activated(x); });
  }
};

}  // namespace kernelpress::KERNELPRESS_ISA
