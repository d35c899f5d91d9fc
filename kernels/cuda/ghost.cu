// Ghost convolution, channels_last.    p = act(conv(x, W) + b)      y = concat(p, cheap_act(depthwise(p, w) + c)) + residual
//
//     y, one pixel:  │ p: primary channels │ cheap: kept channels │ ◀── both written where they belong, nothing is concatenated
//
// The fused kernel (ghost_fused.cuh) computes both from a tile of p in shared memory. Where it does not fit or does not pay, p is
// written into y by a GEMM over windows of x (gemm.cuh), and the depthwise family's kernel reads it there and writes the rest. It
// reads p without a residual, and adds its own ahead of the activation: so a residual comes at last, but for cheap channels without
// activation.
#include "common/gemm_store.cuh"
#include "depthwise.h"
#include "ghost_fused.cuh"

namespace kernelpress::cuda {
namespace {

using namespace ghost;

template <class T, int kTileM, int kTileN, int kWarpsM, int kAccess = 16>
using Gemm = GemmConfig<T, kTileM, kTileN, kGhostStepBytes, kWarpsM, kGhostThreads / 32 / kWarpsM, kGhostStages, kAccess>;

template <class Config>
using WindowProducts = Pipeline<Config, ConvWindows<typename Config::T>, Rows<typename Config::T>>;

// p into the first channels of y.
template <class Config>
__global__ void __launch_bounds__(kGhostThreads)
    ghost_primary(const ConvWindows<typename Config::T> windows, const Rows<typename Config::T> weights,
                  const Epilogue<typename Config::T> epilogue) {
  SIMT_DYN_SMEM(shared);
  const int64_t tiles_n = (weights.count + Config::kTileN - 1) / Config::kTileN;
  const int64_t row = blockIdx.x / tiles_n * Config::kTileM, channel = blockIdx.x % tiles_n * Config::kTileN;
  Accumulators<Config> sums;
  sums.clear();
  WindowProducts<Config> products(shared, windows, weights);
  products.start(row, channel, 0, static_cast<int>((weights.depth + Config::kStep - 1) / Config::kStep));
  products.run(sums);
  block_barrier();
  store_tile(sums, shared, epilogue, ConsecutivePixels{row, windows.count}, channel);
}

constexpr int kAddThreads = 256;

// y += residual, in the first `channels` channels of every pixel; kCount of them a thread.
template <class T, int kCount>
__global__ void __launch_bounds__(kAddThreads)
    ghost_add(T* y, const T* residual, int64_t pixels, int64_t channels, int64_t y_stride, int64_t residual_stride) {
  const int64_t vectors = channels / kCount, index = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (index >= pixels * vectors) return;
  const int64_t pixel = index / vectors, channel = index % vectors * kCount;
  auto* target = reinterpret_cast<Vector<T, kCount>*>(y + pixel * y_stride + channel);
  float values[kCount], others[kCount];
  to_float(*target, values);
  to_float(*reinterpret_cast<const Vector<T, kCount>*>(residual + pixel * residual_stride + channel), others);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] += others[i];
  *target = from_float<T>(values);
}

unsigned blocks_for(int64_t count, int64_t each) { return static_cast<unsigned>(ceil_div(count, each)); }

template <class Config>
int launch_primary(const GhostConv2dArgs& a, void* stream) {
  using T = typename Config::T;
  const Window& w = a.window;
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const ConvWindows<T> windows{static_cast<const T*>(a.x), a.x_stride,        a.batch * a.out_h * a.out_w,
                               narrow(a.in_h),             narrow(a.in_w),     narrow(a.c_in),
                               narrow(a.out_h),            narrow(a.out_w),    narrow(w.kernel_h),
                               narrow(w.kernel_w),         narrow(w.stride_h), narrow(w.stride_w),
                               narrow(w.pad_h),            narrow(w.pad_w),    narrow(w.dilation_h),
                               narrow(w.dilation_w),       T{}};
  const int64_t depth = w.kernel_h * w.kernel_w * a.c_in;
  const Rows<T> weights{static_cast<const T*>(a.primary_weight), depth, a.primary, depth};
  const Epilogue<T> epilogue =
      make_epilogue<T>(nullptr, a.primary_bias, nullptr, a.y, 0, a.y_stride, a.primary, a.activation);
  const int64_t tiles = ceil_div(windows.count, Config::kTileM) * ceil_div(a.primary, Config::kTileN);
  const int64_t shared = larger(WindowProducts<Config>::bytes(ceil_div(depth, Config::kStep)), store_shared_bytes<Config>());
  const Grid grid{dim3(static_cast<unsigned>(tiles)), dim3(kGhostThreads), static_cast<size_t>(shared), stream};
  return launch(&ghost_primary<Config>, grid, windows, weights, epilogue);
}

bool adds_with_cheap(const GhostConv2dArgs& a) { return a.kept > 0 && a.cheap_activation == Activation::identity; }

// p, read from y, to the channels after it.
Status launch_cheap(const GhostConv2dArgs& a, int64_t element, const Device& device, void* stream) {
  const int64_t offset = a.primary * element;
  DepthwiseConv2dArgs cheap{};
  cheap.x = a.y;
  cheap.weight = a.cheap_weight;
  cheap.bias = a.cheap_bias;
  if (a.residual != nullptr && adds_with_cheap(a)) cheap.residual = static_cast<const unsigned char*>(a.residual) + offset;
  cheap.y = static_cast<unsigned char*>(a.y) + offset;
  cheap.batch = a.batch;
  cheap.in_h = cheap.out_h = a.out_h;
  cheap.in_w = cheap.out_w = a.out_w;
  cheap.channels = a.kept / a.multiplier;
  cheap.multiplier = a.multiplier;
  cheap.x_stride = cheap.y_stride = a.y_stride;
  cheap.residual_stride = a.residual_stride;
  cheap.window = {a.cheap_h, a.cheap_w, 1, 1, a.cheap_h / 2, a.cheap_w / 2, 1, 1};
  cheap.dtype = a.dtype;
  cheap.activation = a.cheap_activation;
  cheap.configuration = -1;
  return depthwise_conv2d(cheap, device, stream);
}

template <class T>
int launch_add(const GhostConv2dArgs& a, void* stream) {
  T* const y = static_cast<T*>(a.y);
  const T* const residual = static_cast<const T*>(a.residual);
  const int64_t channels = adds_with_cheap(a) ? a.primary : a.primary + a.kept;
  const int64_t pixels = a.batch * a.out_h * a.out_w, bytes = kGhostVector * static_cast<int64_t>(sizeof(T));
  const bool fours = channels % kGhostVector == 0 && a.y_stride % kGhostVector == 0 && a.residual_stride % kGhostVector == 0 &&
                     is_multiple(y, bytes) && is_multiple(residual, bytes);
  const int64_t vectors = pixels * (fours ? channels / kGhostVector : channels);
  const Grid grid{dim3(blocks_for(vectors, kAddThreads)), dim3(kAddThreads), 0, stream};
  return launch(fours ? &ghost_add<T, kGhostVector> : &ghost_add<T, 1>, grid, y, residual, pixels, channels, a.y_stride,
                a.residual_stride);
}

template <class T>
Status two_kernels(const GhostConv2dArgs& a, const Device& device, void* stream) {
  constexpr int64_t kElement = sizeof(T);
  const bool wide = is_multiple(a.x, 16) && is_multiple(a.primary_weight, 16) && a.x_stride * kElement % 16 == 0 && a.c_in * kElement % 16 == 0;
  const char* const name = kGhostTiles[kGhostTwoKernels].name;
  const int code = wide ? launch_primary<Gemm<T, 128, 64, 2>>(a, stream) : launch_primary<Gemm<T, 128, 64, 2, sizeof(T)>>(a, stream);
  if (code != 0) return {code, "ghost_primary", name};
  if (a.kept > 0) {
    const Status cheap = launch_cheap(a, kElement, device, stream);
    if (cheap.code != 0) return cheap;
  }
  if (a.residual == nullptr) return {0, "ghost_primary", name};
  return {launch_add<T>(a, stream), "ghost_add", name};
}

template <class Config>
Status one_kernel(const GhostConv2dArgs& a, const GhostTile& tile, void* stream) {
  const int64_t tiles = ceil_div(a.out_h, tile.tile_h) * ceil_div(a.out_w, tile.tile_w);
  const int64_t blocks = a.batch * tiles * ceil_div(a.primary, Config::kTileN);
  const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(kGhostThreads),
                  static_cast<size_t>(shared_bytes(tile, a.c_in, sizeof(typename Config::T))), stream};
  return {launch(&ghost_fused<Config>, grid, a, tile), "ghost_fused", tile.name};
}

template <class T>
Status run(const GhostConv2dArgs& a, const Device& device, void* stream) {
  int64_t index = a.configuration < 0 ? choose_ghost_tile(a, device) : a.configuration;
  if (!ghost_is_fusible(a)) index = kGhostTwoKernels;
  const GhostTile& tile = kGhostTiles[index];
  if (index == kGhostTwoKernels) return two_kernels<T>(a, device, stream);
  if (tile.rows == 64) return one_kernel<Gemm<T, 64, 32, 2>>(a, tile, stream);
  if (tile.channels == 16) return one_kernel<Gemm<T, 128, 16, 4>>(a, tile, stream);
  if (tile.channels == 32) return one_kernel<Gemm<T, 128, 32, 4>>(a, tile, stream);
  return one_kernel<Gemm<T, 128, 64, 2>>(a, tile, stream);
}

}  // namespace

Status ghost_conv2d(const GhostConv2dArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return run<Half>(a, device, stream);
    case DataType::bfloat16: return run<BFloat16>(a, device, stream);
    default: return run<float>(a, device, stream);
  }
}

}  // namespace kernelpress::cuda
