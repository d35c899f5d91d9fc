// int8 matrix product and convolution on the register tile of int8_tile.h.
//
//   int8_matmul   y[m, n] = epilogue(Σ_k (x[m, k] − z) · w[n, k])                 m = row; of each its own z and scale, where given
//   int8_conv2d   y[p, q, n] = epilogue(Σ_rsc (x[p·S-P+r·D, q·S-P+s·D, c] − z) · w[n, c, r, s])
//
// Activations are staged in scratch before they are multiplied (int8_tile.h): rows of a product, pixels of a 1×1 convolution, else a band
// of input rows in which the padding has the value of z. One task: a block of output rows × a range of panels.
// Bound: products; each row is staged once a task, at a cost of 2 / C_out or so of its products.
#include <algorithm>

#include "args.h"
#include "int8_rows.h"
#include "int8_tile.h"
#include "rows.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // staged activations kept in the second-level cache while the panels pass
constexpr double kStagingCost = 0.04;        // of one row, in units of its products with one panel

Staged* staged_scratch(int64_t elements) { return reinterpret_cast<Staged*>(thread_scratch(staged_floats(elements))); }

Split split_product(int64_t rows, int64_t depth, int64_t panels) {
  return split_work(rows, depth * kInt8Panel / (kPanel * static_cast<int64_t>(sizeof(float))), panels, kStagingCost);
}

// Rows [begin, end) of a product; `stage_rows(to, stride, m, count)` stages those from m on.
template <class StageRows>
void multiply_rows(const Int8Product& product, int64_t length, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel,
                   const StageRows& stage_rows) {
  const int64_t stride = staged_stride(length), row_bytes = stride * static_cast<int64_t>(sizeof(Staged));
  const int64_t block = minimum(end - begin, maximum(kInt8TileRows, kBlockBytes / row_bytes / kInt8TileRows * kInt8TileRows));
  Staged* const staged = staged_scratch(block * stride);
  const Int8TileInput in{staged, stride, block, 0, kNoSegmentOffset, 1, ceil_div(length, kGroup)};
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = minimum(block, end - m);
    stage_rows(staged, stride, m, rows);
    for (int64_t j = first_panel; j < last_panel; ++j) multiply(product, in, j, minimum(j + 1, last_panel - 1), m, rows);
  }
}

// `count` rows that lie `from_stride` apart, to rows `to_stride` apart.
void stage_rows(Staged* to, int64_t to_stride, const int8_t* from, int64_t from_stride, int64_t length, int64_t count, int32_t zero_point) {
  if (from_stride == length && to_stride == length) return stage(to, from, count * length, zero_point);
  for (int64_t i = 0; i < count; ++i) stage(to + i * to_stride, from + i * from_stride, length, zero_point);
}

// A band of staged input rows for output rows [p0, p0 + rows) of one image, with the padding on all sides, pixels contiguous.
struct Band {
  int64_t height, width;

  Band(const Int8Conv2dArgs& a, int64_t rows)
      : height((rows - 1) * a.window.stride_h + a.window.reach_h()), width((a.out_w - 1) * a.window.stride_w + a.window.reach_w()) {}
};

void load_band(const Int8Conv2dArgs& a, const Band& band, int64_t image, int64_t first_out_row, Staged* staged) {
  const int32_t zero_point = static_cast<int32_t>(a.input_zero_point);
  const Staged padding = static_cast<Staged>(kHasVnni ? 128 + zero_point : 0);
  const int64_t left = minimum(a.window.pad_w, band.width), copied = maximum(0, minimum(a.in_w, band.width - left));
  for (int64_t i = 0; i < band.height; ++i) {
    const int64_t h = first_out_row * a.window.stride_h - a.window.pad_h + i;
    Staged* row = staged + i * band.width * a.c_in;
    Staged* const end = row + band.width * a.c_in;
    if (h >= 0 && h < a.in_h) {
      row = std::fill_n(row, left * a.c_in, padding);
      stage_rows(row, a.c_in, a.x + (image * a.in_h + h) * a.in_w * a.x_stride, a.x_stride, a.c_in, copied, zero_point);
      row += copied * a.c_in;
    }
    std::fill(row, end, padding);
  }
}

// Contiguous runs of one output pixel's receptive field: without dilation a kernel row each.
struct Runs {
  int64_t count, length;

  explicit Runs(const Int8Conv2dArgs& a)
      : count(a.window.dilation_w == 1 ? a.window.kernel_h : a.window.kernel_h * a.window.kernel_w),
        length(a.window.dilation_w == 1 ? a.window.kernel_w * a.c_in : a.c_in) {}

  int64_t groups() const { return ceil_div(length, kGroup); }
};

void find_offsets(const Int8Conv2dArgs& a, const Runs& runs, const Band& band, int64_t* offsets) {
  const int64_t per_row = runs.count / a.window.kernel_h;
  for (int64_t i = 0; i < runs.count; ++i) {
    offsets[i] = (i / per_row * a.window.dilation_h * band.width + i % per_row * a.window.dilation_w) * a.c_in;
  }
}

