// A thin vector of floats, as wide as the instruction set that this file is compiled for. The only place with intrinsics, beside
// simd_int8.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef KERNELPRESS_ISA
#error "KERNELPRESS_ISA must name the instruction set: one of X86_VARIANTS in build_native.py"
#endif

namespace kernelpress::KERNELPRESS_ISA {

#define KP_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kTileRows = 14;  // rows of the GEMM register tile: 14 × 2 accumulators + 2 weights leave 2 of 32 registers

struct Vec {
  __m512 v;
};
KP_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
KP_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
KP_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
KP_INLINE Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
KP_INLINE void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
using Some = __mmask16;
KP_INLINE Some between(int from, int to) { return static_cast<Some>(first(to) & ~first(from)); }
KP_INLINE Vec load_some(const float* p, Some some) { return {_mm512_maskz_loadu_ps(some, p)}; }
KP_INLINE void store_some(float* p, Vec a, Some some) { _mm512_mask_storeu_ps(p, some, a.v); }
KP_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
KP_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
KP_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
KP_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
KP_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
KP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KP_INLINE Vec at_least(Vec x, Vec low) { return {_mm512_max_ps(low.v, x.v)}; }  // a NaN in x stays
KP_INLINE Vec at_most(Vec x, Vec high) { return {_mm512_min_ps(high.v, x.v)}; }
KP_INLINE Vec keep_nan(Vec x, Vec from) { return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(from.v, from.v, _CMP_UNORD_Q), from.v)}; }
KP_INLINE Vec round_to_integer(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
KP_INLINE Vec times_power_of_two(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
KP_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xCA))};
}

struct Ints {
  __m512i v;
};
struct LaneMask {
  __mmask16 v;
};
KP_INLINE Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
KP_INLINE LaneMask mask_of(Ints a) { return {_mm512_test_epi32_mask(a.v, a.v)}; }
KP_INLINE Vec permute(Vec a, Ints from) { return {_mm512_permutexvar_ps(from.v, a.v)}; }
KP_INLINE Vec choose(LaneMask where, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.v, where.v, a.v)}; }
KP_INLINE Vec interleaved_low(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(a.v, from, b.v)};
}
KP_INLINE Vec interleaved_high(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.v, from, b.v)};
}
KP_INLINE Vec evens(Vec a, Vec b) {
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, at, b.v)};
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 × 2 accumulators + 2 weights + 1 broadcast of 16 registers

struct Vec {
  __m256 v;
};
KP_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
KP_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
KP_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
KP_INLINE Vec load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
KP_INLINE void store_first(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
using Some = __m256i;
KP_INLINE Some between(int from, int to) { return _mm256_andnot_si256(first(from), first(to)); }
KP_INLINE Vec load_some(const float* p, Some some) { return {_mm256_maskload_ps(p, some)}; }
KP_INLINE void store_some(float* p, Vec a, Some some) { _mm256_maskstore_ps(p, some, a.v); }
KP_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
KP_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
KP_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
KP_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
KP_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
KP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KP_INLINE Vec at_least(Vec x, Vec low) { return {_mm256_max_ps(low.v, x.v)}; }
KP_INLINE Vec at_most(Vec x, Vec high) { return {_mm256_min_ps(high.v, x.v)}; }
KP_INLINE Vec keep_nan(Vec x, Vec from) { return {_mm256_blendv_ps(x.v, from.v, _mm256_cmp_ps(from.v, from.v, _CMP_UNORD_Q))}; }
KP_INLINE Vec round_to_integer(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
KP_INLINE Vec times_power_of_two(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
KP_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0x80000000u)));
  return {_mm256_or_ps(_mm256_andnot_ps(mask, magnitude.v), _mm256_and_ps(mask, sign.v))};
}

struct Ints {
  __m256i v;
};
struct LaneMask {
  __m256 v;
};
KP_INLINE Ints load_ints(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
KP_INLINE LaneMask mask_of(Ints a) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, _mm256_setzero_si256()))}; }
KP_INLINE Vec permute(Vec a, Ints from) { return {_mm256_permutevar8x32_ps(a.v, from.v)}; }
KP_INLINE Vec choose(LaneMask where, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, where.v)}; }
KP_INLINE Vec interleaved_low(Vec a, Vec b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)};
}
KP_INLINE Vec interleaved_high(Vec a, Vec b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)};
}
KP_INLINE Vec evens(Vec a, Vec b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8))};
}

#else  // portable: GCC and Clang vectors, which SSE2 and NEON both serve

