// Two products, the second on what the first leaves in shared memory.    y[p, n] = act(Σ_t last[n, t] · Σ_k core[t, k] · x[p, k] + b[n] + residual)
//
//   lowrank_linear   x: rows                          lowrank_conv2d   x: windows of the first factor's product, a kernel before this one
//
//   one block: 64 pixels × all ranks, then 64 output channels at a time
//
//     x ─────cp.async──┐                    hidden [64][rank] ──┐
//     core ─cp.async───┴──mma──▶ sums ──▶     last ─cp.async────┴──mma──▶ sums ──▶ y
//
// Traffic: x, weights, y; the product between never leaves the multiprocessor. Where pixels leave multiprocessors idle, output channels
// are shared out among blocks, which all compute the first product. Bound by memory, or by `mma` from 64 channels on either side on.
#include "lowrank.h"

#include "common/gemm_sources.cuh"
#include "common/gemm_store.cuh"
#include "dense.h"

namespace kernelpress::cuda {
namespace {

constexpr int kPixels = 64, kChannels = 64, kStepBytes = 128;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

template <class T, int kRank, int kAccess>
struct Lowrank {
  static constexpr int kCoreStages = sizeof(T) == 2 ? 3 : 2;
  using Core = GemmConfig<T, kPixels, kRank, kStepBytes, 2, 2, kCoreStages, kAccess>;
  using Last = GemmConfig<T, kPixels, kChannels, kStepBytes, 2, 2, 2, kAccess>;
  static constexpr int kWorkBytes = larger(kCoreStages * (Core::kStageBytesA + Core::kStageBytesB),
                                           larger(2 * Last::kStageBytesB, store_shared_bytes<Last>()));
  static constexpr int kHiddenBytes = kPixels * kRank * static_cast<int>(sizeof(T));
};

template <class Config, class T>
__device__ __forceinline__ int steps_of(const Rows<T>& weights) {
  return static_cast<int>((weights.depth + Config::kStep - 1) / Config::kStep);
}

// A block's sums as the A operand of the next product, zeros beyond the last rank.
template <class Core, class Last>
__device__ __forceinline__ void keep(const Accumulators<Core>& sums, unsigned char* hidden, int64_t rank) {
  using T = typename Core::T;
  const int group = lane_index() / 4, pair = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < Core::kFragmentsM; ++m)
#pragma unroll
    for (int n = 0; n < Core::kFragmentsN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row<Core>() + 16 * m + group + 8 * half, column = warp_column<Core>() + 8 * n + 2 * pair;
        Vector<T, 2> two;
#pragma unroll
        for (int i = 0; i < 2; ++i) two[i] = from_float<T>(column + i < rank ? sums.value[m][n][2 * half + i] : 0.0f);
        *reinterpret_cast<Vector<T, 2>*>(hidden + resident_offset<Last, kPixels>(row, column)) = two;
      }
}

template <class Plan, class Source>
__global__ void __launch_bounds__(Plan::Core::kThreads, 2)
    lowrank_fused(const Source x, const Rows<typename Plan::Core::T> core, const Rows<typename Plan::Core::T> last,
                  const Epilogue<typename Plan::Core::T> epilogue) {
  using Core = typename Plan::Core;
  using Last = typename Plan::Last;
  SIMT_DYN_SMEM(shared);
  unsigned char* const hidden = shared + Plan::kWorkBytes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPixels;
  {
    Accumulators<Core> sums;
    sums.clear();
    multiply_accumulate(sums, shared, x, core, first, 0, 0, steps_of<Core>(core));
    keep<Core, Last>(sums, hidden, core.count);
  }
  const Resident kept{hidden};
#pragma unroll 1
  for (int64_t channel = static_cast<int64_t>(blockIdx.y) * kChannels; channel < last.count; channel += gridDim.y * kChannels) {
    Accumulators<Last> sums;
    sums.clear();
    block_barrier();
    multiply_accumulate(sums, shared, kept, last, 0, channel, 0, steps_of<Last>(last));
    block_barrier();
    store_tile(sums, shared, epilogue, ConsecutivePixels{first, x.count}, channel);
  }
}

// What both launchers come to: `x` are rows or windows.
template <class T, class Source>
struct CoreAndLast {
  const Source& x;
  Rows<T> core, last;
  Epilogue<T> epilogue;
  int64_t channels;  // of a row of x, or of a tap of a window
  const Device& device;
  void* stream;

