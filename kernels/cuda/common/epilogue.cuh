// The epilogue that every kernel ends in:    y[pixel, channel] = cast(activation(sum · scale[channel] + bias[channel] + residual))
//
// Sums are float (int32 sums are converted before). The cast rounds to the nearest, ties to even; int8 is requantised: divided by
// the output's scale, shifted by its zero point, saturated. Values are handled kCount neighbouring channels at a time, in one
// vector access where addresses, strides and channels are multiples of 16 bytes.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "simt.cuh"
#include "status.h"

namespace kernelpress::cuda {

// Absent tensors are null. `aligned`: y, residual, scale and bias, and the strides, are multiples of 16 bytes (`is_aligned`).
template <class Out>
struct Epilogue {
  const float *scale, *bias;  // [channels]
  const Out* residual;
  Out* y;
  int64_t residual_stride, y_stride, channels;
  Activation activation;
  bool aligned;
  float inverse_scale = 1.0f, zero_point = 0.0f;                    // of y, if int8
  float residual_scale = 1.0f, residual_zero_point = 0.0f;          // of the residual, if int8
};

// Whether an address, or a stride in elements of T, is a multiple of 16 bytes. A null address is.
inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }
template <class T>
bool is_aligned(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class Out>
Epilogue<Out> make_epilogue(const void* scale, const void* bias, const void* residual, void* y, int64_t residual_stride,
                            int64_t y_stride, int64_t channels, Activation activation) {
  Epilogue<Out> epilogue{static_cast<const float*>(scale), static_cast<const float*>(bias), static_cast<const Out*>(residual),
                         static_cast<Out*>(y), residual_stride, y_stride, channels, activation, false};
  epilogue.aligned = is_aligned(scale) && is_aligned(bias) && is_aligned(residual) && is_aligned(y) &&
                     is_aligned<Out>(y_stride) && (residual == nullptr || is_aligned<Out>(residual_stride));
  return epilogue;
}

// Vectors of 16 or 8 bytes in one access: as structs of their elements the compiler may take them apart.
template <class V>
__device__ __forceinline__ V load_vector(const void* address) {
  if constexpr (sizeof(V) == 16) {
    return load_16<V>(address);
  } else {
    static_assert(sizeof(V) == 8);
    const uint2 words = *static_cast<const uint2*>(address);
    V vector;
    memcpy(&vector, &words, 8);
    return vector;
  }
}

template <class V>
__device__ __forceinline__ void store_vector(void* address, const V& vector) {
  if constexpr (sizeof(V) == 16) {
    store_16(address, vector);
  } else {
    static_assert(sizeof(V) == 8);
    uint2 words;
    memcpy(&words, &vector, 8);
    *static_cast<uint2*>(address) = words;
  }
}

namespace detail {

__device__ __forceinline__ float reciprocal(float x) {
#ifdef KERNELPRESS_SIMT
  return 1.0f / x;
#else
  return __fdividef(1.0f, x);
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

// Comparisons, not fmaxf: NaN stays NaN.
__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }

__device__ __forceinline__ float hard_sigmoid(float x) { return at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); }

template <int kCount, class Function>
__device__ __forceinline__ void map(float (&values)[kCount], Function function) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = function(values[i]);
}

}  // namespace detail

template <int kCount>
__device__ __forceinline__ void activate(float (&values)[kCount], Activation activation) {
  using namespace detail;
  switch (activation) {
    case Activation::identity: return;
    case Activation::relu: return map(values, [](float x) { return at_least(x, 0.0f); });
    case Activation::relu6: return map(values, [](float x) { return at_most(at_least(x, 0.0f), 6.0f); });
    case Activation::silu: return map(values, [](float x) { return x * sigmoid(x); });
    case Activation::hardswish: return map(values, [](float x) { return x * hard_sigmoid(x); });
    case Activation::hardsigmoid: return map(values, [](float x) { return hard_sigmoid(x); });
    case Activation::sigmoid: return map(values, [](float x) { return sigmoid(x); });
    case Activation::gelu: return map(values, [](float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); });
  }
}

// Scale and bias of kCount channels, in registers: a thread loads them once and finishes many pixels with them.
template <int kCount>
struct ChannelTerms {
  float scale[kCount], bias[kCount];
};

