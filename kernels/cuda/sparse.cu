// Convolutions and matrix products whose weight is block-CSR: the work follows the non-zero blocks.
//
//     y[m, n] = act(scale[n] · Σ_blocks Σ_k x[window(m, block), k] · block[n, k] + bias[n] + residual[m, n])
//
//   row of blocks    ▓ · · ▓ · ▓ · ·      one item: kTileM pixels × one row of blocks (or a segment of a long one)
//                    · · · · · · · ·      its K is that row's blocks, one after the other: sparse_sources.cuh gathers their
//                    ▓ ▓ ▓ ▓ ▓ ▓ ▓ ▓      channels of x, the blocks themselves lie in memory as they are multiplied
//   items: longest rows first, groups of pixels outside, so that x stays in the second-level cache while all rows of blocks read it;
//   a block takes every gridDim.x-th, and while it stores one the copies of the next are in flight.
//   Segments leave partial sums, which `sparse_reduce` adds in their order.
//
// An item reads kTileM × c of x and r × c weights for r · kTileM · c products: with r = 64 and kTileM = 128 in bf16, 43 products
// and sums a byte. What bounds it on large problems is the second-level cache.
#include "sparse.h"

#include <utility>

#include "common/gemm_store.cuh"
#include "sparse_sources.cuh"
#include "sparse_tiles.h"

namespace kernelpress::cuda {

namespace {

constexpr int kSparseStepBytes = 128;

// A row of blocks, or a part of it. `slot` is where its sums go, -1 for the output itself.
struct alignas(16) SparseItem {
  int32_t row, first, count, slot;
};

struct alignas(16) SparseSplit {
  int32_t row, first_slot, slots, unused;
};

// Where results go; Out is known to the kernel for floating T, and is `out` for int8.
struct SparseOutput {
  Epilogue<float> epilogue;  // of the output's dtype, whatever the pointers say
  DataType out;

  template <class Out>
  __device__ __forceinline__ Epilogue<Out> typed(int64_t channels) const {
    return {epilogue.scale, epilogue.bias, reinterpret_cast<const Out*>(epilogue.residual), reinterpret_cast<Out*>(epilogue.y),
            epilogue.residual_stride, epilogue.y_stride, min(epilogue.channels, channels), epilogue.activation, epilogue.aligned};
  }

