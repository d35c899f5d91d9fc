// Pooling, channels_last: the mean over all pixels of an image, and the maximum over a window. Bound: bandwidth.
#include "args.h"
#include "runtime.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

void global_avg_pool2d(const GlobalAvgPool2dArgs& a) {
  constexpr int64_t kVecs = 4;  // independent sums hide the latency of an addition
  const int64_t strip = kVecs * kLanes, strips = ceil_div(a.channels, strip);
  const Vec share = broadcast(1.0f / static_cast<float>(a.positions));
  parallel(a.batch * strips, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / strips, c = task % strips * strip;
      const float* x = a.x + image * a.positions * a.x_stride + c;
      float* y = a.y + image * a.channels + c;
      Vec sum[kVecs] = {zero(), zero(), zero(), zero()};
      const int64_t channels = minimum(strip, a.channels - c);
      for (int64_t m = 0; m < a.positions; ++m) {
        for (int64_t v = 0; v < kVecs && v * kLanes < channels; ++v) {
          sum[v] = sum[v] + load_up_to(x + m * a.x_stride + v * kLanes, channels - v * kLanes);
        }
      }
      for (int64_t v = 0; v < kVecs && v * kLanes < channels; ++v) store_up_to(y + v * kLanes, sum[v] * share, channels - v * kLanes);
    }
  });
}

void max_pool2d(const MaxPool2dArgs& a) {
  parallel(a.batch * a.out_h, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / a.out_h, top = row % a.out_h * a.stride_h - a.pad_h;
      const int64_t first_row = maximum(0, top), last_row = minimum(a.in_h, top + a.kernel_h);
      for (int64_t q = 0; q < a.out_w; ++q) {
        const int64_t left = q * a.stride_w - a.pad_w, first = maximum(0, left), last = minimum(a.in_w, left + a.kernel_w);
        float* y = a.y + (row * a.out_w + q) * a.y_stride;
        for (int64_t c = 0; c < a.channels; c += kLanes) {
          const int64_t lanes = minimum(kLanes, a.channels - c);
          Vec best = broadcast(-__builtin_inff());
          for (int64_t h = first_row; h < last_row; ++h) {
            const float* x = a.x + ((image * a.in_h + h) * a.in_w + first) * a.x_stride + c;
            for (int64_t s = first; s < last; ++s, x += a.x_stride) best = maximum_keeping_nan(best, load_up_to(x, lanes));
          }
          store_up_to(y + c, best, lanes);
        }
      }
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
