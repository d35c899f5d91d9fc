// A tile of ghost convolution in one kernel: both halves of y from one copy of p in shared memory.
//
//            tile_w + 2                                       GEMM: rows are the pixels of the rectangle inside the image, counted
//        ┌───────────────┐     p, in shared memory:           row by row; k is x's channels; kTileN channels of p
//        │ 0 0 0 0 0 0 0 │     zero outside of the image,     ──▶ bias, activation, rounded to T, into p
//        │ 0 ┌───────────┤     which is what the cheap        cheap: a thread has 4 channels × 4 pixels of a row and reads
//        │ 0 │ the tile  │     operation is padded with       3 × 6 vectors of p for them; it writes the 4 vectors of p in
//        │ 0 │           │     (drawn: at the left top)       their middle and the 4 of the cheap operation
//        └───┴───────────┘
//
// Bound by memory traffic: x is read (1 + halo) times, mostly from the second-level cache, y is written once.
#pragma once

#include "common/epilogue.cuh"
#include "common/gemm.cuh"
#include "common/gemm_sources.cuh"
#include "ghost_tiles.h"

namespace kernelpress::cuda::ghost {

// Pixels of a rectangle of one image, row by row, as rows of a GEMM; neighbours are row_step or column_step pixels of x apart.
template <class T>
struct RectanglePixels {
  static constexpr bool kResident = false;
  const T* base;  // the image
  int64_t stride;
  int32_t count, width, first, row_step, column_step, depth;

  template <class Share>
  class Cursor {
   public:
    static constexpr bool kPads = false;
    static constexpr int kChunk = Element<T>::kPer16Bytes;

    __device__ __forceinline__ explicit Cursor(const RectanglePixels& source) : source_(source) {}
    __device__ __forceinline__ void start(int64_t first_row, int64_t k) {
#pragma unroll
      for (int i = 0; i < Share::kCount; ++i) {
        const int row = static_cast<int>(first_row) + Share::row(i);
        const int h = row / source_.width, w = row % source_.width;
        pixel_[i] = row < source_.count ? source_.first + h * source_.row_step + w * source_.column_step : -1;
      }
      k_ = static_cast<int>(k) + Share::chunk() * kChunk;
    }
    __device__ __forceinline__ void seek() {}
    __device__ __forceinline__ bool find(int i, const T*& address) const {
      const bool valid = pixel_[i] >= 0 && k_ < source_.depth;
      address = valid ? source_.base + pixel_[i] * source_.stride + k_ : source_.base;
      return valid;
    }
    __device__ __forceinline__ void advance(int n) { k_ += n; }
    __device__ __forceinline__ T padding() const { return T{}; }

   private:
    const RectanglePixels& source_;
    int pixel_[Share::kCount];
    int k_;
  };
};

// What one block computes: channels first_channel … of the pixels from (top, left) on, of one image. The rectangle around them that
// lies inside the image begins at (inner_top, inner_left); positions in shared memory are counted from (top - 1, left - 1).
struct Block {
  int64_t image;
  int32_t top, left, inner_top, inner_left, inner_height, inner_width, positions_w, first_channel;

