// Dense convolution on the register tile of tile.h.
//
//   pointwise   y[m, n] = act(bias[n] + residual[m, n] + Σ_c s[c] · x[m, c] · w[n, c])         m = pixel
//   conv2d      y[p, q, n] = act(… + Σ_rsc x[p·S-P+r·D, q·S-P+s·D, c] · w[n, c, r, s])       no im2col: a band of padded input rows is
//                                                                                        copied to scratch, and the tile walks over it
//   one task:  a block of output rows × a range of panels     bound: FMA; weights stream once per block
#include "chain.h"
#include "conv_rows.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kBlockFloats = 48 * 1024;  // activations kept in the second-level cache while the panels pass

// Rows a multiple of 2 KB apart fall into two sets of the first-level cache: such rows are copied to a padded stride first.
KP_INLINE bool rows_collide(int64_t stride) { return stride % 512 == 0; }

KP_INLINE void copy_scaled(float* to, const float* from, const float* scale, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = count - c;
    const Vec value = load_up_to(from + c, lanes);
    store_up_to(to + c, scale ? value * load_up_to(scale + c, lanes) : value, lanes);
  }
}

void pointwise_rows(const PointwiseConv2dArgs& p, const Interleaved& between, int64_t image, int64_t begin, int64_t end,
                    int64_t first_panel, int64_t last_panel) {
  const float* scale = p.input_scale ? p.input_scale + image * p.c_in : nullptr;
  const bool staged = scale || rows_collide(p.x_stride);
  const int64_t staged_stride = round_up(p.c_in, kLanes) + kLanes;
  const int64_t block = maximum(kTileRows, kBlockFloats / p.c_in / kTileRows * kTileRows);
  float* scratch = staged ? thread_scratch(minimum(block, end - begin) * staged_stride) : nullptr;
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = minimum(block, end - m);
    const float* x = p.x + m * p.x_stride;
    if (staged) {
      for (int64_t i = 0; i < rows; ++i) copy_scaled(scratch + i * staged_stride, x + i * p.x_stride, scale, p.c_in);
    }
    const TileInput in = staged ? contiguous_rows(scratch, staged_stride, p.c_in) : contiguous_rows(x, p.x_stride, p.c_in);
    const TileOutput out{p.y, p.y_stride, p.bias, p.residual, p.residual_stride, ActivationFunction(p.activation), between};
    multiply_panels(in, p.weight, out.at(m, 0), rows, p.c_out, first_panel, last_panel);
  }
}

// A band of input rows for output rows [p0, p0 + rows) of one image, zero-padded on all sides, pixels contiguous.
struct Band {
  int64_t height, width;

  Band(const Conv2dArgs& a, int64_t rows)
      : height((rows - 1) * a.window.stride_h + a.window.reach_h()),
        width((a.out_w - 1) * a.window.stride_w + a.window.reach_w()) {}

  int64_t floats(const Conv2dArgs& a) const { return height * width * a.c_in; }
};

void fill(float* to, int64_t count) { std::memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

void copy_pixels(float* to, const float* from, const Conv2dArgs& a, int64_t pixels) {
  if (a.x_stride_c == 1 && a.x_stride_w == a.c_in) {
    std::memcpy(to, from, static_cast<size_t>(pixels * a.c_in) * sizeof(float));
  } else if (a.x_stride_c == 1) {
    for (int64_t q = 0; q < pixels; ++q) copy_scaled(to + q * a.c_in, from + q * a.x_stride_w, nullptr, a.c_in);
  } else if (a.c_in == 3 && a.x_stride_w == 1) {
    const float *red = from, *green = from + a.x_stride_c, *blue = from + 2 * a.x_stride_c;
    for (int64_t q = 0; q < pixels; ++q) to[3 * q] = red[q], to[3 * q + 1] = green[q], to[3 * q + 2] = blue[q];
  } else {
    for (int64_t c = 0; c < a.c_in; ++c) {
      const float* plane = from + c * a.x_stride_c;
      for (int64_t q = 0; q < pixels; ++q) to[q * a.c_in + c] = plane[q * a.x_stride_w];
    }
  }
}

void load_band(const Conv2dArgs& a, const Band& band, int64_t image, int64_t first_out_row, float* scratch) {
  const int64_t row_floats = band.width * a.c_in;
  const int64_t left = minimum(a.window.pad_w, band.width);
  const int64_t copied = maximum(0, minimum(a.in_w, band.width - left));
  for (int64_t i = 0; i < band.height; ++i) {
    const int64_t h = first_out_row * a.window.stride_h - a.window.pad_h + i;
    float* row = scratch + i * row_floats;
    if (h < 0 || h >= a.in_h) {
      fill(row, row_floats);
      continue;
    }
    fill(row, left * a.c_in);
    copy_pixels(row + left * a.c_in, a.x + image * a.x_stride_n + h * a.x_stride_h, a, copied);
    fill(row + (left + copied) * a.c_in, (band.width - left - copied) * a.c_in);
  }
}

// Offsets of the contiguous runs of one output pixel's receptive field; without dilation a kernel row is one run.
struct Segments {
  int64_t* offsets;
  int64_t count, length;
};

Segments receptive_field(const Conv2dArgs& a, const Band& band, int64_t* offsets) {
  const Window& w = a.window;
  const bool whole_rows = w.dilation_w == 1;
  const int64_t per_row = whole_rows ? 1 : w.kernel_w;
  for (int64_t r = 0; r < w.kernel_h; ++r) {
    for (int64_t s = 0; s < per_row; ++s) {
      offsets[r * per_row + s] = (r * w.dilation_h * band.width + s * w.dilation_w) * a.c_in;
    }
  }
  return {offsets, w.kernel_h * per_row, whole_rows ? w.kernel_w * a.c_in : a.c_in};
}

// Output rows whose band of input rows stays in the second-level cache while the panels pass.
int64_t rows_per_band(const Conv2dArgs& a, int64_t rows) {
  return maximum(1, minimum(rows, kBlockFloats / (Band(a, 1).width * a.c_in * a.window.stride_h)));
}

// Room for the segments' offsets at the head of the scratch memory.
int64_t offset_floats(const Conv2dArgs& a) { return round_up(2 * a.window.kernel_h * a.window.kernel_w, kLanes); }

}  // namespace