  // Calls `use` with the epilogue of the first `channels` channels.
  template <class T, class Use>
  __device__ __forceinline__ void visit(int64_t channels, const Use& use) const {
    if constexpr (!std::is_same_v<T, int8_t>) {
      use(typed<T>(channels));
    } else if (out == DataType::float32) {
      use(typed<float>(channels));
    } else if (out == DataType::float16) {
      use(typed<Half>(channels));
    } else {
      use(typed<BFloat16>(channels));
    }
  }
};

template <class T, class Source>
struct SparseProblem {
  Source x;
  BlockValues<T> blocks;
  SparseOutput output;
  const SparseItem* items;
  typename Element<T>::Accumulator* workspace;  // [slots][pixels][rows of a block]
  int64_t pixels;
  uint32_t tiles, segments, group;              // `group` tiles of pixels go through all segments together
};

struct SparsePlace {
  uint32_t tile, segment;
};

__device__ __forceinline__ SparsePlace sparse_place(uint32_t index, uint32_t tiles, uint32_t segments, uint32_t group) {
  const uint32_t whole = group * segments, first = index / whole * group, within = index % whole;
  const uint32_t rows = min(tiles - first, group);
  return {first + within % rows, within / rows};
}

template <class Config, class Source, int kBlocks>
__global__ void __launch_bounds__(Config::kThreads, kBlocks)
    sparse_gemm(const SparseProblem<typename Config::T, Source> problem) {
  using T = typename Config::T;
  using Sum = typename Config::Accumulator;
  SIMT_DYN_SMEM(shared);
  // `start` fills all stages but the last: until the next item's first step the store has that one.
  unsigned char* const staging = shared + (Config::kStages - 1) * (Config::kStageBytesA + Config::kStageBytesB);
  Source x = problem.x;
  BlockValues<T> values = problem.blocks;
  const int64_t block_size = static_cast<int64_t>(values.rows) << values.log2_block;
  const uint32_t all = problem.tiles * problem.segments;
  Pipeline<Config, Source, BlockValues<T>> pipeline(shared, x, values);
  pipeline.start(0, 0, 0, 0);
  SparseItem item{}, next{};
  int64_t first_pixel = 0, next_pixel = 0;
  // Each turn multiplies one item, begins the next, and stores the one; the first turn has none to multiply.
#pragma unroll 1
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    if (index < all) {
      const SparsePlace place = sparse_place(index, problem.tiles, problem.segments, problem.group);
      next = load_16<SparseItem>(problem.items + place.segment);
      next_pixel = static_cast<int64_t>(place.tile) * Config::kTileM;
    }
    Accumulators<Config> sums;
    sums.clear();
    pipeline.run(sums);
    block_barrier();
    if (index < all) {
      x.list.columns = problem.x.list.columns + next.first;
      x.list.count = values.count = next.count;
      values.base = problem.blocks.base + next.first * block_size;
      const int64_t depth = static_cast<int64_t>(next.count) << values.log2_block;
      pipeline.start(next_pixel, 0, 0, static_cast<int>((depth + Config::kStep - 1) / Config::kStep));
    }
    if (index != blockIdx.x) {
      if (item.slot >= 0) {
        const Partials<Sum> partials{problem.workspace, problem.pixels, values.rows, values.rows};
        store_partials(sums, partials, item.slot, first_pixel, 0);
      } else {
        const int64_t channel = static_cast<int64_t>(item.row) * values.rows;
        problem.output.template visit<T>(channel + values.rows, [&](const auto& epilogue) {
          store_tile(sums, staging, epilogue, ConsecutivePixels{first_pixel, problem.pixels}, channel);
        });
      }
    }
    if (index >= all) return;
    item = next;
    first_pixel = next_pixel;
  }
}

constexpr int kSparseReduceThreads = 128;

// Adds the partial sums of a split row of blocks, slot after slot; a thread has eight channels of a pixel.
template <class T>
__global__ void __launch_bounds__(kSparseReduceThreads)
    sparse_reduce(const typename Element<T>::Accumulator* workspace, const SparseSplit* splits, int64_t pixels, int64_t rows,
                  SparseOutput output) {
  using Sum = typename Element<T>::Accumulator;
  constexpr int kVector = 8;
  const int64_t vectors = rows / kVector, index = static_cast<int64_t>(blockIdx.x) * kSparseReduceThreads + threadIdx.x;
  if (index >= pixels * vectors) return;
  const SparseSplit split = load_16<SparseSplit>(splits + blockIdx.y);
  const int64_t pixel = index / vectors, within = index % vectors * kVector;
  Sum sums[kVector] = {};
#pragma unroll 4
  for (int slot = 0; slot < split.slots; ++slot) {
    const Sum* const source = workspace + ((static_cast<int64_t>(split.first_slot) + slot) * pixels + pixel) * rows + within;
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const Vector<Sum, 4> four = load_16<Vector<Sum, 4>>(source + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i + j] += four[j];
    }
  }
  float values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = static_cast<float>(sums[i]);
  const int64_t channel = split.row * rows + within;
  output.template visit<T>(output.epilogue.channels, [&](const auto& epilogue) {
    finish(epilogue, channel_terms<kVector>(epilogue, channel), values, pixel, channel);
  });
}

int log2_of(int64_t size) { return size == 64 ? 6 : size == 32 ? 5 : 4; }

SparseOutput sparse_output(const SparseConv2dArgs& args) {
  SparseOutput output{make_epilogue<float>(args.scale, args.bias, args.residual, args.y, args.residual_stride, args.y_stride,
                                           args.c_out, args.activation),
                      args.output};
  const int64_t bytes = sparse_element_bytes(args.output);
  output.epilogue.aligned = is_aligned(args.scale) && is_aligned(args.bias) && is_aligned(args.residual) && is_aligned(args.y) &&
                            args.y_stride * bytes % 16 == 0 && args.residual_stride * bytes % 16 == 0;
  return output;
}

template <class T>
ListedRows<T> make_source(const SparseConv2dArgs& args, const BlockList& list, const ListedRows<T>*) {
  return {static_cast<const T*>(args.x), args.x_stride, args.batch * args.out_h * args.out_w, static_cast<int32_t>(args.c_in), list};
}

template <class T>
ListedWindows<T> make_source(const SparseConv2dArgs& args, const BlockList& list, const ListedWindows<T>*) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const Window& w = args.window;
  return {static_cast<const T*>(args.x), args.x_stride, args.batch * args.out_h * args.out_w, narrow(args.in_h), narrow(args.in_w),
          narrow(args.c_in), narrow(args.out_h), narrow(args.out_w), narrow(w.kernel_w), narrow(w.stride_h), narrow(w.stride_w),
          narrow(w.pad_h), narrow(w.pad_w), narrow(w.dilation_h), narrow(w.dilation_w),
          static_cast<uint32_t>((args.c_in + args.block_w - 1) / args.block_w), list};
}

