// Ghost convolution, channels_last: few channels from a dense convolution, the others from those by a depthwise one.
//
//   p = act(conv(x))                    y[…, :P] = p + residual[…, :P]              y[…, P:] = act'(depthwise(p)) + residual[…, P:]
//
//   x rows ─register tile→ rows of p ─depthwise→ y's other channels     Rows of p are y's own first channels; beside the task's rows,
//                                                                       which others write, they lie in scratch. With a residual they
//                                                                       lie in a ring of scratch, and are added on the way to y.
//
//   one task:  a run of output rows, in steps whose rows of p stay in the inner caches, × a range of panels of p, whose cheap channels
//   need no other; so narrow maps are split without computing a row twice.      bound: FMA, or bandwidth where C_in is small
#include "conv_rows.h"
#include "depthwise_rows.h"
#include "rows.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kGhostFloats = 48 * 1024;  // rows of p between the convolutions

void store_sum(float* y, const float* x, const float* residual, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t lanes = channels - c;
    store_up_to(y + c, load_up_to(x + c, lanes) + load_up_to(residual + c, lanes), lanes);
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
        stride_(args.residual ? padded(channels_) : args.y_stride),
        wide_stride_(args.multiplier > 1 ? padded(channels_ * args.multiplier) : 0),
        pointwise_(is_pointwise(args.window)) {
    const int64_t fitting = kGhostFloats / (a_.out_w * (stride_ + wide_stride_)) - 2 * margin_;
    const int64_t wanted = maximum(maximum(1, fitting), ceil_div(kTileRows, a_.out_w));
    step_ = ceil_div(rows, ceil_div(rows, wanted));
    capacity_ = minimum(a_.out_h, step_ + 2 * margin_);
  }

  // Output rows [begin, end) of one image.
  void run(int64_t image, int64_t begin, int64_t end) {
    image_ = image, begin_ = begin, end_ = end;
    const int64_t row = a_.out_w * stride_, aside = (a_.residual ? capacity_ : 2 * margin_) * row;
    const int64_t wide = capacity_ * a_.out_w * wide_stride_;
    const int64_t conv = pointwise_ ? 0 : conv_scratch_floats(convolution(nullptr), capacity_);
    float* memory = thread_scratch(aside + wide + conv);
    if (a_.residual) rows_ = {memory, row, capacity_};
    else rows_ = {a_.y + pixel_of(0) * stride_ + first_, row, a_.out_h, memory, margin_, begin, end};
    wide_ = {memory + aside, a_.out_w * wide_stride_, capacity_};
    conv_scratch_ = memory + aside + wide;
    for (int64_t p = begin, next = maximum(0, begin - margin_); p < end; p += step_) {
      const int64_t last = minimum(end, p + step_), bottom = minimum(a_.out_h, last + margin_);
      while (next < bottom) {
        const int64_t run = minimum(bottom - next, neighbours(next));
        compute(next, next + run);
        next += run;
      }
      for (int64_t h = p; a_.residual && h < last; ++h) add_row(h);
      if (kept_) make_cheap(p, last);
    }
  }

 private:
  int64_t pixel_of(int64_t row) const { return (image_ * a_.out_h + row) * a_.out_w; }

  // How many rows of p from row h on lie one behind the other.
  int64_t neighbours(int64_t h) const {
    const int64_t in_ring = capacity_ - h % capacity_;
    if (a_.residual) return in_ring;
    const int64_t in_place = h < begin_ ? begin_ - h : h < end_ ? end_ - h : a_.out_h - h;
    return wide_stride_ ? minimum(in_place, in_ring) : minimum(in_place, capacity_);
  }

  // The dense convolution, whose output pixels begin at y.
  Conv2dArgs convolution(float* y) const {
    return {a_.x, a_.primary_weight, a_.primary_bias, nullptr, y, a_.batch, a_.in_h, a_.in_w, a_.c_in, a_.out_h, a_.out_w, a_.primary,
            a_.in_h * a_.in_w * a_.x_stride, 1, a_.in_w * a_.x_stride, a_.x_stride, 0, stride_, a_.window, a_.activation};
  }

  // Rows [first, last) of p, which are neighbours.
  void compute(int64_t first, int64_t last) {
    const int64_t pixel = pixel_of(first), pixels = (last - first) * a_.out_w;
    float* to = const_cast<float*>(rows_.row(first));
    if (pointwise_) {
      const TileOutput out{to - first_, stride_, a_.primary_bias, nullptr, 0, ActivationFunction(a_.activation)};
      multiply_panels(contiguous_rows(a_.x + pixel * a_.x_stride, a_.x_stride, a_.c_in), a_.primary_weight, out, pixels, a_.primary,
                      first_panel_, last_panel_);
    } else {
      conv_rows(convolution(to - first_ - pixel * stride_), image_, first, last, first_panel_, last_panel_, conv_scratch_);
    }
    if (wide_stride_) widen(to, stride_, const_cast<float*>(wide_.row(first)), wide_stride_, pixels, channels_, a_.multiplier);
  }

  void add_row(int64_t h) const {
    const float* from = rows_.row(h);
    for (int64_t q = 0, pixel = pixel_of(h); q < a_.out_w; ++q, ++pixel, from += stride_) {
      store_sum(a_.y + pixel * a_.y_stride + first_, from, a_.residual + pixel * a_.residual_stride + first_, channels_);
    }
  }

  void make_cheap(int64_t begin, int64_t end) const {
    const int64_t channel = first_ * a_.multiplier, pixel = pixel_of(begin);
    const DepthwiseProblem g{{a_.cheap_h, a_.cheap_w, 1, 1, a_.cheap_h / 2, a_.cheap_w / 2, 1, 1},
                             a_.out_h,
                             a_.out_w,
                             a_.out_w,
                             kept_,
                             wide_stride_ ? wide_stride_ : stride_,
                             a_.cheap_weight + channel,
                             a_.cheap,
                             a_.cheap_bias ? a_.cheap_bias + channel : nullptr,
                             ActivationFunction(a_.cheap_activation)};
    float* y = a_.y + pixel * a_.y_stride + a_.primary + channel;
    const float* residual = a_.residual ? a_.residual + pixel * a_.residual_stride + a_.primary + channel : nullptr;
    const bool adds = a_.cheap_activation == Activation::identity;  // the depthwise convolution adds before its activation
    const DepthwiseOutput out{y, a_.y_stride, adds ? residual : nullptr, a_.residual_stride, a_.out_w};
    depthwise_rows(g, wide_stride_ ? wide_ : rows_, begin, end, out);
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
  int64_t image_ = 0, begin_ = 0, end_ = 0;
  RowSource rows_{}, wide_{};  // of p, and with every channel as often as it makes others
  float* conv_scratch_ = nullptr;
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
