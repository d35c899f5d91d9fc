// Images of another size, channels_last.     source(i) = (i + shift) · step + offset, in rows and in columns
//
//   nearest:   y[n, p, q, c] = x[n, ⌊source(p)⌋, ⌊source(q)⌋, c]
//   bilinear:  the same from the four pixels around (source(p), source(q)), by how near they are; sources left of the first pixel are it
//
//   bound: bandwidth
//
// One task: a run of output rows over all images.
#include "args.h"
#include "rows.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

// The pixels before and after a source position along one dimension, and how near the position is to the second one.
struct Source {
  int64_t first, second;
  float share;
};

// In float, as PyTorch does: where a position is rounded to decides which pixel is the nearest.
Source source_of(const Resize2dArgs& a, int64_t i, double step, int64_t size) {
  const float at = (static_cast<float>(i) + static_cast<float>(a.shift)) * static_cast<float>(step) + static_cast<float>(a.offset);
  const float inside = at < 0 ? 0 : at;
  const int64_t first = minimum(static_cast<int64_t>(inside), size - 1);
  return {first, minimum(first + 1, size - 1), inside - static_cast<float>(first)};
}

void resize_row(const Resize2dArgs& a, const float* image, int64_t p, float* y) {
  const Source row = source_of(a, p, a.step_h, a.in_h);
  const float *upper = image + row.first * a.in_w * a.x_stride, *lower = image + row.second * a.in_w * a.x_stride;
  const Vec down = broadcast(row.share), up = broadcast(1 - row.share);
  for (int64_t q = 0; q < a.out_w; ++q, y += a.y_stride) {
    const Source column = source_of(a, q, a.step_w, a.in_w);
    const int64_t left = column.first * a.x_stride, right = column.second * a.x_stride;
    const Vec to_right = broadcast(column.share), to_left = broadcast(1 - column.share);
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      const int64_t n = a.channels - c;
      Vec value = load_up_to(upper + left + c, n);
      if (a.is_bilinear) {
        const Vec above = fma(value, to_left, load_up_to(upper + right + c, n) * to_right);
        const Vec below = fma(load_up_to(lower + left + c, n), to_left, load_up_to(lower + right + c, n) * to_right);
        value = fma(above, up, below * down);
      }
      store_up_to(y + c, value, n);
    }
  }
}

}  // namespace

void resize2d(const Resize2dArgs& a) {
  over_output_rows(a.batch, a.out_h, [&](int64_t image, int64_t begin, int64_t end) {
    const float* x = a.x + image * a.in_h * a.in_w * a.x_stride;
    for (int64_t p = begin; p < end; ++p) resize_row(a, x, p, a.y + (image * a.out_h + p) * a.out_w * a.y_stride);
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
