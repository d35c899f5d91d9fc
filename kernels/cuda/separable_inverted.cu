// Expand → depthwise → project in one kernel (MobileNet V2's block).
//
//     y[p, n] = act(Σ_c pj[n, c] · act_dw(Σ_rs dw[r, s, c] · act_ex(ex[c] · x[p·S-P + rs·D] + b_ex[c]) + b_dw[c]) + b[n] + residual)
//
//   one block: 8×8 outputs × tile_n channels. The halo of x stays in shared memory; for every 128 bytes of hidden channels
//
//     x halo ──┐                                                    pj ─cp.async──▶ B ──┐
//     ex ──────┴──mma──▶ hidden halo ──FMA──▶ A [64][128 B] ────────────────────────────┴──mma──▶ accumulators ──▶ y
//
//     while one chunk computes, the weights of the next are in flight; three barriers a chunk
//
// Traffic: x (with its halo), weights, y; the hidden map, six times as wide, never leaves the multiprocessor. Price: the halo is expanded
// by every block that needs it, 1.6 times at stride 1, 1.1 at stride 2.
#include "dense.h"
#include "depthwise.h"
#include "separable.h"
#include "separable_launch.cuh"
#include "separable_stages.cuh"

namespace kernelpress::cuda {
namespace {

template <class T>
struct InvertedProblem {
  const T *x, *expand_weight, *depthwise_weight, *project_weight;
  const float *expand_bias, *depthwise_bias;
  int64_t in_h, in_w, c_in, hidden, out_h, out_w, x_stride;
  Window window;
  Activation expand_activation, depthwise_activation;
  SeparablePlan plan;
  Epilogue<T> epilogue;
};

template <class Config, int kKernel, int kStride>
__global__ void __launch_bounds__(Config::kThreads, 256 / Config::kThreads) inverted_fused(const InvertedProblem<typename Config::T> problem) {
  using T = typename Config::T;
  constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32;
  SIMT_DYN_SMEM(shared);
  const SeparablePlan& plan = problem.plan;
  const FusedBlock block(plan, problem.window, Config::kTileN);
  const Halo<T> halo{problem.x + block.image * problem.in_h * problem.in_w * problem.x_stride, problem.in_h, problem.in_w,
                     problem.x_stride, block.in_row, block.in_column, plan.halo_h, plan.halo_w};
  const int taps = plan.weight_bytes / kChunkBytes, set = plan.weight_bytes + plan.expand_bytes + plan.project_bytes;
  unsigned char* const hidden = shared + plan.expand_steps * plan.x_bytes;
  unsigned char* const a = hidden + plan.x_bytes;
  unsigned char* const weights = a + kFusedPixels * kChunkBytes;
  const auto copy = [&](int chunk) {
    unsigned char* const to = weights + chunk % 2 * set;
    const int64_t channel = static_cast<int64_t>(chunk) * kChunkChannels<T>;
    copy_rows<kThreads, false>(to, problem.depthwise_weight, 0, taps, taps, channel, problem.hidden);
    for (int step = 0; step < plan.expand_steps; ++step)
      copy_rows<kThreads, true>(to + plan.weight_bytes + step * kChunkChannels<T> * kChunkBytes, problem.expand_weight, channel,
                                problem.hidden, kChunkChannels<T>, static_cast<int64_t>(step) * kChunkChannels<T>, problem.c_in);
    copy_rows<kThreads, true>(to + plan.weight_bytes + plan.expand_bytes, problem.project_weight, block.first_channel,
                              problem.epilogue.channels, Config::kTileN, channel, problem.hidden);
    cp_async_commit();
  };

  for (int step = 0; step < plan.expand_steps; ++step)
    copy_halo<kThreads>(shared + step * plan.x_bytes, halo, plan.halo_rows, static_cast<int64_t>(step) * kChunkChannels<T>, problem.c_in);
  copy(0);
  Accumulators<Config> sums;
  sums.clear();
#pragma unroll 1
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    cp_async_wait<0>();
    block_barrier();
    if (chunk + 1 < plan.chunks) copy(chunk + 1);
    const unsigned char* from = weights + chunk % 2 * set;
    const int64_t channel = static_cast<int64_t>(chunk) * kChunkChannels<T>;
    expand_chunk<T, kWarps>(hidden, shared, from + plan.weight_bytes, plan.expand_steps, plan.halo_rows, halo, problem.expand_bias, channel,
                            problem.hidden, problem.expand_activation);
    block_barrier();
    depthwise_chunk<T, kThreads, kKernel, kStride>(a, hidden, from, plan.halo_w, problem.window, problem.depthwise_bias, channel,
                                                   problem.hidden, problem.depthwise_activation);
    block_barrier();
    multiply_chunk(sums, a, from + plan.weight_bytes + plan.expand_bytes);
  }
  block_barrier();
  store_tile(sums, shared, problem.epilogue,
             PatchPixels{block.image, block.first_row, block.first_column, problem.out_h, problem.out_w}, block.first_channel);
}

template <class T>
class InvertedLaunch {
 public:
  InvertedLaunch(const InvertedResidualArgs& args, const Device& device, void* stream)
      : a_(args), device_(device), stream_(stream),
        shape_{a_.batch, a_.in_h, a_.in_w, a_.c_in, a_.hidden, a_.out_h, a_.out_w, a_.c_out, sizeof(T), a_.window, true} {}

