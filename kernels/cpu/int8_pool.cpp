// Pooling of int8, channels_last: the mean over all pixels of an image, the maximum of a window.
//
//   mean      y = (Σ x − pixels · zero_point) · (scale / pixels), quantized again or float32; the sum is exact
//   maximum   of the integers, whose order is that of what they stand for
//
//   bound: bandwidth
#include "args.h"
#include "int8_epilogue.h"
#include "runtime.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kStrip = 64;  // channels of a task, which the compiler keeps in registers
constexpr int64_t kBytesWorthATask = 32768;

// What Int8Output is made from.
struct MeanOutput {
  void* y;
  int64_t y_stride, y_is_int8;
  Activation activation;
  double output_scale, output_zero_point;
};

void maximum_of_window(const int8_t* x, int64_t row_bytes, int64_t x_stride, int64_t rows, int64_t columns, int64_t channels, int8_t* y) {
  for (int64_t c = 0; c < channels; c += kStrip) {
    const int64_t count = minimum(kStrip, channels - c);
    if (count == kStrip) {
      int8_t most[kStrip];
      std::memcpy(most, x + c, kStrip);
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t s = 0; s < columns; ++s) {
          const int8_t* value = x + h * row_bytes + s * x_stride + c;
          for (int64_t i = 0; i < kStrip; ++i) most[i] = value[i] > most[i] ? value[i] : most[i];
        }
      }
      std::memcpy(y + c, most, kStrip);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      int8_t most = x[c + i];
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t s = 0; s < columns; ++s) {
          const int8_t value = x[h * row_bytes + s * x_stride + c + i];
          most = value > most ? value : most;
        }
      }
      y[c + i] = most;
    }
  }
}

}  // namespace

void int8_global_avg_pool2d(const Int8GlobalAvgPool2dArgs& a) {
  const Int8Output output(MeanOutput{a.y, a.y_stride, a.y_is_int8, Activation::identity, a.output_scale, a.output_zero_point});
  const Vec share = broadcast(static_cast<float>(a.scale / static_cast<double>(a.positions)));
  const Ints offset = broadcast_int(static_cast<int32_t>(-a.positions * static_cast<int64_t>(a.zero_point)));
  const int64_t strips = ceil_div(a.channels, kStrip);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / strips, first = task % strips * kStrip, last = minimum(a.channels, first + kStrip);
      for (int64_t c = first; c < last; c += kLanes) {
        const int8_t* x = a.x + image * a.positions * a.x_stride + c;
        Ints sums[2] = {offset, broadcast_int(0)};
        int64_t m = 0;
        for (; m + 2 <= a.positions; m += 2, x += 2 * a.x_stride) {
          sums[0] = sums[0] + load_int8_up_to(x, last - c);
          sums[1] = sums[1] + load_int8_up_to(x + a.x_stride, last - c);
        }
        if (m < a.positions) sums[0] = sums[0] + load_int8_up_to(x, last - c);
        output.write(to_floats(sums[0] + sums[1]) * share, image, c, last - c);
      }
    }
  };
  if (a.batch * a.positions * a.channels < kBytesWorthATask) body(0, a.batch * strips);
  else parallel(a.batch * strips, body);
}

void int8_max_pool2d(const Int8MaxPool2dArgs& a) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / a.out_h, top = row % a.out_h * a.stride_h - a.pad_h;
      const int64_t first_row = maximum(0, top), rows = minimum(a.in_h, top + a.kernel_h) - first_row;
      for (int64_t q = 0; q < a.out_w; ++q) {
        const int64_t left = q * a.stride_w - a.pad_w, first = maximum(0, left), columns = minimum(a.in_w, left + a.kernel_w) - first;
        const int8_t* x = a.x + ((image * a.in_h + first_row) * a.in_w + first) * a.x_stride;
        maximum_of_window(x, a.in_w * a.x_stride, a.x_stride, rows, columns, a.channels, a.y + (row * a.out_w + q) * a.y_stride);
      }
    }
  };
  if (a.batch * a.out_h * a.out_w * a.channels < kBytesWorthATask / 8) body(0, a.batch * a.out_h);
  else parallel(a.batch * a.out_h, body);
}

}  // namespace kernelpress::KERNELPRESS_ISA
