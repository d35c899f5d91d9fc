// Squares of floats turned in registers: how positions become neighbours in memory where channels were, and back.
#pragma once

#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// Lane l of row r becomes lane r of row l. One round of interleaving rotates the bits of (row, lane) by one, so log2(kLanes) rounds
// exchange the two.
KP_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec turned[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = interleaved_low(rows[i], rows[i + kLanes / 2]);
      turned[2 * i + 1] = interleaved_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
}

// to[c * to_stride + p] = from[p * from_stride + c] for p < positions, c < channels.
inline void transpose_copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t positions, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t lanes = minimum(kLanes, channels - c);
    for (int64_t p = 0; p < positions; p += kLanes) {
      const int64_t count = minimum(kLanes, positions - p);
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) square[i] = i < count ? load_up_to(from + (p + i) * from_stride + c, lanes) : zero();
      transpose(square);
      for (int64_t i = 0; i < lanes; ++i) store_up_to(to + (c + i) * to_stride + p, square[i], count);
    }
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
