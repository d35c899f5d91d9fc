// Pixels of staged rows, one above the other, turned into operands of `dot`, and what becomes of their sums as bytes.
//
//   with VNNI   4 rows of bytes                 without   2 rows of 16 bits
//   a  0 1 2 … 15 │ 16 …  ─┐                    a  0 1 … 7 │ 8 …  ─┐
//   b  0 1 2 … 15 │ 16 …  ─┤  a0 b0 c0 d0  a1 b1 c1 d1 …           ├─▶  a0 b0  a1 b1 …
//   c  0 1 2 … 15 │ 16 …  ─┤                    b  0 1 … 7 │ 8 …  ─┘
//   d  0 1 2 … 15 │ 16 …  ─┘
//
// A block of kGroup · kLanes channels gives kGroup vectors. The instructions work in parts of 128 bits, so that lane 4 · l + e of vector
// j is channel 4 · (kGroup · l + j) + e of the block: packing puts them in order again, and `in_order` what is summed.
#pragma once

#include "simd_int8.h"

namespace kernelpress::KERNELPRESS_ISA {

constexpr int kBlock = kGroup * kLanes;

// Index in a block, in order, of what stands at `at` when vector follows vector.
constexpr int channel_at(int at) { return 4 * (kGroup * (at % kLanes / 4) + at / kLanes) + at % 4; }

KP_INLINE void in_order(const Ints (&sums)[kGroup], int32_t* to) {
  alignas(64) int32_t stored[kBlock];
#pragma GCC unroll 4
  for (int j = 0; j < kGroup; ++j) store_ints(stored + j * kLanes, sums[j]);
#pragma GCC unroll 16
  for (int at = 0; at < kBlock; at += 4) std::memcpy(to + channel_at(at), stored + at, 4 * sizeof(int32_t));
}

#if defined(__AVX512F__) && defined(KP_VNNI)

KP_INLINE void interleave(__m512i a, __m512i b, __m512i c, __m512i d, Ints (&v)[kGroup]) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  v[0].v = _mm512_unpacklo_epi16(ab_low, cd_low), v[1].v = _mm512_unpackhi_epi16(ab_low, cd_low);
  v[2].v = _mm512_unpacklo_epi16(ab_high, cd_high), v[3].v = _mm512_unpackhi_epi16(ab_high, cd_high);
}
KP_INLINE void interleave(const Staged* const (&rows)[kGroup], int64_t at, Ints (&v)[kGroup]) {
  interleave(_mm512_loadu_si512(rows[0] + at), _mm512_loadu_si512(rows[1] + at), _mm512_loadu_si512(rows[2] + at),
             _mm512_loadu_si512(rows[3] + at), v);
}
KP_INLINE __m512i bytes_of(const Ints (&v)[kGroup], const ByteRange& range) {
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(v[0].v, v[1].v), range.zero_point.v);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(v[2].v, v[3].v), range.zero_point.v);
  return _mm512_min_epi8(_mm512_max_epi8(_mm512_packs_epi16(low, high), range.low.v), range.high.v);
}
KP_INLINE void store_block(int8_t* y, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  if (__builtin_expect(n >= kBlock, 1)) _mm512_storeu_si512(y, bytes_of(v, range));
  else _mm512_mask_storeu_epi8(y, (__mmask64{1} << n) - 1, bytes_of(v, range));
}
KP_INLINE void store_halves(int8_t* y, int8_t* below, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  const __m512i bytes = bytes_of(v, range);
  const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  _mm256_mask_storeu_epi8(y, some, _mm512_castsi512_si256(bytes));
  _mm256_mask_storeu_epi8(below, some, _mm512_extracti64x4_epi64(bytes, 1));
}

#elif defined(__AVX512F__)

