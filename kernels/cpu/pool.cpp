// Pooling, channels_last: the mean over all pixels of an image, the maximum and the mean over a window. Bound: bandwidth.
#include "pool.h"

#include "args.h"
#include "runtime.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

namespace {

constexpr int64_t kFloatsWorthATask = 8192;

// Sums of kVecs vectors of channels over pixels, in kChains chains: an addition's latency is that of several.
template <int kVecs, int kChains>
KP_INLINE void sum_strip(const float* x, int64_t x_stride, int64_t pixels, int64_t channels, float* y) {
  Vec sum[kChains][kVecs] = {};
  int64_t m = 0;
  for (; m + kChains <= pixels; m += kChains) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = sum[i][v] + load_up_to(x + (m + i) * x_stride + v * kLanes, channels - v * kLanes);
    }
  }
  for (; m < pixels; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[0][v] = sum[0][v] + load_up_to(x + m * x_stride + v * kLanes, channels - v * kLanes);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    Vec total = sum[0][v];
#pragma GCC unroll 8
    for (int i = 1; i < kChains; ++i) total = total + sum[i][v];
    store_up_to(y + v * kLanes, total, channels - v * kLanes);
  }
}

void sum_pixels(const float* x, int64_t x_stride, int64_t pixels, int64_t channels, float* y) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) sum_strip<4, 2>(x + c, x_stride, pixels, 4 * kLanes, y + c);
  for (; c < channels; c += kLanes) sum_strip<1, 4>(x + c, x_stride, pixels, channels - c, y + c);
}

// Parts that the pixels of one image are cut into: each thread has one where images alone do not keep them all at work.
int64_t parts_of(int64_t batch, int64_t positions, int64_t channels) {
  return maximum(1, minimum(thread_count() / batch, minimum(positions, positions * channels / kFloatsWorthATask)));
}

}  // namespace

int64_t mean_scratch_floats(int64_t batch, int64_t channels) { return maximum(thread_count(), batch) * round_up(channels, kLanes); }

void channel_means(const float* x, int64_t batch, int64_t positions, int64_t channels, int64_t x_stride, float* y, float* scratch) {
  const int64_t parts = parts_of(batch, positions, channels), width = round_up(channels, kLanes);
  const auto sum = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts, part = task % parts, first = positions * part / parts;
      const float* pixels = x + (image * positions + first) * x_stride;
      sum_pixels(pixels, x_stride, positions * (part + 1) / parts - first, channels, scratch + task * width);
    }
  };
  if (batch * positions * channels < kFloatsWorthATask) sum(0, batch);
  else parallel(batch * parts, sum);
  const Vec share = broadcast(1.0f / static_cast<float>(positions));
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec total = load(scratch + image * parts * width + c);
      for (int64_t part = 1; part < parts; ++part) total = total + load(scratch + (image * parts + part) * width + c);
      store_up_to(y + image * channels + c, total * share, channels - c);
    }
  }
}

void global_avg_pool2d(const GlobalAvgPool2dArgs& a) {
  float* scratch = thread_scratch(mean_scratch_floats(a.batch, a.channels));
  channel_means(a.x, a.batch, a.positions, a.channels, a.x_stride, a.y, scratch);
}

namespace {

// One output pixel after the other: `start`, then `join(acc, x)` for every input pixel under the window, then `finish(acc, top, left)`
// for the window that begins at that pixel, which may lie in the padding.
template <class Args, class Join, class Finish>
KP_INLINE void over_windows(const Args& a, float start, const Join& join, const Finish& finish) {
  parallel(a.batch * a.out_h, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / a.out_h, top = row % a.out_h * a.stride_h - a.pad_h;
      const int64_t first_row = maximum(0, top), last_row = minimum(a.in_h, top + a.kernel_h);
      for (int64_t q = 0; q < a.out_w; ++q) {
        const int64_t left = q * a.stride_w - a.pad_w, first = maximum(0, left), last = minimum(a.in_w, left + a.kernel_w);
        float* y = a.y + (row * a.out_w + q) * a.y_stride;
        for (int64_t c = 0; c < a.channels; c += kLanes) {
          const int64_t lanes = minimum(kLanes, a.channels - c);
          Vec acc = broadcast(start);
          for (int64_t h = first_row; h < last_row; ++h) {
            const float* x = a.x + ((image * a.in_h + h) * a.in_w + first) * a.x_stride + c;
            for (int64_t s = first; s < last; ++s, x += a.x_stride) acc = join(acc, load_up_to(x, lanes));
          }
          store_up_to(y + c, finish(acc, top, left), lanes);
        }
      }
    }
  });
}

// Input pixels that a window of the average counts along one dimension: padding as far as it goes, or none of it.
KP_INLINE int64_t counted(int64_t begin, int64_t kernel, int64_t size, int64_t padding) {
  return minimum(begin + kernel, size + padding) - maximum(begin, -padding);
}

}  // namespace

void max_pool2d(const MaxPool2dArgs& a) {
  over_windows(
      a, -__builtin_inff(), [](Vec acc, Vec x) { return maximum_keeping_nan(acc, x); }, [](Vec acc, int64_t, int64_t) { return acc; });
}

void avg_pool2d(const AvgPool2dArgs& a) {
  const int64_t pad_h = a.counts_padding ? a.pad_h : 0, pad_w = a.counts_padding ? a.pad_w : 0;
  const auto mean = [&](Vec sum, int64_t top, int64_t left) {
    const int64_t pixels = counted(top, a.kernel_h, a.in_h, pad_h) * counted(left, a.kernel_w, a.in_w, pad_w);
    return sum * broadcast(1.0f / static_cast<float>(a.divisor ? a.divisor : pixels));
  };
  over_windows(a, 0.0f, [](Vec acc, Vec x) { return acc + x; }, mean);
}

}  // namespace kernelpress::KERNELPRESS_ISA
