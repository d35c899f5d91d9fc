// Integers beside the floats of simd.h: kLanes int32 in a vector, int8 that is widened when loaded and saturated when stored, and the
// products of int8 matrices.
//
//   dot(sums, x, w)   sums[l] += Σ_g x[g] · w[l][g],  g < kGroup     x: one group of inputs in every lane; w: kLanes outputs
//
//   with VNNI         kGroup = 4: x in bytes, moved up by 128 to be unsigned, times signed bytes
//   without           kGroup = 2: x in 16 bits, the zero point taken off, times bytes widened to 16: no sum saturates
#pragma once

#include "simd.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define KP_VNNI 1
#endif

namespace kernelpress::KERNELPRESS_ISA {

#if defined(KP_VNNI)
constexpr bool kHasVnni = true;
constexpr int kGroup = 4;
using Staged = uint8_t;  // what activations are turned into before they are multiplied
#else
constexpr bool kHasVnni = false;
constexpr int kGroup = 2;
using Staged = int16_t;
#endif

// Integers → y = clamp(integer + zero point, low, high), low and high of int8.
struct ByteRange {
  Ints zero_point, low, high;
};

#if defined(__AVX512F__)

KP_INLINE void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
KP_INLINE Ints load_ints_first(const int32_t* p, int n) { return {_mm512_maskz_loadu_epi32(first(n), p)}; }
KP_INLINE Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
KP_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
KP_INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
KP_INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
KP_INLINE Ints load_int8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
KP_INLINE Ints load_int8_first(const int8_t* p, int n) { return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p))}; }
KP_INLINE void store_int8(int8_t* p, Ints a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v)); }
KP_INLINE void store_int8_first(int8_t* p, Ints a, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(a.v)); }
KP_INLINE Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
KP_INLINE Ints rounded(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
KP_INLINE Vec zero_for_nan(Vec a) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v)}; }
KP_INLINE Vec fma_rounded_once(Vec a, Vec b, Vec c) { return fma(a, b, c); }

#if defined(KP_VNNI)
KP_INLINE Ints load_weights(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
// GCC 12 spills an array of accumulators that the intrinsic updates; with "+v" they stay in registers.
KP_INLINE void dot(Ints& sums, Ints x, Ints w) { asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(x.v), "v"(w.v)); }
#else
KP_INLINE Ints load_weights(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
KP_INLINE void dot(Ints& sums, Ints x, Ints w) { sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(x.v, w.v)); }
#endif

KP_INLINE void stage(Staged* to, const int8_t* from, int64_t count, [[maybe_unused]] int32_t zero_point) {
#if defined(KP_VNNI)
  const __m512i up = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t k = 0; k < count; k += 64) {
    const int64_t left = count - k;
    const __mmask64 some = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    _mm512_storeu_si512(to + k, _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, from + k), up));
  }
#else
  const __m512i down = _mm512_set1_epi16(static_cast<int16_t>(zero_point));
  for (int64_t k = 0; k < count; k += 32) {
    const int64_t left = count - k;
    const __mmask32 some = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    _mm512_storeu_si512(to + k, _mm512_sub_epi16(_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(some, from + k)), down));
  }
#endif
}

KP_INLINE ByteRange byte_range(int32_t zero_point, int32_t low, int32_t high) {
  return {{_mm512_set1_epi16(static_cast<int16_t>(zero_point))},
          {_mm512_set1_epi8(static_cast<int8_t>(low))},
          {_mm512_set1_epi8(static_cast<int8_t>(high))}};
}
template <int kVecs>
KP_INLINE void store_bytes(int8_t* p, const Ints (&steps)[kVecs], const ByteRange& range, int64_t n) {
  const auto vec = [&steps](int v) { return v < kVecs ? steps[v].v : _mm512_setzero_si512(); };
  // Saturation packs each quarter of the vectors by itself: the quarters are put in order at the end.
  const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(vec(0), vec(1)), range.zero_point.v);
  if constexpr (kVecs <= 2) {
    const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
    const __m512i bytes = _mm512_permutexvar_epi32(from, _mm512_packs_epi16(a, a));
    const __m256i y = _mm512_castsi512_si256(_mm512_min_epi8(_mm512_max_epi8(bytes, range.low.v), range.high.v));
    if (n >= 32 && kVecs == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), y);
    else _mm256_mask_storeu_epi8(p, static_cast<__mmask32>((uint64_t{1} << minimum(n, 16 * kVecs)) - 1), y);
  } else {
    const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(vec(2), vec(3)), range.zero_point.v);
    const __m512i bytes = _mm512_permutexvar_epi32(from, _mm512_packs_epi16(a, b));
    const __m512i y = _mm512_min_epi8(_mm512_max_epi8(bytes, range.low.v), range.high.v);
    if (n >= 64 && kVecs == 4) _mm512_storeu_si512(p, y);
    else _mm512_mask_storeu_epi8(p, (__mmask64{1} << minimum(n, 16 * kVecs - (kVecs == 4))) - 1, y);
  }
}

