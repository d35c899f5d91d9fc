// Convolution with a sparse weight.     y[n, p, q] = act(bias[n] + residual[n, p, q] + Σ_crs w[n, c, r, s] · x[c, p·S-P+r·D, q·S-P+s·D])
//
//   strip of scratch       c = 0 │ positions → │         x, channels or pixels neighbours in memory, is copied so that a run of outputs
//                              1 │             │         reads a run of positions for every tap: into planes of `width` columns with
//                              2 │             │         zeros for padding, one plane for each remainder of row and column by the
//                              … │             │         stride. Outputs are numbered through the rows of such a plane, so a strip
//                                                        is any run of them; columns ≥ out_w are computed and not stored.
//   The walk of sparse.h then knows no geometry: tap (c, r, s) begins at a constant in scratch.      bound: loads of the walk; the copy
//   is read C_out · density times
//
// One task: a range of strips × rows of the weight with as many non-zeros as the others'.
#include "sparse.h"

#include <algorithm>

#include "runtime.h"
#include "transpose.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

struct Strip {
  int64_t image, first, last;  // outputs
};

// Calls body(row, column, from, count) for every run of positions [begin, end) that stand in one row of `width`; `from` counts from begin.
template <class Body>
KP_INLINE void over_runs(int64_t begin, int64_t end, int64_t width, const Body& body) {
  for (int64_t v = begin; v < end;) {
    const int64_t row = v / width, column = v % width, count = minimum(width - column, end - v);
    body(row, column, v - begin, count);
    v += count;
  }
}

// Where an image's channels and pixels stand in memory.
struct Form {
  int64_t image, channel, pixel;

  Form(bool channels_last, int64_t channels, int64_t pixels, int64_t stride)
      : image(pixels * (channels_last ? stride : channels)), channel(channels_last ? 1 : pixels), pixel(channels_last ? stride : 1) {}

  KP_INLINE int64_t at(int64_t i, int64_t c, int64_t p) const { return i * image + c * channel + p * pixel; }
};

// Channels of `count` pixels `step` apart.
void copy_channels(const SparseConv2dArgs& a, const Form& form, float* to, const float* x, int64_t step, int64_t count) {
  const int64_t pitch = a.phases_h * a.phases_w * a.phase_pitch;
  if (a.channels_last) return transpose_copy(to, pitch, x, step * form.pixel, count, a.c_in);
  for (int64_t c = 0; c < a.c_in; ++c, to += pitch, x += form.channel) {
    if (step == 1) {
      for (int64_t i = 0; i < count; i += kLanes) store_up_to(to + i, load_up_to(x + i, count - i), count - i);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = x[i * step];
    }
  }
}