KP_INLINE void interleave(const Staged* const (&rows)[kGroup], int64_t at, Ints (&v)[kGroup]) {
  const __m512i a = _mm512_loadu_si512(rows[0] + at), b = _mm512_loadu_si512(rows[1] + at);
  v[0].v = _mm512_unpacklo_epi16(a, b), v[1].v = _mm512_unpackhi_epi16(a, b);
}
KP_INLINE __m256i bytes_of(const Ints (&v)[kGroup], const ByteRange& range) {
  const __m256i sum = _mm512_cvtsepi16_epi8(_mm512_adds_epi16(_mm512_packs_epi32(v[0].v, v[1].v), range.zero_point.v));
  const __m256i low = _mm512_castsi512_si256(range.low.v), high = _mm512_castsi512_si256(range.high.v);
  return _mm256_min_epi8(_mm256_max_epi8(sum, low), high);
}
KP_INLINE void store_block(int8_t* y, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  if (__builtin_expect(n >= kBlock, 1)) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), bytes_of(v, range));
  else _mm256_mask_storeu_epi8(y, (__mmask32{1} << n) - 1, bytes_of(v, range));
}
KP_INLINE void store_halves(int8_t* y, int8_t* below, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  const __m256i bytes = bytes_of(v, range);
  const __mmask16 some = static_cast<__mmask16>((1u << n) - 1u);
  _mm_mask_storeu_epi8(y, some, _mm256_castsi256_si128(bytes));
  _mm_mask_storeu_epi8(below, some, _mm256_extracti128_si256(bytes, 1));
}

#elif defined(__AVX2__) && defined(KP_VNNI)

KP_INLINE __m256i load_row(const Staged* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
KP_INLINE void interleave(const Staged* const (&rows)[kGroup], int64_t at, Ints (&v)[kGroup]) {
  const __m256i a = load_row(rows[0] + at), b = load_row(rows[1] + at), c = load_row(rows[2] + at), d = load_row(rows[3] + at);
  const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
  v[0].v = _mm256_unpacklo_epi16(ab_low, cd_low), v[1].v = _mm256_unpackhi_epi16(ab_low, cd_low);
  v[2].v = _mm256_unpacklo_epi16(ab_high, cd_high), v[3].v = _mm256_unpackhi_epi16(ab_high, cd_high);
}
KP_INLINE void store_block(int8_t* y, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(v[0].v, v[1].v), range.zero_point.v);
  const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(v[2].v, v[3].v), range.zero_point.v);
  const __m256i clamped = _mm256_min_epi8(_mm256_max_epi8(_mm256_packs_epi16(low, high), range.low.v), range.high.v);
  if (__builtin_expect(n >= kBlock, 1)) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), clamped);
  int8_t bytes[kBlock];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), clamped);
  for (int64_t i = 0; i < n; ++i) y[i] = bytes[i];
}

#elif defined(__AVX2__)

KP_INLINE __m256i load_row(const Staged* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
KP_INLINE void interleave(const Staged* const (&rows)[kGroup], int64_t at, Ints (&v)[kGroup]) {
  const __m256i a = load_row(rows[0] + at), b = load_row(rows[1] + at);
  v[0].v = _mm256_unpacklo_epi16(a, b), v[1].v = _mm256_unpackhi_epi16(a, b);
}
KP_INLINE void store_block(int8_t* y, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  const __m256i sum = _mm256_adds_epi16(_mm256_packs_epi32(v[0].v, v[1].v), range.zero_point.v);
  const __m128i packed = _mm_packs_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i low = _mm256_castsi256_si128(range.low.v), high = _mm256_castsi256_si128(range.high.v);
  const __m128i clamped = _mm_min_epi8(_mm_max_epi8(packed, low), high);
  if (__builtin_expect(n >= kBlock, 1)) return _mm_storeu_si128(reinterpret_cast<__m128i*>(y), clamped);
  int8_t bytes[kBlock];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), clamped);
  for (int64_t i = 0; i < n; ++i) y[i] = bytes[i];
}

#else

KP_INLINE void interleave(const Staged* const (&rows)[kGroup], int64_t at, Ints (&v)[kGroup]) {
  Short8 a, b;
  std::memcpy(&a, rows[0] + at, sizeof a);
  std::memcpy(&b, rows[1] + at, sizeof b);
  v[0].v = reinterpret_cast<Int4>(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
  v[1].v = reinterpret_cast<Int4>(__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
}
KP_INLINE void store_block(int8_t* y, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  store_bytes(y, v, range, minimum(n, kBlock));
}

#endif

#if !defined(__AVX512F__)
KP_INLINE void store_halves(int8_t* y, int8_t* below, const Ints (&v)[kGroup], const ByteRange& range, int64_t n) {
  int8_t bytes[kBlock];
  store_block(bytes, v, range, kBlock);
  for (int64_t i = 0; i < n; ++i) y[i] = bytes[i], below[i] = bytes[kBlock / 2 + i];
}
#endif

// interleave: `at` elements behind the beginning of each row. store_block: the first n of kBlock bytes, as `store_bytes`;
// store_halves: of each half the first n, the second one to `below`.

}  // namespace kernelpress::KERNELPRESS_ISA
