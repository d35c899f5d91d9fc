// Every PTX instruction the kernels use, one wrapper each; the only file with inline assembly.
//
// All warp-wide functions are for whole warps: every thread of the warp must reach the same call. The 8x8 matrices of `mma`
// are 8 rows x 16 bytes whatever the element: an A fragment is 16 rows x 32 bytes, a B fragment 8 columns x 32 bytes, so
// that `ldmatrix` loads all of them alike. With group = lane / 4 and pair = lane % 4:
//
//      A: a[0] row group      bytes 4 pair       a[2] row group      bytes 16 + 4 pair
//         a[1] row group + 8  bytes 4 pair       a[3] row group + 8  bytes 16 + 4 pair
//      B: b[0] column group   bytes 4 pair       b[1] column group   bytes 16 + 4 pair     (B is [column][k], k contiguous)
//      D: d[0], d[1] row group, columns 2 pair, 2 pair + 1        d[2], d[3] row group + 8, the same columns
#pragma once

#include "simt.cuh"

#ifdef KERNELPRESS_SIMT

#include "instructions.h"

#else

namespace kernelpress::cuda {

constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// Asynchronous copies global -> shared. Both addresses are multiples of the size; a copy that is not `valid` reads nothing and
// writes zeros, yet its source must still be an address (any tensor's).
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_8(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(smem)), "l"(gmem), "r"(valid ? 8 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_4(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(smem)), "l"(gmem), "r"(valid ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are in flight; other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Matrix i's eight rows lie at the addresses of lanes 8 i ... 8 i + 7, each 16 bytes and 16-byte aligned; x2 ignores the
// addresses of lanes 16 ... 31. r[i]: two bytes each of row lane / 4, columns 2 (lane % 4) and + 1; _trans: of matrix i's transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem_row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem_row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem_row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem_row))
                 : "memory");
}

// d += A · B, in fp32 (int8: in int32, wrapping).
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c + the sum of the four products of signed bytes.
__device__ __forceinline__ int32_t dp4a(int32_t a, int32_t b, int32_t c) { return __dp4a(a, b, c); }

// Four of the eight bytes of low (0 … 3) and high (4 … 7): byte i of the result is the one that digit i of the hexadecimal
// `selector` names, its lowest digit first. The digits are below 8.
__device__ __forceinline__ uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Rounded to 10 bits of mantissa, ties away from zero; the bits are those of a float.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Exchanges within the warp, of any trivially copyable value of at most 4 or of exactly 8 or 16 bytes.
namespace detail {

template <class T, class Exchange>
__device__ __forceinline__ T shuffle_words(T value, Exchange exchange) {
  constexpr int kWords = (sizeof(T) + 3) / 4;
  static_assert(sizeof(T) <= 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t words[kWords] = {};
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = exchange(words[i]);
  memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace detail

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return detail::shuffle_words(value, [=](uint32_t word) { return __shfl_xor_sync(kWarp, word, lane_mask); });
}

// The value of lane + delta; the last lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int delta) {
  return detail::shuffle_words(value, [=](uint32_t word) { return __shfl_down_sync(kWarp, word, delta); });
}

// The value of lane - delta; the first lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return detail::shuffle_words(value, [=](uint32_t word) { return __shfl_up_sync(kWarp, word, delta); });
}

template <class T>
__device__ __forceinline__ T shuffle_index(T value, int lane) {
  return detail::shuffle_words(value, [=](uint32_t word) { return __shfl_sync(kWarp, word, lane); });
}

__device__ __forceinline__ bool vote_any(bool value) { return __any_sync(kWarp, value) != 0; }
__device__ __forceinline__ bool vote_all(bool value) { return __all_sync(kWarp, value) != 0; }

// 16-byte accesses of global memory; V is any trivially copyable type of 16 bytes (Vector16<T> of numeric.cuh).
template <class V>
__device__ __forceinline__ V load_16(const void* address) {
  static_assert(sizeof(V) == 16);
  const uint4 words = *static_cast<const uint4*>(address);
  V value;
  memcpy(&value, &words, 16);
  return value;
}

// Data that is read once and that this launch never writes: past the L1 cache.
template <class V>
__device__ __forceinline__ V load_streaming_16(const void* address) {
  static_assert(sizeof(V) == 16);
  uint4 words;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
    : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
    : "l"(address));
  V value;
  memcpy(&value, &words, 16);
  return value;
}

template <class V>
__device__ __forceinline__ void store_16(void* address, const V& value) {
  static_assert(sizeof(V) == 16);
  uint4 words;
  memcpy(&words, &value, 16);
  *static_cast<uint4*>(address) = words;
}

// Adds to global memory, relaxed; returns what was there. T: int32_t, uint32_t, float.
template <class T>
__device__ __forceinline__ T atomic_add(T* address, T value) {
  return atomicAdd(address, value);
}

// Orders this thread's accesses of global memory (and those it saw) before its later ones, for the whole device.
__device__ __forceinline__ void device_fence() { __threadfence(); }

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace kernelpress::cuda

#endif

namespace kernelpress::cuda {

// A vector of 16 or 8 bytes to global memory in one instruction, which an assignment of structs does not promise: the compiler may
// take it apart into stores of its elements.
template <class V>
__device__ __forceinline__ void store_global(void* address, const V& value) {
  static_assert(sizeof(V) == 16 || sizeof(V) == 8);
#ifdef KERNELPRESS_SIMT
  if constexpr (sizeof(V) == 16) {
    store_16(address, value);
  } else {
    uint2 words;
    memcpy(&words, &value, 8);
    *static_cast<uint2*>(address) = words;
  }
#else
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  }
#endif
}

// The sum over the warp, in every lane; the order of additions is fixed.
template <class T>
__device__ __forceinline__ T reduce_add(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class T>
__device__ __forceinline__ T reduce_max(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace kernelpress::cuda
