// int8 depthwise convolution through the ring of rows: four taps of a column in one `dp4a`.
//
//   ring row h     x x x x …       four input rows of a column, four channels each, are turned by byte permutes into one register for
//   ring row h + 1 x x x x …       each channel:   (h, h + 1, h + 2, h + 3). The taps of each output row lie in words of the same four
//   ring row h + 2 x x x x …       rows, zero where its window has none, so that the groups of rows are the same for both output rows
//   ring row h + 3 x x x x …       of a patch: 3×3 at stride 1 has one group and 3 dp4a an output, 5×5 10, 7×7 14.
#pragma once

#include "int8_depthwise.h"
#include "depthwise_ring.cuh"

namespace kernelpress::cuda {

// The block's taps in shared memory: [output row][group][kernel column][channel], then the sum of all taps, [channel].
template <int kKernel, int kStride>
struct Int8Taps {
  static constexpr int kGroups = depthwise::int8_groups(kKernel, kStride);

  // Whether rows 4 group … 4 group + 3 of the patch touch output row `row`'s window.
  static __device__ __forceinline__ constexpr bool touches(int row, int group) {
    return 4 * group < row * kStride + kKernel && 4 * group + 3 >= row * kStride;
  }
  static __device__ __forceinline__ int word(int row, int group, int s) { return (row * kGroups + group) * kKernel + s; }
  static constexpr int kSum = kPatchRows * kGroups * kKernel;

  static __device__ __forceinline__ void fill(int32_t* words, const int8_t* weight, int64_t first_channel, int64_t channels, int chunk) {
    for (int i = static_cast<int>(threadIdx.x); i < chunk; i += static_cast<int>(blockDim.x)) {
      const int64_t channel = first_channel + i;
      int32_t total = 0;
#pragma unroll 1
      for (int s = 0; s < kKernel; ++s) {
        int taps[kKernel];
#pragma unroll
        for (int r = 0; r < kKernel; ++r) {
          taps[r] = channel < channels ? weight[(r * kKernel + s) * channels + channel] : 0;
          total += taps[r];
        }
#pragma unroll
        for (int row = 0; row < kPatchRows; ++row)
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            uint32_t packed = 0;
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
              const int r = 4 * group + byte - row * kStride;
              if (r >= 0 && r < kKernel) packed |= (static_cast<uint32_t>(taps[r]) & 255u) << 8 * byte;
            }
            words[word(row, group, s) * chunk + i] = static_cast<int32_t>(packed);
          }
      }
      words[kSum * chunk + i] = total;
    }
  }
};

// Four channels of four pixels, in the words of the pixels, to the four pixels of each channel.
__device__ __forceinline__ void interleave(const uint32_t (&pixels)[4], int32_t (&channels)[kPatchChannels]) {
  const uint32_t low01 = byte_permute(pixels[0], pixels[1], 0x5140), high01 = byte_permute(pixels[0], pixels[1], 0x7362);
  const uint32_t low23 = byte_permute(pixels[2], pixels[3], 0x5140), high23 = byte_permute(pixels[2], pixels[3], 0x7362);
  channels[0] = static_cast<int32_t>(byte_permute(low01, low23, 0x5410));
  channels[1] = static_cast<int32_t>(byte_permute(low01, low23, 0x7632));
  channels[2] = static_cast<int32_t>(byte_permute(high01, high23, 0x5410));
  channels[3] = static_cast<int32_t>(byte_permute(high01, high23, 0x7632));
}

// Adds one group of rows to the patch. `rows`: where they begin; only those that the patch has are read.
template <int kKernel, int kStride, int kGroup>
__device__ __forceinline__ void add_group(int32_t (&sums)[kPatchRows][kPatchColumns<kKernel, kStride>][kPatchChannels],
                                          const unsigned char* const (&rows)[4], int pixel, const int32_t* taps, int tap_pitch) {
  using Taps = Int8Taps<kKernel, kStride>;
  using Word = Vector<int32_t, kPatchChannels>;
  constexpr int kColumns = kPatchColumns<kKernel, kStride>, kInColumns = (kColumns - 1) * kStride + kKernel;
  constexpr int kInRows = (kPatchRows - 1) * kStride + kKernel;
  Word words[kPatchRows][kKernel];
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i)
#pragma unroll
    for (int s = 0; s < kKernel; ++s)
      if (Taps::touches(i, kGroup)) words[i][s] = *reinterpret_cast<const Word*>(taps + Taps::word(i, kGroup, s) * tap_pitch);
