// The product that int8_matmul and int8_conv2d share:    y[m, n] = epilogue(Σ_k A[m, k] · W[n, k] − zero_point · Σ_k W[n, k])
//
//   A: rows of a matrix, or windows of an image            −zero_point · Σ W (`corrections`) is added to a column's sums, so that
//      │                                                   a zero point for all of x costs next to nothing; padding outside of an
//      ▼  cp.async, ldmatrix                               image is the zero point itself, and the correction takes it off again
//   mma.m16n8k32.s8 ◀── W [n][k]
//      │ int32, exact
//      ▼
//   float(sum) · row_scale[m]  ─▶  epilogue in float  ─▶  int8, fp16, bf16 or fp32: chosen at run time, behind one main loop
//
// Blocks take tile after tile; where there are few tiles, K is split among blocks and `reduce_partials` finishes.
#pragma once

#include <utility>

#include "common/gemm_sources.cuh"
#include "common/gemm_store.cuh"
#include "int8.h"
#include "int8_tiles.h"

namespace kernelpress::cuda {

// The epilogue before it is known what it writes.
struct Int8Output {
  const float *scale, *bias;
  const void* residual;
  void* y;
  int64_t residual_stride, y_stride, channels;
  Activation activation;
  DataType dtype;
  bool aligned;
  float inverse_scale, zero_point, residual_scale, residual_zero_point;

  template <class Out>
  __host__ __device__ __forceinline__ Epilogue<Out> of() const {
    return {scale,    bias,          static_cast<const Out*>(residual), static_cast<Out*>(y), residual_stride, y_stride, channels, activation, aligned,
            inverse_scale, zero_point, residual_scale,                     residual_zero_point};
  }
};

// Calls `function(Out{})` with the element type of a dtype.
template <class Function>
__host__ __device__ __forceinline__ auto with_output_type(DataType dtype, const Function& function) {
  switch (dtype) {
    case DataType::int8: return function(int8_t{});
    case DataType::float16: return function(Half{});
    case DataType::bfloat16: return function(BFloat16{});
    default: return function(float{});
  }
}

template <class Args>
Int8Output int8_output(const Args& args) {
  const bool aligned = with_output_type(args.output, [&args](auto out) {
    using Out = decltype(out);
    return make_epilogue<Out>(args.scale, args.bias, args.residual, args.y, args.residual_stride, args.y_stride, args.c_out, args.activation).aligned;
  });
  return {args.scale,      args.bias,       args.residual,
          args.y,          args.residual_stride, args.y_stride,
          args.c_out,      args.activation, args.output,
          aligned,         static_cast<float>(1.0 / args.output_scale), static_cast<float>(args.output_zero_point),
          static_cast<float>(args.residual_scale), static_cast<float>(args.residual_zero_point)};
}

// What differs from row to row: its scale, and the correction for its zero point. Absent: one scale for all is in the epilogue's.
struct RowTerms {
  const float* scale;
  const int32_t *zero_point, *weight_sums;
  int64_t channels;

  template <int kCount>
  __device__ __forceinline__ void operator()(const int32_t (&sums)[kCount], float (&values)[kCount], int64_t row, int64_t channel) const {
    int32_t shifted[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) shifted[i] = sums[i];
    if (zero_point != nullptr) {
      const uint32_t shift = static_cast<uint32_t>(zero_point[row]);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (channel + i < channels)
          shifted[i] = static_cast<int32_t>(static_cast<uint32_t>(shifted[i]) - shift * static_cast<uint32_t>(weight_sums[channel + i]));
    }
    const float factor = scale == nullptr ? 1.0f : scale[row];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(shifted[i]) * factor;
  }
};

template <class Source>
struct Int8Problem {
  Source x;
  Rows<int8_t> weight;
  const int32_t* corrections;
  RowTerms rows;
  Int8Output output;
  Partials<int32_t> partials;
  int64_t tiles_m, tiles_n;
  int32_t tiles, steps, steps_per_split, splits;
};

namespace int8 {

// Adds a column's correction to all its sums: after the main loop, where registers are free for it.
template <class Config>
__device__ __forceinline__ void correct(Accumulators<Config>& sums, const int32_t* corrections, int64_t first_column, int64_t columns) {
  const int64_t column = first_column + warp_column<Config>() + lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < Config::kFragmentsN; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t value = column + 8 * n + i < columns ? corrections[column + 8 * n + i] : 0;
#pragma unroll
      for (int m = 0; m < Config::kFragmentsM; ++m) {
        sums.value[m][n][i] += value;
        sums.value[m][n][i + 2] += value;
      }
    }
}

}  // namespace int8

// Whether a block has the registers to store a tile while the copies of its next one are in flight.
template <class Config>
inline constexpr bool kStartsAhead = Config::kAccess == 16 && Config::kFragmentsM * Config::kFragmentsN <= 16;