void conv_rows(const Int8Conv2dArgs& a, const Int8Product& product, int64_t image, int64_t begin, int64_t end, int64_t first_panel,
               int64_t last_panel) {
  const Runs runs(a);
  const int64_t row_elements = Band(a, 1).width * a.c_in;
  const int64_t row_bytes = row_elements * a.window.stride_h * static_cast<int64_t>(sizeof(Staged));
  const int64_t step = maximum(1, minimum(end - begin, kBlockBytes / row_bytes));
  const int64_t offset_floats = 2 * runs.count;
  float* const scratch = thread_scratch(offset_floats + staged_floats(Band(a, step).height * row_elements));
  int64_t* const offsets = reinterpret_cast<int64_t*>(scratch);
  Staged* const staged = reinterpret_cast<Staged*>(scratch + offset_floats);
  find_offsets(a, runs, Band(a, step), offsets);
  const Int8TileInput in{staged, a.window.stride_w * a.c_in, a.out_w, a.window.stride_h * row_elements, offsets, runs.count, runs.groups()};
  for (int64_t p0 = begin; p0 < end; p0 += step) {
    const int64_t rows = minimum(step, end - p0);
    load_band(a, Band(a, rows), image, p0, staged);
    const int64_t first_row = (image * a.out_h + p0) * a.out_w;
    for (int64_t j = first_panel; j < last_panel; ++j) multiply(product, in, j, minimum(j + 1, last_panel - 1), first_row, rows * a.out_w);
  }
}

bool is_pointwise(const Window& w) { return w.kernel_h == 1 && w.kernel_w == 1 && w.pad_h == 0 && w.pad_w == 0; }

// Output pixels [begin, end) of a 1×1 convolution.
void pixels_of_group(const Int8Conv2dArgs& a, const Int8Product& product, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const bool skips = a.window.stride_h != 1 || a.window.stride_w != 1;
  multiply_rows(product, a.c_in, begin, end, first, last, [&](Staged* to, int64_t stride, int64_t m, int64_t count) {
    if (!skips) return stage_rows(to, stride, a.x + m * a.x_stride, a.x_stride, a.c_in, count, product.zero_point);
    over_images(m, m + count, a.out_w, [&](int64_t line, int64_t from, int64_t until) {
      const int64_t row = line / a.out_h * a.in_h + line % a.out_h * a.window.stride_h;
      const int8_t* x = a.x + (row * a.in_w + from * a.window.stride_w) * a.x_stride;
      stage_rows(to, stride, x, a.window.stride_w * a.x_stride, a.c_in, until - from, product.zero_point);
      to += (until - from) * stride;
    });
  });
}

int64_t packed_depth(const Int8Conv2dArgs& of_group) {
  const Runs runs(of_group);
  return runs.count * runs.groups() * kGroup;
}

// The convolution of one group alone.
Int8Conv2dArgs group_of(const Int8Conv2dArgs& a, int64_t g) {
  Int8Conv2dArgs group = a;
  group.groups = 1, group.c_in = a.c_in / a.groups, group.c_out = a.c_out / a.groups;
  const int64_t channel = g * group.c_out, bytes = a.y_is_int8 ? 1 : static_cast<int64_t>(sizeof(float));
  group.x += g * group.c_in;
  group.weight += g * round_up(group.c_out, kLanes) * packed_depth(group);
  group.weight_sums += channel, group.scale += channel;
  if (a.bias) group.bias += channel;
  if (a.residual) group.residual = static_cast<const char*>(a.residual) + channel * bytes;
  group.y = static_cast<char*>(a.y) + channel * bytes;
  return group;
}

}  // namespace

void int8_conv_rows(const Int8Conv2dArgs& a, int64_t image, int64_t begin, int64_t end) {
  const Int8Product product(a, packed_depth(a));
  if (!is_pointwise(a.window)) return conv_rows(a, product, image, begin, end, 0, product.panels());
  const int64_t first = image * a.out_h;
  pixels_of_group(a, product, (first + begin) * a.out_w, (first + end) * a.out_w, 0, product.panels());
}

void int8_matmul(const Int8MatmulArgs& a) {
  Int8Product product(a, round_up(a.c_in, kGroup));
  product.row_scale = a.row_scale, product.row_zero_point = a.row_zero_point;
  over_grid(split_product(a.rows, product.depth, product.panels()), a.rows, product.panels(), [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    multiply_rows(product, a.c_in, begin, end, first, last, [&](Staged* to, int64_t stride, int64_t m, int64_t count) {
      if (!a.row_zero_point) return stage_rows(to, stride, a.x + m * a.x_stride, a.x_stride, a.c_in, count, product.zero_point);
      for (int64_t i = 0; i < count; ++i) stage(to + i * stride, a.x + (m + i) * a.x_stride, a.c_in, a.row_zero_point[m + i]);
    });
  });
}

void int8_conv2d(const Int8Conv2dArgs& a) {
  const Int8Conv2dArgs of_group = group_of(a, 0);
  const int64_t panels = ceil_div(of_group.c_out, kInt8Panel), pixels = a.batch * a.out_h * a.out_w;
  const bool of_pixels = is_pointwise(a.window);
  const int64_t rows = of_pixels ? pixels : a.batch * a.out_h;
  const Split split = split_product(pixels, packed_depth(of_group), a.groups * panels);
  over_grid({minimum(split.row_parts, rows), split.panel_parts}, rows, a.groups * panels,
            [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
              over_images(first, last, panels, [&](int64_t g, int64_t first_panel, int64_t last_panel) {
                const Int8Conv2dArgs group = group_of(a, g);
                const Int8Product product(group, packed_depth(group));
                if (of_pixels) return pixels_of_group(group, product, begin, end, first_panel, last_panel);
                over_images(begin, end, a.out_h, [&](int64_t image, int64_t from, int64_t to) {
                  conv_rows(group, product, image, from, to, first_panel, last_panel);
                });
              });
            });
}

}  // namespace kernelpress::KERNELPRESS_ISA