  __device__ __forceinline__ int rows() const { return inner_height * inner_width; }
  __device__ __forceinline__ int position(int row) const {
    const int h = inner_top + row / inner_width - (top - kGhostReach), w = inner_left + row % inner_width - (left - kGhostReach);
    return h * positions_w + w;
  }
};

__device__ __forceinline__ Block block_of(const GhostConv2dArgs& a, const GhostTile& tile) {
  const int out_h = static_cast<int>(a.out_h), out_w = static_cast<int>(a.out_w);
  const uint32_t slices = (static_cast<uint32_t>(a.primary) + tile.channels - 1) / tile.channels;
  const uint32_t tiles_h = (out_h + tile.tile_h - 1) / tile.tile_h, tiles_w = (out_w + tile.tile_w - 1) / tile.tile_w;
  uint32_t index = blockIdx.x;
  Block block;
  block.first_channel = static_cast<int>(index % slices) * tile.channels;
  index /= slices;
  block.left = static_cast<int>(index % tiles_w) * tile.tile_w;
  index /= tiles_w;
  block.top = static_cast<int>(index % tiles_h) * tile.tile_h;
  block.image = index / tiles_h;
  block.inner_top = max(block.top - kGhostReach, 0);
  block.inner_left = max(block.left - kGhostReach, 0);
  block.inner_height = min(block.top + tile.tile_h + kGhostReach, out_h) - block.inner_top;
  block.inner_width = min(block.left + tile.tile_w + kGhostReach, out_w) - block.inner_left;
  block.positions_w = tile.tile_w + 2 * kGhostReach;
  return block;
}

// Zeros at the positions outside of the image.
template <class T, int kTileN>
__device__ __forceinline__ void clear_outside(T* p, const Block& block, const GhostTile& tile) {
  constexpr int kVectors = kTileN / Element<T>::kPer16Bytes, kPitch = kTileN + kPitchPadding;
  const int positions = (tile.tile_h + 2 * kGhostReach) * block.positions_w;
  if (block.rows() == positions) return;
  for (int i = static_cast<int>(threadIdx.x); i < positions * kVectors; i += kGhostThreads) {
    const int position = i / kVectors;
    const int h = position / block.positions_w + block.top - kGhostReach - block.inner_top;
    const int w = position % block.positions_w + block.left - kGhostReach - block.inner_left;
    if (h >= 0 && h < block.inner_height && w >= 0 && w < block.inner_width) continue;
    store_16(p + position * kPitch + i % kVectors * Element<T>::kPer16Bytes, Vector16<T>{});
  }
}

// From sums to p: bias, activation, rounding. Rows are counted from `first_row` of the rectangle.
template <class Config>
__device__ __forceinline__ void put_primary(typename Config::T* p, const Accumulators<Config>& sums, const Block& block, int first_row,
                                            const float* bias, int channels, Activation activation) {
  using T = typename Config::T;
  constexpr int kValues = 2 * Config::kFragmentsN, kPitch = Config::kTileN + kPitchPadding;
  const int lane = lane_index(), column = warp_column<Config>() + 2 * (lane % 4);
  float shift[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int channel = block.first_channel + column + i / 2 * 8 + i % 2;
    shift[i] = bias != nullptr && channel < channels ? bias[channel] : 0.0f;
  }
#pragma unroll
  for (int m = 0; m < Config::kFragmentsM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp_row<Config>() + 16 * m + lane / 4 + 8 * half;
      if (row >= block.rows()) continue;
      float values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = sums.value[m][i / 2][2 * half + i % 2] + shift[i];
      activate(values, activation);
      T* target = p + block.position(row) * kPitch + column;
#pragma unroll
      for (int n = 0; n < Config::kFragmentsN; ++n) {
        const float two[2] = {values[2 * n], values[2 * n + 1]};
        *reinterpret_cast<Vector<T, 2>*>(target + 8 * n) = from_float<T>(two);
      }
    }
}

template <class T>
using Four = Vector<T, kGhostVector>;

// Through one word: nvcc would take the members of a structure in global memory one by one.
template <class T>
__device__ __forceinline__ void load_four(const T* address, float (&values)[kGhostVector]) {
  Four<T> four;
  if constexpr (sizeof(four) == 16) {
    four = load_16<Four<T>>(address);
  } else {
    const uint64_t word = *reinterpret_cast<const uint64_t*>(address);
    memcpy(&four, &word, sizeof four);
  }
  to_float(four, values);
}

// Writes four channels, with the residual's added.
template <class T>
__device__ __forceinline__ void put_four(T* y, const T* residual, float (&values)[kGhostVector]) {
  if (residual != nullptr) {
    float others[kGhostVector];
    load_four(residual, others);
#pragma unroll
    for (int c = 0; c < kGhostVector; ++c) values[c] += others[c];
  }
  *reinterpret_cast<Four<T>*>(y) = from_float<T>(values);
}

// The cheap operation on p, and both halves of y.
template <class T, int kTileN>
__device__ __forceinline__ void put_outputs(const T* p, const GhostConv2dArgs& a, const Block& block, const GhostTile& tile) {
  constexpr int kGroups = kTileN / kGhostVector, kPitch = kTileN + kPitchPadding, kTaps = 2 * kGhostReach + 1;
  constexpr int kColumns = kGhostStrip + 2 * kGhostReach;
  const int group = static_cast<int>(threadIdx.x) % kGroups * kGhostVector, channel = block.first_channel + group;
  const int primary = static_cast<int>(a.primary);
  if (channel >= primary) return;
  float weights[kTaps * kTaps][kGhostVector], bias[kGhostVector];
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap)
    load_four(static_cast<const T*>(a.cheap_weight) + tap * primary + channel, weights[tap]);
#pragma unroll
  for (int c = 0; c < kGhostVector; ++c) bias[c] = a.cheap_bias == nullptr ? 0.0f : a.cheap_bias[channel + c];
  const int strips_w = tile.tile_w / kGhostStrip, strips = tile.tile_h * strips_w;
  const int out_h = static_cast<int>(a.out_h), out_w = static_cast<int>(a.out_w);
#pragma unroll 1
  for (int strip = static_cast<int>(threadIdx.x) / kGroups; strip < strips; strip += kGhostThreads / kGroups) {
    const int row = strip / strips_w, column = strip % strips_w * kGhostStrip;
    const int h = block.top + row, w = block.left + column;
    if (h >= out_h || w >= out_w) continue;
    float sums[kGhostStrip * kGhostVector], middle[kGhostStrip][kGhostVector];
#pragma unroll
    for (int i = 0; i < kGhostStrip * kGhostVector; ++i) sums[i] = bias[i % kGhostVector];
#pragma unroll
    for (int r = 0; r < kTaps; ++r) {
      const T* source = p + ((row + r) * block.positions_w + column) * kPitch + group;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float values[kGhostVector];
        to_float(*reinterpret_cast<const Four<T>*>(source + j * kPitch), values);
#pragma unroll
        for (int c = 0; c < kGhostVector; ++c) {
#pragma unroll
          for (int s = 0; s < kTaps; ++s)
            if (j >= s && j - s < kGhostStrip)
              sums[(j - s) * kGhostVector + c] = fmaf(values[c], weights[r * kTaps + s][c], sums[(j - s) * kGhostVector + c]);
          if (r == kGhostReach && j >= kGhostReach && j - kGhostReach < kGhostStrip) middle[j - kGhostReach][c] = values[c];
        }
      }
    }
    activate(sums, a.cheap_activation);
    const int64_t pixel = (block.image * out_h + h) * out_w + w;
    T* y = static_cast<T*>(a.y) + pixel * a.y_stride + channel;
    const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + pixel * a.residual_stride + channel;
#pragma unroll
    for (int j = 0; j < kGhostStrip; ++j) {
      if (w + j >= out_w) break;
      float cheap[kGhostVector];
#pragma unroll
      for (int c = 0; c < kGhostVector; ++c) cheap[c] = sums[j * kGhostVector + c];
      put_four(y, residual, middle[j]);
      put_four(y + primary, residual == nullptr ? nullptr : residual + primary, cheap);
      y += a.y_stride;
      if (residual != nullptr) residual += a.residual_stride;
    }
  }
}

