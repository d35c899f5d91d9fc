// Grouped convolution, channels_last:
//   y[n, p, q, σ(o)] = act(scale[o] · Σ_{r,s,c} w[g, o, r, s, c] · x[n, p·S-P+r·D, q·S-P+s·D, start(g) + c] + bias[o] + residual[…, σ(o)])
//
// σ is the channel shuffle: o = i · C / G + k goes to k · G + i. Every group is an implicit GEMM of its own on tensor cores, rows =
// output pixels, columns = the group's output channels, K = (r, s, c) over the window of input channels that the group reads:
//
//       x  ├──── group 0 ────┼──── group 1 ────┼──── group 2 ────┤        a window begins at a multiple of 16 bytes and may reach
//          ├ window 0 ──┤ ├──── window 1 ──┤ ├──── window 2 ─────┤        into the neighbours: the weights there are zeros. So may
//                                                                         the windows of narrow groups that were merged into one.
//   a tile a block:   block = (pixels, channels of one group); a shuffle scatters single values.
//   whole pixels:     block = pixels; it makes all groups, one after the other, collects them in shared memory in the order of y and
//                     writes whole lines:  [pixels][c_out] floats next to the stages of the main loop.
//
// Memory-bound on the layers of ShuffleNet and ResNeXt (16 … 150 operations a byte, merged zeros included): x comes from memory
// once, y goes there once. Zero times infinity or NaN is NaN: a non-finite value of x reaches the outputs of all groups whose
// windows hold it.
#include "grouped.h"

#include "common/gemm.cuh"
#include "common/gemm_sources.cuh"
#include "common/gemm_store.cuh"
#include "grouped_tiles.h"

namespace kernelpress::cuda {
namespace {

template <class T, int kPixels, int kChannels, int kAccess>
using GroupedConfig = GemmConfig<T, kPixels, kChannels, kGroupedStepBytes, 2, kChannels == 16 ? 1 : 2, kGroupedStages, kAccess>;

// Where a channel of the convolution goes: i · per_group + k → k · groups + i.
struct ShuffledChannels {
  static constexpr bool kContiguous = false;
  int32_t groups, per_group;
  __device__ __forceinline__ int64_t operator()(int64_t channel) const {
    const uint32_t at = static_cast<uint32_t>(channel), group = at / per_group;
    return (at - group * per_group) * groups + group;
  }
};

// What all blocks share.
template <class T>
struct GroupedProblem {
  GroupedConv2dArgs args;
  Epilogue<T> epilogue;
  int32_t tiles_per_group, tiles, steps;
  int32_t collected_at, pitch;  // where whole pixels are collected in shared memory, in bytes; their distance, in floats
};

// The columns of one tile: channels of the convolution, all of one group.
struct GroupColumns {
  int64_t group, first, end;
};

template <class Config>
__device__ __forceinline__ GroupColumns columns_of(const GroupedProblem<typename Config::T>& problem, int tile) {
  const GroupedConv2dArgs& a = problem.args;
  const int64_t group = tile / problem.tiles_per_group;
  return {group, group * a.group_out + tile % problem.tiles_per_group * Config::kTileN, min((group + 1) * a.group_out, a.c_out)};
}

// The operands of one group after the other.
template <class T>
struct GroupOperands {
  ConvWindows<T> windows;
  Rows<T> filters;

