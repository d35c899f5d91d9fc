// 3×3 depthwise convolution down a strip of kStrip output pixels, for instruction sets with 32 vector registers.
//
//   input row h ──▶ taps 2 · ──▶ output row p-1, finished           A vector of the input is loaded once and feeds every output
//               ├─▶ taps 1 · ──▶ output row p                       that it touches: the accumulators of three output rows roll
//               └─▶ taps 0 · ──▶ output row p+1, begun              down the strip, the nine taps stay in registers.
//
//   registers: 3 rows × 7 accumulators + 9 taps + 1 input           bound: FMA ports in cache, bandwidth beyond it
#pragma once

#include "depthwise_rows.h"

namespace kernelpress::KERNELPRESS_ISA {

constexpr int kRollingStrip = 7;
constexpr int64_t kRollingRows = 8;            // output rows of a run
constexpr int64_t kRollingRowsOfLongRows = 4;  // of a run over rows of kLongRowFloats and more: measured faster there
constexpr int64_t kLongRowFloats = 4 * 1024;

struct RollingTaps {
  Vec at[3][3];
};

// Where a finished output row goes, and the clamp that it ends in.
struct RollingOutput {
  float* y;
  int64_t y_stride;
  Vec low, high;

  KP_INLINE void store_pixel(int q, Vec value) const { store(y + q * y_stride, at_most(at_least(value, low), high)); }
};

// Adds one input row to the output rows that take it: kTapRows has bit r set where tap row r counts, for the output row `by_r`. The
// row that takes tap row 2 is finished and stored. kLeft and kRight leave the first and the last column out, which lie in the padding.
template <int kStride, bool kLeft, bool kRight, int kTapRows>
KP_INLINE void add_rolling_row(const float* x, int64_t x_stride, const RollingTaps& taps, Vec* by_0, Vec* by_1, Vec* by_2,
                               const RollingOutput& out) {
  constexpr int kColumns = (kRollingStrip - 1) * kStride + 3;
  if (x) {
#pragma GCC unroll 16
    for (int j = kLeft; j < kColumns - kRight; ++j) {
      const Vec value = in_register(load(x + j * x_stride));
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        const int q = (j - s) / kStride;
        if (j < s || (j - s) % kStride != 0 || q >= kRollingStrip) continue;
        if (kTapRows & 4) by_2[q] = fma(value, taps.at[2][s], by_2[q]);
        if (kTapRows & 2) by_1[q] = fma(value, taps.at[1][s], by_1[q]);
        if (kTapRows & 1) by_0[q] = fma(value, taps.at[0][s], by_0[q]);
      }
      const int done = (j - 2) / kStride;
      if ((kTapRows & 4) && j >= 2 && (j - 2) % kStride == 0) out.store_pixel(done, by_2[done]);
    }
    if ((kTapRows & 4) && kRight) out.store_pixel(kRollingStrip - 1, by_2[kRollingStrip - 1]);
  } else if (kTapRows & 4) {
#pragma GCC unroll 8
    for (int q = 0; q < kRollingStrip; ++q) out.store_pixel(q, by_2[q]);
  }
}

KP_INLINE void begin_rolling_row(Vec* row, const float* bias) {
#pragma GCC unroll 8
  for (int q = 0; q < kRollingStrip; ++q) row[q] = load(bias);
}

KP_INLINE void copy_rolling_row(Vec* to, const Vec* from) {
#pragma GCC unroll 8
  for (int q = 0; q < kRollingStrip; ++q) to[q] = from[q];
}

// One vector of channels of `count` ≥ 2 output rows; rows[i] + offset is the strip's first column of input row i, a null row lies in the
// padding.
template <int kStride, bool kLeft, bool kRight>
KP_INLINE void roll_down(const float* const* rows, int64_t offset, int64_t x_stride, const RollingTaps& taps, const float* bias,
                         RollingOutput out, int64_t y_row, int64_t count) {
  Vec ends[kRollingStrip], middle[kRollingStrip], begins[kRollingStrip];
  const auto input = [&](int64_t i) { return rows[i] ? rows[i] + offset : nullptr; };
  if constexpr (kStride == 1) {
    begin_rolling_row(middle, bias);
    add_rolling_row<1, kLeft, kRight, 1>(input(0), x_stride, taps, middle, nullptr, nullptr, out);
    begin_rolling_row(begins, bias);
    add_rolling_row<1, kLeft, kRight, 3>(input(1), x_stride, taps, begins, middle, nullptr, out);
    for (int64_t i = 2; i < count; ++i, out.y += y_row) {
      copy_rolling_row(ends, middle);
      copy_rolling_row(middle, begins);
      begin_rolling_row(begins, bias);
      add_rolling_row<1, kLeft, kRight, 7>(input(i), x_stride, taps, begins, middle, ends, out);
    }
    add_rolling_row<1, kLeft, kRight, 6>(input(count), x_stride, taps, nullptr, begins, middle, out);
    out.y += y_row;
    add_rolling_row<1, kLeft, kRight, 4>(input(count + 1), x_stride, taps, nullptr, nullptr, begins, out);
  } else {
    begin_rolling_row(begins, bias);
    add_rolling_row<2, kLeft, kRight, 1>(input(0), x_stride, taps, begins, nullptr, nullptr, out);
    for (int64_t i = 1; i < 2 * count - 1; i += 2, out.y += y_row) {
      copy_rolling_row(ends, begins);
      add_rolling_row<2, kLeft, kRight, 2>(input(i), x_stride, taps, nullptr, ends, nullptr, out);
      begin_rolling_row(begins, bias);
      add_rolling_row<2, kLeft, kRight, 5>(input(i + 1), x_stride, taps, begins, nullptr, ends, out);
    }
    add_rolling_row<2, kLeft, kRight, 2>(input(2 * count - 1), x_stride, taps, nullptr, begins, nullptr, out);
    add_rolling_row<2, kLeft, kRight, 4>(input(2 * count), x_stride, taps, nullptr, nullptr, begins, out);
  }
}

// All channels of the strip whose first input column is `first_column`, kLanes at a time; the last vector overlaps its neighbour where
// the channels do not fill it.
template <int kStride, bool kLeft, bool kRight>
void roll_strip(const DepthwiseProblem& g, const float* const* rows, int64_t first_column, const float* bias, const DepthwiseOutput& out,
                int64_t count) {
  const ActivationFunction& f = g.activation;
  const bool plain = f.clamps && !out.residual;
  const Vec low = plain ? f.low : broadcast(-__builtin_inff()), high = plain ? f.high : broadcast(__builtin_inff());
  // In locals: as far as the compiler knows, a vector stored may change anything that lies behind a pointer.
  const int64_t channels = g.channels, weight_stride = g.weight_stride, x_stride = g.x_stride;
  const int64_t y_stride = out.y_stride, y_row = out.row_pixels * y_stride;
  const float* const weight = g.weight;
  float* const y = out.y;
  for (int64_t c = 0; c < channels; c += kLanes) {
    c = minimum(c, channels - kLanes);
    RollingTaps taps;
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) taps.at[t / 3][t % 3] = in_register(load(weight + t * weight_stride + c));
    const RollingOutput to{y + c, y_stride, low, high};
    roll_down<kStride, kLeft, kRight>(rows, first_column * x_stride + c, x_stride, taps, bias + c, to, y_row, count);
    if (!plain) finish_sums(g.activation, out, count, kRollingStrip, c, c + kLanes);
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
