// Depthwise convolution of contiguous images.     y[n, o, p, q] = act(bias[o] + residual + Σ_rs x[n, o/m, p·S-P+r·D, q·S-P+s·D] · w[o, r, s])
//
//   A channel is a plane: a band of its rows, padded, is copied to scratch as sparse.cpp copies a strip, and the taps are steps of the
//   walk of sparse.h. Outputs are numbered through padded rows, so vectors need not end where a narrow image's rows do.
//   bound: loads from the first-level cache; bandwidth beyond the caches
//
//   Windows of 3×3 and 5×5 by 1 or 2 roll down a plane where it lies instead, one vector of columns at a time: each input row is read
//   once, for all outputs that it is under, sums[i] being that of output row t − i at step t.
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

// Which lanes of the columns from `begin` on stand in a row of so many.
Some lanes_in(int64_t begin, int64_t columns) {
  const auto lane = [](int64_t at) { return static_cast<int>(minimum(maximum(at, 0), kLanes)); };
  return between(lane(-begin), lane(columns - begin));
}

// Under one vector of output columns, for each tap of a row: where it begins in a row of x, and which lanes stand in the image.
template <int kKernel, int kStride>
struct Columns {
  int64_t begin[kKernel];
  Some some[kKernel][kStride];

  Columns(const DepthwisePlanesArgs& a, int64_t q) {
    for (int s = 0; s < kKernel; ++s) {
      begin[s] = q * kStride + s - a.window.pad_w;
      for (int v = 0; v < kStride; ++v) some[s][v] = lanes_in(begin[s] + v * kLanes, a.in_w);
    }
  }
  KP_INLINE Vec read(const float* row, int s) const {
    const float* from = row + begin[s];
    if constexpr (kStride == 1) return load_some(from, some[s][0]);
    return evens(load_some(from, some[s][0]), load_some(from + kLanes, some[s][kStride - 1]));
  }
};

// The weights of a window: those of 3×3 stay in registers, where the compiler would read them anew after each store.
template <int kKernel>
struct Taps {
  static constexpr bool kFit = kKernel == 3 && kLanes == 16;  // 32 registers
  const float* weight;
  Vec fitting[kFit ? kKernel * kKernel : 1];

  explicit Taps(const float* from) : weight(from) {
#pragma GCC unroll 9
    for (int i = 0; kFit && i < kKernel * kKernel; ++i) fitting[i] = broadcast(weight[i]);
  }
  KP_INLINE Vec operator()(int r, int s) const {
    if constexpr (kFit) return fitting[r * kKernel + s];
    return broadcast(weight[r * kKernel + s]);
  }
};

// Output rows [0, out_h) of one vector of columns of a plane.
template <int kKernel, int kStride, class Store>
KP_INLINE void roll_down(const DepthwisePlanesArgs& a, const float* x, const Columns<kKernel, kStride>& columns, const float* weight, Vec bias,
                         const Store& store_row) {
  constexpr int kLive = (kKernel + kStride - 1) / kStride;
  const Taps<kKernel> taps(weight);
  Vec sums[kLive];
#pragma GCC unroll 8
  for (int i = 0; i < kLive; ++i) sums[i] = bias;
  int64_t h = -a.window.pad_h;
  for (int64_t t = 0; t < a.out_h + kLive - 1; ++t) {
#pragma GCC unroll 2
    for (int e = 0; e < kStride; ++e, ++h) {
      if (h < 0 || h >= a.in_h) continue;
      Vec values[kKernel];
#pragma GCC unroll 8
      for (int s = 0; s < kKernel; ++s) values[s] = columns.read(x + h * a.in_w, s);
#pragma GCC unroll 8
      for (int i = 0; i < kLive; ++i) {
        const int r = i * kStride + e;
        if (r >= kKernel) continue;
        Vec sum = values[0] * taps(r, 0);
#pragma GCC unroll 8
        for (int s = 1; s < kKernel; ++s) sum = fma(values[s], taps(r, s), sum);
        sums[i] = sums[i] + sum;
      }
    }
    if (t >= kLive - 1) store_row(sums[kLive - 1], t - (kLive - 1));
#pragma GCC unroll 8
    for (int i = kLive - 1; i > 0; --i) sums[i] = sums[i - 1];
    sums[0] = bias;
  }
}

template <int kKernel, int kStride>
bool roll_planes(const DepthwisePlanesArgs& a) {
  const Window& w = a.window;
  const bool is_plain = a.multiplier == 1 && w.dilation_h == 1 && w.dilation_w == 1;
  if (!is_plain || w.kernel_h != kKernel || w.kernel_w != kKernel || w.stride_h != kStride || w.stride_w != kStride) return false;
  parallel(a.batch * a.channels, [&](int64_t begin, int64_t end) {
    const ActivationFunction activation(a.activation);
    const int64_t out_w = a.out_w;
    for (int64_t q = 0; q < out_w; q += kLanes) {
      const Columns<kKernel, kStride> columns(a, q);
      const Some some = lanes_in(q, out_w);
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t channel = plane % a.channels, to = plane * a.out_h * a.out_w + q;
        float* y = a.y + to;
        const float* residual = a.residual ? a.residual + to : nullptr;
        const Vec bias = a.bias ? broadcast(a.bias[channel]) : zero();
        roll_down(a, a.x + plane * a.in_h * a.in_w, columns, a.weight + channel * kKernel * kKernel, bias, [&](Vec sum, int64_t row) {
          if (residual) sum = sum + load_some(residual + row * out_w, some);
          store_some(y + row * out_w, activation(sum), some);
        });
      }
    }
  });
  return true;
}

}  // namespace

void depthwise_planes(const DepthwisePlanesArgs& a) {
  if (roll_planes<3, 1>(a) || roll_planes<3, 2>(a) || roll_planes<5, 1>(a) || roll_planes<5, 2>(a)) return;
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
