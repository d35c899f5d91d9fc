// Depthwise → pointwise in one kernel.    y[p, n] = act(Σ_c pw[n, c] · act_dw(Σ_rs dw[r, s, c] · x[p·S-P + rs·D, c] + b_dw[c]) + b[n] + residual)
//
//   one block: 8×8 outputs × tile_n channels; for every 128 bytes of input channels
//
//     x ──cp.async──▶ halo ──FMA──▶ A [64][128 B] ──┐
//     pw ─cp.async──▶ B [tile_n][128 B] ────────────┴──mma──▶ accumulators ──▶ y
//
//     while one chunk computes, the copies of the next are in flight; two barriers a chunk
//
// Traffic: x (the halo 1.6 times at stride 1, mostly from the second-level cache), weights, y; the depthwise result never leaves the
// multiprocessor. Bound by the depthwise FMA and `mma` together, whichever blocks of one multiprocessor do not hide.
#include "separable.h"

#include "dense.h"
#include "depthwise.h"
#include "separable_launch.cuh"
#include "separable_stages.cuh"

namespace kernelpress::cuda {
namespace {

template <class T>
struct SeparableProblem {
  const T *x, *depthwise_weight, *pointwise_weight;
  const float* depthwise_bias;
  int64_t in_h, in_w, channels, out_h, out_w, x_stride;
  Window window;
  Activation depthwise_activation;
  SeparablePlan plan;
  Epilogue<T> epilogue;
};

template <class Config, int kKernel, int kStride>
__global__ void __launch_bounds__(Config::kThreads, 256 / Config::kThreads) separable_fused(const SeparableProblem<typename Config::T> problem) {
  using T = typename Config::T;
  constexpr int kThreads = Config::kThreads;
  SIMT_DYN_SMEM(shared);
  const SeparablePlan& plan = problem.plan;
  const FusedBlock block(plan, problem.window, Config::kTileN);
  const Halo<T> halo{problem.x + block.image * problem.in_h * problem.in_w * problem.x_stride, problem.in_h, problem.in_w,
                     problem.x_stride, block.in_row, block.in_column, plan.halo_h, plan.halo_w};
  const int taps = plan.weight_bytes / kChunkBytes, set = plan.x_bytes + plan.weight_bytes + plan.project_bytes;
  unsigned char* const a = shared + 2 * set;
  const auto copy = [&](int chunk) {
    unsigned char* const to = shared + chunk % 2 * set;
    const int64_t channel = static_cast<int64_t>(chunk) * kChunkChannels<T>;
    copy_halo<kThreads>(to, halo, plan.halo_h * plan.halo_w, channel, problem.channels);
    copy_rows<kThreads, false>(to + plan.x_bytes, problem.depthwise_weight, 0, taps, taps, channel, problem.channels);
    copy_rows<kThreads, true>(to + plan.x_bytes + plan.weight_bytes, problem.pointwise_weight, block.first_channel,
                              problem.epilogue.channels, Config::kTileN, channel, problem.channels);
    cp_async_commit();
  };

  Accumulators<Config> sums;
  sums.clear();
  copy(0);
#pragma unroll 1
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    cp_async_wait<0>();
    block_barrier();
    if (chunk + 1 < plan.chunks) copy(chunk + 1);
    const unsigned char* from = shared + chunk % 2 * set;
    depthwise_chunk<T, kThreads, kKernel, kStride>(a, from, from + plan.x_bytes, plan.halo_w, problem.window, problem.depthwise_bias,
                                                   static_cast<int64_t>(chunk) * kChunkChannels<T>, problem.channels,
                                                   problem.depthwise_activation);
    block_barrier();
    multiply_chunk(sums, a, from + plan.x_bytes + plan.weight_bytes);
  }
  block_barrier();
  store_tile(sums, shared, problem.epilogue,
             PatchPixels{block.image, block.first_row, block.first_column, problem.out_h, problem.out_w}, block.first_channel);
}

template <class T>
class SeparableLaunch {
 public:
  SeparableLaunch(const SeparableConv2dArgs& args, const Device& device, void* stream)
      : a_(args), device_(device), stream_(stream),
        shape_{a_.batch, a_.in_h, a_.in_w, a_.channels, a_.channels, a_.out_h, a_.out_w, a_.c_out, sizeof(T), a_.window, false} {}

  Status run() const {
    const bool fusible = copies_vectors<T>(a_.x, a_.x_stride) && copies_vectors<T>(a_.depthwise_weight, a_.channels) &&
                         copies_vectors<T>(a_.pointwise_weight, a_.channels);
    const int64_t tile = separable_tile(shape_, device_, fusible, a_.configuration);
    if (tile == kUnfusedTile) return one_after_the_other();
    return {launch_separable<T>(*this, tile, a_.window), "separable_conv2d", kSeparableTiles[tile].name};
  }

  template <class Config, int kKernel, int kStride>
  int launch_fused(const SeparableTile& tile) const {
    const SeparablePlan plan = plan_separable(shape_, tile);
    const SeparableProblem<T> problem{
        static_cast<const T*>(a_.x), static_cast<const T*>(a_.depthwise_weight), static_cast<const T*>(a_.pointwise_weight),
        a_.depthwise_bias, a_.in_h, a_.in_w, a_.channels, a_.out_h, a_.out_w, a_.x_stride, a_.window, a_.depthwise_activation, plan,
        make_epilogue<T>(nullptr, a_.pointwise_bias, a_.residual, a_.y, a_.residual_stride, a_.y_stride, a_.c_out, a_.activation)};
    return launch(separable_fused<Config, kKernel, kStride>, separable_grid(plan, Config::kThreads, stream_), problem);
  }

 private:
  Status one_after_the_other() const {
    const DepthwiseConv2dArgs first{a_.x, a_.depthwise_weight, a_.depthwise_bias, nullptr, nullptr, a_.workspace,
                                    a_.batch, a_.in_h, a_.in_w, a_.channels, 1, a_.out_h, a_.out_w,
                                    a_.x_stride, 0, a_.channels, a_.window, a_.dtype, a_.depthwise_activation, -1};
    const Status status = depthwise_conv2d(first, device_, stream_);
    if (status.code != 0) return status;
    PointwiseConv2dArgs second{};
    second.x = a_.workspace;
    second.weight = a_.pointwise_weight;
    second.bias = a_.pointwise_bias;
    second.residual = a_.residual;
    second.y = a_.y;
    second.batch = a_.batch;
    second.positions = a_.out_h * a_.out_w;
    second.c_in = second.x_stride = a_.channels;
    second.c_out = a_.c_out;
    second.residual_stride = a_.residual_stride;
    second.y_stride = a_.y_stride;
    second.dtype = a_.dtype;
    second.activation = a_.activation;
    second.configuration = -1;
    return pointwise_conv2d(second, device_, stream_);
  }

  const SeparableConv2dArgs& a_;
  const Device& device_;
  void* stream_;
  SeparableShape shape_;
};

}  // namespace

Status separable_conv2d(const SeparableConv2dArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return SeparableLaunch<Half>(a, device, stream).run();
    case DataType::bfloat16: return SeparableLaunch<BFloat16>(a, device, stream).run();
    default: return SeparableLaunch<float>(a, device, stream).run();
  }
}

}  // namespace kernelpress::cuda