// Blocks that one multiprocessor shall hold, as far as registers go.
template <class Config>
constexpr int kBlocksTogether = Config::kTileN == 64 ? 2 : Config::kTileM * Config::kTileN > 64 * 32 ? 3 : 4;

// One block a tile of pixels and a slice of channels of p; slices of a tile are neighbours and share its pixels of x in the cache.
template <class Config>
__global__ void __launch_bounds__(kGhostThreads, kBlocksTogether<Config>) ghost_fused(const GhostConv2dArgs a, const GhostTile tile) {
  using T = typename Config::T;
  static_assert(Config::kThreads == kGhostThreads);
  using Products = Pipeline<Config, RectanglePixels<T>, Rows<T>>;
  SIMT_DYN_SMEM(shared);
  const int steps = static_cast<int>((a.c_in + Config::kStep - 1) / Config::kStep);
  T* const p = reinterpret_cast<T*>(shared + Products::kStageBytes * min(steps, Config::kStages));
  const Block block = block_of(a, tile);
  const int row_step = static_cast<int>(a.window.stride_h * a.in_w), column_step = static_cast<int>(a.window.stride_w);
  const RectanglePixels<T> pixels{static_cast<const T*>(a.x) + block.image * a.in_h * a.in_w * a.x_stride,
                                  a.x_stride,
                                  block.rows(),
                                  block.inner_width,
                                  block.inner_top * row_step + block.inner_left * column_step,
                                  row_step,
                                  column_step,
                                  static_cast<int>(a.c_in)};
  const Rows<T> weights{static_cast<const T*>(a.primary_weight), a.c_in, a.primary, a.c_in};
  Products products(shared, pixels, weights);
  products.start(0, block.first_channel, 0, steps);
  clear_outside<T, Config::kTileN>(p, block, tile);
#pragma unroll 1
  for (int row = 0; row < block.rows(); row += Config::kTileM) {
    Accumulators<Config> sums;
    sums.clear();
    products.run(sums);
    block_barrier();
    if (row + Config::kTileM < block.rows()) products.start(row + Config::kTileM, block.first_channel, 0, steps);
    put_primary(p, sums, block, row, a.primary_bias, static_cast<int>(a.primary), a.activation);
  }
  block_barrier();
  put_outputs<T, Config::kTileN>(p, a, block, tile);
}

}  // namespace kernelpress::cuda::ghost