  __device__ __forceinline__ explicit GroupOperands(const GroupedConv2dArgs& a) {
    const Window& w = a.geometry;
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    windows = {nullptr, a.x_stride, a.batch * a.out_h * a.out_w, narrow(a.in_h), narrow(a.in_w), narrow(a.window), narrow(a.out_h),
               narrow(a.out_w), narrow(w.kernel_h), narrow(w.kernel_w), narrow(w.stride_h), narrow(w.stride_w), narrow(w.pad_h),
               narrow(w.pad_w), narrow(w.dilation_h), narrow(w.dilation_w), T{}};
    filters.base = static_cast<const T*>(a.weight);
    filters.stride = filters.depth = w.kernel_h * w.kernel_w * a.window;
  }
  __device__ __forceinline__ void turn_to(const GroupedConv2dArgs& a, const GroupColumns& columns) {
    const int64_t own = columns.group * a.group_in / a.window_step * a.window_step;
    windows.base = static_cast<const T*>(a.x) + min(own, a.c_in - a.window);
    filters.count = columns.end;
  }
};

template <class Config>
using GroupedPipeline = Pipeline<Config, ConvWindows<typename Config::T>, Rows<typename Config::T>>;

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) grouped_one_tile(GroupedProblem<typename Config::T> problem, ShuffledChannels channels) {
  SIMT_DYN_SMEM(shared);
  const GroupedConv2dArgs& a = problem.args;
  const GroupColumns columns = columns_of<Config>(problem, static_cast<int>(blockIdx.x % problem.tiles));
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x / problem.tiles) * Config::kTileM;
  GroupOperands<typename Config::T> operands(a);
  operands.turn_to(a, columns);
  GroupedPipeline<Config> pipeline(shared, operands.windows, operands.filters);
  pipeline.start(first_pixel, columns.first, 0, problem.steps);
  Accumulators<Config> sums;
  sums.clear();
  pipeline.run(sums);
  block_barrier();
  problem.epilogue.channels = columns.end;
  const ConsecutivePixels pixels{first_pixel, a.batch * a.out_h * a.out_w};
  if (channels.groups == 1)
    store_tile<Config>(sums, shared, problem.epilogue, pixels, columns.first);
  else
    store_tile<Config>(sums, shared, problem.epilogue, pixels, columns.first, channels);
}

// Puts a tile's scaled and biased sums where they belong among the whole pixels' channels.
template <class Config>
__device__ __forceinline__ void collect(const Accumulators<Config>& sums, float* collected, int pitch, const Epilogue<typename Config::T>& epilogue,
                                        const GroupColumns& columns, const ShuffledChannels& channels) {
  const int lane = lane_index(), row = warp_row<Config>() + lane / 4;
#pragma unroll
  for (int n = 0; n < Config::kFragmentsN; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t channel = columns.first + warp_column<Config>() + 8 * n + 2 * (lane % 4) + j;
      if (channel >= columns.end) continue;
      const float scale = epilogue.scale == nullptr ? 1.0f : epilogue.scale[channel];
      const float bias = epilogue.bias == nullptr ? 0.0f : epilogue.bias[channel];
      float* const target = collected + channels(channel);
#pragma unroll
      for (int m = 0; m < Config::kFragmentsM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          target[(row + 16 * m + 8 * half) * pitch] = fmaf(sums.value[m][n][2 * half + j], scale, bias);
    }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) grouped_whole_pixels(GroupedProblem<typename Config::T> problem, ShuffledChannels channels) {
  using T = typename Config::T;
  constexpr int kVector = Element<T>::kPer16Bytes;
  SIMT_DYN_SMEM(shared);
  const GroupedConv2dArgs& a = problem.args;
  float* const collected = reinterpret_cast<float*>(shared + problem.collected_at);
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x) * Config::kTileM;
  GroupOperands<T> operands(a);
  GroupedPipeline<Config> pipeline(shared, operands.windows, operands.filters);
  GroupColumns columns = columns_of<Config>(problem, 0);
  operands.turn_to(a, columns);
  pipeline.start(first_pixel, columns.first, 0, problem.steps);
#pragma unroll 1
  for (int tile = 0; tile < problem.tiles; ++tile) {
    Accumulators<Config> sums;
    sums.clear();
    pipeline.run(sums);
    block_barrier();
    const GroupColumns done = columns;
    if (tile + 1 < problem.tiles) {
      columns = columns_of<Config>(problem, tile + 1);
      operands.turn_to(a, columns);
      pipeline.start(first_pixel, columns.first, 0, problem.steps);  // its copies fly while this tile is collected
    }
    collect<Config>(sums, collected, problem.pitch, problem.epilogue, done, channels);
  }
  block_barrier();
  ChannelTerms<kVector> applied;
#pragma unroll
  for (int i = 0; i < kVector; ++i) applied.scale[i] = 1.0f, applied.bias[i] = 0.0f;
  const ConsecutivePixels pixels{first_pixel, a.batch * a.out_h * a.out_w};
  const int vectors = static_cast<int>((a.c_out + kVector - 1) / kVector);
  for (int at = static_cast<int>(threadIdx.x); at < Config::kTileM * vectors; at += Config::kThreads) {
    const int row = at / vectors, channel = at % vectors * kVector;
    const int64_t pixel = pixels(row);
    if (pixel < 0) break;
    float values[kVector];
    const float* const source = collected + row * problem.pitch + channel;
    if (channel + kVector <= a.c_out) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const Vector<float, 4> four = *reinterpret_cast<const Vector<float, 4>*>(source + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] = four[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = channel + i < a.c_out ? source[i] : 0.0f;
    }
    finish(problem.epilogue, applied, values, pixel, channel);
  }
}

