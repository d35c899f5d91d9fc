// Depthwise convolution, channels_last.     y[n, p, q, c] = act(bias[c] + residual + Σ_rs x[n, p·S-P+r·D, q·S-P+s·D, c/m] · w[r, s, c])
//
//       column table of a strip                    one tile: one output row × kStrip pixels × one vector of channels
//   h ─┬──┬──┬──┬──┬──┬──                          An input vector is loaded once and feeds every tap and output of the tile
//      │p₀│p₁│p₂│ …   │ 0│   0 = zeros            that it touches; taps and accumulators stay in registers.
//      └──┴──┴──┴──┴──┴──┘   (padding)             The addresses of a strip's columns are looked up in a table that is made once
//                                                  for all channels, so that borders cost no branch.
//   bound: FMA ports in cache, bandwidth beyond it
//
// One task: a run of output rows over all images. A channel multiplier m > 1 widens each band of input rows to C·m channels in
// scratch first, so that one kernel serves both.
#include "depthwise_rolling.h"
#include "depthwise_rows.h"

#include "runtime.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int kStrip = kLanes == 4 ? 4 : 7;   // output pixels of a tile; the maps of the usual networks are multiples of 7 wide
constexpr bool kRolls = kLanes == 16;         // 3×3 windows keep three rows of accumulators in 32 registers: depthwise_rolling.h
constexpr int64_t kMaxTableChannels = 4096;   // wider inputs take depthwise_row_any
alignas(64) const float kZeros[kMaxTableChannels] = {};

// Column addresses of one input row under a strip.
template <int kKernel, int kStride>
struct Columns {
  static constexpr int kCount = (kStrip - 1) * kStride + kKernel;
  const float* at[kCount];
};

template <int kKernel, int kStride>
KP_INLINE void look_up(Columns<kKernel, kStride>& columns, const DepthwiseProblem& g, const float* row, int64_t first_column) {
  constexpr int kCount = Columns<kKernel, kStride>::kCount;
  if (first_column >= 0 && first_column + kCount <= g.in_w) {
    const float* x = row + first_column * g.x_stride;
#pragma GCC unroll 32
    for (int j = 0; j < kCount; ++j, x += g.x_stride) columns.at[j] = x;
  } else {
    for (int j = 0; j < kCount; ++j) {
      const int64_t column = first_column + j;
      columns.at[j] = column >= 0 && column < g.in_w ? row + column * g.x_stride : kZeros;
    }
  }
}

// Adds input row h of a window to the accumulators of a strip.
template <int kKernel, int kStride, bool kWhole>
KP_INLINE void add_input_row(const DepthwiseProblem& g, Vec (&acc)[kStrip], const Columns<kKernel, kStride>& columns, int h, int64_t c,
                             int64_t lanes) {
  Vec tap[kKernel];
#pragma GCC unroll 8
  for (int s = 0; s < kKernel; ++s) {
    const float* weight = g.weight + (h * kKernel + s) * g.weight_stride + c;
    tap[s] = kWhole ? load(weight) : load_up_to(weight, lanes);
  }
#pragma GCC unroll 32
  for (int j = 0; j < Columns<kKernel, kStride>::kCount; ++j) {
    const float* x = columns.at[j] + c;
    const Vec value = kWhole ? load(x) : load_up_to(x, lanes);
#pragma GCC unroll 8
    for (int s = 0; s < kKernel; ++s) {
      if (j < s || (j - s) % kStride != 0 || (j - s) / kStride >= kStrip) continue;
      acc[(j - s) / kStride] = fma(value, tap[s], acc[(j - s) / kStride]);
    }
  }
}

// A strip of one output row; present[h] is false where input row h lies in the padding above or below.
template <int kKernel, int kStride, bool kWhole>
KP_INLINE void strip_tile(const DepthwiseProblem& g, const Columns<kKernel, kStride> (&columns)[kKernel], const bool (&present)[kKernel],
                          const DepthwiseOutput& out, int64_t pixels, int64_t c) {
  const int64_t lanes = kWhole ? kLanes : g.channels - c;
  const Vec bias = g.bias ? load_up_to(g.bias + c, lanes) : zero();
  Vec acc[kStrip];
#pragma GCC unroll 8
  for (int q = 0; q < kStrip; ++q) acc[q] = bias;
  for (int h = 0; h < kKernel; ++h) {
    if (present[h]) add_input_row<kKernel, kStride, kWhole>(g, acc, columns[h], h, c, lanes);
  }
  const bool plain = g.activation.clamps && !out.residual;
  const Vec low = plain ? g.activation.low : broadcast(-__builtin_inff()), high = plain ? g.activation.high : broadcast(__builtin_inff());
#pragma GCC unroll 8
  for (int q = 0; q < kStrip; ++q) {
    const Vec value = at_most(at_least(acc[q], low), high);
    if (kWhole && __builtin_expect(pixels >= kStrip, 1)) store(out.y + q * out.y_stride + c, value);
    else if (q < pixels) store_up_to(out.y + q * out.y_stride + c, value, lanes);
  }
}