int64_t conv_scratch_floats(const Conv2dArgs& a, int64_t rows) {
  return offset_floats(a) + Band(a, rows_per_band(a, rows)).floats(a);
}

void conv_rows(const Conv2dArgs& a, int64_t image, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel, float* scratch) {
  const int64_t row_floats = Band(a, 1).width * a.c_in, step = rows_per_band(a, end - begin);
  const Band largest(a, step);
  const Segments field = receptive_field(a, largest, reinterpret_cast<int64_t*>(scratch));
  float* pixels = scratch + offset_floats(a);
  const int64_t panel_size = field.count * field.length * kPanel;
  for (int64_t p0 = begin; p0 < end; p0 += step) {
    const int64_t rows = minimum(step, end - p0);
    load_band(a, Band(a, rows), image, p0, pixels);
    const TileOutput out{a.y, a.y_stride, a.bias, a.residual, a.residual_stride, ActivationFunction(a.activation)};
    Lookahead nothing;
    for (int64_t j = first_panel; j < last_panel; ++j) {
      const int64_t columns = minimum(kPanel, a.c_out - j * kPanel);
      const float* panel = a.weight + j * panel_size;
      const float* next = j + 1 < last_panel ? panel + panel_size : panel;
      for (int64_t i = 0, t = 0; i < rows; ++t) {
        TileInput in{pixels + i * a.window.stride_h * row_floats, a.window.stride_w * a.c_in, field.offsets, field.count, field.length};
        const TileOutput place = out.at((image * a.out_h + p0 + i) * a.out_w, j * kPanel);
        if (2 * a.out_w <= kTileRows && i + 1 < rows) {
          in.half_offset = a.window.stride_h * row_floats;
          tile_function(2 * a.out_w, columns)(in, panel, place, columns, fetched_by(t, panel, next, in.depth(), nothing));
          i += 2;
        } else {
          multiply(in, panel, t == 0 ? next : panel, place, a.out_w, columns, nothing);
          i += 1;
        }
      }
    }
  }
}

void pointwise_conv2d(const PointwiseConv2dArgs& p) { pointwise_between(p, {}); }

void pointwise_between(const PointwiseConv2dArgs& p, const Interleaved& between) {
  const int64_t panels = ceil_div(p.c_out, kPanel), rows = p.batch * p.positions;
  over_grid(split_work(rows, p.c_in, panels), rows, panels, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    if (!p.input_scale) return pointwise_rows(p, between, 0, begin, end, first, last);
    for (int64_t image = begin / p.positions; image * p.positions < end; ++image) {
      pointwise_rows(p, between, image, maximum(begin, image * p.positions), minimum(end, (image + 1) * p.positions), first, last);
    }
  });
}

void conv2d(const Conv2dArgs& a) {
  const int64_t panels = ceil_div(a.c_out, kPanel), rows = a.batch * a.out_h;
  const int64_t depth = a.window.kernel_h * a.window.kernel_w * a.c_in;
  const Split split = split_work(rows * a.out_w, depth, panels);
  over_grid({minimum(split.row_parts, rows), split.panel_parts}, rows, panels, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t image = begin / a.out_h; image * a.out_h < end; ++image) {
      const int64_t top = image * a.out_h;
      const int64_t from = maximum(begin, top) - top, to = minimum(end - top, a.out_h);
      conv_rows(a, image, from, to, first, last, thread_scratch(conv_scratch_floats(a, to - from)));
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
