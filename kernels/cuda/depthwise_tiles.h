// How a depthwise convolution is cut into blocks: the table of configurations, and the heuristic from problem to plan.
// Plain C++, no CUDA header.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "depthwise.h"

namespace kernelpress::cuda {

enum class DepthwiseKernel { ring, any_window, tensor };

// A block owns up to `channel_vectors` 16-byte vectors of every pixel.
struct DepthwiseTile {
  const char* name;
  int threads, channel_vectors;
  DepthwiseKernel kernel;
};

inline constexpr DepthwiseTile kDepthwiseTiles[] = {
    {"ring of rows, 128 bytes of channels, 128 threads", 128, 8, DepthwiseKernel::ring},
    {"ring of rows, 64 bytes of channels, 64 threads", 64, 4, DepthwiseKernel::ring},
    {"ring of rows, 32 bytes of channels, 32 threads", 32, 2, DepthwiseKernel::ring},
    {"any window, 128 threads", 128, 0, DepthwiseKernel::any_window},
    {"tensor cores, 32 bytes of channels, 128 threads", 128, 2, DepthwiseKernel::tensor},
};
inline constexpr int kAnyWindowTile = 3, kTensorTile = 4;
inline constexpr int kDepthwiseTileCount = sizeof kDepthwiseTiles / sizeof kDepthwiseTiles[0];
inline constexpr int kDepthwiseMaxThreads = 128;  // of the ring and of any window

// int8 has no kernel for tensor cores.
inline constexpr DepthwiseTile kInt8DepthwiseTiles[] = {kDepthwiseTiles[0], kDepthwiseTiles[1], kDepthwiseTiles[2], kDepthwiseTiles[3]};

// Outputs of one thread: a patch of rows × columns of four channels. Wider windows reuse each weight over more columns.
inline constexpr int kPatchRows = 2;
inline constexpr int kPatchChannels = 4;
constexpr int patch_columns(int kernel, int stride) { return kernel == 3 || stride == 2 ? 4 : 8; }
template <int kKernel, int kStride>
inline constexpr int kPatchColumns = patch_columns(kKernel, kStride);  // for device code, which calls no host function
inline constexpr int kAnyPatchColumns = 4;  // of the any_window kernel, one row of one 16-byte vector

// Outputs of one column of an `mma` fragment; a warp computes kTensorPatches of them for each of its four channels.
inline constexpr int kTensorRows = 4, kTensorColumns = 8, kTensorPatches = 8;
inline constexpr int kTensorMinPatches = 4;  // a step with fewer is left to the ring: the other fragment columns would idle
inline constexpr int kTensorStageBytes = kTensorPatches * kTensorRows * kTensorColumns * 64;

namespace depthwise {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// int8: four input rows of a column lie in one register, its taps in one word. Words of one output row and column.
constexpr int int8_groups(int kernel, int stride) { return ((kPatchRows - 1) * stride + kernel + 3) / 4; }

// 32-bit words beside the ring, per channel: the taps as float; or, of int8, the groups of taps and their sum.
constexpr int64_t float_words(int kernel) { return kernel * kernel; }
constexpr int64_t int8_words(int kernel, int stride) { return kPatchRows * int8_groups(kernel, stride) * kernel + 1; }

}  // namespace depthwise

// Where blocks and threads lie in the output of a kernel that walks down the image.
//
//   block = (chunk of channels, column block, segment of rows, image); it walks its segment in steps of row_strips patches
//   ring_rows of ring_columns pixels in shared memory: the in_rows of this step and, while it computes, the step_rows that
//   the next one adds
struct DepthwisePlan {
  int64_t blocks, shared_bytes;
  int32_t threads;
  int32_t vectors;                     // of 16 bytes, per pixel and block
  int32_t chunks, column_blocks, segments;
  int32_t column_strips, row_strips;   // patches of one step
  int32_t steps;                       // of one segment
  int32_t in_rows, step_rows, ring_rows, ring_columns;
  int32_t copy_bytes;                  // widest access that all pixels of x allow: 16, 8, 4, or 0: element by element
  int32_t plane_columns;               // of the tensor kernel's ring: pixels between two planes, each of one row of four channels
};

struct DepthwiseShape {
  int64_t batch, channels, out_h, out_w, kernel, stride, element_bytes, table_words;
};

inline bool depthwise_is_specialised(const Window& w, int64_t multiplier) {
  return multiplier == 1 && w.kernel_h == w.kernel_w && (w.kernel_h == 3 || w.kernel_h == 5 || w.kernel_h == 7) &&
         w.stride_h == w.stride_w && (w.stride_h == 1 || w.stride_h == 2) && w.dilation_h == 1 && w.dilation_w == 1;
}

namespace depthwise {

// All but threads, shared_bytes and copy_bytes, from the patches that one step can have and their size.
inline DepthwisePlan plan_walk(const DepthwiseShape& s, int64_t own, int64_t patches, int64_t rows, int64_t columns, const Device& device) {
  const int64_t chunks = ceil_div(ceil_div(s.channels * s.element_bytes, 16), own);
  const int64_t wide = ceil_div(s.out_w, columns), column_blocks = ceil_div(wide, patches);
  const int64_t column_strips = ceil_div(wide, column_blocks);
  const int64_t high = ceil_div(s.out_h, rows), row_strips = larger(1, smaller(patches / column_strips, high));
  const int64_t all_steps = ceil_div(high, row_strips);
  // About four waves of the four to eight blocks that a multiprocessor holds: enough to even out, few enough to walk far.
  const int64_t wanted = 16 * device.multiprocessors, without = chunks * column_blocks * s.batch;
  const int64_t steps = ceil_div(all_steps, larger(1, smaller(all_steps, ceil_div(wanted, without))));
  const int64_t segments = ceil_div(all_steps, steps);
  const int64_t step_rows = row_strips * rows * s.stride, in_rows = step_rows - s.stride + s.kernel;
  DepthwisePlan plan{};
  plan.blocks = without * segments;
  plan.vectors = static_cast<int32_t>(own);
  plan.chunks = static_cast<int32_t>(chunks);
  plan.column_blocks = static_cast<int32_t>(column_blocks);
  plan.segments = static_cast<int32_t>(segments);
  plan.column_strips = static_cast<int32_t>(column_strips);
  plan.row_strips = static_cast<int32_t>(row_strips);
  plan.steps = static_cast<int32_t>(steps);
  plan.in_rows = static_cast<int32_t>(in_rows);
  plan.step_rows = static_cast<int32_t>(step_rows);
  plan.ring_rows = static_cast<int32_t>(steps > 1 ? in_rows + step_rows : in_rows);
  return plan;
}

// Vectors of a block where `most` are the limit: the chunks of channels are about equal.
inline int64_t own_vectors(const DepthwiseShape& s, int64_t most) {
  const int64_t vectors = ceil_div(s.channels * s.element_bytes, 16);
  return ceil_div(vectors, ceil_div(vectors, most));
}

}  // namespace depthwise

inline DepthwisePlan plan_depthwise_ring(const DepthwiseShape& s, const DepthwiseTile& tile, const Device& device) {
  const int64_t columns = patch_columns(static_cast<int>(s.kernel), static_cast<int>(s.stride));
  const int64_t own = depthwise::own_vectors(s, tile.channel_vectors), per_vector = 16 / s.element_bytes;
  DepthwisePlan plan = depthwise::plan_walk(s, own, tile.threads / (own * per_vector / kPatchChannels), kPatchRows, columns, device);
  plan.threads = tile.threads;
  plan.ring_columns = static_cast<int32_t>((plan.column_strips * columns - 1) * s.stride + s.kernel);
  plan.shared_bytes = s.table_words * own * per_vector * 4 + int64_t{plan.ring_rows} * plan.ring_columns * own * 16;
  return plan;
}

// A warp for every four channels. The last patch reads its 16 columns, 12 where the window is no wider than 5.
inline DepthwisePlan plan_depthwise_tensor(const DepthwiseShape& s, const Device& device) {
  const int64_t own = depthwise::own_vectors(s, kDepthwiseTiles[kTensorTile].channel_vectors);
  const int64_t quads = own * 16 / s.element_bytes / kPatchChannels;
  DepthwisePlan plan = depthwise::plan_walk(s, own, kTensorPatches, kTensorRows, kTensorColumns, device);
  plan.threads = static_cast<int32_t>(32 * quads);
  plan.ring_columns = static_cast<int32_t>(plan.column_strips * kTensorColumns + (s.kernel > 5 ? 8 : 4));
  // Whole groups of 8, which a swizzle turns round, and 4 more: copies of four pixels of all planes meet no bank twice.
  plan.plane_columns = plan.column_strips * kTensorColumns + 12;
  plan.shared_bytes = kTensorStageBytes + plan.ring_rows * quads * plan.plane_columns * kPatchChannels * s.element_bytes;
  return plan;
}

// Whether the tensor kernel can compute it: 5×5 and 7×7 at stride 1 in 16 bits, `copy_bytes` of x at least 8.
inline bool tensor_is_possible(const DepthwiseShape& s, int64_t copy_bytes, const Device& device) {
  return s.element_bytes == 2 && s.kernel > 3 && s.stride == 1 && copy_bytes >= 8 && s.channels % kPatchChannels == 0 &&
         plan_depthwise_tensor(s, device).shared_bytes <= device.shared_bytes;
}

// Whether it is also worth it: there are patches enough, and room for a second block on a multiprocessor.
inline bool tensor_pays(const DepthwiseShape& s, int64_t copy_bytes, const Device& device) {
  if (!tensor_is_possible(s, copy_bytes, device)) return false;
  const DepthwisePlan plan = plan_depthwise_tensor(s, device);
  return plan.column_strips * plan.row_strips >= kTensorMinPatches && plan.shared_bytes <= device.shared_bytes / 2;
}

// The first configuration whose blocks leave room for a second one on a multiprocessor and are enough to occupy all of them;
// where none has enough, the one with the most. The table's order is the order of preference.
inline int64_t choose_depthwise_tile(const DepthwiseShape& s, const Device& device) {
  int64_t best = kAnyWindowTile, most = 0;
  for (int64_t index = 0; index < kAnyWindowTile; ++index) {
    const DepthwisePlan plan = plan_depthwise_ring(s, kDepthwiseTiles[index], device);
    if (plan.shared_bytes > device.shared_bytes / 2) continue;
    if (plan.blocks >= 2 * device.multiprocessors) return index;
    if (plan.blocks > most) {
      best = index;
      most = plan.blocks;
    }
  }
  return best;
}

}  // namespace kernelpress::cuda