template <class T>
struct GroupedLaunch {
  GroupedProblem<T> problem;
  ShuffledChannels channels;
  void* stream;

  template <class Config>
  Grid grid(int64_t tiles, int64_t shared_bytes) const {
    const GroupedConv2dArgs& a = problem.args;
    const int64_t blocks = (a.batch * a.out_h * a.out_w + Config::kTileM - 1) / Config::kTileM * tiles;
    return {dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), static_cast<size_t>(shared_bytes), stream};
  }
  template <class Config>
  int one_tile() const {
    const int64_t stages = GroupedPipeline<Config>::bytes(problem.steps), store = store_shared_bytes<Config>();
    return launch(grouped_one_tile<Config>, grid<Config>(problem.tiles, stages > store ? stages : store), problem, channels);
  }
  template <class Config>
  int whole_pixels() {
    problem.collected_at = static_cast<int32_t>(GroupedPipeline<Config>::bytes(problem.steps));
    problem.pitch = static_cast<int32_t>(grouped_row_pitch(problem.args.c_out));
    const int64_t collected = static_cast<int64_t>(Config::kTileM) * problem.pitch * static_cast<int64_t>(sizeof(float));
    return launch(grouped_whole_pixels<Config>, grid<Config>(1, problem.collected_at + collected), problem, channels);
  }
};

template <class T>
Status launch_grouped(const GroupedConv2dArgs& a, const Device& device, void* stream) {
  const int64_t depth = a.geometry.kernel_h * a.geometry.kernel_w * a.window;
  const bool aligned = a.window_step > 1 && is_aligned(a.x) && is_aligned<T>(a.x_stride) && is_aligned(a.weight) && is_aligned<T>(a.window);
  if (a.configuration >= kGroupedTileCount) return {1, "grouped_conv2d", "none"};
  int64_t index = a.configuration >= 0 ? a.configuration : choose_grouped_tile(a, device);
  if (grouped_shared_bytes(kGroupedTiles[index], a.c_out) > device.shared_bytes) return {1, "grouped_conv2d", kGroupedTiles[index].name};
  if (!aligned) index = kGroupedCopiedByValue;
  const GroupedTile& tile = kGroupedTiles[index];
  GroupedProblem<T> problem{};
  problem.args = a;
  problem.epilogue = make_epilogue<T>(a.scale, a.bias, a.residual, a.y, a.residual_stride, a.y_stride, a.c_out, a.activation);
  problem.tiles_per_group = static_cast<int32_t>(grouped_tiles_per_group(tile, a.group_out));
  problem.tiles = static_cast<int32_t>(a.groups) * problem.tiles_per_group;
  problem.steps = static_cast<int32_t>((depth * static_cast<int64_t>(sizeof(T)) + kGroupedStepBytes - 1) / kGroupedStepBytes);
  const ShuffledChannels channels{static_cast<int32_t>(a.shuffle), static_cast<int32_t>(a.c_out / a.shuffle)};
  GroupedLaunch<T> ready{problem, channels, stream};
  Status status{0, "grouped_conv2d", aligned ? tile.name : "64 pixels x 32 channels, copied value by value"};
  if (!aligned) {
    status.code = ready.template one_tile<GroupedConfig<T, 64, 32, sizeof(T)>>();
    return status;
  }
  switch (index) {
    case 0: status.code = ready.template one_tile<GroupedConfig<T, 64, 16, 16>>(); break;
    case 1: status.code = ready.template one_tile<GroupedConfig<T, 64, 32, 16>>(); break;
    case 2: status.code = ready.template one_tile<GroupedConfig<T, 128, 64, 16>>(); break;
    default: status.code = ready.template whole_pixels<GroupedConfig<T, 64, 32, 16>>(); break;
  }
  return status;
}

}  // namespace

Status grouped_conv2d(const GroupedConv2dArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return launch_grouped<Half>(a, device, stream);
    case DataType::bfloat16: return launch_grouped<BFloat16>(a, device, stream);
    default: return launch_grouped<float>(a, device, stream);
  }
}

}  // namespace kernelpress::cuda