#elif defined(__AVX2__)

KP_INLINE void store_ints(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
KP_INLINE Ints load_ints_first(const int32_t* p, int n) { return {_mm256_maskload_epi32(p, first(n))}; }
KP_INLINE Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
KP_INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
KP_INLINE Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
KP_INLINE Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
KP_INLINE Ints load_int8(const int8_t* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }
KP_INLINE Ints load_int8_first(const int8_t* p, int n) {
  int8_t bytes[kLanes] = {};
  for (int i = 0; i < n; ++i) bytes[i] = p[i];
  return load_int8(bytes);
}
KP_INLINE void store_int8(int8_t* p, Ints a) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
KP_INLINE void store_int8_first(int8_t* p, Ints a, int n) {
  int8_t bytes[kLanes];
  store_int8(bytes, a);
  for (int i = 0; i < n; ++i) p[i] = bytes[i];
}
KP_INLINE Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
KP_INLINE Ints rounded(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
KP_INLINE Vec zero_for_nan(Vec a) { return {_mm256_and_ps(a.v, _mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q))}; }
KP_INLINE Vec fma_rounded_once(Vec a, Vec b, Vec c) { return fma(a, b, c); }

#if defined(KP_VNNI)
KP_INLINE Ints load_weights(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
KP_INLINE void dot(Ints& sums, Ints x, Ints w) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.v) : "x"(x.v), "x"(w.v)); }
#else
KP_INLINE Ints load_weights(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
KP_INLINE void dot(Ints& sums, Ints x, Ints w) { sums.v = _mm256_add_epi32(sums.v, _mm256_madd_epi16(x.v, w.v)); }
#endif

KP_INLINE void stage(Staged* to, const int8_t* from, int64_t count, [[maybe_unused]] int32_t zero_point) {
  int64_t k = 0;
#if defined(KP_VNNI)
  const __m256i up = _mm256_set1_epi8(static_cast<char>(0x80));
  for (; k + 32 <= count; k += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_xor_si256(x, up));
  }
  for (; k < count; ++k) to[k] = static_cast<Staged>(from[k] + 128);
#else
  const __m256i down = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
  for (; k + 16 <= count; k += 16) {
    const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_sub_epi16(x, down));
  }
  for (; k < count; ++k) to[k] = static_cast<Staged>(from[k] - zero_point);
#endif
}

KP_INLINE ByteRange byte_range(int32_t zero_point, int32_t low, int32_t high) {
  return {{_mm256_set1_epi16(static_cast<int16_t>(zero_point))},
          {_mm256_set1_epi8(static_cast<int8_t>(low))},
          {_mm256_set1_epi8(static_cast<int8_t>(high))}};
}
template <int kVecs>
KP_INLINE void store_bytes(int8_t* p, const Ints (&steps)[kVecs], const ByteRange& range, int64_t n) {
  static_assert(kVecs <= 2);
  const __m256i pairs = _mm256_adds_epi16(_mm256_packs_epi32(steps[0].v, steps[kVecs - 1].v), range.zero_point.v);
  const __m256i halves = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(pairs, pairs), _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  const __m256i clamped = _mm256_min_epi8(_mm256_max_epi8(halves, range.low.v), range.high.v);
  const __m128i y = _mm256_castsi256_si128(clamped);
  if (kVecs == 2 && n >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), y);
  int8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), y);
  for (int i = 0; i < minimum(n, 8 * kVecs); ++i) p[i] = bytes[i];
}

#else

typedef double Double4 __attribute__((vector_size(32)));
typedef int16_t Short8 __attribute__((vector_size(16)));

