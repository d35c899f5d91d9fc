// From a block's accumulators to memory: through the epilogue, or as partial sums of a split K.
//
// `mma` leaves every thread two columns of each row. A warp therefore passes 16 of its rows at a time through shared memory, as
// 32-bit words, and takes them back as whole vectors of the output, 16 bytes (int8: 8):
//
//     write  lane 4 g + t: columns 2 t, 2 t + 1 of row g  ─▶  [16][kWarpN + 8] words  ─▶  read  16 / sizeof(Out) columns of a row
#pragma once

#include "epilogue.cuh"
#include "gemm.cuh"

namespace kernelpress::cuda {

// Rows of the tile that are pixels one after the other: `operator()` gives a row's pixel, or -1 where it has none. Kernels whose
// tiles are made otherwise have a map of their own.
struct ConsecutivePixels {
  int64_t first, count;
  __device__ __forceinline__ int64_t operator()(int row) const { return first + row < count ? first + row : -1; }
};

// From sums to the float that the epilogue takes. int8's corrections for zero points and row scales have their own.
struct PlainSums {
  template <class Sum, int kCount>
  __device__ __forceinline__ void operator()(const Sum (&sums)[kCount], float (&values)[kCount], int64_t, int64_t) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(sums[i]);
  }
};

template <class Config>
constexpr int store_shared_bytes() {
  return Config::kThreads / 32 * 16 * (Config::kWarpN + 8) * 4;
}

namespace detail {

// Fours of columns change places so that neither the writes nor the reads of a warp meet in a bank.
__device__ __forceinline__ int staged_column(int row, int column) { return column ^ (((column >> 3) ^ (row << 2)) & 4); }

}  // namespace detail

// Finishes a block's tile of sums and writes it. Every thread of the block calls it, after a `block_barrier()` if others may still
// use `shared` (16-byte aligned, `store_shared_bytes`).
//   pixels(row)     the pixel of a row of the tile, -1 for none
//   first_channel   of the tile
//   convert(sums, values, pixel, channel)   sums → float
template <class Config, class Out, class Pixels, class ChannelMap = SameChannels, class Convert = PlainSums>
__device__ __forceinline__ void store_tile(const Accumulators<Config>& sums, unsigned char* shared, const Epilogue<Out>& epilogue,
                                           const Pixels& pixels, int64_t first_channel, const ChannelMap& map = {},
                                           const Convert& convert = {}) {
  using Sum = typename Config::Accumulator;
  constexpr int kPitch = Config::kWarpN + 8;
  constexpr int kVector = Element<Out>::kPer16Bytes < 8 ? Element<Out>::kPer16Bytes : 8;  // 16 of int8 would need too many registers
  constexpr int kVectors = Config::kWarpN / kVector;
  static_assert(kVector <= Config::kWarpN && 32 % kVectors == 0, "a lane keeps its channels from row to row");
  Sum* const staged = reinterpret_cast<Sum*>(shared) + warp_index() * (16 * kPitch);
  const int lane = lane_index(), group = lane / 4, pair = lane % 4;
  const int column = lane % kVectors * kVector;
  const int64_t channel = first_channel + warp_column<Config>() + column;
  const ChannelTerms<kVector> terms = channel_terms<kVector>(epilogue, channel);
// The loop stays one, for the code of the epilogue is long: only the choice of the fragments is unrolled.
#pragma unroll 1
  for (int m = 0; m < Config::kFragmentsM; ++m) {
    if (m > 0) warp_barrier();
#pragma unroll
    for (int chosen = 0; chosen < Config::kFragmentsM; ++chosen) {
      if (chosen != m) continue;
#pragma unroll
      for (int n = 0; n < Config::kFragmentsN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = group + 8 * half;
          const Vector<Sum, 2> two{{sums.value[chosen][n][2 * half], sums.value[chosen][n][2 * half + 1]}};
          store_vector(staged + row * kPitch + detail::staged_column(row, 8 * n + 2 * pair), two);
        }
    }
    warp_barrier();
#pragma unroll 1
    for (int row = lane / kVectors; row < 16; row += 32 / kVectors) {
      const int64_t pixel = pixels(warp_row<Config>() + 16 * m + row);
      if (pixel < 0 || channel >= epilogue.channels) continue;
      Sum taken[kVector];
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const Vector<Sum, 4> four =
            load_vector<Vector<Sum, 4>>(staged + row * kPitch + detail::staged_column(row, column + i));
#pragma unroll
        for (int j = 0; j < 4; ++j) taken[i + j] = four[j];
      }
      float values[kVector];
      convert(taken, values, pixel, channel);
      finish(epilogue, terms, values, pixel, channel, map);
    }
  }
}

// Partial sums of a K split among blocks: [split][row][pitch], pitch a multiple of 4 of at least `columns`.
template <class Sum>
struct Partials {
  Sum* base;
  int64_t rows, columns, pitch;
};

constexpr int64_t partials_pitch(int64_t columns) { return (columns + 3) / 4 * 4; }

template <class Config>
__device__ __forceinline__ void store_partials(const Accumulators<Config>& sums, const Partials<typename Config::Accumulator>& partials,
                                               int64_t split, int64_t first_row, int64_t first_column) {
  using Sum = typename Config::Accumulator;
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < Config::kFragmentsM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp_row<Config>() + 16 * m + lane / 4 + 8 * half;
      if (row >= partials.rows) continue;
      Sum* const target = partials.base + (split * partials.rows + row) * partials.pitch;
#pragma unroll
      for (int n = 0; n < Config::kFragmentsN; ++n) {
        const int64_t column = first_column + warp_column<Config>() + 8 * n + 2 * (lane % 4);
        const Vector<Sum, 2> two{{sums.value[m][n][2 * half], sums.value[m][n][2 * half + 1]}};
        if (column < partials.pitch) store_vector(target + column, two);
      }
    }
}

constexpr int kReduceThreads = 128;

// Adds the partial sums, split after split, and finishes them; a thread has one vector of the output.
template <class Sum, class Out, class Convert = PlainSums>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials(Partials<Sum> partials, int64_t splits, Epilogue<Out> epilogue, Convert convert) {
  constexpr int kVector = Element<Out>::kPer16Bytes;
  const int64_t vectors = (partials.columns + kVector - 1) / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index >= partials.rows * vectors) return;
  const int64_t row = index / vectors, column = index % vectors * kVector;
  Sum sums[kVector] = {};
#pragma unroll 4
  for (int64_t split = 0; split < splits; ++split) {
    const Sum* source = partials.base + (split * partials.rows + row) * partials.pitch + column;
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      if (column + i >= partials.pitch) break;
      const Vector<Sum, 4> four = load_16<Vector<Sum, 4>>(source + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i + j] += four[j];
    }
  }
  float values[kVector];
  convert(sums, values, row, column);
  finish(epilogue, channel_terms<kVector>(epilogue, column), values, row, column);
}

template <class Sum, class Out>
Grid reduce_grid(const Partials<Sum>& partials, void* stream) {
  const int64_t vectors = partials.rows * ((partials.columns + Element<Out>::kPer16Bytes - 1) / Element<Out>::kPer16Bytes);
  return {dim3(static_cast<unsigned>((vectors + kReduceThreads - 1) / kReduceThreads)), dim3(kReduceThreads), 0, stream};
}

}  // namespace kernelpress::cuda
