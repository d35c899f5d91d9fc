// Convolution with a sparse weight.     y[n, p, q] = act(bias[n] + residual[n, p, q] + Σ_crs w[n, c, r, s] · x[c, p·S-P+r·D, q·S-P+s·D])
//
//   x, channels or pixels neighbours in memory, is copied strip by strip to the form of strip.h, in which tap (c, r, s) begins at a
//   constant: the walk of sparse.h knows no geometry.                bound: loads of the walk; a strip is read C_out · density times
//
// One task: a range of strips × rows of the weight with as many non-zeros as the others'.
#include "sparse.h"

#include "sparse_split.h"
#include "strip.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

// Where an image's channels and pixels stand in memory.
struct Form {
  int64_t image, channel, pixel;

  Form(bool channels_last, int64_t channels, int64_t pixels, int64_t stride)
      : image(pixels * (channels_last ? stride : channels)), channel(channels_last ? 1 : pixels), pixel(channels_last ? stride : 1) {}

  KP_INLINE int64_t at(int64_t i, int64_t c, int64_t p) const { return i * image + c * channel + p * pixel; }
};

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

}  // namespace

void sparse_conv2d(const SparseConv2dArgs& a) {
  const StripForm form{a.width, a.phases_h, a.phases_w, a.phase_pitch};
  const Form image(a.channels_last, a.c_in, a.in_h * a.in_w, a.x_stride);
  const int64_t rows = ceil_div(a.c_out, a.rows), scratch_floats = a.c_in * form.pitch();
  const SparseWork work{a.batch, a.out_h * a.width, a.strip, a.row_starts, rows, a.phases_h * a.phases_w * a.c_in};
  over_strips(work, [&](const Strip& strip, int64_t first, int64_t last) {
    float* scratch = thread_scratch(scratch_floats + kLanes * a.strip);
    const StripSource x{a.x + strip.image * image.image, a.channels_last != 0, a.c_in, image.channel, image.pixel, a.in_h, a.in_w};
    load_strip(x, form, a.window, strip.first, scratch);
    compute_strip(a, strip, first, last, scratch, scratch + scratch_floats);
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