  template <int kRank, int kAccess>
  int run() const {
    using Plan = Lowrank<T, kRank, kAccess>;
    const int64_t blocks = ceil_div(x.count, kPixels), tiles = ceil_div(last.count, kChannels);
    const int64_t idle = device.multiprocessors / blocks, parts = idle < 1 ? 1 : idle < tiles ? idle : tiles;
    const Grid grid{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)), dim3(Plan::Core::kThreads),
                    static_cast<size_t>(Plan::kWorkBytes + Plan::kHiddenBytes), stream};
    return launch(lowrank_fused<Plan, Source>, grid, x, core, last, epilogue);
  }

  Status run(int64_t configuration) const {
    const bool wide = core.count > kLowrankTiles[0].rank || configuration == 1;
    const bool aligned = is_aligned(x.base) && is_aligned<T>(x.stride) && is_aligned(core.base) && is_aligned<T>(core.depth) &&
                         is_aligned(last.base) && is_aligned<T>(last.depth) && is_aligned<T>(channels);
    Status status{0, "lowrank_fused", kLowrankTiles[wide].name};
    if (wide) status.code = aligned ? run<128, 16>() : run<128, sizeof(T)>();
    else status.code = aligned ? run<64, 16>() : run<64, sizeof(T)>();
    return status;
  }
};

template <class T>
Status run_linear(const LowrankLinearArgs& a, const Device& device, void* stream) {
  const Rows<T> x{static_cast<const T*>(a.x), a.x_stride, a.rows, a.c_in};
  const CoreAndLast<T, Rows<T>> products{
      x,
      {static_cast<const T*>(a.first_weight), a.c_in, a.rank, a.c_in},
      {static_cast<const T*>(a.last_weight), a.rank, a.c_out, a.rank},
      make_epilogue<T>(nullptr, a.bias, a.residual, a.y, a.residual_stride, a.y_stride, a.c_out, a.activation),
      a.c_in,
      device,
      stream};
  return products.run(a.configuration);
}

Status run_first(const LowrankConv2dArgs& a, const Device& device, void* stream) {
  PointwiseConv2dArgs first{};
  first.x = a.x;
  first.weight = a.first_weight;
  first.y = a.workspace;
  first.batch = a.batch;
  first.positions = a.in_h * a.in_w;
  first.c_in = a.c_in;
  first.c_out = first.y_stride = a.rank_in;
  first.x_stride = a.x_stride;
  first.dtype = a.dtype;
  first.activation = Activation::identity;
  first.configuration = -1;
  return pointwise_conv2d(first, device, stream);
}

template <class T>
Status run_conv2d(const LowrankConv2dArgs& a, const Device& device, void* stream) {
  const Status first = run_first(a, device, stream);
  if (first.code != 0) return first;
  const Window& w = a.window;
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const ConvWindows<T> windows{static_cast<const T*>(a.workspace), a.rank_in,          a.batch * a.out_h * a.out_w,
                               narrow(a.in_h),                     narrow(a.in_w),     narrow(a.rank_in),
                               narrow(a.out_h),                    narrow(a.out_w),    narrow(w.kernel_h),
                               narrow(w.kernel_w),                 narrow(w.stride_h), narrow(w.stride_w),
                               narrow(w.pad_h),                    narrow(w.pad_w),    narrow(w.dilation_h),
                               narrow(w.dilation_w),               T{}};
  const int64_t depth = w.kernel_h * w.kernel_w * a.rank_in;
  const CoreAndLast<T, ConvWindows<T>> products{
      windows,
      {static_cast<const T*>(a.core_weight), depth, a.rank_out, depth},
      {static_cast<const T*>(a.last_weight), a.rank_out, a.c_out, a.rank_out},
      make_epilogue<T>(nullptr, a.bias, a.residual, a.y, a.residual_stride, a.y_stride, a.c_out, a.activation),
      a.rank_in,
      device,
      stream};
  return products.run(a.configuration);
}

}  // namespace

Status lowrank_linear(const LowrankLinearArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return run_linear<Half>(a, device, stream);
    case DataType::bfloat16: return run_linear<BFloat16>(a, device, stream);
    default: return run_linear<float>(a, device, stream);
  }
}

Status lowrank_conv2d(const LowrankConv2dArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return run_conv2d<Half>(a, device, stream);
    case DataType::bfloat16: return run_conv2d<BFloat16>(a, device, stream);
    default: return run_conv2d<float>(a, device, stream);
  }
}

}  // namespace kernelpress::cuda