  Status run() const {
    const bool fusible = copies_vectors<T>(a_.x, a_.x_stride) && copies_vectors<T>(a_.expand_weight, a_.c_in) &&
                         copies_vectors<T>(a_.depthwise_weight, a_.hidden) && copies_vectors<T>(a_.project_weight, a_.hidden);
    const int64_t tile = separable_tile(shape_, device_, fusible, a_.configuration);
    if (tile == kUnfusedTile) return one_after_the_other();
    return {launch_separable<T>(*this, tile, a_.window), "inverted_residual", kSeparableTiles[tile].name};
  }

  template <class Config, int kKernel, int kStride>
  int launch_fused(const SeparableTile& tile) const {
    const SeparablePlan plan = plan_separable(shape_, tile);
    const InvertedProblem<T> problem{
        static_cast<const T*>(a_.x), static_cast<const T*>(a_.expand_weight), static_cast<const T*>(a_.depthwise_weight),
        static_cast<const T*>(a_.project_weight), a_.expand_bias, a_.depthwise_bias, a_.in_h, a_.in_w, a_.c_in, a_.hidden, a_.out_h,
        a_.out_w, a_.x_stride, a_.window, a_.expand_activation, a_.depthwise_activation, plan,
        make_epilogue<T>(nullptr, a_.project_bias, a_.residual, a_.y, a_.residual_stride, a_.y_stride, a_.c_out, a_.activation)};
    return launch(inverted_fused<Config, kKernel, kStride>, separable_grid(plan, Config::kThreads, stream_), problem);
  }

 private:
  Status one_after_the_other() const {
    PointwiseConv2dArgs expand{};
    expand.x = a_.x;
    expand.weight = a_.expand_weight;
    expand.bias = a_.expand_bias;
    expand.y = a_.workspace;
    expand.batch = a_.batch;
    expand.positions = a_.in_h * a_.in_w;
    expand.c_in = a_.c_in;
    expand.c_out = expand.y_stride = a_.hidden;
    expand.x_stride = a_.x_stride;
    expand.dtype = a_.dtype;
    expand.activation = a_.expand_activation;
    expand.configuration = -1;
    const Status status = pointwise_conv2d(expand, device_, stream_);
    if (status.code != 0) return status;
    SeparableConv2dArgs rest{};
    rest.x = a_.workspace;
    rest.depthwise_weight = a_.depthwise_weight;
    rest.depthwise_bias = a_.depthwise_bias;
    rest.pointwise_weight = a_.project_weight;
    rest.pointwise_bias = a_.project_bias;
    rest.residual = a_.residual;
    rest.y = a_.y;
    rest.workspace = static_cast<unsigned char*>(a_.workspace) + expanded_bytes(shape_);
    rest.batch = a_.batch;
    rest.in_h = a_.in_h;
    rest.in_w = a_.in_w;
    rest.channels = rest.x_stride = a_.hidden;
    rest.out_h = a_.out_h;
    rest.out_w = a_.out_w;
    rest.c_out = a_.c_out;
    rest.residual_stride = a_.residual_stride;
    rest.y_stride = a_.y_stride;
    rest.window = a_.window;
    rest.depthwise_activation = a_.depthwise_activation;
    rest.dtype = a_.dtype;
    rest.activation = a_.activation;
    rest.configuration = -1;
    return separable_conv2d(rest, device_, stream_);
  }

  const InvertedResidualArgs& a_;
  const Device& device_;
  void* stream_;
  SeparableShape shape_;
};

}  // namespace

Status inverted_residual(const InvertedResidualArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return InvertedLaunch<Half>(a, device, stream).run();
    case DataType::bfloat16: return InvertedLaunch<BFloat16>(a, device, stream).run();
    default: return InvertedLaunch<float>(a, device, stream).run();
  }
}

}  // namespace kernelpress::cuda