constexpr int kLanes = 4;
constexpr int kTileRows = 4;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
struct Vec {
  Float4 v;
};
KP_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
KP_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
KP_INLINE Vec load_first(const float* p, int n) {
  Vec a{};
  for (int i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
KP_INLINE void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
struct Some {
  int from, to;
};
KP_INLINE Some between(int from, int to) { return {from, to}; }
KP_INLINE Vec load_some(const float* p, Some some) {
  Vec a{};
  for (int i = some.from; i < some.to; ++i) a.v[i] = p[i];
  return a;
}
KP_INLINE void store_some(float* p, Vec a, Some some) {
  for (int i = some.from; i < some.to; ++i) p[i] = a.v[i];
}
KP_INLINE Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
KP_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
KP_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
KP_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
KP_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
KP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
KP_INLINE Vec select(Int4 where, Vec a, Vec b) {
  return {reinterpret_cast<Float4>((where & reinterpret_cast<Int4>(a.v)) | (~where & reinterpret_cast<Int4>(b.v)))};
}
KP_INLINE Vec at_least(Vec x, Vec low) { return select(x.v < low.v, low, x); }
KP_INLINE Vec at_most(Vec x, Vec high) { return select(x.v > high.v, high, x); }
KP_INLINE Vec keep_nan(Vec x, Vec from) { return select(from.v != from.v, from, x); }
KP_INLINE Vec round_to_integer(Vec x) {
  for (int i = 0; i < kLanes; ++i) x.v[i] = std::nearbyintf(x.v[i]);
  return x;
}
KP_INLINE Vec times_power_of_two(Vec x, Vec n) {
  for (int i = 0; i < kLanes; ++i) x.v[i] = std::ldexp(x.v[i], static_cast<int>(n.v[i]));
  return x;
}
KP_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
  for (int i = 0; i < kLanes; ++i) magnitude.v[i] = std::copysign(magnitude.v[i], sign.v[i]);
  return magnitude;
}

struct Ints {
  Int4 v;
};
struct LaneMask {
  Int4 v;
};
KP_INLINE Ints load_ints(const int32_t* p) {
  Ints a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
KP_INLINE LaneMask mask_of(Ints a) { return {a.v != 0}; }
KP_INLINE Vec permute(Vec a, Ints from) {
  Vec b;
  for (int i = 0; i < kLanes; ++i) b.v[i] = a.v[from.v[i]];
  return b;
}
KP_INLINE Vec choose(LaneMask where, Vec a, Vec b) { return select(where.v, a, b); }
KP_INLINE Vec interleaved_low(Vec a, Vec b) { return {Float4{a.v[0], b.v[0], a.v[1], b.v[1]}}; }
KP_INLINE Vec interleaved_high(Vec a, Vec b) { return {Float4{a.v[2], b.v[2], a.v[3], b.v[3]}}; }
KP_INLINE Vec evens(Vec a, Vec b) { return {__builtin_shufflevector(a.v, b.v, 0, 2, 4, 6)}; }

#endif

// between: the lanes from … to − 1, 0 ≤ from, to ≤ kLanes, for load_some, which reads 0 elsewhere, and store_some. evens: every second of a,
// then of b.
// permute: lane l of the result is lane from[l] of a; choose: a where the mask holds, elsewhere b; mask_of holds where a lane is not 0.

// The larger of two vectors; a NaN on either side wins, as in PyTorch's pooling.
KP_INLINE Vec maximum_keeping_nan(Vec a, Vec b) { return keep_nan(at_least(b, a), a); }

// The same value, which the compiler is to load once and keep in a register rather than to read again with every use.
KP_INLINE Vec in_register(Vec a) {
#if defined(__AVX512F__)
  asm("" : "+v"(a.v));
#elif defined(__x86_64__)
  asm("" : "+x"(a.v));
#endif
  return a;
}

KP_INLINE Vec zero() { return broadcast(0.0f); }

// The first n lanes, n ≤ kLanes; a whole vector takes the plain access.
KP_INLINE Vec load_up_to(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n)); }
KP_INLINE void store_up_to(float* p, Vec a, int64_t n) {
  if (n >= kLanes) store(p, a);
  else store_first(p, a, static_cast<int>(n));
}

// a and b in turn, of each the first n lanes, n ≤ kLanes.
KP_INLINE void store_interleaved(float* p, Vec a, Vec b, int64_t n) {
  store_up_to(p, interleaved_low(a, b), 2 * n);
  if (2 * n > kLanes) store_up_to(p + kLanes, interleaved_high(a, b), 2 * n - kLanes);
}

KP_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
KP_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
KP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KP_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace kernelpress::KERNELPRESS_ISA
