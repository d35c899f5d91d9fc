// Grouped convolution, channels_last, and the channel shuffle.
//
//   y[n, p, q, k·G + i] = act(residual + b[o] + Σ_rsc x[n, p·S-P+r·D, q·S-P+s·D, g·C+c] · w[o, r, s, c])    o = i·K + k, g = o's group
//
//   x ─┬ group 0 ─register tile→ ┐                              each group is a dense convolution of channel slices; with a shuffle
//      ├ group 1 ─register tile→ ├ rows in scratch ─shuffle→ y   its rows wait in the first-level cache until every group of them
//      └ group 2 ─register tile→ ┘                              is there, and are interleaved as they are stored
//
//   one task:  a block of output rows × a range of groups      bound: FMA, of which a group narrower than a vector wastes lanes
#include "conv_rows.h"
#include "grouped_narrow.h"
#include "grouped_shuffle.h"
#include "rows.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kStepFloats = 16 * 1024;  // input and output pixels of a step, which all groups pass over

bool shuffles(const GroupedConv2dArgs& a) { return a.shuffle > 1 && a.shuffle < a.c_out; }

int64_t panels_per_group(const GroupedConv2dArgs& a) { return ceil_div(a.c_out / a.groups, kPanel); }

// The dense convolution that group g is.
Conv2dArgs group_of(const GroupedConv2dArgs& a, int64_t g) {
  const int64_t group_in = a.c_in / a.groups, group_out = a.c_out / a.groups;
  const int64_t weights = panels_per_group(a) * kPanel * a.window.kernel_h * a.window.kernel_w * group_in;
  return {a.x + g * group_in,
          a.weight + g * weights,
          a.bias ? a.bias + g * group_out : nullptr,
          a.residual ? a.residual + g * group_out : nullptr,
          a.y + g * group_out,
          a.batch, a.in_h, a.in_w, group_in, a.out_h, a.out_w, group_out,
          a.in_h * a.in_w * a.x_stride, 1, a.in_w * a.x_stride, a.x_stride,
          a.residual_stride, a.y_stride,
          a.window,
          a.activation};
}

// Output rows [begin, end) of one image; y and residual as for `conv_rows`.
void rows_of_group(const Conv2dArgs& g, int64_t image, int64_t begin, int64_t end, float* scratch) {
  const int64_t panels = ceil_div(g.c_out, kPanel), pixel = (image * g.out_h + begin) * g.out_w;
  if (!is_pointwise(g.window)) return conv_rows(g, image, begin, end, 0, panels, scratch);
  const TileOutput out{g.y, g.y_stride, g.bias, g.residual, g.residual_stride, ActivationFunction(g.activation)};
  const TileInput in = contiguous_rows(g.x + pixel * g.x_stride_w, g.x_stride_w, g.c_in);
  multiply_panels(in, g.weight, out.at(pixel, 0), (end - begin) * g.out_w, g.c_out, 0, panels);
}

// Pixels [0, count) of a convolution's result, from `pixel` of the output on.
void store_shuffled(const GroupedConv2dArgs& a, const Shuffle& shuffle, const float* from, int64_t stride, int64_t pixel, int64_t count) {
  const ActivationFunction activation(a.activation);
  for (int64_t m = pixel; m < pixel + count; ++m, from += stride) {
    const float* residual = a.residual ? a.residual + m * a.residual_stride : nullptr;
    shuffle.pixel({from, nullptr, a.shuffle}, a.y + m * a.y_stride, [&](Vec value, int64_t c, int64_t lanes) {
      return activation(residual ? value + load_up_to(residual + c, lanes) : value);
    });
  }
}

void grouped_rows(const GroupedConv2dArgs& a, int64_t image, int64_t begin, int64_t end, int64_t first_group, int64_t last_group) {
  const bool shuffled = shuffles(a), pointwise = is_pointwise(a.window);
  const int64_t stride = padded(a.c_out), wanted = maximum(kStepFloats / ((a.c_in + stride) * a.out_w), ceil_div(kTileRows, a.out_w));
  const int64_t step = shuffled || pointwise ? minimum(wanted, end - begin) : end - begin;
  const int64_t staged_floats = shuffled ? step * a.out_w * stride : 0;
  const int64_t conv_floats = pointwise ? 0 : conv_scratch_floats(group_of(a, 0), step);
  float* scratch = thread_scratch(staged_floats + conv_floats);
  const Shuffle shuffle(a.shuffle, a.c_out / a.shuffle);
  for (int64_t p = begin; p < end; p += step) {
    const int64_t last = minimum(end, p + step), pixel = (image * a.out_h + p) * a.out_w;
    GroupedConv2dArgs part = a;
    if (shuffled) {
      part.y = scratch - pixel * stride, part.y_stride = stride;
      part.residual = nullptr, part.activation = Activation::identity;
    }
    for (int64_t g = first_group; g < last_group; ++g) rows_of_group(group_of(part, g), image, p, last, scratch + staged_floats);
    if (shuffled) store_shuffled(a, shuffle, scratch, stride, pixel, (last - p) * a.out_w);
  }
}

}  // namespace

void grouped_conv2d(const GroupedConv2dArgs& given) {
  if (given.narrow) return narrow_grouped_conv2d(given);
  GroupedConv2dArgs a = given;
  if (is_pointwise(a.window)) a.in_h = a.out_h = a.batch * a.out_h * a.out_w, a.in_w = a.out_w = a.batch = 1;
  const int64_t rows = a.batch * a.out_h, depth = a.window.kernel_h * a.window.kernel_w * a.c_in / a.groups;
  Split split = split_work(rows * a.out_w, depth, a.groups * panels_per_group(a));
  if (shuffles(a) || split.panel_parts > a.groups) split = {thread_count(), 1};
  split.row_parts = minimum(split.row_parts, rows);
  over_grid(split, rows, a.groups, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    over_images(begin, end, a.out_h, [&](int64_t image, int64_t from, int64_t to) { grouped_rows(a, image, from, to, first, last); });
  });
}

void shuffle_concat(const ShuffleConcatArgs& a) {
  const int64_t channels = a.c_a + a.c_b, per_group = channels / a.groups;
  const bool straddles = a.c_a % per_group != 0;  // one group has channels of both
  const Shuffle shuffle(a.groups, per_group);
  parallel(a.pixels, [&](int64_t begin, int64_t end) {
    float* joined = straddles ? thread_scratch(channels) : nullptr;
    for (int64_t m = begin; m < end; ++m) {
      ShuffledPixel from{a.a + m * a.a_stride, a.b + m * a.b_stride, a.c_a / per_group};
      if (straddles) {
        std::memcpy(joined, from.a, static_cast<size_t>(a.c_a) * sizeof(float));
        std::memcpy(joined + a.c_a, from.b, static_cast<size_t>(a.c_b) * sizeof(float));
        from = {joined, nullptr, a.groups};
      }
      shuffle.pixel(from, a.y + m * a.y_stride, [](Vec value, int64_t, int64_t) { return value; });
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
