// Depthwise → pointwise, alone and behind the layer that makes its input, without the intermediates reaching main memory.
//
//   separable_conv2d                                    inverted_residual (expand 1×1), separable_stem (dense k×k)
//   x rows ─depthwise→ scratch ─register tile→ y        a chain of three layers, streamed by rows: chain.cpp
//
//   one task:  a run of output rows, in steps whose intermediates fit the second-level cache; a pointwise weight panel is
//   read once per step.   bound: FMA; the memory traffic is x, y and the weights
#include "chain.h"
#include "chain_layers.h"
#include "depthwise_rows.h"
#include "rows.h"
#include "split.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kSeparableFloats = 32 * 1024;  // depthwise results per step
constexpr double kDepthwiseCost = 1;             // a pixel's depthwise results, in units of its FMAs with one panel
constexpr int64_t kInvertedFloats = 96 * 1024;   // expanded rows and depthwise results per step

// Output rows per step: as many as `budget` floats hold, at least one register tile high, evenly dividing the task.
KP_INLINE int64_t rows_per_step(int64_t budget, int64_t floats_per_row, int64_t out_w, int64_t rows) {
  const int64_t wanted = maximum(maximum(1, budget / floats_per_row), ceil_div(kTileRows, out_w));
  const int64_t steps = ceil_div(rows, wanted);
  return ceil_div(rows, steps);
}

void separable_rows(const SeparableConv2dArgs& a, const Interleaved& between, int64_t image, int64_t begin, int64_t end,
                    int64_t first_panel, int64_t last_panel) {
  const DepthwiseProblem g{a.window,           a.in_h,     a.in_w,           a.out_w, a.channels, a.x_stride,
                           a.depthwise_weight, a.channels, a.depthwise_bias, ActivationFunction(a.depthwise_activation)};
  const TileOutput out{a.y, a.y_stride, a.pointwise_bias, a.residual, a.residual_stride, ActivationFunction(a.activation), between};
  const float* x = a.x + image * a.in_h * a.in_w * a.x_stride;
  const int64_t stride = padded(a.channels), row_floats = a.in_w * a.x_stride;
  const int64_t step = rows_per_step(kSeparableFloats, a.out_w * stride, a.out_w, end - begin);
  float* scratch = thread_scratch(step * a.out_w * stride);
  for (int64_t p = begin; p < end; p += step) {
    const int64_t last = minimum(end, p + step);
    depthwise_rows(g, {x, a.in_w * a.x_stride, a.in_h}, p, last, {scratch, stride, nullptr, 0, a.out_w});
    const auto rows_under = [&](int64_t row) { return minimum(a.in_h, (row - 1) * a.window.stride_h - a.window.pad_h + a.window.reach_h()); };
    const Lookahead later{x + rows_under(last) * row_floats, x + rows_under(minimum(end, last + step)) * row_floats};
    multiply_panels(contiguous_rows(scratch, stride, a.channels), a.pointwise_weight, out.at((image * a.out_h + p) * a.out_w, 0),
                    (last - p) * a.out_w, a.c_out, first_panel, last_panel, later);
  }
}

template <class Args>
void run_as_chain(const Args& a) {
  FloatChainBuilder builder;
  builder.append(a);
  run_chain(builder.chain(), kInvertedFloats);
}

}  // namespace

void separable_conv2d(const SeparableConv2dArgs& a) { separable_between(a, {}); }

void separable_between(const SeparableConv2dArgs& a, const Interleaved& between) {
  const int64_t panels = ceil_div(a.c_out, kPanel), rows = a.batch * a.out_h;
  const Split split = split_work(rows * a.out_w, a.channels, panels, kDepthwiseCost);
  over_grid({minimum(split.row_parts, rows), split.panel_parts}, rows, panels, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    over_images(begin, end, a.out_h, [&](int64_t image, int64_t from, int64_t to) {
      separable_rows(a, between, image, from, to, first, last);
    });
  });
}

void inverted_residual(const InvertedResidualArgs& a) { run_as_chain(a); }

void separable_stem(const SeparableStemArgs& a) { run_as_chain(a); }

}  // namespace kernelpress::KERNELPRESS_ISA
