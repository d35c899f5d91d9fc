// Depthwise → pointwise, and expand → depthwise → project, without the intermediates reaching main memory.
//
//   separable_conv2d                                    inverted_residual
//   x rows ─depthwise→ scratch ─register tile→ y        x rows ─tile→ ring of expanded rows ─depthwise→ scratch ─tile→ y
//
//   one task:  a run of output rows, in steps whose intermediates fit the second-level cache; a pointwise weight panel is
//   read once per step.   bound: FMA; the memory traffic is x, y and the weights
#include "depthwise_rows.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kSeparableFloats = 32 * 1024;  // depthwise results per step
constexpr int64_t kInvertedFloats = 96 * 1024;   // expanded rows and depthwise results per step

// Pixels of scratch lie one vector further apart than their channels need: a power-of-two distance would collide in the cache.
KP_INLINE int64_t padded(int64_t channels) { return round_up(channels, kLanes) + kLanes; }

// Output rows per step: as many as `budget` floats hold, at least one register tile high, evenly dividing the task.
KP_INLINE int64_t rows_per_step(int64_t budget, int64_t floats_per_row, int64_t out_w, int64_t rows) {
  const int64_t wanted = maximum(maximum(1, budget / floats_per_row), ceil_div(kTileRows, out_w));
  const int64_t steps = ceil_div(rows, wanted);
  return ceil_div(rows, steps);
}

// Runs body(image, first, last) for the parts of a run of output rows over all images.
template <class Body>
void over_output_rows(int64_t batch, int64_t out_h, const Body& body) {
  parallel(batch * out_h, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin / out_h; image * out_h < end; ++image) {
      const int64_t top = image * out_h;
      body(image, maximum(begin, top) - top, minimum(end - top, out_h));
    }
  });
}

void separable_rows(const SeparableConv2dArgs& a, int64_t image, int64_t begin, int64_t end) {
  const DepthwiseProblem g{a.window, a.in_h, a.in_w, a.out_w, a.channels, a.x_stride, a.depthwise_weight, a.depthwise_bias,
                           ActivationFunction(a.depthwise_activation)};
  const TileOutput out{a.y, a.y_stride, a.pointwise_bias, a.residual, a.residual_stride, ActivationFunction(a.activation)};
  const float* x = a.x + image * a.in_h * a.in_w * a.x_stride;
  const int64_t stride = padded(a.channels);
  const int64_t step = rows_per_step(kSeparableFloats, a.out_w * stride, a.out_w, end - begin);
  float* scratch = thread_scratch(step * a.out_w * stride);
  for (int64_t p = begin; p < end; p += step) {
    const int64_t last = minimum(end, p + step);
    depthwise_rows(g, {x, a.in_w * a.x_stride, a.in_h}, p, last, {scratch, stride, nullptr, 0, a.out_w});
    multiply_panels(contiguous_rows(scratch, stride, a.channels), a.pointwise_weight, out.at((image * a.out_h + p) * a.out_w, 0),
                    (last - p) * a.out_w, a.c_out, 0, ceil_div(a.c_out, kPanel));
  }
}

// A ring of the last `capacity` expanded rows of one image; row h lies in slot h mod capacity.
class ExpandedRows {
 public:
  ExpandedRows(const InvertedResidualArgs& args, int64_t image, float* memory, int64_t capacity)
      : a_(args), x_(args.x + image * args.in_h * args.in_w * args.x_stride), memory_(memory), capacity_(capacity),
        row_floats_(args.in_w * padded(args.hidden)), activation_(args.expand_activation) {}

  RowSource source() const { return {memory_, row_floats_, capacity_}; }

  // Makes rows [first, last) available, reusing those that are; the ring may drop rows before `first`.
  void provide(int64_t first, int64_t last) {
    for (int64_t h = maximum(first, next_); h < last;) {
      const int64_t run = minimum(last - h, capacity_ - h % capacity_);
      const TileOutput out{memory_ + h % capacity_ * row_floats_, padded(a_.hidden), a_.expand_bias, nullptr, 0, activation_};
      multiply_panels(contiguous_rows(x_ + h * a_.in_w * a_.x_stride, a_.x_stride, a_.c_in), a_.expand_weight, out, run * a_.in_w, a_.hidden,
                      0, ceil_div(a_.hidden, kPanel));
      h += run;
    }
    next_ = maximum(next_, last);
  }

 private:
  const InvertedResidualArgs& a_;
  const float* x_;
  float* memory_;
  int64_t capacity_, row_floats_, next_ = 0;
  ActivationFunction activation_;
};

void inverted_rows(const InvertedResidualArgs& a, int64_t image, int64_t begin, int64_t end) {
  const Window& w = a.window;
  const int64_t stride = padded(a.hidden), reach = (w.kernel_h - 1) * w.dilation_h + 1;
  const DepthwiseProblem g{w, a.in_h, a.in_w, a.out_w, a.hidden, stride, a.depthwise_weight, a.depthwise_bias,
                           ActivationFunction(a.depthwise_activation)};
  const TileOutput out{a.y, a.y_stride, a.project_bias, a.residual, a.residual_stride, ActivationFunction(a.activation)};
  const int64_t step = rows_per_step(kInvertedFloats, (a.in_w * w.stride_h + a.out_w) * stride, a.out_w, end - begin);
  const int64_t capacity = minimum(a.in_h, (step - 1) * w.stride_h + reach);
  float* scratch = thread_scratch((capacity * a.in_w + step * a.out_w) * stride);
  float* depthwise_result = scratch + capacity * a.in_w * stride;
  ExpandedRows expanded(a, image, scratch, maximum(1, capacity));
  for (int64_t p = begin; p < end; p += step) {
    const int64_t last = minimum(end, p + step), top = p * w.stride_h - w.pad_h;
    expanded.provide(maximum(0, top), minimum(a.in_h, top + (last - p - 1) * w.stride_h + reach));
    depthwise_rows(g, expanded.source(), p, last, {depthwise_result, stride, nullptr, 0, a.out_w});
    multiply_panels(contiguous_rows(depthwise_result, stride, a.hidden), a.project_weight, out.at((image * a.out_h + p) * a.out_w, 0),
                    (last - p) * a.out_w, a.c_out, 0, ceil_div(a.c_out, kPanel));
  }
}

}  // namespace

void separable_conv2d(const SeparableConv2dArgs& a) {
  over_output_rows(a.batch, a.out_h, [&](int64_t image, int64_t first, int64_t last) { separable_rows(a, image, first, last); });
}

void inverted_residual(const InvertedResidualArgs& a) {
  over_output_rows(a.batch, a.out_h, [&](int64_t image, int64_t first, int64_t last) { inverted_rows(a, image, first, last); });
}

}  // namespace kernelpress::KERNELPRESS_ISA
