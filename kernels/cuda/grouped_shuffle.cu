// Channel shuffle, of one tensor or of two behind one another:     y[pixel, k · G + i] = concat(a, b)[pixel, i · C / G + k]
//
//   pairs of lanes     two equal halves, G = 2: y alternates between them. Lane 2 j reads a vector of a, lane 2 j + 1 the same one of b;
//                      they exchange halves and write neighbouring vectors. Every access has 16 bytes, every line is whole:
//
//                        a0 a1 a2 a3 a4 a5 a6 a7 ──┬─▶ a0 b0 a1 b1 a2 b2 a3 b3     (fp16)
//                        b0 b1 b2 b3 b4 b5 b6 b7 ──┴─▶ a4 b4 a5 b5 a6 b6 a7 b7
//
//   shared memory      any G: a block reads some whole pixels, 16 bytes at a time where it can, and writes them vector by vector,
//                      gathering each value from shared memory: two bytes a lane and cycle are five times what the copy needs.
//   value by value     pixels that fit no shared memory: gathered from L1.
//
// Memory-bound: 2 · C · sizeof(T) bytes a pixel, no arithmetic. Values move as bits of 2 or 4 bytes.
#include "grouped.h"

#include "common/epilogue.cuh"
#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/simt.cuh"
#include "grouped_tiles.h"

namespace kernelpress::cuda {
namespace {

// Two tensors whose channels count on; without a second one `channels_b` is 0.
template <class Bits>
struct Shuffled {
  const Bits *a, *b;
  Bits* y;
  int64_t pixels, a_stride, b_stride, y_stride;
  int32_t channels_a, channels_b, groups, per_group;
};

// A channel of y, and which channel of the concatenation it takes; `next` without division.
struct ShuffleWalk {
  int32_t group, within;
  __device__ __forceinline__ ShuffleWalk(int32_t channel, int32_t groups)
      : group(channel % groups), within(channel / groups) {}
  __device__ __forceinline__ int32_t source(int32_t per_group) const { return group * per_group + within; }
  __device__ __forceinline__ void next(int32_t groups) {
    if (++group == groups) {
      group = 0;
      ++within;
    }
  }
};

constexpr int kShuffleThreads = kShuffleTiles[0].threads;
constexpr int kPairVectors = 4;  // vectors of a lane, in flight together

// a and b are the halves. Lanes go on over the pixels' vectors as if these lay in one row.
template <class Bits>
__global__ void __launch_bounds__(kShuffleThreads) shuffle_pairs(Shuffled<Bits> problem) {
  constexpr int kVector = 16 / sizeof(Bits), kHalf = kVector / 2;
  using Half16 = Vector<Bits, kHalf>;
  const bool odd = threadIdx.x % 2 != 0;
  const int64_t vectors = 2 * problem.channels_a / kVector, all = problem.pixels * vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kShuffleThreads * kPairVectors) + threadIdx.x;
  Vector<Bits, kVector> taken[kPairVectors] = {};
#pragma unroll
  for (int i = 0; i < kPairVectors; ++i) {
    const int64_t index = first + i * kShuffleThreads;
    if (index >= all) continue;
    const int64_t pixel = index / vectors, channel = index % vectors / 2 * kVector;
    const Bits* const source = odd ? problem.b + pixel * problem.b_stride : problem.a + pixel * problem.a_stride;
    taken[i] = load_streaming_16<Vector<Bits, kVector>>(source + channel);
  }
#pragma unroll
  for (int i = 0; i < kPairVectors; ++i) {
    const int64_t index = first + i * kShuffleThreads;
    Half16 kept, given;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      kept[j] = taken[i][odd ? kHalf + j : j];
      given[j] = taken[i][odd ? j : kHalf + j];
    }
    const Half16 received = shuffle_xor(given, 1);
    if (index >= all) continue;
    Vector<Bits, kVector> out;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      out[2 * j] = odd ? received[j] : kept[j];
      out[2 * j + 1] = odd ? kept[j] : received[j];
    }
    store_global(problem.y + index / vectors * problem.y_stride + index % vectors * kVector, out);
  }
}

// Reads `count` channels of this block's pixels into their rows.
template <class Bits, bool kAligned>
__device__ __forceinline__ void read_pixels(Bits* rows, int pitch, const Bits* source, int64_t stride, int count, int pixels) {
  constexpr int kVector = kAligned ? 16 / sizeof(Bits) : 1;
  const int vectors = count / kVector;
  for (int at = static_cast<int>(threadIdx.x); at < pixels * vectors; at += kShuffleThreads) {
    const int pixel = at / vectors, channel = at % vectors * kVector;
    if constexpr (kAligned) {
      const auto taken = load_streaming_16<Vector<Bits, kVector>>(source + pixel * stride + channel);
      *reinterpret_cast<Vector<Bits, kVector>*>(rows + pixel * pitch + channel) = taken;
    } else {
      rows[pixel * pitch + channel] = source[pixel * stride + channel];
    }
  }
}

