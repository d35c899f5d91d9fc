// The stages of the fused separable kernels, between parts of shared memory.
//
//     halo of x  ──expand (mma)──▶  halo of hidden channels  ──depthwise──▶  A: 64 pixels  ──project (mma)──▶  accumulators
//     [pixel][128 bytes]                [pixel][128 bytes]                   [pixel][128 bytes]
//
// All of them are rows of 128 bytes of channels, swizzled as gemm.cuh's operands are: `ldmatrix`, the copies and the depthwise
// loads (16 or 8 lanes read one whole row) meet no bank twice.
#pragma once

#include "common/epilogue.cuh"
#include "common/gemm.cuh"
#include "common/gemm_store.cuh"
#include "separable_tiles.h"

namespace kernelpress::cuda {

template <class T>
inline constexpr int kChunkChannels = kChunkBytes / static_cast<int>(sizeof(T));

// Which patch and output channels a block computes.
struct FusedBlock {
  int64_t image, first_row, first_column, first_channel;  // of the output
  int64_t in_row, in_column;                              // of the halo, in the input

  __device__ __forceinline__ FusedBlock(const SeparablePlan& plan, const Window& w, int tile_n) {
    int64_t index = blockIdx.x;
    first_channel = index % plan.tiles_n * tile_n;
    index /= plan.tiles_n;
    first_column = index % plan.tiles_w * kFusedColumns;
    index /= plan.tiles_w;
    first_row = index % plan.tiles_h * kFusedRows;
    image = index / plan.tiles_h;
    in_row = first_row * w.stride_h - w.pad_h;
    in_column = first_column * w.stride_w - w.pad_w;
  }
};

// The pixel of y that a row of the A operand stands for, -1 for none.
struct PatchPixels {
  int64_t image, first_row, first_column, out_h, out_w;

  __device__ __forceinline__ int64_t operator()(int row) const {
    const int64_t p = first_row + row / kFusedColumns, q = first_column + row % kFusedColumns;
    return p < out_h && q < out_w ? (image * out_h + p) * out_w + q : -1;
  }
};

// Input under a patch, pixel by pixel; beyond the borders there is none.
template <class T>
struct Halo {
  const T* image;
  int64_t in_h, in_w, stride, first_row, first_column;
  int rows, columns;

  __device__ __forceinline__ bool inside(int row, int column) const {
    const int64_t h = first_row + row, w = first_column + column;
    return row < rows && h >= 0 && h < in_h && w >= 0 && w < in_w;
  }
  __device__ __forceinline__ const T* pixel(int row, int column) const {
    return image + ((first_row + row) * in_w + first_column + column) * stride;
  }
};

// Starts the copies of one chunk of channels of `count` pixels of a halo, zeros beyond its borders and the last channel.
template <int kThreads, class T>
__device__ __forceinline__ void copy_halo(unsigned char* to, const Halo<T>& halo, int count, int64_t channel, int64_t channels) {
  const int chunk = static_cast<int>(threadIdx.x) % 8;
  const int64_t own = channel + chunk * Element<T>::kPer16Bytes;
  int row = 0, column = static_cast<int>(threadIdx.x) / 8;
  for (int pixel = column; pixel < count; pixel += kThreads / 8, column += kThreads / 8) {
    while (column >= halo.columns) {
      column -= halo.columns;
      ++row;
    }
    const bool valid = own < channels && halo.inside(row, column);
    cp_async_16(to + swizzled_offset<kChunkBytes>(pixel, chunk), valid ? halo.pixel(row, column) + own : halo.image, valid);
  }
}

// Starts the copies of one chunk of columns of `count` rows of a matrix [rows][depth], zeros beyond its ends.
template <int kThreads, bool kSwizzled, class T>
__device__ __forceinline__ void copy_rows(unsigned char* to, const T* matrix, int64_t first_row, int64_t rows, int count, int64_t column,
                                          int64_t depth) {
  const int chunk = static_cast<int>(threadIdx.x) % 8;
  const int64_t own = column + chunk * Element<T>::kPer16Bytes;
  for (int row = static_cast<int>(threadIdx.x) / 8; row < count; row += kThreads / 8) {
    const bool valid = own < depth && first_row + row < rows;
    cp_async_16(to + (kSwizzled ? swizzled_offset<kChunkBytes>(row, chunk) : row * kChunkBytes + chunk * 16),
                valid ? matrix + (first_row + row) * depth + own : matrix, valid);
  }
}

// Depthwise convolution of one chunk: from the halo into the A operand, four channels and four neighbouring pixels at a time.
//   kKernel > 0   square window of that size and stride, without dilation: an input is read once for all taps of a row
//   kKernel = 0   any window
template <class T, int kThreads, int kKernel, int kStride>
__device__ __forceinline__ void depthwise_chunk(unsigned char* to, const unsigned char* halo, const unsigned char* weights, int halo_w,
                                                const Window& window, const float* bias, int64_t channel, int64_t channels,
                                                Activation activation) {
  constexpr int kStrip = 4, kStrips = kFusedPixels / kStrip, kQuads = kChunkChannels<T> / 4;
  constexpr int kQuadBytes = 4 * static_cast<int>(sizeof(T));
  using Quad = Vector<T, 4>;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kStrips * kQuads; item += kThreads) {
    const int quad = item % kQuads, strip = item / kQuads;
    const int row = strip / (kFusedColumns / kStrip), column = strip % (kFusedColumns / kStrip) * kStrip;
    const int chunk = quad * kQuadBytes / 16, within = quad * kQuadBytes % 16;
    const auto input = [&](int pixel, float(&values)[4]) {
      to_float(*reinterpret_cast<const Quad*>(halo + swizzled_offset<kChunkBytes>(pixel, chunk) + within), values);
    };
    const auto tap = [&](int index, float(&values)[4]) {
      to_float(*reinterpret_cast<const Quad*>(weights + index * kChunkBytes + quad * kQuadBytes), values);
    };
    float sums[kStrip * 4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t own = channel + quad * 4 + c;
      const float start = bias != nullptr && own < channels ? bias[own] : 0.0f;
#pragma unroll
      for (int q = 0; q < kStrip; ++q) sums[q * 4 + c] = start;
    }
    if constexpr (kKernel > 0) {
#pragma unroll
      for (int r = 0; r < kKernel; ++r) {
        float taps[kKernel][4];
#pragma unroll
        for (int s = 0; s < kKernel; ++s) tap(r * kKernel + s, taps[s]);
        const int first = (row * kStride + r) * halo_w + column * kStride;
#pragma unroll
        for (int j = 0; j < (kStrip - 1) * kStride + kKernel; ++j) {
          float x[4];
          input(first + j, x);
#pragma unroll
          for (int s = 0; s < kKernel; ++s) {
            if (j < s || (j - s) % kStride != 0 || (j - s) / kStride >= kStrip) continue;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              float& sum = sums[(j - s) / kStride * 4 + c];
              sum = fmaf(x[c], taps[s][c], sum);
            }
          }
        }
      }
    } else {
      const int kernel_h = static_cast<int>(window.kernel_h), kernel_w = static_cast<int>(window.kernel_w);
      const int stride_h = static_cast<int>(window.stride_h), stride_w = static_cast<int>(window.stride_w);
      const int dilation_h = static_cast<int>(window.dilation_h), dilation_w = static_cast<int>(window.dilation_w);
#pragma unroll 1
      for (int r = 0; r < kernel_h; ++r)
#pragma unroll 1
        for (int s = 0; s < kernel_w; ++s) {
          float taps[4];
          tap(r * kernel_w + s, taps);
          const int first = (row * stride_h + r * dilation_h) * halo_w + column * stride_w + s * dilation_w;
#pragma unroll
          for (int q = 0; q < kStrip; ++q) {
            float x[4];
            input(first + q * stride_w, x);
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[q * 4 + c] = fmaf(x[c], taps[c], sums[q * 4 + c]);
          }
        }
    }
    activate(sums, activation);
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      Quad result;
#pragma unroll
      for (int c = 0; c < 4; ++c) result[c] = from_float<T>(sums[q * 4 + c]);
      const int pixel = row * kFusedColumns + column + q;
      *reinterpret_cast<Quad*>(to + swizzled_offset<kChunkBytes>(pixel, chunk) + within) = result;
    }
  }
}