// `store_offset`: where in shared memory a tile is stored through; 0: where its stages were.
template <class Config, int kBlocks, class Source>
__global__ void __launch_bounds__(Config::kThreads, kBlocks) int8_gemm(Int8Problem<Source> problem, int64_t store_offset) {
  SIMT_DYN_SMEM(shared);
  Pipeline<Config, Source, Rows<int8_t>> pipeline(shared, problem.x, problem.weight);
  const int split = static_cast<int>(blockIdx.z), first_step = split * problem.steps_per_split;
  const int steps = min(problem.steps - first_step, problem.steps_per_split);
  int row_tile, column_tile;
  const auto start = [&](int index) {
    const TileIndex tile = grouped_tile(index, problem.tiles_m, problem.tiles_n);
    row_tile = static_cast<int>(tile.m);
    column_tile = static_cast<int>(tile.n);
    pipeline.start(tile.m * Config::kTileM, tile.n * Config::kTileN, static_cast<int64_t>(first_step) * Config::kStep, steps);
  };
  start(static_cast<int>(blockIdx.x));
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < problem.tiles; index += static_cast<int>(gridDim.x)) {
    const int64_t first_row = static_cast<int64_t>(row_tile) * Config::kTileM;
    const int64_t first_column = static_cast<int64_t>(column_tile) * Config::kTileN;
    Accumulators<Config> sums;
    sums.clear();
    pipeline.run(sums);
    if (split == 0 && problem.corrections != nullptr) int8::correct(sums, problem.corrections, first_column, problem.output.channels);
    const int next = index + static_cast<int>(gridDim.x);
    const bool starts_ahead = kStartsAhead<Config> && store_offset != 0;
    block_barrier();
    if (starts_ahead && next < problem.tiles) start(next);
    if (problem.splits > 1) {
      store_partials(sums, problem.partials, split, first_row, first_column);
    } else {
      with_output_type(problem.output.dtype, [&](auto out) {
        store_tile(sums, shared + store_offset, problem.output.template of<decltype(out)>(), ConsecutivePixels{first_row, problem.x.count},
                   first_column, SameChannels{}, problem.rows);
      });
    }
    if (!starts_ahead && next < problem.tiles) {
      block_barrier();
      start(next);
    }
  }
}

// Widest access that every row of x allows: 16, 4 or 1 byte; W's rows allow 16.
inline int int8_access(const void* x, int64_t x_stride, int64_t c_in) {
  const uint64_t all = reinterpret_cast<uintptr_t>(x) | static_cast<uint64_t>(x_stride) | static_cast<uint64_t>(c_in);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
}

// How many of kInt8Tiles there are for a source.
template <class Source>
inline constexpr int kTileCount = std::is_same_v<Source, Rows<int8_t>> ? kInt8TileCount : kInt8WindowTileCount;

template <class Source>
struct Int8Launch {
  const Device& device;
  void* stream;
  GemmShape shape;
  DensePlan plan;
  Int8Problem<Source> problem;  // without tiles and splits

  template <int kTile, int kAccess>
  int run() {
    constexpr DenseTile t = kInt8Tiles[kTile];
    using Config = GemmConfig<int8_t, t.tile_m, t.tile_n, t.step_bytes, t.warps_m, t.warps_n, t.stages, kAccess>;
    problem.tiles_m = dense::ceil_div(shape.m, t.tile_m);
    problem.tiles_n = dense::ceil_div(shape.n, t.tile_n);
    problem.tiles = static_cast<int32_t>(problem.tiles_m * problem.tiles_n);
    problem.steps = static_cast<int32_t>(dense::steps(shape, t));
    static_assert(store_shared_bytes<Config>() == dense::store_bytes(t));
    const int64_t shared = dense::shared_bytes(shape, t, device);
    const int64_t store = kStartsAhead<Config> && dense::stores_aside(shape, t, device) ? dense::stages_bytes(shape, t) : 0;
    const Grid grid{dim3(static_cast<unsigned>(dense::blocks(shape, t, device)), 1, static_cast<unsigned>(plan.splits)),
                    dim3(Config::kThreads), static_cast<size_t>(shared), stream};
    return launch(int8_gemm<Config, t.blocks, Source>, grid, problem, store);
  }

  template <int... kTile>
  int run_aligned(std::integer_sequence<int, kTile...>) {
    int code = 0;
    ((plan.tile == kTile && (code = run<kTile, kInt8Tiles[kTile].any_alignment ? 4 : 16>(), true)) || ...);
    return code;
  }

  int operator()(int access) {
    problem.steps_per_split = static_cast<int32_t>(plan.steps);
    problem.splits = static_cast<int32_t>(plan.splits);
    const int code = access < 4 ? run<kInt8AnyAlignment, 1>() : run_aligned(std::make_integer_sequence<int, kTileCount<Source>>{});
    if (code != 0 || plan.splits == 1) return code;
    return with_output_type(problem.output.dtype, [this](auto out) {
      using Out = decltype(out);
      return launch(reduce_partials<int32_t, Out, RowTerms>, reduce_grid<int32_t, Out>(problem.partials, stream), problem.partials,
                    plan.splits, problem.output.template of<Out>(), problem.rows);
    });
  }
};

// Launches a product whose A is `source`; `depth`: its K.
template <class Source, class Args>
Status launch_int8(const char* kernel, const Args& args, const Source& source, int64_t rows, int64_t depth, const RowTerms& terms,
                   const Device& device, void* stream) {
  const GemmShape shape{rows, args.c_out, depth};
  const int access = int8_access(args.x, args.x_stride, args.c_in);
  int tile = args.configuration >= 0 ? static_cast<int>(args.configuration) : choose_int8_tile(shape, kTileCount<Source>, device);
  if (access < 16 || tile >= kTileCount<Source>) tile = kInt8AnyAlignment;
  const DensePlan plan = plan_int8(shape, tile, device, args.workspace_bytes);
  Int8Launch<Source> launch_product{device, stream, shape, plan,
                                    {source,
                                     {static_cast<const int8_t*>(args.weight), args.weight_stride, args.c_out, depth},
                                     args.corrections,
                                     terms,
                                     int8_output(args),
                                     {static_cast<int32_t*>(args.workspace), rows, args.c_out, partials_pitch(args.c_out)},
                                     0, 0, 0, 0, 0, 0}};
  return {launch_product(access), kernel, kInt8Tiles[tile].name};
}

}  // namespace kernelpress::cuda