// kAligned: channels_a and channels_b, addresses and strides are multiples of 16 bytes.
template <class Bits, bool kAligned>
__global__ void __launch_bounds__(kShuffleThreads) shuffle_staged(Shuffled<Bits> problem, int32_t pixels_per_block, int32_t pitch) {
  SIMT_DYN_SMEM(shared);
  constexpr int kVector = kAligned ? 16 / sizeof(Bits) : 1;
  Bits* const rows = reinterpret_cast<Bits*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * pixels_per_block;
  const int pixels = static_cast<int>(min(static_cast<int64_t>(pixels_per_block), problem.pixels - first));
  read_pixels<Bits, kAligned>(rows, pitch, problem.a + first * problem.a_stride, problem.a_stride, problem.channels_a, pixels);
  if (problem.channels_b > 0)
    read_pixels<Bits, kAligned>(rows + problem.channels_a, pitch, problem.b + first * problem.b_stride, problem.b_stride,
                                problem.channels_b, pixels);
  block_barrier();
  const int vectors = (problem.channels_a + problem.channels_b) / kVector;
  for (int at = static_cast<int>(threadIdx.x); at < pixels * vectors; at += kShuffleThreads) {
    const int pixel = at / vectors, channel = at % vectors * kVector;
    const Bits* const row = rows + pixel * pitch;
    Vector<Bits, kVector> out;
    ShuffleWalk walk(channel, problem.groups);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      out[i] = row[walk.source(problem.per_group)];
      walk.next(problem.groups);
    }
    Bits* const target = problem.y + (first + pixel) * problem.y_stride + channel;
    if constexpr (kAligned)
      store_global(target, out);
    else
      *target = out[0];
  }
}

template <class Bits>
__global__ void __launch_bounds__(kShuffleThreads) shuffle_gathered(Shuffled<Bits> problem) {
  const int64_t channels = problem.channels_a + problem.channels_b;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kShuffleThreads + threadIdx.x;
  if (index >= problem.pixels * channels) return;
  const int64_t pixel = index / channels, channel = index % channels;
  const int32_t source = ShuffleWalk(static_cast<int32_t>(channel), problem.groups).source(problem.per_group);
  problem.y[pixel * problem.y_stride + channel] = source < problem.channels_a
                                                      ? problem.a[pixel * problem.a_stride + source]
                                                      : problem.b[pixel * problem.b_stride + source - problem.channels_a];
}

Grid shuffle_grid(int64_t items, int64_t per_block, int64_t shared_bytes, void* stream) {
  return {dim3(static_cast<unsigned>((items + per_block - 1) / per_block)), dim3(kShuffleThreads), static_cast<size_t>(shared_bytes), stream};
}

template <class Bits>
Status launch_shuffle(const ShuffleConcatArgs& args, const Device& device, void* stream) {
  constexpr int64_t kVector = 16 / sizeof(Bits);
  Shuffled<Bits> problem{static_cast<const Bits*>(args.a), static_cast<const Bits*>(args.b), static_cast<Bits*>(args.y),
                         args.pixels, args.a_stride, args.b_stride, args.y_stride,
                         static_cast<int32_t>(args.channels_a), static_cast<int32_t>(args.channels_b), static_cast<int32_t>(args.groups),
                         static_cast<int32_t>((args.channels_a + args.channels_b) / args.groups)};
  const bool aligned = is_aligned(args.a) && is_aligned(args.b) && is_aligned(args.y) && is_aligned<Bits>(args.a_stride) &&
                       is_aligned<Bits>(args.b_stride) && is_aligned<Bits>(args.y_stride) && args.channels_a % kVector == 0 &&
                       args.channels_b % kVector == 0;
  const int64_t index = choose_shuffle(args, sizeof(Bits), aligned, device);
  const int64_t channels = args.channels_a + args.channels_b;
  if (index < 0) return {1, "shuffle_concat", args.configuration < kShuffleTileCount ? kShuffleTiles[args.configuration].name : "none"};
  Status status{0, "shuffle_concat", kShuffleTiles[index].name};
  if (index == kShufflePairs) {
    if (args.channels_b == 0) {
      problem.channels_a = problem.channels_b = static_cast<int32_t>(channels / 2);
      problem.b = problem.a + problem.channels_a;
      problem.b_stride = problem.a_stride;
    }
    status.code = launch(shuffle_pairs<Bits>, shuffle_grid(args.pixels * channels / kVector, kShuffleThreads * kPairVectors, 0, stream), problem);
  } else if (index == kShuffleStaged) {
    const int64_t row = shuffle_row_bytes(args, sizeof(Bits)), wanted = kShuffleStageBytes / row;
    const int32_t pixels = static_cast<int32_t>(wanted < 1 ? 1 : wanted), pitch = static_cast<int32_t>(row / static_cast<int64_t>(sizeof(Bits)));
    const Grid grid = shuffle_grid(args.pixels, pixels, pixels * row, stream);
    status.code = aligned ? launch(shuffle_staged<Bits, true>, grid, problem, pixels, pitch)
                          : launch(shuffle_staged<Bits, false>, grid, problem, pixels, pitch);
  } else {
    status.code = launch(shuffle_gathered<Bits>, shuffle_grid(args.pixels * channels, kShuffleThreads, 0, stream), problem);
  }
  return status;
}

}  // namespace

Status shuffle_concat(const ShuffleConcatArgs& args, const Device& device, void* stream) {
  return args.dtype == DataType::float32 ? launch_shuffle<uint32_t>(args, device, stream) : launch_shuffle<uint16_t>(args, device, stream);
}

}  // namespace kernelpress::cuda