// Adds the products of one chunk: the A operand with the rows of the 1×1 weight.
template <class Config>
__device__ __forceinline__ void multiply_chunk(Accumulators<Config>& sums, const unsigned char* a, const unsigned char* b) {
#pragma unroll
  for (int slice = 0; slice < Config::kSlices; ++slice) {
    Fragments<Config> fragments;
    fragments.load(a, b, slice);
    fragments.multiply(sums, Untransformed{}, 0);
  }
}

// Makes one chunk of hidden channels from the halo of x: 16 pixels a warp at a time. Pixels beyond the borders become zeros, which is
// what the depthwise convolution pads with.
//   x         [steps][halo_rows][128 bytes]      weights   [steps][chunk's channels][128 bytes]
template <class T, int kWarps>
__device__ __forceinline__ void expand_chunk(unsigned char* to, const unsigned char* x, const unsigned char* weights, int steps,
                                             int halo_rows, const Halo<T>& halo, const float* bias, int64_t channel, int64_t channels,
                                             Activation activation) {
  using Config = GemmConfig<T, 16 * kWarps, kChunkChannels<T>, kChunkBytes, kWarps, 1, 2>;
  const int group = lane_index() / 4, pair = lane_index() % 4;
#pragma unroll 1
  for (int first = 0; first + warp_row<Config>() < halo_rows; first += Config::kTileM) {
    Accumulators<Config> sums;
    sums.clear();
#pragma unroll 1
    for (int step = 0; step < steps; ++step)
      multiply_chunk(sums, x + (step * halo_rows + first) * kChunkBytes, weights + step * Config::kStageBytesB);
    const int pixel = first + warp_row<Config>() + group;
    const bool inside[2] = {halo.inside(pixel / halo.columns, pixel % halo.columns),
                            halo.inside((pixel + 8) / halo.columns, (pixel + 8) % halo.columns)};
#pragma unroll
    for (int n = 0; n < Config::kFragmentsN; ++n) {
      const int own = 8 * n + 2 * pair;
      float(&values)[4] = sums.value[0][n];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (bias != nullptr && channel + own + i % 2 < channels) values[i] += bias[channel + own + i % 2];
      activate(values, activation);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<T, 2> two;
#pragma unroll
        for (int i = 0; i < 2; ++i) two[i] = from_float<T>(inside[half] ? values[2 * half + i] : 0.0f);
        constexpr int kSize = sizeof(T);
        *reinterpret_cast<Vector<T, 2>*>(to + swizzled_offset<kChunkBytes>(pixel + 8 * half, own * kSize / 16) + own * kSize % 16) = two;
      }
    }
  }
}

}  // namespace kernelpress::cuda
