// Ghost convolution, channels_last: few channels from a dense convolution, the others from those by a depthwise one.
//
//   p = act(conv(x))                    y[…, :P] = p + residual[…, :P]              y[…, P:] = act'(depthwise(p)) + residual[…, P:]
//
//   x rows ─register tile→ ring of p's rows ─┬─copy────────→ y's first channels      Rows of p stay in the ring as long as windows
//                                            └─depthwise───→ y's other channels      of the depthwise convolution reach them.
//
//   one task:  a run of output rows, in steps whose rows of p stay in the inner caches, × a range of panels of p, whose cheap channels
//   need no other; so narrow maps are split without computing a row twice.      bound: FMA, or bandwidth where C_in is small
#include "conv_rows.h"
#include "depthwise_rows.h"
#include "rows.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kGhostFloats = 24 * 1024;  // rows of p in the ring

// y = x + residual, or x where there is none.
void store_sum(float* y, const float* x, const float* residual, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t lanes = channels - c;
    const Vec value = load_up_to(x + c, lanes);
    store_up_to(y + c, residual ? value + load_up_to(residual + c, lanes) : value, lanes);
  }
}

class GhostRows {
 public:
  // For tasks of at most `rows` output rows and the panels [first_panel, last_panel) of p.
  GhostRows(const GhostConv2dArgs& args, int64_t rows, int64_t first_panel, int64_t last_panel)
      : a_(args),
        first_panel_(first_panel),
        last_panel_(last_panel),
        first_(first_panel * kPanel),
        channels_(minimum(last_panel * kPanel, args.primary) - first_),
        kept_(maximum(0, minimum(args.cheap - first_ * args.multiplier, channels_ * args.multiplier))),
        margin_(kept_ ? args.cheap_h / 2 : 0),
        stride_(padded(channels_)),
        wide_stride_(args.multiplier > 1 ? padded(channels_ * args.multiplier) : 0),
        pointwise_(is_pointwise(args.window)) {
    const int64_t fitting = kGhostFloats / (a_.out_w * (stride_ + wide_stride_)) - 2 * margin_;
    const int64_t wanted = maximum(maximum(1, fitting), ceil_div(kTileRows, a_.out_w));
    step_ = ceil_div(rows, ceil_div(rows, wanted));
    capacity_ = minimum(a_.out_h, step_ + 2 * margin_);
  }

  // Output rows [begin, end) of one image.
  void run(int64_t image, int64_t begin, int64_t end) {
    const int64_t ring = capacity_ * a_.out_w * stride_, wide = capacity_ * a_.out_w * wide_stride_;
    const int64_t conv = pointwise_ ? 0 : conv_scratch_floats(convolution(nullptr), capacity_);
    ring_ = thread_scratch(ring + wide + conv);
    wide_ = ring_ + ring;
    conv_scratch_ = wide_ + wide;
    const int64_t first_pixel = image * a_.out_h * a_.out_w;
    for (int64_t p = begin, next = maximum(0, begin - margin_); p < end; p += step_) {
      const int64_t last = minimum(end, p + step_), bottom = minimum(a_.out_h, last + margin_);
      while (next < bottom) {
        const int64_t run = minimum(bottom - next, capacity_ - next % capacity_);
        compute(image, next, next + run);
        next += run;
      }
      for (int64_t h = p; h < last; ++h) keep_row(first_pixel, h);
      if (kept_) make_cheap(first_pixel, p, last);
    }
  }

 private:
  // The dense convolution, whose output pixels begin at y.
  Conv2dArgs convolution(float* y) const {
    return {a_.x, a_.primary_weight, a_.primary_bias, nullptr, y, a_.batch, a_.in_h, a_.in_w, a_.c_in, a_.out_h, a_.out_w, a_.primary,
            a_.in_h * a_.in_w * a_.x_stride, 1, a_.in_w * a_.x_stride, a_.x_stride, 0, stride_, a_.window, a_.activation};
  }

  float* ring_row(int64_t h) const { return ring_ + h % capacity_ * a_.out_w * stride_; }

