// int8 depthwise convolution, channels_last.    y[n,p,q,c] = epilogue(Σ_rs w[r,s,c] · (x[n, p·S-P+r·D, q·S-P+s·D, c/m] − zero_point))
//
//   k 3, 5, 7, stride 1, 2, int8 y   the ring of rows of depthwise.cu, the zero point beyond the borders; four taps in one dp4a:
//                                    int8_depthwise.cuh
//   any other window, floating y     one thread: 4 neighbouring outputs of a row × 16 channels, straight from global memory
//
// Sums are exact: Σ w · x from start −zero_point · Σ w. An output is 2 bytes of traffic: 3×3 is bound by the issue of instructions (the
// epilogue's conversions and requantisation are half of them) at two thirds of copy bandwidth, 5×5 and 7×7 by dp4a.
#include "int8_depthwise.h"

#include "common/epilogue.cuh"
#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/simt.cuh"
#include "int8_depthwise.cuh"

namespace kernelpress::cuda {
namespace {

constexpr int kThreads = 128, kColumns = 4;

template <class Out, int kVector>
__global__ void __launch_bounds__(kThreads, 3) int8_depthwise(const Int8DepthwiseConv2dArgs a, const Epilogue<Out> epilogue) {
  using Group = Vector<int8_t, kVector>;
  const Window& w = a.window;
  const int zero_point = static_cast<int>(a.input_zero_point);
  const int64_t c_out = a.channels * a.multiplier, groups = c_out / kVector, wide = (a.out_w + kColumns - 1) / kColumns;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= groups * wide * a.out_h * a.batch) return;
  const int64_t channel = index % groups * kVector;
  index /= groups;
  const int64_t q0 = index % wide * kColumns;
  index /= wide;
  const int64_t p = index % a.out_h, image = index / a.out_h;
  const int8_t* x = static_cast<const int8_t*>(a.x) + image * a.in_h * a.in_w * a.x_stride + (kVector > 1 ? channel : channel / a.multiplier);
  const int8_t* weight = static_cast<const int8_t*>(a.weight) + channel;

  int sums[kColumns][kVector] = {};
  for (int64_t r = 0; r < w.kernel_h; ++r) {
    const int64_t h = p * w.stride_h - w.pad_h + r * w.dilation_h;
    if (h < 0 || h >= a.in_h) continue;
    for (int64_t s = 0; s < w.kernel_w; ++s) {
      const Group taps = *reinterpret_cast<const Group*>(weight + (r * w.kernel_w + s) * c_out);
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        const int64_t column = (q0 + q) * w.stride_w - w.pad_w + s * w.dilation_w;
        if (column < 0 || column >= a.in_w) continue;
        const Group values = *reinterpret_cast<const Group*>(x + (h * a.in_w + column) * a.x_stride);
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[q][c] += (values[c] - zero_point) * taps[c];
      }
    }
  }
  const ChannelTerms<kVector> terms = channel_terms<kVector>(epilogue, channel);
#pragma unroll
  for (int q = 0; q < kColumns; ++q) {
    if (q0 + q >= a.out_w) break;
    float values[kVector];
#pragma unroll
    for (int c = 0; c < kVector; ++c) values[c] = static_cast<float>(sums[q][c]);
    finish(epilogue, terms, values, (image * a.out_h + p) * a.out_w + q0 + q, channel);
  }
}

template <class Out>
int launch_any(const Int8DepthwiseConv2dArgs& a, const Epilogue<Out>& epilogue, void* stream) {
  constexpr int kVector = 16;
  const bool aligned = a.multiplier == 1 && a.channels % kVector == 0 && is_aligned(a.x) && is_aligned(a.weight) && a.x_stride % kVector == 0;
  const int64_t items = a.channels * a.multiplier / (aligned ? kVector : 1) * ((a.out_w + kColumns - 1) / kColumns) * a.out_h * a.batch;
  const Grid grid{dim3(static_cast<unsigned>((items + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream};
  return aligned ? launch(int8_depthwise<Out, kVector>, grid, a, epilogue) : launch(int8_depthwise<Out, 1>, grid, a, epilogue);
}

template <class Out>
Status launch_depthwise(const Int8DepthwiseConv2dArgs& a, const Device& device, void* stream) {
  const int64_t kernel = a.window.kernel_h, stride = a.window.stride_h;
  const DepthwiseShape shape{a.batch, a.channels, a.out_h, a.out_w, kernel, stride, 1,
                             depthwise::int8_words(static_cast<int>(kernel), static_cast<int>(stride))};
  int64_t index = kAnyWindowTile;
  if (std::is_same_v<Out, int8_t> && depthwise_is_specialised(a.window, a.multiplier))
    index = a.configuration >= 0 && a.configuration <= kAnyWindowTile ? a.configuration : choose_depthwise_tile(shape, device);
  auto epilogue = make_epilogue<Out>(a.scale, a.bias, a.residual, a.y, a.residual_stride, a.y_stride, a.channels * a.multiplier,
                                     a.activation);
  epilogue.inverse_scale = static_cast<float>(1.0 / a.output_scale);
  epilogue.zero_point = static_cast<float>(a.output_zero_point);
  epilogue.residual_scale = static_cast<float>(a.residual_scale);
  epilogue.residual_zero_point = static_cast<float>(a.residual_zero_point);
  const DepthwiseTile& tile = kInt8DepthwiseTiles[index];
  Status status{0, "int8_depthwise_conv2d", tile.name};
  if (tile.kernel == DepthwiseKernel::any_window) {
    status.code = launch_any(a, epilogue, stream);
  } else if constexpr (std::is_same_v<Out, int8_t>) {
    DepthwisePlan plan = plan_depthwise_ring(shape, tile, device);
    plan.copy_bytes = copy_bytes<int8_t>(a.x, a.x_stride, a.channels);
    status.code = launch_int8_ring(a, plan, epilogue, stream);
  }
  return status;
}

}  // namespace

Status int8_depthwise_conv2d(const Int8DepthwiseConv2dArgs& a, const Device& device, void* stream) {
  switch (a.output) {
    case DataType::int8: return launch_depthwise<int8_t>(a, device, stream);
    case DataType::float16: return launch_depthwise<Half>(a, device, stream);
    case DataType::bfloat16: return launch_depthwise<BFloat16>(a, device, stream);
    default: return launch_depthwise<float>(a, device, stream);
  }
}

}  // namespace kernelpress::cuda
