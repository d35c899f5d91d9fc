// What simt.cuh takes from the CUDA toolkit under nvcc, on the host: indices, types, float functions, shared memory, launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace kernelpress::simt {

// Each thread sees its own index for as long as it lives: the compiler may ask once.
__attribute__((const)) dim3 thread_index();
__attribute__((const)) dim3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

// The array that `owner`'s line declares, the same for all threads of a block.
void* shared_array(size_t bytes, const char* owner, int line, const char* name);
unsigned char* dynamic_shared();

int run_grid(const void* kernel, dim3 blocks, dim3 threads, size_t shared_bytes, void (*enter)(const void*), const void* call,
             size_t call_bytes);

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: the unit of the sum is the unit of the subnormals
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace kernelpress::simt

#define threadIdx (::kernelpress::simt::thread_index())
#define blockIdx (::kernelpress::simt::block_index())
#define blockDim (::kernelpress::simt::block_size())
#define gridDim (::kernelpress::simt::grid_size())

#define SIMT_SHARED(type, name, ...)         \
  using SimtArray_##name = type __VA_ARGS__; \
  SimtArray_##name& name =                   \
      *static_cast<SimtArray_##name*>(       \
          ::kernelpress::simt::shared_array(sizeof(SimtArray_##name), __PRETTY_FUNCTION__, __LINE__, #name))

#define SIMT_DYN_SMEM(name) unsigned char* const name = ::kernelpress::simt::dynamic_shared()

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x < -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyint(x));
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __ffs(int32_t x) { return __builtin_ffs(x); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> 4 * i & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (select & 7u)) & 255u;
    if (select & 8u) byte = byte & 128u ? 255u : 0u;
    result |= byte << 8 * i;
  }
  return result;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace kernelpress::cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes = 0;
  void* stream = nullptr;
};

namespace detail {

template <class... Parameters>
struct KernelCall {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> values;
};

template <class... Parameters, size_t... kIndex>
void enter_with(const KernelCall<Parameters...>& call, std::index_sequence<kIndex...>) {
  call.kernel(std::get<kIndex>(call.values)...);
}

template <class... Parameters>
void enter(const void* call) {
  enter_with(*static_cast<const KernelCall<Parameters...>*>(call), std::index_sequence_for<Parameters...>{});
}

}  // namespace detail

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return 0;
  const detail::KernelCall<Parameters...> call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  return simt::run_grid(reinterpret_cast<const void*>(kernel), grid.blocks, grid.threads, grid.shared_bytes,
                        &detail::enter<Parameters...>, &call, sizeof call);
}

}  // namespace kernelpress::cuda
