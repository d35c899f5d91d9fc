// 1×1 convolution and the linear layer as one GEMM over pixels.
//
//     y[m, n] = act(scale[n] · Σ_k x[m, k] · s[image(m), k] · weight[n, k] + bias[n] + residual[m, n])
//
//   one block:  tiles blockIdx.x, blockIdx.x + gridDim.x, …                  x_stride
//               while it stores one, the copies of the next are in flight    ├────────────┤
//   ┌──────────┐                                                     pixel m │ c_in │     │   channels_last, or a slice of it
//   │ 1  2  3  │  groups of 8 rows of tiles: blocks that run together            m+1 │ c_in │     │
//   │ 4  5  6  │  share x and weight in the second-level cache
//   └──────────┘
//   Small c_in and c_out (MobileNet's early layers) are bound by memory: x is read once and y written once where c_out fits a tile.
//   Large ones are bound by `mma`, small batches by latency: there K is split among blocks, and `reduce_partials` finishes.
#include "dense.h"

#include <utility>

#include "common/gemm_sources.cuh"
#include "common/gemm_store.cuh"
#include "dense_tiles.h"

namespace kernelpress::cuda {

namespace {

// Squeeze-and-excitation on the way: A's fragments times the scale of their row's image.
template <class Config>
struct InputScale {
  using T = typename Config::T;
  static constexpr int kPerWord = 4 / sizeof(T);

  const T* base;
  int64_t depth;
  int image[Config::kFragmentsM][2];

  __device__ __forceinline__ InputScale(const T* scale, int64_t c_in, int64_t positions, int64_t first_row, int64_t rows)
      : base(scale), depth(c_in) {
#pragma unroll
    for (int m = 0; m < Config::kFragmentsM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + warp_row<Config>() + 16 * m + 8 * half + lane_index() / 4;
        image[m][half] = row < rows ? static_cast<int>(static_cast<uint32_t>(row) / static_cast<uint32_t>(positions)) : 0;
      }
  }

  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int m, int64_t k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = k + (i / 2 * 4 + lane_index() % 4) * kPerWord;
      if (at < depth) a[i] = product(a[i], base + image[m][i % 2] * depth + at, depth - at);
    }
  }

  __device__ __forceinline__ static uint32_t product(uint32_t word, const T* scale, int64_t left) {
    Vector<T, kPerWord> values, factors;
    memcpy(&values, &word, 4);
    if constexpr (Config::kAccess >= 4) {
      factors = *reinterpret_cast<const Vector<T, kPerWord>*>(scale);
    } else {
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) factors[i] = scale[i < left ? i : 0];
    }
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) values[i] = from_float<T>(to_float(values[i]) * to_float(factors[i]));
    memcpy(&word, &values, 4);
    return word;
  }
};

template <class T>
struct DenseProblem {
  Rows<T> x, weight;
  Epilogue<T> epilogue;
  Partials<float> partials;
  const T* input_scale;
  int64_t positions, tiles_m, tiles_n;
  int32_t steps, splits;
};

// `store_offset`: where in shared memory a tile is stored through; 0: where its stages were.
template <class Config, int kBlocks, bool kScaled>
__global__ void __launch_bounds__(Config::kThreads, kBlocks)
    dense_gemm(DenseProblem<typename Config::T> problem, int64_t store_offset) {
  using Source = Rows<typename Config::T>;
  SIMT_DYN_SMEM(shared);
  Pipeline<Config, Source, Source> pipeline(shared, problem.x, problem.weight);
  const uint32_t tiles = static_cast<uint32_t>(problem.tiles_m * problem.tiles_n);
  const int64_t split = blockIdx.z;
  const int64_t first_k = split * problem.steps * Config::kStep;
  const int64_t left = (problem.x.depth - first_k + Config::kStep - 1) / Config::kStep;
  const int steps = static_cast<int>(min(left, static_cast<int64_t>(problem.steps)));
  // A tile's place is computed again where it is needed: registers are short while it is multiplied.
  const auto place = [&](uint32_t index) {
    const TileIndex tile = grouped_tile(index, problem.tiles_m, problem.tiles_n);
    return TileIndex{tile.m * Config::kTileM, tile.n * Config::kTileN};
  };
  const auto start = [&](uint32_t index) {
    const TileIndex first = place(index);
    pipeline.start(first.m, first.n, first_k, steps);
  };
  start(blockIdx.x);
#pragma unroll 1
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    Accumulators<Config> sums;
    sums.clear();
    if constexpr (kScaled) {
      const int64_t first_row = place(index).m;
      pipeline.run(sums, InputScale<Config>(problem.input_scale, problem.x.depth, problem.positions, first_row, problem.x.count));
    } else {
      pipeline.run(sums);
    }
    // Starts the next tile, then stores this one; the other way round where both use the same memory.
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == 0 || store_offset == 0) block_barrier();
      if ((phase == 0) == (store_offset != 0)) {
        if (index + gridDim.x < tiles) start(index + gridDim.x);
        continue;
      }
      const TileIndex first = place(index);
      if (problem.splits > 1) {
        store_partials(sums, problem.partials, split, first.m, first.n);
      } else {
        store_tile(sums, shared + store_offset, problem.epilogue, ConsecutivePixels{first.m, problem.x.count}, first.n);
      }
    }
  }
}