  // Rows [first, last) of p, which lie one behind the other in the ring.
  void compute(int64_t image, int64_t first, int64_t last) {
    const int64_t pixel = (image * a_.out_h + first) * a_.out_w, pixels = (last - first) * a_.out_w;
    float* to = ring_row(first);
    if (pointwise_) {
      const TileOutput out{to - first_, stride_, a_.primary_bias, nullptr, 0, ActivationFunction(a_.activation)};
      multiply_panels(contiguous_rows(a_.x + pixel * a_.x_stride, a_.x_stride, a_.c_in), a_.primary_weight, out, pixels, a_.primary,
                      first_panel_, last_panel_);
    } else {
      conv_rows(convolution(to - first_ - pixel * stride_), image, first, last, first_panel_, last_panel_, conv_scratch_);
    }
    if (!wide_stride_) return;
    widen(to, stride_, wide_ + first % capacity_ * a_.out_w * wide_stride_, wide_stride_, pixels, channels_, a_.multiplier);
  }

  void keep_row(int64_t first_pixel, int64_t h) const {
    const float* from = ring_row(h);
    for (int64_t q = 0, pixel = first_pixel + h * a_.out_w; q < a_.out_w; ++q, ++pixel, from += stride_) {
      const float* residual = a_.residual ? a_.residual + pixel * a_.residual_stride + first_ : nullptr;
      store_sum(a_.y + pixel * a_.y_stride + first_, from, residual, channels_);
    }
  }

  void make_cheap(int64_t first_pixel, int64_t begin, int64_t end) const {
    const int64_t channel = first_ * a_.multiplier, pixel = first_pixel + begin * a_.out_w;
    const int64_t stride = wide_stride_ ? wide_stride_ : stride_;
    const DepthwiseProblem g{{a_.cheap_h, a_.cheap_w, 1, 1, a_.cheap_h / 2, a_.cheap_w / 2, 1, 1},
                             a_.out_h,
                             a_.out_w,
                             a_.out_w,
                             kept_,
                             stride,
                             a_.cheap_weight + channel,
                             a_.cheap,
                             a_.cheap_bias ? a_.cheap_bias + channel : nullptr,
                             ActivationFunction(a_.cheap_activation)};
    float* y = a_.y + pixel * a_.y_stride + a_.primary + channel;
    const float* residual = a_.residual ? a_.residual + pixel * a_.residual_stride + a_.primary + channel : nullptr;
    const bool adds = a_.cheap_activation == Activation::identity;  // the depthwise convolution adds before its activation
    const RowSource source{wide_stride_ ? wide_ : ring_, a_.out_w * stride, capacity_};
    depthwise_rows(g, source, begin, end, {y, a_.y_stride, adds ? residual : nullptr, a_.residual_stride, a_.out_w});
    for (int64_t m = 0; residual && !adds && m < (end - begin) * a_.out_w; ++m) {
      store_sum(y + m * a_.y_stride, y + m * a_.y_stride, residual + m * a_.residual_stride, kept_);
    }
  }

  const GhostConv2dArgs& a_;
  int64_t first_panel_, last_panel_;
  int64_t first_, channels_;  // of p, that these panels hold
  int64_t kept_;              // channels made from those
  int64_t margin_;            // rows of p above and below an output row that its window reaches
  int64_t stride_, wide_stride_;
  bool pointwise_;
  int64_t step_, capacity_;
  float *ring_ = nullptr, *wide_ = nullptr, *conv_scratch_ = nullptr;
};

}  // namespace

void ghost_conv2d(const GhostConv2dArgs& a) {
  const int64_t panels = ceil_div(a.primary, kPanel), rows = a.batch * a.out_h, depth = a.window.kernel_h * a.window.kernel_w * a.c_in;
  const Split split = split_work(rows * a.out_w, depth, panels, 0, (a.cheap_h - 1) * a.out_w);
  over_grid({minimum(split.row_parts, rows), split.panel_parts}, rows, panels, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    over_images(begin, end, a.out_h, [&](int64_t image, int64_t from, int64_t to) {
      GhostRows(a, to - from, first, last).run(image, from, to);
    });
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
