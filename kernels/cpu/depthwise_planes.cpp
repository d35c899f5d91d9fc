// Depthwise convolution of contiguous images.     y[n, o, p, q] = act(bias[o] + residual + Σ_rs x[n, o/m, p·S-P+r·D, q·S-P+s·D] · w[o, r, s])
//
//   A channel is a plane: a band of its rows, padded, is copied to scratch as sparse.cpp copies a strip, and the taps are steps of the
//   walk of sparse.h. Outputs are numbered through padded rows, so vectors need not end where a narrow image's rows do.
//   bound: loads from the first-level cache; bandwidth beyond the caches
//
// One task: a run of planes over all images.
#include "runtime.h"
#include "sparse.h"
#include "strip.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kBandFloats = 5 * 1024;  // of scratch: it stays in the first-level cache

// Input of one channel for `outputs` positions of a band, and where its taps begin there.
struct Band {
  StripForm form;
  int64_t outputs;

  explicit Band(const DepthwisePlanesArgs& a) {
    const Window& w = a.window;
    const auto phases = [](int64_t kernel, int64_t dilation, int64_t stride) {
      int64_t most = 0;
      for (int64_t k = 0; k < kernel; ++k) most = maximum(most, k * dilation % stride);
      return most + 1;
    };
    form.width = a.out_w + (w.reach_w() - 1) / w.stride_w;
    form.phases_h = phases(w.kernel_h, w.dilation_h, w.stride_h);
    form.phases_w = phases(w.kernel_w, w.dilation_w, w.stride_w);
    const int64_t rows = maximum(1, kBandFloats / (form.phases_h * form.phases_w * form.width) - (w.reach_h() - 1) / w.stride_h);
    const int64_t bands = ceil_div(a.out_h, rows);
    outputs = ceil_div(a.out_h, bands) * form.width;
    form.phase_pitch = round_up(round_up(outputs, kLanes) + (w.reach_h() - 1) / w.stride_h * form.width + form.width - a.out_w, kLanes);
  }

  int32_t begin_of(const Window& w, int64_t tap) const {
    const int64_t down = tap / w.kernel_w * w.dilation_h, right = tap % w.kernel_w * w.dilation_w;
    const int64_t phase = down % w.stride_h * form.phases_w + right % w.stride_w;
    return static_cast<int32_t>(phase * form.phase_pitch + down / w.stride_h * form.width + right / w.stride_w);
  }
};

}  // namespace

void depthwise_planes(const DepthwisePlanesArgs& a) {
  const Band band(a);
  const int64_t taps = a.window.kernel_h * a.window.kernel_w, outputs = a.out_h * band.form.width, pixels = a.out_h * a.out_w;
  const ActivationFunction activation(a.activation), identity(Activation::identity);
  parallel(a.batch * a.channels, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(band.form.pitch() + kMostVectors * kLanes + round_up(taps + 2, kLanes));
    float* tile = scratch + band.form.pitch();
    auto* steps = reinterpret_cast<int32_t*>(tile + kMostVectors * kLanes);
    for (int64_t tap = 0; tap < taps; ++tap) steps[tap] = band.begin_of(a.window, tap);
    steps[taps] = 0, steps[taps + 1] = static_cast<int32_t>(taps);
    for (int64_t plane = begin; plane < end; ++plane) {
      const StripSource x{a.x + plane * a.in_h * a.in_w, false, 1, 0, 1, a.in_h, a.in_w};
      for (int64_t top = 0; top < outputs; top += band.outputs) {
        const int64_t bottom = minimum(top + band.outputs, outputs);
        load_strip(x, band.form, a.window, top, scratch);
        for (int64_t j = 0; j < a.multiplier; ++j) {
          const int64_t o = plane % a.channels * a.multiplier + j, out = (plane * a.multiplier + j) * pixels;
          const SparseRows filter{steps + taps, steps, a.weight + o * taps, a.bias ? a.bias + o : nullptr, 1};
          for (int64_t from = top; from < bottom; from += kMostVectors * kLanes) {
            const int64_t count = minimum(kMostVectors * kLanes, bottom - from);
            const SparseWalk walk = sparse_walk_of(1, ceil_div(count, kLanes));
            if (band.form.width == a.out_w) {
              walk(filter, scratch + from - top, 0, 1, {a.y + out + from, 0, a.residual ? a.residual + out + from : nullptr, 0, count, activation});
              continue;
            }
            walk(filter, scratch + from - top, 0, 1, {tile, 0, nullptr, 0, round_up(count, kLanes), identity});
            over_runs(from, from + count, band.form.width, [&](int64_t row, int64_t column, int64_t i, int64_t run) {
              const int64_t to = out + row * a.out_w + column, used = minimum(run, a.out_w - column);
              for (int64_t k = 0; k < used; k += kLanes) {
                const int64_t lanes = minimum(kLanes, used - k);
                Vec sum = load_up_to(tile + i + k, lanes);
                if (a.residual) sum = sum + load_up_to(a.residual + to + k, lanes);
                store_up_to(a.y + to + k, activation(sum), lanes);
              }
            });
          }
        }
      }
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
