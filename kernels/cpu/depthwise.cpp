// Depthwise convolution, channels_last.     y[n, p, q, c] = act(bias[c] + residual + Σ_rs x[n, p·S-P+r·D, q·S-P+s·D, c/m] · w[r, s, c])
//
//       column table of a strip                    one tile: one output row × kStrip pixels × one vector of channels
//   r ─┬──┬──┬──┬──┬──┬──                          An input vector is loaded once per kernel row and feeds every tap and output
//      │p₀│p₁│p₂│ …   │ 0│   0 = zeros            that touches it; the taps of the row and the accumulators stay in registers.
//      └──┴──┴──┴──┴──┴──┘   (padding)             The addresses of a strip's columns are looked up in a table that is made once
//                                                  for all channels, so that borders cost no branch.
//   bound: FMA ports in cache, bandwidth beyond it
//
// A strip is walked over a few output rows per vector of channels, which finds the input rows they share in the first-level cache.
// One task: a run of output rows over all images. A channel multiplier m > 1 widens each band of input rows to C·m channels in
// scratch first, so that one kernel serves both.
#include "depthwise_rows.h"

#include "runtime.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int kStrip = kLanes == 4 ? 4 : 7;   // output pixels of a tile; the maps of the usual networks are multiples of 7 wide
constexpr int kRowGroup = 4;                  // output rows that share a column table
constexpr int64_t kMaxTableChannels = 4096;   // wider inputs take depthwise_row_any
alignas(64) const float kZeros[kMaxTableChannels] = {};

KP_INLINE void finish_pixel(const DepthwiseProblem& g, const DepthwiseOutput& out, Vec value, int64_t pixel, int64_t c, int64_t lanes) {
  if (out.residual) value = value + load_up_to(out.residual + pixel * out.residual_stride + c, lanes);
  store_up_to(out.y + pixel * out.y_stride + c, g.activation(value), lanes);
}

// Column addresses of one input row under a strip.
template <int kKernel, int kStride>
struct Columns {
  static constexpr int kCount = (kStrip - 1) * kStride + kKernel;
  const float* at[kCount];
};

template <int kKernel, int kStride>
KP_INLINE void look_up(Columns<kKernel, kStride>& columns, const DepthwiseProblem& g, const float* row, int64_t first_column) {
  for (int j = 0; j < Columns<kKernel, kStride>::kCount; ++j) {
    const int64_t column = first_column + j;
    columns.at[j] = column >= 0 && column < g.in_w ? row + column * g.x_stride : kZeros;
  }
}

// One output row of a strip; columns[r] is null where kernel row r lies in the padding above or below.
template <int kKernel, int kStride, bool kWhole>
KP_INLINE void strip_tile(const DepthwiseProblem& g, const Columns<kKernel, kStride>* const* columns, const DepthwiseOutput& out,
                          int64_t pixels, int64_t c) {
  const int64_t lanes = kWhole ? kLanes : g.channels - c;
  const Vec bias = g.bias ? load_up_to(g.bias + c, lanes) : zero();
  Vec acc[kStrip];
#pragma GCC unroll 8
  for (int q = 0; q < kStrip; ++q) acc[q] = bias;
  for (int r = 0; r < kKernel; ++r) {
    if (!columns[r]) continue;
    const float* weight = g.weight + r * kKernel * g.channels + c;
    Vec tap[kKernel];
#pragma GCC unroll 8
    for (int s = 0; s < kKernel; ++s) {
      tap[s] = kWhole ? load(weight + s * g.channels) : load_up_to(weight + s * g.channels, lanes);
    }
#pragma GCC unroll 32
    for (int j = 0; j < Columns<kKernel, kStride>::kCount; ++j) {
      const float* x = columns[r]->at[j] + c;
      const Vec value = kWhole ? load(x) : load_up_to(x, lanes);
#pragma GCC unroll 8
      for (int s = 0; s < kKernel; ++s) {
        if (j < s || (j - s) % kStride != 0 || (j - s) / kStride >= kStrip) continue;
        acc[(j - s) / kStride] = fma(value, tap[s], acc[(j - s) / kStride]);
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kStrip; ++q) {
    if (q < pixels) finish_pixel(g, out, acc[q], q, c, lanes);
  }
}

template <int kKernel, int kStride>
void strip_rows(const DepthwiseProblem& g, const RowSource& source, int64_t begin, int64_t end, const DepthwiseOutput& out) {
  constexpr int kTableRows = (kRowGroup - 1) * kStride + kKernel;
  Columns<kKernel, kStride> table[kTableRows];
  const Columns<kKernel, kStride>* present[kTableRows];
  for (int64_t p = begin; p < end; p += kRowGroup) {
    const int64_t rows = minimum(kRowGroup, end - p), top = p * kStride - g.window.pad_h;
    for (int64_t q0 = 0; q0 < g.out_w; q0 += kStrip) {
      for (int64_t i = 0; i < (rows - 1) * kStride + kKernel; ++i) {
        const bool inside = top + i >= 0 && top + i < g.in_h;
        present[i] = inside ? &table[i] : nullptr;
        if (inside) look_up(table[i], g, source.row(top + i), q0 * kStride - g.window.pad_w);
      }
      const int64_t pixels = g.out_w - q0;
      for (int64_t c = 0; c < g.channels; c += kLanes) {
        for (int64_t i = 0; i < rows; ++i) {
          const DepthwiseOutput place = out.at((p - begin + i) * out.row_pixels + q0);
          if (c + kLanes <= g.channels) strip_tile<kKernel, kStride, true>(g, present + i * kStride, place, pixels, c);
          else strip_tile<kKernel, kStride, false>(g, present + i * kStride, place, pixels, c);
        }
      }
    }
  }
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
          const Vec tap = load_up_to(g.weight + (r * w.kernel_w + s) * g.channels + c, lanes);
          for (int64_t q = 0; q < pixels; ++q) {
            const int64_t column = (q0 + q) * w.stride_w - w.pad_w + s * w.dilation_w;
            if (column < 0 || column >= g.in_w) continue;
            acc[q] = fma(load_up_to(source.row(h) + column * g.x_stride + c, lanes), tap, acc[q]);
          }
        }
      }
      for (int64_t q = 0; q < pixels; ++q) finish_pixel(g, out, acc[q], q0 + q, c, lanes);
    }
  }
}