#pragma unroll
  for (int j = 0; j < kInColumns; ++j) {
    uint32_t pixels[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pixels[i] = 4 * kGroup + i < kInRows ? *reinterpret_cast<const uint32_t*>(rows[i] + j * pixel) : 0;
    int32_t x[kPatchChannels];
    interleave(pixels, x);
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i)
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
        if (!Taps::touches(i, kGroup) || j < s || (j - s) % kStride != 0 || (j - s) / kStride >= kColumns) continue;
        int32_t(&sum)[kPatchChannels] = sums[i][(j - s) / kStride];
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c) sum[c] = dp4a(x[c], words[i][s][c], sum[c]);
      }
  }
}

template <int kKernel, int kStride, int kGroup = 0>
__device__ __forceinline__ void add_groups(int32_t (&sums)[kPatchRows][kPatchColumns<kKernel, kStride>][kPatchChannels],
                                           const Ring<int8_t>& ring, int slot, int place, const int32_t* taps, int tap_pitch) {
  if constexpr (kGroup < Int8Taps<kKernel, kStride>::kGroups) {
    const unsigned char* rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = ring.row(slot) + place;
      slot = ring.behind(slot, 1);
    }
    add_group<kKernel, kStride, kGroup>(sums, rows, ring.pixel(), taps, tap_pitch);
    add_groups<kKernel, kStride, kGroup + 1>(sums, ring, slot, place, taps, tap_pitch);
  }
}

template <int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseMaxThreads, kKernel == 3 ? 4 : kKernel == 7 && kStride == 1 ? 2 : 3) int8_depthwise_ring(
    const Int8DepthwiseConv2dArgs a, const DepthwisePlan plan, const Epilogue<int8_t> epilogue) {
  using Taps = Int8Taps<kKernel, kStride>;
  constexpr int kColumns = kPatchColumns<kKernel, kStride>, kVector = Element<int8_t>::kPer16Bytes;
  SIMT_DYN_SMEM(shared);
  const RingBlock block = ring_block<int8_t>(plan, a.out_h, kPatchRows, kColumns);
  const int chunk = plan.vectors * kVector, zero_point = static_cast<int>(a.input_zero_point);
  int32_t* words = reinterpret_cast<int32_t*>(shared);
  unsigned char* memory = shared + (Taps::kSum + 1) * chunk * 4;

  Ring<int8_t> ring(memory, plan, static_cast<const int8_t*>(a.x) + block.image * a.in_h * a.in_w * a.x_stride, a.in_h, a.in_w, a.x_stride,
                    block.first_row * kStride - a.window.pad_h, block.first_column * kStride - a.window.pad_w, block.first_channel,
                    a.channels);
  const uint32_t padding = (static_cast<uint32_t>(zero_point) & 255u) * 0x01010101u;
  ring.advance(plan.in_rows, padding);
  cp_async_commit();
  Taps::fill(words, static_cast<const int8_t*>(a.weight), block.first_channel, a.channels, chunk);

  const PatchPlace at = patch_place<int8_t>(plan, kColumns);
  const int32_t* taps = words + at.quad * kPatchChannels;
  const int place = at.column * kStride * ring.pixel() + at.quad * kPatchChannels;

  int first_slot = 0;
#pragma unroll 1
  for (int step = 0; step < block.steps; ++step) {
    cp_async_wait<0>();
    block_barrier();
    if (step + 1 < block.steps) ring.advance(plan.step_rows, padding);
    cp_async_commit();
    if (vote_any(at.works)) {
      int32_t sums[kPatchRows][kColumns][kPatchChannels];
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) {
        const int32_t start = -zero_point * taps[Taps::kSum * chunk + c];
#pragma unroll
        for (int i = 0; i < kPatchRows; ++i)
#pragma unroll
          for (int q = 0; q < kColumns; ++q) sums[i][q][c] = start;
      }
      add_groups<kKernel, kStride>(sums, ring, ring.behind(first_slot, at.row * kStride), place, taps, chunk);
      store_patch(sums, epilogue, at, block, plan, step, a.out_h, a.out_w);
    }
    first_slot = ring.behind(first_slot, plan.step_rows);
  }
}

inline int launch_int8_ring(const Int8DepthwiseConv2dArgs& a, const DepthwisePlan& plan, const Epilogue<int8_t>& epilogue, void* stream) {
  const Grid grid{dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)),
                  static_cast<size_t>(plan.shared_bytes), stream};
  switch (a.window.kernel_h * 10 + a.window.stride_h) {
    case 31: return launch(int8_depthwise_ring<3, 1>, grid, a, plan, epilogue);
    case 32: return launch(int8_depthwise_ring<3, 2>, grid, a, plan, epilogue);
    case 51: return launch(int8_depthwise_ring<5, 1>, grid, a, plan, epilogue);
    case 52: return launch(int8_depthwise_ring<5, 2>, grid, a, plan, epilogue);
    case 71: return launch(int8_depthwise_ring<7, 1>, grid, a, plan, epilogue);
    default: return launch(int8_depthwise_ring<7, 2>, grid, a, plan, epilogue);
  }
}

}  // namespace kernelpress::cuda
