// Depthwise → pointwise, alone and behind the layer that makes its input, without the intermediates reaching main memory.
//
//   separable_conv2d                                    inverted_residual (expand 1×1), separable_stem (dense k×k)
//   x rows ─depthwise→ scratch ─register tile→ y        x rows ─tile→ ring of hidden rows ─depthwise→ scratch ─tile→ y
//
//   one task:  a run of output rows, in steps whose intermediates fit the second-level cache; a pointwise weight panel is
//   read once per step.   bound: FMA; the memory traffic is x, y and the weights
#include "conv_rows.h"
#include "depthwise_rows.h"
#include "split.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kSeparableFloats = 32 * 1024;  // depthwise results per step
constexpr double kDepthwiseCost = 1;             // a pixel's depthwise results, in units of its FMAs with one panel
constexpr int64_t kInvertedFloats = 96 * 1024;   // expanded rows and depthwise results per step

// Pixels of scratch lie one vector further apart than their channels need: a power-of-two distance would collide in the cache.
KP_INLINE int64_t padded(int64_t channels) { return round_up(channels, kLanes) + kLanes; }

// Output rows per step: as many as `budget` floats hold, at least one register tile high, evenly dividing the task.
KP_INLINE int64_t rows_per_step(int64_t budget, int64_t floats_per_row, int64_t out_w, int64_t rows) {
  const int64_t wanted = maximum(maximum(1, budget / floats_per_row), ceil_div(kTileRows, out_w));
  const int64_t steps = ceil_div(rows, wanted);
  return ceil_div(rows, steps);
}

// Runs body(image, first, last) for the parts of output rows [begin, end) over all images.
template <class Body>
void over_images(int64_t begin, int64_t end, int64_t out_h, const Body& body) {
  for (int64_t image = begin / out_h; image * out_h < end; ++image) {
    const int64_t top = image * out_h;
    body(image, maximum(begin, top) - top, minimum(end - top, out_h));
  }
}

template <class Body>
void over_output_rows(int64_t batch, int64_t out_h, const Body& body) {
  parallel(batch * out_h, [&](int64_t begin, int64_t end) { over_images(begin, end, out_h, body); });
}

void separable_rows(const SeparableConv2dArgs& a, int64_t image, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
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
                    (last - p) * a.out_w, a.c_out, first_panel, last_panel);
  }
}

// A ring of the last `capacity` rows of a hidden map that produce(h, count, to) computes; row h lies in slot h mod capacity.
template <class Produce>
class HiddenRows {
 public:
  HiddenRows(float* memory, int64_t row_floats, int64_t capacity, const Produce& produce)
      : memory_(memory), row_floats_(row_floats), capacity_(capacity), produce_(produce) {}

  RowSource source() const { return {memory_, row_floats_, capacity_}; }

  // Makes rows [first, last) available, reusing those that are; the ring may drop rows before `first`.
  void provide(int64_t first, int64_t last) {
    for (int64_t h = maximum(first, next_); h < last;) {
      const int64_t run = minimum(last - h, capacity_ - h % capacity_);
      produce_(h, run, memory_ + h % capacity_ * row_floats_);
      h += run;
    }
    next_ = maximum(next_, last);
  }

 private:
  float* memory_;
  int64_t row_floats_, capacity_, next_ = 0;
  const Produce& produce_;
};

// The part that comes after the hidden map: depthwise over it, then the 1×1 convolution into `out`.
struct Tail {
  DepthwiseProblem depthwise;
  const float* weight;
  TileOutput out;
  int64_t out_h, c_out;

  int64_t reach() const { return (depthwise.window.kernel_h - 1) * depthwise.window.dilation_h + 1; }
  int64_t step(int64_t rows) const {
    const int64_t pixels = depthwise.in_w * depthwise.window.stride_h + depthwise.out_w;
    return rows_per_step(kInvertedFloats, pixels * depthwise.x_stride, depthwise.out_w, rows);
  }
  int64_t capacity(int64_t rows) const {
    return maximum(1, minimum(depthwise.in_h, (step(rows) - 1) * depthwise.window.stride_h + reach()));
  }
  int64_t scratch_floats(int64_t rows) const {
    return (capacity(rows) * depthwise.in_w + step(rows) * depthwise.out_w) * depthwise.x_stride;
  }
};