void widen_row(const DepthwiseConv2dArgs& a, const float* x, float* to) {
  for (int64_t q = 0; q < a.in_w; ++q) {
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int64_t j = 0; j < a.multiplier; ++j) *to++ = x[q * a.x_stride + c];
    }
  }
}

// Output rows of one image with a channel multiplier, one at a time over a ring of widened input rows.
void widened_rows(const DepthwiseConv2dArgs& a, DepthwiseProblem g, const float* image, int64_t begin, int64_t end, const DepthwiseOutput& out) {
  const int64_t reach = (a.window.kernel_h - 1) * a.window.dilation_h + 1;
  const RowSource ring{thread_scratch(reach * a.in_w * g.channels), a.in_w * g.channels, reach};
  g.x_stride = g.channels;
  for (int64_t p = begin, made = 0; p < end; ++p) {
    const int64_t top = p * a.window.stride_h - a.window.pad_h, bottom = minimum(a.in_h, top + reach);
    for (int64_t h = maximum(made, maximum(0, top)); h < bottom; ++h) {
      widen_row(a, image + h * a.in_w * a.x_stride, const_cast<float*>(ring.row(h)));
    }
    made = maximum(made, bottom);
    depthwise_rows(g, ring, p, p + 1, out.at((p - begin) * a.out_w));
  }
}

}  // namespace

void depthwise_rows(const DepthwiseProblem& g, const RowSource& source, int64_t begin, int64_t end, const DepthwiseOutput& out) {
  const Window& w = g.window;
  const bool plain = w.kernel_h == w.kernel_w && w.stride_h == w.stride_w && w.dilation_h == 1 && w.dilation_w == 1 &&
                     g.channels <= kMaxTableChannels;
  const int64_t shape = plain ? w.kernel_h * 10 + w.stride_h : 0;
  switch (shape) {
    case 31: return strip_rows<3, 1>(g, source, begin, end, out);
    case 32: return strip_rows<3, 2>(g, source, begin, end, out);
    case 51: return strip_rows<5, 1>(g, source, begin, end, out);
    case 52: return strip_rows<5, 2>(g, source, begin, end, out);
    case 71: return strip_rows<7, 1>(g, source, begin, end, out);
    case 72: return strip_rows<7, 2>(g, source, begin, end, out);
    default:
      for (int64_t p = begin; p < end; ++p) row_of_any_window(g, source, p, out.at((p - begin) * out.row_pixels));
  }
}

void depthwise_conv2d(const DepthwiseConv2dArgs& a) {
  const DepthwiseProblem g{a.window,   a.in_h,   a.in_w, a.out_w, a.channels * a.multiplier,
                           a.x_stride, a.weight, a.bias, ActivationFunction(a.activation)};
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