KP_INLINE void store_ints(int32_t* p, Ints a) { std::memcpy(p, &a.v, sizeof a.v); }
KP_INLINE Ints load_ints_first(const int32_t* p, int n) {
  Ints a{};
  for (int i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
KP_INLINE Ints broadcast_int(int32_t x) { return {Int4{x, x, x, x}}; }
KP_INLINE Ints operator+(Ints a, Ints b) { return {a.v + b.v}; }
KP_INLINE Ints operator-(Ints a, Ints b) { return {a.v - b.v}; }
KP_INLINE Ints operator*(Ints a, Ints b) { return {a.v * b.v}; }
KP_INLINE Ints load_int8_first(const int8_t* p, int n) {
  Ints a{};
  for (int i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
KP_INLINE Ints load_int8(const int8_t* p) { return load_int8_first(p, kLanes); }
KP_INLINE void store_int8_first(int8_t* p, Ints a, int n) {
  for (int i = 0; i < n; ++i) p[i] = static_cast<int8_t>(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}
KP_INLINE void store_int8(int8_t* p, Ints a) { store_int8_first(p, a, kLanes); }
KP_INLINE Vec to_floats(Ints a) { return {__builtin_convertvector(a.v, Float4)}; }
KP_INLINE Ints rounded(Vec a) { return {__builtin_convertvector(round_to_integer(a).v, Int4)}; }
KP_INLINE Vec zero_for_nan(Vec a) { return select(a.v == a.v, a, Vec{}); }
KP_INLINE Vec fma_rounded_once(Vec a, Vec b, Vec c) {
  const Double4 sum = __builtin_convertvector(a.v, Double4) * __builtin_convertvector(b.v, Double4) + __builtin_convertvector(c.v, Double4);
  return {__builtin_convertvector(sum, Float4)};
}

KP_INLINE Ints load_weights(const int8_t* p) {
  Short8 wide;
  for (int i = 0; i < 2 * kLanes; ++i) wide[i] = p[i];
  return {reinterpret_cast<Int4>(wide)};
}
KP_INLINE void dot(Ints& sums, Ints x, Ints w) {
#if defined(__SSE2__)
  sums.v += reinterpret_cast<Int4>(_mm_madd_epi16(reinterpret_cast<__m128i>(x.v), reinterpret_cast<__m128i>(w.v)));
#else
  const Short8 a = reinterpret_cast<Short8>(x.v), b = reinterpret_cast<Short8>(w.v);
  for (int i = 0; i < kLanes; ++i) sums.v[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
#endif
}

KP_INLINE void stage(Staged* to, const int8_t* from, int64_t count, int32_t zero_point) {
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<Staged>(from[k] - zero_point);
}

KP_INLINE ByteRange byte_range(int32_t zero_point, int32_t low, int32_t high) {
  return {broadcast_int(zero_point), broadcast_int(low), broadcast_int(high)};
}
template <int kVecs>
KP_INLINE void store_bytes(int8_t* p, const Ints (&steps)[kVecs], const ByteRange& range, int64_t n) {
  for (int v = 0; v < kVecs && v * kLanes < n; ++v) {
    Int4 y = steps[v].v + range.zero_point.v;
    y = y < range.low.v ? range.low.v : y;
    y = y > range.high.v ? range.high.v : y;
    store_int8_first(p + v * kLanes, {y}, static_cast<int>(minimum(kLanes, n - v * kLanes)));
  }
}

#endif

// rounded: half to even, of what an int32 holds; fma_rounded_once: on processors without that instruction too, by way of doubles.
// stage: int8 moved up by 128, or down by the zero point; it writes up to 64 elements behind the last. store_bytes: the first n of some
// vectors, n > 0, of integers below 2^30.

// The first n lanes, n ≤ kLanes; a whole vector takes the plain access.
KP_INLINE Ints load_ints_up_to(const int32_t* p, int64_t n) { return n >= kLanes ? load_ints(p) : load_ints_first(p, static_cast<int>(n)); }
KP_INLINE Ints load_int8_up_to(const int8_t* p, int64_t n) { return n >= kLanes ? load_int8(p) : load_int8_first(p, static_cast<int>(n)); }
KP_INLINE void store_int8_up_to(int8_t* p, Ints a, int64_t n) {
  if (n >= kLanes) store_int8(p, a);
  else store_int8_first(p, a, static_cast<int>(n));
}

}  // namespace kernelpress::KERNELPRESS_ISA