void clear_channels(const SparseConv2dArgs& a, float* to, int64_t count) {
  const int64_t pitch = a.phases_h * a.phases_w * a.phase_pitch;
  for (int64_t c = 0; c < a.c_in && count > 0; ++c, to += pitch) std::memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

void load_strip(const SparseConv2dArgs& a, const Strip& strip, float* scratch) {
  const Window& w = a.window;
  const Form form(a.channels_last, a.c_in, a.in_h * a.in_w, a.x_stride);
  for (int64_t phase = 0; phase < a.phases_h * a.phases_w; ++phase) {
    const int64_t down = phase / a.phases_w - w.pad_h, right = phase % a.phases_w - w.pad_w;
    float* plane = scratch + phase * a.phase_pitch;
    over_runs(strip.first, strip.first + a.phase_pitch, a.width, [&](int64_t row, int64_t column, int64_t from, int64_t count) {
      const int64_t h = row * w.stride_h + down;
      if (h < 0 || h >= a.in_h) return clear_channels(a, plane + from, count);
      const int64_t lowest = right < 0 ? ceil_div(-right, w.stride_w) : 0;  // columns with an input pixel: lowest … highest - 1
      const int64_t highest = right < a.in_w ? ceil_div(a.in_w - right, w.stride_w) : 0;
      const int64_t left = minimum(maximum(lowest, column), column + count), end = maximum(left, minimum(highest, column + count));
      clear_channels(a, plane + from, left - column);
      if (end > left) {
        const float* x = a.x + form.at(strip.image, 0, h * a.in_w + left * w.stride_w + right);
        copy_channels(a, form, plane + from + left - column, x, w.stride_w, end - left);
      }
      clear_channels(a, plane + from + end - column, column + count - end);
    });
  }
}

// Sums of channels [n, n + count) in `tile`, `strip` apart, to y with residual and activation.
void store_tile(const SparseConv2dArgs& a, const ActivationFunction& activation, const Strip& strip, const float* tile, int64_t n,
                int64_t count) {
  const int64_t pixels = a.out_h * a.out_w;
  const Form to(a.channels_last, a.c_out, pixels, a.y_stride), added(a.channels_last, a.c_out, pixels, a.residual_stride);
  over_runs(strip.first, strip.last, a.width, [&](int64_t row, int64_t column, int64_t from, int64_t run) {
    const int64_t used = minimum(run, a.out_w - column);
    for (int64_t i = 0; i < used; i += kLanes) {
      const int64_t positions = minimum(kLanes, used - i), pixel = row * a.out_w + column + i;
      Vec square[kLanes];
      for (int64_t c = 0; c < kLanes; ++c) square[c] = c < count ? load(tile + c * a.strip + from + i) : zero();
      if (a.channels_last) transpose(square);
      const int64_t vectors = a.channels_last ? positions : count, lanes = a.channels_last ? count : positions;
      for (int64_t k = 0; k < vectors; ++k) {
        const int64_t channel = a.channels_last ? n : n + k, at = a.channels_last ? pixel + k : pixel;
        const Vec sum = a.residual ? square[k] + load_up_to(a.residual + added.at(strip.image, channel, at), lanes) : square[k];
        store_up_to(a.y + to.at(strip.image, channel, at), activation(sum), lanes);
      }
    }
  });
}

void compute_strip(const SparseConv2dArgs& a, const Strip& strip, int64_t first, int64_t last, const float* scratch, float* tile) {
  const SparseRows rows{a.row_starts, a.steps, a.values, a.bias, a.c_out};
  const SparseWalk walk = sparse_walk_of(a.rows, ceil_div(strip.last - strip.first, kLanes));
  const ActivationFunction activation(a.activation);
  if (!a.channels_last && a.width == a.out_w) {
    const Form form(false, a.c_out, a.out_h * a.out_w, 1);
    const int64_t from = form.at(strip.image, 0, strip.first);
    const float* residual = a.residual ? a.residual + from : nullptr;
    return walk(rows, scratch, first, last, {a.y + from, form.channel, residual, form.channel, strip.last - strip.first, activation});
  }
  const ActivationFunction identity(Activation::identity);
  const int64_t step = kLanes / a.rows;
  for (int64_t i = first; i < last; i += step) {
    const int64_t end = minimum(i + step, last), n = i * a.rows;
    walk(rows, scratch, i, end, {tile - n * a.strip, a.strip, nullptr, 0, round_up(strip.last - strip.first, kLanes), identity});
    store_tile(a, activation, strip, tile, n, minimum(end * a.rows, a.c_out) - n);
  }
}

// Threads by strips and by rows: least time of the slowest, in steps of the walk; filling a strip takes a few per channel.
struct Split {
  int64_t strip_parts, row_parts;
};

Split split_work(int64_t strips, int64_t rows, int64_t non_zeros, int64_t planes) {
  constexpr double kFilling = 3;
  Split best{1, 1};
  double least = 0;
  for (int64_t row_parts = 1; row_parts <= minimum(thread_count(), rows); ++row_parts) {
    const int64_t strip_parts = minimum(thread_count() / row_parts, strips);
    const double work = static_cast<double>(non_zeros + rows) / static_cast<double>(row_parts) + kFilling * static_cast<double>(planes);
    const double cost = static_cast<double>(ceil_div(strips, strip_parts)) * work;
    if (row_parts == 1 || cost < least) best = {strip_parts, row_parts}, least = cost;
  }
  return best;
}

}  // namespace

void sparse_conv2d(const SparseConv2dArgs& a) {
  const int64_t rows = ceil_div(a.c_out, a.rows), outputs = a.out_h * a.width;
  const int64_t vectors = ceil_div(outputs, kLanes), strips_of_image = ceil_div(vectors, a.strip / kLanes), strips = a.batch * strips_of_image;
  const int64_t planes = a.phases_h * a.phases_w * a.c_in, scratch_floats = planes * a.phase_pitch;
  const Split split = split_work(strips, rows, a.row_starts[rows], planes);
  // Rows and non-zeros both count: those of part k end where its share of their sum does.
  const auto first_row = [&](int64_t part) {
    const int64_t share = (a.row_starts[rows] + rows) * part / split.row_parts;
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (a.row_starts[middle] + middle < share) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  parallel(split.strip_parts * split.row_parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / split.row_parts, j = task % split.row_parts;
      float* scratch = thread_scratch(scratch_floats + kLanes * a.strip);
      for (int64_t s = strips * i / split.strip_parts; s < strips * (i + 1) / split.strip_parts; ++s) {
        const int64_t k = s % strips_of_image, from = vectors * k / strips_of_image, to = vectors * (k + 1) / strips_of_image;
        const Strip strip{s / strips_of_image, from * kLanes, minimum(to * kLanes, outputs)};
        load_strip(a, strip, scratch);
        compute_strip(a, strip, first_row(j), first_row(j + 1), scratch, scratch + scratch_floats);
      }
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