// Output rows [begin, end) of one image, the hidden map streaming through `scratch`.
template <class Produce>
void stream_rows(const Tail& tail, int64_t image, int64_t begin, int64_t end, float* scratch, const Produce& produce) {
  const DepthwiseProblem& g = tail.depthwise;
  const int64_t step = tail.step(end - begin), capacity = tail.capacity(end - begin), row_floats = g.in_w * g.x_stride;
  float* result = scratch + capacity * row_floats;
  HiddenRows<Produce> hidden(scratch, row_floats, capacity, produce);
  for (int64_t p = begin; p < end; p += step) {
    const int64_t last = minimum(end, p + step), top = p * g.window.stride_h - g.window.pad_h;
    hidden.provide(maximum(0, top), minimum(g.in_h, top + (last - p - 1) * g.window.stride_h + tail.reach()));
    depthwise_rows(g, hidden.source(), p, last, {result, g.x_stride, nullptr, 0, g.out_w});
    multiply_panels(contiguous_rows(result, g.x_stride, g.channels), tail.weight, tail.out.at((image * tail.out_h + p) * g.out_w, 0),
                    (last - p) * g.out_w, tail.c_out, 0, ceil_div(tail.c_out, kPanel));
  }
}

void inverted_rows(const InvertedResidualArgs& a, int64_t image, int64_t begin, int64_t end) {
  const int64_t stride = padded(a.hidden);
  const Tail tail{{a.window, a.in_h, a.in_w, a.out_w, a.hidden, stride, a.depthwise_weight, a.depthwise_bias,
                   ActivationFunction(a.depthwise_activation)},
                  a.project_weight,
                  {a.y, a.y_stride, a.project_bias, a.residual, a.residual_stride, ActivationFunction(a.activation)},
                  a.out_h,
                  a.c_out};
  const float* x = a.x + image * a.in_h * a.in_w * a.x_stride;
  const ActivationFunction activation(a.expand_activation);
  const auto expand = [&](int64_t h, int64_t rows, float* to) {
    const TileOutput out{to, stride, a.expand_bias, nullptr, 0, activation};
    multiply_panels(contiguous_rows(x + h * a.in_w * a.x_stride, a.x_stride, a.c_in), a.expand_weight, out, rows * a.in_w, a.hidden, 0,
                    ceil_div(a.hidden, kPanel));
  };
  stream_rows(tail, image, begin, end, thread_scratch(tail.scratch_floats(end - begin)), expand);
}

void stem_rows(const SeparableStemArgs& a, int64_t image, int64_t begin, int64_t end) {
  const int64_t stride = padded(a.hidden);
  const Tail tail{{a.window, a.mid_h, a.mid_w, a.out_w, a.hidden, stride, a.depthwise_weight, a.depthwise_bias,
                   ActivationFunction(a.depthwise_activation)},
                  a.pointwise_weight,
                  {a.y, a.y_stride, a.pointwise_bias, nullptr, 0, ActivationFunction(a.activation)},
                  a.out_h,
                  a.c_out};
  Conv2dArgs stem{a.x,     a.stem_weight, a.stem_bias, nullptr, nullptr, a.batch, a.in_h,        a.in_w,           a.c_in, a.mid_h, a.mid_w,
                  a.hidden, a.x_stride_n, a.x_stride_c, a.x_stride_h, a.x_stride_w, 0, stride, a.stem_window, a.stem_activation};
  const int64_t tail_floats = tail.scratch_floats(end - begin);
  float* scratch = thread_scratch(tail_floats + conv_scratch_floats(stem, tail.capacity(end - begin)));
  const auto convolve = [&](int64_t h, int64_t rows, float* to) {
    stem.y = to - (image * a.mid_h + h) * a.mid_w * stride;
    conv_rows(stem, image, h, h + rows, 0, ceil_div(a.hidden, kPanel), scratch + tail_floats);
  };
  stream_rows(tail, image, begin, end, scratch, convolve);
}

}  // namespace

void separable_conv2d(const SeparableConv2dArgs& a) {
  const int64_t panels = ceil_div(a.c_out, kPanel), rows = a.batch * a.out_h;
  const Split split = split_work(rows * a.out_w, a.channels, panels, kDepthwiseCost);
  over_grid({minimum(split.row_parts, rows), split.panel_parts}, rows, panels, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    over_images(begin, end, a.out_h, [&](int64_t image, int64_t from, int64_t to) { separable_rows(a, image, from, to, first, last); });
  });
}

void inverted_residual(const InvertedResidualArgs& a) {
  over_output_rows(a.batch, a.out_h, [&](int64_t image, int64_t first, int64_t last) { inverted_rows(a, image, first, last); });
}

void separable_stem(const SeparableStemArgs& a) {
  over_output_rows(a.batch, a.out_h, [&](int64_t image, int64_t first, int64_t last) { stem_rows(a, image, first, last); });
}

}  // namespace kernelpress::KERNELPRESS_ISA