template <class T, int kTile, int kTileN, class Source>
int run(const SparseConv2dArgs& args, const Device& device, void* stream) {
  constexpr SparseTile t = kSparseTiles[kTile];
  constexpr int kWarpsM = t.any_alignment || kTileN == 64 ? 2 : 4, kWarpsN = t.any_alignment ? 4 : kTileN == 64 ? 2 : 1;
  constexpr int kAccess = t.any_alignment ? sizeof(T) : 16;
  using Config = GemmConfig<T, t.tile_m, kTileN, kSparseStepBytes, kWarpsM, kWarpsN, t.stages, kAccess>;
  static_assert(store_shared_bytes<Config>() <= Config::kStageBytesA + Config::kStageBytesB, "the store has one stage");
  const int64_t pixels = args.batch * args.out_h * args.out_w, tiles = (pixels + t.tile_m - 1) / t.tile_m;
  const int log2_width = log2_of(args.block_w);
  const SparseProblem<T, Source> problem{
      make_source<T>(args, {static_cast<const int32_t*>(args.columns), 0, log2_width}, static_cast<const Source*>(nullptr)),
      {static_cast<const T*>(args.blocks), static_cast<int32_t>(args.block_h), 0, log2_width},
      sparse_output(args),
      static_cast<const SparseItem*>(args.items),
      static_cast<typename Element<T>::Accumulator*>(args.workspace),
      pixels,
      static_cast<uint32_t>(tiles),
      static_cast<uint32_t>(args.segments),
      static_cast<uint32_t>(sparse_group(args, t, tiles, device))};
  // Fewer blocks where registers would not do: the widest tile has the corners of its windows besides its sums.
  constexpr bool kCrowded = std::is_same_v<Source, ListedWindows<T>> && (t.tile_m > 64 ? kTileN == 64 : t.any_alignment && sizeof(T) == 4);
  constexpr int kBlocks = kCrowded ? t.blocks - 1 : t.blocks;
  const Grid grid{dim3(static_cast<unsigned>(sparse_blocks(t, kTileN, kBlocks, tiles * args.segments, device))), dim3(Config::kThreads),
                  static_cast<size_t>(sparse_shared_bytes(t, kTileN)), stream};
  return launch(sparse_gemm<Config, Source, kBlocks>, grid, problem);
}

template <class T, int kTile, class Source>
int run_rows_of_blocks(const SparseConv2dArgs& args, const Device& device, void* stream) {
  if constexpr (!kSparseTiles[kTile].any_alignment) {
    if (args.block_h == 16) return run<T, kTile, 16, Source>(args, device, stream);
    if (args.block_h == 32) return run<T, kTile, 32, Source>(args, device, stream);
  }
  return run<T, kTile, 64, Source>(args, device, stream);
}

bool is_matrix_product(const SparseConv2dArgs& args) {
  const Window& w = args.window;
  return w.kernel_h == 1 && w.kernel_w == 1 && w.stride_h == 1 && w.stride_w == 1 && w.pad_h == 0 && w.pad_w == 0;
}

template <class T>
int run_tile(const SparseConv2dArgs& args, int64_t tile, const Device& device, void* stream) {
  using Rows = ListedRows<T>;
  using Windows = ListedWindows<T>;
  if (tile == kSparseUnaligned) return run_rows_of_blocks<T, kSparseUnaligned, Windows>(args, device, stream);
  const bool rows = is_matrix_product(args);
  if constexpr (sizeof(T) == 2) {
    if (tile == kSparseLarge) {
      return rows ? run_rows_of_blocks<T, kSparseLarge, Rows>(args, device, stream)
                  : run_rows_of_blocks<T, kSparseLarge, Windows>(args, device, stream);
    }
  }
  return rows ? run_rows_of_blocks<T, kSparseSmall, Rows>(args, device, stream)
              : run_rows_of_blocks<T, kSparseSmall, Windows>(args, device, stream);
}

template <class T>
Status launch_sparse(const SparseConv2dArgs& args, const Device& device, void* stream) {
  const int64_t tile = args.configuration < 0 || !sparse_runs(args.configuration, args) ? sparse_tile(args, device) : args.configuration;
  Status status{run_tile<T>(args, tile, device, stream), "sparse_gemm", kSparseTiles[tile].name};
  if (status.code != 0 || args.split_rows == 0) return status;
  const int64_t pixels = args.batch * args.out_h * args.out_w, vectors = pixels * args.block_h / 8;
  const Grid grid{dim3(static_cast<unsigned>((vectors + kSparseReduceThreads - 1) / kSparseReduceThreads),
                       static_cast<unsigned>(args.split_rows)),
                  dim3(kSparseReduceThreads), 0, stream};
  status.kernel = "sparse_reduce";
  status.code = launch(sparse_reduce<T>, grid, static_cast<typename Element<T>::Accumulator*>(args.workspace),
                       static_cast<const SparseSplit*>(args.splits), pixels, args.block_h, sparse_output(args));
  return status;
}

}  // namespace

Status sparse_conv2d(const SparseConv2dArgs& args, const Device& device, void* stream) {
  switch (args.dtype) {
    case DataType::float16: return launch_sparse<Half>(args, device, stream);
    case DataType::bfloat16: return launch_sparse<BFloat16>(args, device, stream);
    case DataType::int8: return launch_sparse<int8_t>(args, device, stream);
    default: return launch_sparse<float>(args, device, stream);
  }
}

}  // namespace kernelpress::cuda
