// The wrappers of ptx.cuh on the host: the same names, carried out by the emulator.
#pragma once

#include "device.h"

namespace kernelpress::simt {

// Where a call stands in the kernel's text.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Exchange { exclusive_or, down, up, index };

void copy_async(void* shared, const void* global, int bytes, bool valid);
void wait_copies(int pending);
void load_matrices(uint32_t* registers, const void* row, int count, bool transposed, Site site);
void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void exchange(void* value, int bytes, Exchange kind, int operand, Site site);
bool vote(bool value, bool all, Site site);
void load_vector(void* value, const void* address, bool read_only);
void store_vector(void* address, const void* value);
void begin_atomic(void* address, int bytes);

}  // namespace kernelpress::simt

namespace kernelpress::cuda {

using simt::Site;

inline void cp_async_16(void* smem, const void* gmem, bool valid) { simt::copy_async(smem, gmem, 16, valid); }
inline void cp_async_8(void* smem, const void* gmem, bool valid) { simt::copy_async(smem, gmem, 8, valid); }
inline void cp_async_4(void* smem, const void* gmem, bool valid) { simt::copy_async(smem, gmem, 4, valid); }
void cp_async_commit();

template <int kPending>
void cp_async_wait() {
  simt::wait_copies(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, Site site = Site::here()) {
  simt::load_matrices(r, smem_row, 4, false, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, Site site = Site::here()) {
  simt::load_matrices(r, smem_row, 2, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, Site site = Site::here()) {
  simt::load_matrices(r, smem_row, 4, true, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, Site site = Site::here()) {
  simt::load_matrices(r, smem_row, 2, true, site);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  simt::multiply_f16(d, a, b, site);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  simt::multiply_bf16(d, a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  simt::multiply_tf32(d, a, b, site);
}
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  simt::multiply_s8(d, a, b, site);
}

inline int32_t dp4a(int32_t a, int32_t b, int32_t c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 32; i += 8) sum += static_cast<uint32_t>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
  return static_cast<int32_t>(sum);
}

inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) != 0 ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

void block_barrier(Site site = Site::here());
void warp_barrier(Site site = Site::here());

template <class T>
T shuffle_xor(T value, int lane_mask, Site site = Site::here()) {
  simt::exchange(&value, sizeof value, simt::Exchange::exclusive_or, lane_mask, site);
  return value;
}
template <class T>
T shuffle_down(T value, int delta, Site site = Site::here()) {
  simt::exchange(&value, sizeof value, simt::Exchange::down, delta, site);
  return value;
}
template <class T>
T shuffle_up(T value, int delta, Site site = Site::here()) {
  simt::exchange(&value, sizeof value, simt::Exchange::up, delta, site);
  return value;
}
template <class T>
T shuffle_index(T value, int lane, Site site = Site::here()) {
  simt::exchange(&value, sizeof value, simt::Exchange::index, lane, site);
  return value;
}

inline bool vote_any(bool value, Site site = Site::here()) { return simt::vote(value, false, site); }
inline bool vote_all(bool value, Site site = Site::here()) { return simt::vote(value, true, site); }

template <class V>
V load_16(const void* address) {
  static_assert(sizeof(V) == 16);
  V value;
  simt::load_vector(&value, address, false);
  return value;
}
template <class V>
V load_streaming_16(const void* address) {
  static_assert(sizeof(V) == 16);
  V value;
  simt::load_vector(&value, address, true);
  return value;
}
template <class V>
void store_16(void* address, const V& value) {
  static_assert(sizeof(V) == 16);
  simt::store_vector(address, &value);
}

template <class T>
__attribute__((no_sanitize("thread"))) T atomic_add(T* address, T value) {
  simt::begin_atomic(address, sizeof(T));
  const T before = *address;
  *address = before + value;
  return before;
}

void device_fence();
inline void prefetch_l2(const void*) {}

}  // namespace kernelpress::cuda