// Output rows [begin, end) from output column `first_column` on.
template <int kKernel, int kStride>
void strip_rows(const DepthwiseProblem& g, const RowSource& source, int64_t begin, int64_t end, int64_t first_column, const DepthwiseOutput& out) {
  Columns<kKernel, kStride> columns[kKernel];
  bool present[kKernel];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t top = p * kStride - g.window.pad_h;
    for (int64_t q0 = first_column; q0 < g.out_w; q0 += kStrip) {
      for (int64_t h = 0; h < kKernel; ++h) {
        present[h] = top + h >= 0 && top + h < g.in_h;
        if (present[h]) look_up(columns[h], g, source.row(top + h), q0 * kStride - g.window.pad_w);
      }
      const DepthwiseOutput place = out.at((p - begin) * out.row_pixels + q0);
      int64_t c = 0;
      for (; c + kLanes <= g.channels; c += kLanes) strip_tile<kKernel, kStride, true>(g, columns, present, place, g.out_w - q0, c);
      if (c < g.channels) strip_tile<kKernel, kStride, false>(g, columns, present, place, g.out_w - q0, c);
      if (!g.activation.clamps || out.residual) finish_sums(g.activation, place, 1, minimum(kStrip, g.out_w - q0), 0, g.channels);
    }
  }
}

// Output columns of a 3×3 window, from the left, that roll_strip can compute: whole strips with at most a column of padding beside.
template <int kStride>
int64_t rolling_columns(const DepthwiseProblem& g, int64_t rows) {
  if (!kRolls || rows < 2 || g.channels < kLanes || g.window.pad_w > 1) return 0;
  int64_t columns = g.out_w - g.out_w % kRollingStrip;
  while (columns > 0 && (columns - 1) * kStride - g.window.pad_w + 3 > g.in_w + 1) columns -= kRollingStrip;
  return columns;
}

template <int kStride>
void rows_of_3x3(const DepthwiseProblem& g, const RowSource& source, int64_t begin, int64_t end, const DepthwiseOutput& out) {
  const int64_t columns = rolling_columns<kStride>(g, end - begin);
  if constexpr (kRolls) {
    const int64_t most = g.in_w * g.x_stride < kLongRowFloats ? kRollingRows : kRollingRowsOfLongRows, runs = ceil_div(end - begin, most);
    const float* bias = g.bias ? g.bias : kZeros;
    for (int64_t run = 0; columns > 0 && run < runs; ++run) {
      const int64_t first = begin + (end - begin) * run / runs, count = begin + (end - begin) * (run + 1) / runs - first;
      const float* rows[kRollingRows * kStride + 2];
      for (int64_t i = 0; i < (count - 1) * kStride + 3; ++i) {
        const int64_t h = first * kStride - g.window.pad_h + i;
        rows[i] = h >= 0 && h < g.in_h ? source.row(h) : nullptr;
      }
      for (int64_t q0 = 0; q0 < columns; q0 += kRollingStrip) {
        const int64_t left = q0 * kStride - g.window.pad_w, right = left + (kRollingStrip - 1) * kStride + 3;
        const DepthwiseOutput place = out.at((first - begin) * out.row_pixels + q0);
        if (left < 0 && right > g.in_w) roll_strip<kStride, true, true>(g, rows, left, bias, place, count);
        else if (left < 0) roll_strip<kStride, true, false>(g, rows, left, bias, place, count);
        else if (right > g.in_w) roll_strip<kStride, false, true>(g, rows, left, bias, place, count);
        else roll_strip<kStride, false, false>(g, rows, left, bias, place, count);
      }
    }
  }
  strip_rows<3, kStride>(g, source, begin, end, columns, out);
}

// One output row of any kernel size, stride, dilation and width.
void row_of_any_window(const DepthwiseProblem& g, const RowSource& source, int64_t p, const DepthwiseOutput& out) {
  const Window& w = g.window;
  for (int64_t q0 = 0; q0 < g.out_w; q0 += kStrip) {
    const int64_t pixels = minimum(kStrip, g.out_w - q0);
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      const int64_t lanes = minimum(kLanes, g.channels - c);
      const Vec bias = g.bias ? load_up_to(g.bias + c, lanes) : zero();
      Vec acc[kStrip];
      for (int q = 0; q < kStrip; ++q) acc[q] = bias;
      for (int64_t r = 0; r < w.kernel_h; ++r) {
        const int64_t h = p * w.stride_h - w.pad_h + r * w.dilation_h;
        if (h < 0 || h >= g.in_h) continue;
        for (int64_t s = 0; s < w.kernel_w; ++s) {
          const Vec tap = load_up_to(g.weight + (r * w.kernel_w + s) * g.weight_stride + c, lanes);
          for (int64_t q = 0; q < pixels; ++q) {
            const int64_t column = (q0 + q) * w.stride_w - w.pad_w + s * w.dilation_w;
            if (column < 0 || column >= g.in_w) continue;
            acc[q] = fma(load_up_to(source.row(h) + column * g.x_stride + c, lanes), tap, acc[q]);
          }
        }
      }
      for (int64_t q = 0; q < pixels; ++q) store_up_to(out.y + (q0 + q) * out.y_stride + c, acc[q], lanes);
    }
    finish_sums(g.activation, out.at(q0), 1, pixels, 0, g.channels);
  }
}

