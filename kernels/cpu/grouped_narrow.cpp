// 3×3 convolution in groups narrower than a vector, as many channels in as out, channels_last.
//
//   input pixel   a0 a1 a2 a3 │ b0 b1 b2 b3     a vector holds whole groups. For every input channel j of a group, one permutation gives
//   j = 1         a1 a1 a1 a1 │ b1 b1 b1 b1     each lane its group's channel j: it feeds all taps and outputs that the pixel touches,
//                                               so no lane is wasted on zeros between the groups.
//   packed weights [vector][3][3][j][kLanes]
//
//   one task:  a run of output rows × a range of vectors, over a band of padded input rows in scratch     bound: FMA
#include "epilogue.h"
#include "grouped_narrow.h"
#include "rows.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int kStrip = 7;                   // output pixels of a tile; the maps of the usual networks are multiples of 7 wide
constexpr int64_t kBandFloats = 32 * 1024;  // input rows of a step

// Lane l takes channel j of its group.
struct Spread {
  Ints from[kLanes];

  explicit Spread(int64_t width) {
    for (int64_t j = 0; j < width; ++j) {
      int32_t lane[kLanes];
      for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<int32_t>(l / width * width + j);
      from[j] = load_ints(lane);
    }
  }
};

// Padded input rows under a run of output rows: `channels` of them from `first` on.
struct Band {
  int64_t first, channels, width, pixel, row;

  Band(const GroupedConv2dArgs& a, int64_t first_vector, int64_t last_vector)
      : first(first_vector * kLanes),
        channels(minimum(last_vector * kLanes, a.c_in) - first),
        width((round_up(a.out_w, kStrip) - 1) * a.window.stride_w + 3),
        pixel(padded(channels)),
        row(width * pixel) {}

  void load(const GroupedConv2dArgs& a, int64_t image, int64_t first_out_row, int64_t rows, float* to) const {
    const int64_t copied = maximum(0, minimum(a.in_w, width - a.window.pad_w));
    for (int64_t i = 0; i < rows; ++i, to += row) {
      const int64_t h = first_out_row * a.window.stride_h - a.window.pad_h + i;
      std::memset(to, 0, static_cast<size_t>(row) * sizeof(float));
      if (h < 0 || h >= a.in_h) continue;
      const float* x = a.x + ((image * a.in_h + h) * a.in_w) * a.x_stride + first;
      for (int64_t q = 0; q < copied; ++q) {
        std::memcpy(to + (a.window.pad_w + q) * pixel, x + q * a.x_stride, static_cast<size_t>(channels) * sizeof(float));
      }
    }
  }
};

template <int kStride>
KP_INLINE void add_strip(Vec (&acc)[kStrip], const float* x, const Band& band, const float* weight, const Spread& spread, int64_t width) {
  for (int64_t r = 0; r < 3; ++r, x += band.row) {
    for (int64_t j = 0; j < width; ++j) {
      const float* taps = weight + (r * 3 * width + j) * kLanes;
      const Vec tap[3] = {load(taps), load(taps + width * kLanes), load(taps + 2 * width * kLanes)};
#pragma GCC unroll 16
      for (int column = 0; column < (kStrip - 1) * kStride + 3; ++column) {
        const Vec value = permute(load(x + column * band.pixel), spread.from[j]);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          const int q = (column - s) / kStride;
          if (column < s || (column - s) % kStride != 0 || q >= kStrip) continue;
          acc[q] = fma(value, tap[s], acc[q]);
        }
      }
    }
  }
}

template <int kStride>
void narrow_rows(const GroupedConv2dArgs& a, int64_t image, int64_t begin, int64_t end, int64_t first_vector, int64_t last_vector) {
  const int64_t width = a.c_in / a.groups;
  const Band band(a, first_vector, last_vector);
  const Spread spread(width);
  const ActivationFunction activation(a.activation);
  const int64_t step = minimum(maximum(1, kBandFloats / (band.row * kStride)), end - begin);
  float* scratch = thread_scratch(((step - 1) * kStride + 3) * band.row);
  for (int64_t p0 = begin; p0 < end; p0 += step) {
    const int64_t rows = minimum(step, end - p0);
    band.load(a, image, p0, (rows - 1) * kStride + 3, scratch);
    for (int64_t v = first_vector; v < last_vector; ++v) {
      const int64_t c = v * kLanes, lanes = minimum(kLanes, a.c_out - c);
      const float* weight = a.weight + v * 9 * width * kLanes;
      const Vec bias = a.bias ? load_up_to(a.bias + c, lanes) : zero();
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t q0 = 0; q0 < a.out_w; q0 += kStrip) {
          Vec acc[kStrip] = {bias, bias, bias, bias, bias, bias, bias};
          add_strip<kStride>(acc, scratch + i * kStride * band.row + q0 * kStride * band.pixel + c - band.first, band, weight, spread, width);
          const int64_t pixel = (image * a.out_h + p0 + i) * a.out_w + q0;
#pragma GCC unroll 8
          for (int q = 0; q < kStrip; ++q) {
            if (q >= a.out_w - q0) break;
            const float* residual = a.residual ? a.residual + (pixel + q) * a.residual_stride + c : nullptr;
            const Vec value = residual ? acc[q] + load_up_to(residual, lanes) : acc[q];
            store_up_to(a.y + (pixel + q) * a.y_stride + c, activation(value), lanes);
          }
        }
      }
    }
  }
}

}  // namespace

void narrow_grouped_conv2d(const GroupedConv2dArgs& a) {
  const int64_t vectors = ceil_div(a.c_out, kLanes), rows = a.batch * a.out_h;
  Split split = split_work(rows * a.out_w, 9 * a.c_in / a.groups, vectors);
  split.row_parts = minimum(split.row_parts, rows);
  over_grid(split, rows, vectors, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    over_images(begin, end, a.out_h, [&](int64_t image, int64_t from, int64_t to) {
      if (a.window.stride_h == 1) narrow_rows<1>(a, image, from, to, first, last);
      else narrow_rows<2>(a, image, from, to, first, last);
    });
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