// Widest access that every row of x, weight and input_scale allows: 16 or 4 bytes, or one element.
template <class T>
int widest_access(const PointwiseConv2dArgs& args) {
  const auto allows = [&args](int64_t bytes) {
    for (const void* address : {args.x, args.weight, args.input_scale})
      if (reinterpret_cast<uintptr_t>(address) % bytes != 0) return false;
    return args.x_stride * static_cast<int64_t>(sizeof(T)) % bytes == 0 && args.c_in * static_cast<int64_t>(sizeof(T)) % bytes == 0;
  };
  return allows(16) ? 16 : allows(4) ? 4 : static_cast<int>(sizeof(T));
}

template <class T>
struct DenseLaunch {
  static constexpr DenseTable kTable = dense_table(sizeof(T));

  const PointwiseConv2dArgs& args;
  const Device& device;
  void* stream;
  GemmShape shape;
  DensePlan plan;

  template <int kTile, int kAccess, bool kScaled>
  int run() const {
    constexpr DenseTile t = kTable.tiles[kTile];
    using Config = GemmConfig<T, t.tile_m, t.tile_n, t.step_bytes, t.warps_m, t.warps_n, t.stages, kAccess>;
    static_assert(Config::kStageBytesA + Config::kStageBytesB == dense::stage_bytes(t));
    const DenseProblem<T> problem{
        {static_cast<const T*>(args.x), args.x_stride, shape.m, args.c_in},
        {static_cast<const T*>(args.weight), args.c_in, args.c_out, args.c_in},
        make_epilogue<T>(args.scale, args.bias, args.residual, args.y, args.residual_stride, args.y_stride, args.c_out,
                         args.activation),
        {static_cast<float*>(args.workspace), shape.m, shape.n, partials_pitch(shape.n)},
        static_cast<const T*>(args.input_scale),
        args.positions,
        dense::ceil_div(shape.m, t.tile_m),
        dense::ceil_div(shape.n, t.tile_n),
        static_cast<int32_t>(plan.steps),
        static_cast<int32_t>(plan.splits)};
    static_assert(store_shared_bytes<Config>() == dense::store_bytes(t));
    const int64_t shared = dense::shared_bytes(shape, t, device);
    const int64_t store = dense::stores_aside(shape, t, device) ? dense::stages_bytes(shape, t) : 0;
    const Grid grid{dim3(static_cast<unsigned>(dense::blocks(shape, t, device)), 1, static_cast<unsigned>(plan.splits)),
                    dim3(Config::kThreads), static_cast<size_t>(shared), stream};
    const int code = launch(dense_gemm<Config, t.blocks, kScaled>, grid, problem, store);
    if (code != 0 || plan.splits == 1) return code;
    return launch(reduce_partials<float, T, PlainSums>, reduce_grid<float, T>(problem.partials, stream), problem.partials,
                  plan.splits, problem.epilogue, PlainSums{});
  }

  template <bool kScaled>
  int run_at(int access) const {
    constexpr int kTile = kTable.any_alignment();
    if constexpr (kScaled) {
      if (access == 16) return run<kTile, 16, true>();
    }
    if constexpr (sizeof(T) < 4) {
      if (access < 4) return run<kTile, sizeof(T), kScaled>();
    }
    return run<kTile, 4, kScaled>();
  }

  template <int... kTile>
  int run_aligned(std::integer_sequence<int, kTile...>) const {
    int code = 0;
    ((plan.tile == kTile && (code = run<kTile, 16, false>(), true)) || ...);
    return code;
  }
};

template <class T>
Status launch_dense(const PointwiseConv2dArgs& args, const Device& device, void* stream) {
  constexpr DenseTable kTable = dense_table(sizeof(T));
  const GemmShape shape{args.batch * args.positions, args.c_out, args.c_in * static_cast<int64_t>(sizeof(T))};
  const int access = widest_access<T>(args);
  const bool is_scaled = args.input_scale != nullptr;
  int tile = args.configuration >= 0 ? static_cast<int>(args.configuration) : choose_dense_tile(shape, sizeof(T), device);
  if (access < 16 || is_scaled || tile > kTable.any_alignment()) tile = kTable.any_alignment();
  const DenseLaunch<T> dense{args, device, stream, shape, plan_dense(shape, sizeof(T), tile, device, args.workspace_bytes)};
  Status status{0, "dense_gemm", kTable.tiles[tile].name};
  if (tile < kTable.any_alignment()) {
    status.code = dense.run_aligned(std::make_integer_sequence<int, kTable.any_alignment()>{});
  } else {
    status.code = is_scaled ? dense.template run_at<true>(access) : dense.template run_at<false>(access);
  }
  return status;
}

}  // namespace

Status pointwise_conv2d(const PointwiseConv2dArgs& args, const Device& device, void* stream) {
  switch (args.dtype) {
    case DataType::float16: return launch_dense<Half>(args, device, stream);
    case DataType::bfloat16: return launch_dense<BFloat16>(args, device, stream);
    default: return launch_dense<float>(args, device, stream);
  }
}

}  // namespace kernelpress::cuda