// Output rows of one image with a channel multiplier, one at a time over a ring of widened input rows.
void widened_rows(const DepthwiseConv2dArgs& a, DepthwiseProblem g, const float* image, int64_t begin, int64_t end, const DepthwiseOutput& out) {
  const int64_t reach = a.window.reach_h();
  const RowSource ring{thread_scratch(reach * a.in_w * g.channels), a.in_w * g.channels, reach};
  g.x_stride = g.channels;
  for (int64_t p = begin, made = 0; p < end; ++p) {
    const int64_t top = p * a.window.stride_h - a.window.pad_h, bottom = minimum(a.in_h, top + reach);
    for (int64_t h = maximum(made, maximum(0, top)); h < bottom; ++h) {
      widen(image + h * a.in_w * a.x_stride, a.x_stride, const_cast<float*>(ring.row(h)), g.channels, a.in_w, a.channels, a.multiplier);
    }
    made = maximum(made, bottom);
    depthwise_rows(g, ring, p, p + 1, out.at((p - begin) * a.out_w));
  }
}

}  // namespace

void finish_sums(const ActivationFunction& activation, const DepthwiseOutput& out, int64_t rows, int64_t pixels, int64_t first, int64_t last) {
  const auto finish = [&](const auto& curve) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t pixel = i * out.row_pixels; pixel < i * out.row_pixels + pixels; ++pixel) {
        for (int64_t c = first; c < last; c += kLanes) {
          float* const y = out.y + pixel * out.y_stride + c;
          Vec value = load_up_to(y, last - c);
          if (out.residual) value = value + load_up_to(out.residual + pixel * out.residual_stride + c, last - c);
          store_up_to(y, curve(value), last - c);
        }
      }
    }
  };
  if (activation.clamps) finish([&](Vec x) { return activation.clamped(x); });
  else with_curve(activation.kind, finish);
}

void widen(const float* x, int64_t x_stride, float* to, int64_t to_stride, int64_t pixels, int64_t channels, int64_t multiplier) {
  for (int64_t q = 0; q < pixels; ++q, x += x_stride, to += to_stride) {
    for (int64_t c = 0, o = 0; c < channels; ++c) {
      for (int64_t j = 0; j < multiplier; ++j) to[o++] = x[c];
    }
  }
}

void depthwise_rows(const DepthwiseProblem& g, const RowSource& source, int64_t begin, int64_t end, const DepthwiseOutput& out) {
  const Window& w = g.window;
  const bool plain = w.kernel_h == w.kernel_w && w.stride_h == w.stride_w && w.dilation_h == 1 && w.dilation_w == 1 &&
                     g.channels <= kMaxTableChannels;
  const int64_t shape = plain ? w.kernel_h * 10 + w.stride_h : 0;
  switch (shape) {
    case 31: return rows_of_3x3<1>(g, source, begin, end, out);
    case 32: return rows_of_3x3<2>(g, source, begin, end, out);
    case 51: return strip_rows<5, 1>(g, source, begin, end, 0, out);
    case 52: return strip_rows<5, 2>(g, source, begin, end, 0, out);
    case 71: return strip_rows<7, 1>(g, source, begin, end, 0, out);
    case 72: return strip_rows<7, 2>(g, source, begin, end, 0, out);
    default:
      for (int64_t p = begin; p < end; ++p) row_of_any_window(g, source, p, out.at((p - begin) * out.row_pixels));
  }
}

void depthwise_conv2d(const DepthwiseConv2dArgs& a) {
  const int64_t channels = a.channels * a.multiplier;
  const DepthwiseProblem g{a.window, a.in_h,   a.in_w, a.out_w, channels, a.x_stride, a.weight, channels, a.bias,
                           ActivationFunction(a.activation)};
  const DepthwiseOutput out{a.y, a.y_stride, a.residual, a.residual_stride, a.out_w};
  parallel(a.batch * a.out_h, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin / a.out_h; image * a.out_h < end; ++image) {
      const int64_t top = image * a.out_h, first = maximum(begin, top) - top, last = minimum(end - top, a.out_h);
      const float* x = a.x + image * a.in_h * a.in_w * a.x_stride;
      const DepthwiseOutput place = out.at((top + first) * a.out_w);
      if (a.multiplier > 1) widened_rows(a, g, x, first, last, place);
      else depthwise_rows(g, {x, a.in_w * a.x_stride, a.in_h}, first, last, place);
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