template <int kCount>
__device__ __forceinline__ void load_channels(float (&values)[kCount], const float* vector, int64_t channel, int64_t channels,
                                              bool aligned, float absent) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = absent;
  if (vector == nullptr) return;
  if constexpr (kCount % 4 == 0) {
    if (aligned && channel + kCount <= channels) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const Vector<float, 4> four = load_16<Vector<float, 4>>(vector + channel + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] = four[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (channel + i < channels) values[i] = vector[channel + i];
}

template <int kCount, class Out>
__device__ __forceinline__ ChannelTerms<kCount> channel_terms(const Epilogue<Out>& epilogue, int64_t channel) {
  const bool aligned = epilogue.aligned && channel % 4 == 0;
  ChannelTerms<kCount> terms;
  load_channels(terms.scale, epilogue.scale, channel, epilogue.channels, aligned, 1.0f);
  load_channels(terms.bias, epilogue.bias, channel, epilogue.channels, aligned, 0.0f);
  return terms;
}

// Where channels go in y (and lie in the residual). Another map may take this one's place: the grouped family's shuffle.
struct SameChannels {
  static constexpr bool kContiguous = true;
  __device__ __forceinline__ int64_t operator()(int64_t channel) const { return channel; }
};

namespace detail {

template <class Out>
__device__ __forceinline__ float plus_residual(const Epilogue<Out>& epilogue, float value, Out residual) {
  if constexpr (std::is_same_v<Out, int8_t>)
    return fmaf(to_float(residual) - epilogue.residual_zero_point, epilogue.residual_scale, value);
  else
    return value + to_float(residual);
}

template <class Out>
__device__ __forceinline__ Out output_value(const Epilogue<Out>& epilogue, float value) {
  if constexpr (std::is_same_v<Out, int8_t>) {
    const float steps = rintf(value * epilogue.inverse_scale);
    const float shifted = (steps == steps ? steps : 0.0f) + epilogue.zero_point;  // NaN becomes the zero point
    return static_cast<int8_t>(static_cast<int>(fminf(fmaxf(shifted, -128.0f), 127.0f)));
  } else {
    return from_float<Out>(value);
  }
}

}  // namespace detail

// Finishes kCount sums of neighbouring channels of one pixel and writes those that exist.
template <int kCount, class Out, class ChannelMap = SameChannels>
__device__ __forceinline__ void finish(const Epilogue<Out>& epilogue, const ChannelTerms<kCount>& terms, const float (&sums)[kCount],
                                       int64_t pixel, int64_t channel, const ChannelMap& map = {}) {
  constexpr int kVector = kCount < Element<Out>::kPer16Bytes ? kCount : Element<Out>::kPer16Bytes;
  constexpr bool kVectors = ChannelMap::kContiguous && kCount % kVector == 0 && kVector * sizeof(Out) >= 8;
  using Values = Vector<Out, kVectors ? kVector : 1>;
  const bool whole = kVectors && epilogue.aligned && channel + kCount <= epilogue.channels && channel % kVector == 0;
  const Out* residual = epilogue.residual == nullptr ? nullptr : epilogue.residual + pixel * epilogue.residual_stride;
  Out* y = epilogue.y + pixel * epilogue.y_stride;
  float values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = fmaf(sums[i], terms.scale[i], terms.bias[i]);
  if (residual != nullptr) {
    if (whole) {
      if constexpr (kVectors) {
#pragma unroll
        for (int i = 0; i < kCount; i += kVector) {
          const Values vector = load_vector<Values>(residual + map(channel + i));
#pragma unroll
          for (int j = 0; j < kVector; ++j) values[i + j] = detail::plus_residual(epilogue, values[i + j], vector[j]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (channel + i < epilogue.channels) values[i] = detail::plus_residual(epilogue, values[i], residual[map(channel + i)]);
    }
  }
  activate(values, epilogue.activation);
  if (whole) {
    if constexpr (kVectors) {
#pragma unroll
      for (int i = 0; i < kCount; i += kVector) {
        Values vector;
        if constexpr (sizeof(Out) == 2) {
#pragma unroll
          for (int j = 0; j < kVector; j += 2) {
            const uint32_t two = pack<Out>(values[i + j], values[i + j + 1]);
            memcpy(&vector[j], &two, 4);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kVector; ++j) vector[j] = detail::output_value(epilogue, values[i + j]);
        }
        store_global(y + map(channel + i), vector);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (channel + i < epilogue.channels) y[map(channel + i)] = detail::output_value(epilogue, values[i]);
  }
}

}  // namespace kernelpress::cuda
