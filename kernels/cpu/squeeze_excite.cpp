// Squeeze-and-excitation, channels_last.     y[n, c] = act(expand_bias[c] + Σ_r expand[c, r] · h[n, r])
//                                            h[n, r] = act(reduce_bias[r] + Σ_c reduce[r, c] · mean x[n, :, :, c])
//
//   x ──mean over pixels──▶ [N, C] ──reduce──▶ [N, R] ──expand──▶ y [N, C_out]      what lies between stays in the first-level cache
//
//   bound: the map x is read once from the cache that the layer before has left it in; both weights, packed in panels, once
//
// Three loops over threads: parts of the map, then panels of each product.
#include "args.h"
#include "pool.h"
#include "runtime.h"
#include "split.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

// y[n, j] = act(bias[j] + Σ_k x[n, k] · weight[k, j]); rows of x lie `depth` apart.
void product(const float* x, int64_t rows, int64_t depth, const float* weight, const float* bias, Activation activation, float* y,
             int64_t y_stride, int64_t columns) {
  const int64_t panels = ceil_div(columns, kPanel);
  const TileOutput out{y, y_stride, bias, nullptr, 0, ActivationFunction(activation)};
  over_grid(split_work(rows, depth, panels), rows, panels, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    multiply_panels(contiguous_rows(x + begin * depth, depth, depth), weight, out.at(begin, 0), end - begin, columns, first, last);
  });
}

}  // namespace

void squeeze_excite(const SqueezeExciteArgs& a) {
  const int64_t means = round_up(a.batch * a.c_in, kLanes), hidden = round_up(a.batch * a.hidden, kLanes);
  float* mean = thread_scratch(means + hidden + mean_scratch_floats(a.batch, a.c_in));
  channel_means(a.x, a.batch, a.positions, a.c_in, a.x_stride, mean, mean + means + hidden);
  product(mean, a.batch, a.c_in, a.reduce_weight, a.reduce_bias, a.reduce_activation, mean + means, a.hidden, a.hidden);
  product(mean + means, a.batch, a.hidden, a.expand_weight, a.expand_bias, a.activation, a.y, a.y_stride, a.c_out);
}

}  // namespace kernelpress::KERNELPRESS_ISA
