// Element types of the kernels, their conversion from and to float, and short vectors of them.
//
// Half and BFloat16 are plain 16-bit structs: arithmetic happens in float. int8_t saturates; all conversions round to the
// nearest, ties to even.
#pragma once

#include "simt.cuh"

#ifndef KERNELPRESS_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kernelpress::cuda {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// What products of T are summed in.
template <class T>
struct Element {
  using Accumulator = float;
  static constexpr int kPer16Bytes = 16 / sizeof(T);
};

template <>
struct Element<int8_t> {
  using Accumulator = int32_t;
  static constexpr int kPer16Bytes = 16;
};

// kCount values that are loaded and stored as one: aligned to its size, up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  static_assert((kCount & (kCount - 1)) == 0);
  static constexpr int kSize = kCount;
  T values[kCount];

  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <class T>
using Vector16 = Vector<T, Element<T>::kPer16Bytes>;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(int8_t value) { return static_cast<float>(value); }
__device__ __forceinline__ float to_float(int32_t value) { return static_cast<float>(value); }

__device__ __forceinline__ float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

__device__ __forceinline__ float to_float(Half value) {
#ifdef KERNELPRESS_SIMT
  return simt::half_to_float(value.bits);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

namespace detail {

template <class T>
struct FromFloat;

template <>
struct FromFloat<float> {
  __device__ __forceinline__ static float convert(float value) { return value; }
};

template <>
struct FromFloat<Half> {
  __device__ __forceinline__ static Half convert(float value) {
#ifdef KERNELPRESS_SIMT
    return {simt::float_to_half(value)};
#else
    return {__half_as_ushort(__float2half_rn(value))};
#endif
  }
};

template <>
struct FromFloat<BFloat16> {
  __device__ __forceinline__ static BFloat16 convert(float value) {
#ifdef KERNELPRESS_SIMT
    return {simt::float_to_bfloat16(value)};
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
  }
};

template <>
struct FromFloat<int32_t> {
  __device__ __forceinline__ static int32_t convert(float value) { return __float2int_rn(value); }
};

template <>
struct FromFloat<int8_t> {
  __device__ __forceinline__ static int8_t convert(float value) {
    return static_cast<int8_t>(min(max(__float2int_rn(value), -128), 127));
  }
};

}  // namespace detail

template <class T>
__device__ __forceinline__ T from_float(float value) {
  return detail::FromFloat<T>::convert(value);
}

template <class T, int kCount>
__device__ __forceinline__ void to_float(const Vector<T, kCount>& vector, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(vector[i]);
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> from_float(const float (&values)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector[i] = from_float<T>(values[i]);
  return vector;
}

// Two neighbouring values, rounded in one instruction, in the bits of a register: `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2);
#ifndef KERNELPRESS_SIMT
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
  }
#else
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

}  // namespace kernelpress::cuda
