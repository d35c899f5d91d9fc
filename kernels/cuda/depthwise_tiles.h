// How a depthwise convolution is cut into blocks: the table of configurations, and the heuristic from problem to plan.
// Plain C++, no CUDA header.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "depthwise.h"

namespace kernelpress::cuda {

// A block owns up to `channel_vectors` 16-byte vectors of every pixel; `any_window` is the kernel for whatever the ring is not
// compiled for.
struct DepthwiseTile {
  const char* name;
  int threads, channel_vectors;
  bool any_window;
};

inline constexpr DepthwiseTile kDepthwiseTiles[] = {
    {"ring of rows, 128 bytes of channels, 128 threads", 128, 8, false},
    {"ring of rows, 64 bytes of channels, 64 threads", 64, 4, false},
    {"ring of rows, 32 bytes of channels, 32 threads", 32, 2, false},
    {"any window, 128 threads", 128, 0, true},
};
inline constexpr int kDepthwiseTileCount = sizeof kDepthwiseTiles / sizeof kDepthwiseTiles[0];
inline constexpr int kAnyWindowTile = 3;
inline constexpr int kDepthwiseMaxThreads = 128;

// Outputs of one thread: a patch of rows × columns of four channels. Wider windows reuse each weight over more columns.
inline constexpr int kPatchRows = 2;
inline constexpr int kPatchChannels = 4;
constexpr int patch_columns(int kernel, int stride) { return kernel == 3 || stride == 2 ? 4 : 8; }
template <int kKernel, int kStride>
inline constexpr int kPatchColumns = patch_columns(kKernel, kStride);  // for device code, which calls no host function
inline constexpr int kAnyPatchColumns = 4;  // of the any_window kernel, one row of one 16-byte vector

namespace depthwise {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace depthwise

// Where blocks and threads lie in the output of one ring kernel.
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
};

struct DepthwiseShape {
  int64_t batch, channels, out_h, out_w, kernel, stride, element_bytes;
};

inline bool depthwise_is_specialised(const Window& w, int64_t multiplier) {
  return multiplier == 1 && w.kernel_h == w.kernel_w && (w.kernel_h == 3 || w.kernel_h == 5 || w.kernel_h == 7) &&
         w.stride_h == w.stride_w && (w.stride_h == 1 || w.stride_h == 2) && w.dilation_h == 1 && w.dilation_w == 1;
}

inline DepthwisePlan plan_depthwise_ring(const DepthwiseShape& s, const DepthwiseTile& tile, const Device& device) {
  using namespace depthwise;
  const int64_t columns = patch_columns(static_cast<int>(s.kernel), static_cast<int>(s.stride));
  const int64_t per_vector = 16 / s.element_bytes, vectors = ceil_div(s.channels, per_vector);
  const int64_t chunks = ceil_div(vectors, tile.channel_vectors), own = ceil_div(vectors, chunks);
  const int64_t strips = tile.threads / (own * per_vector / kPatchChannels);
  const int64_t wide = ceil_div(s.out_w, columns), column_blocks = ceil_div(wide, strips);
  const int64_t column_strips = ceil_div(wide, column_blocks);
  const int64_t high = ceil_div(s.out_h, kPatchRows), row_strips = larger(1, smaller(strips / column_strips, high));
  const int64_t all_steps = ceil_div(high, row_strips);
  // About four waves of the four to eight blocks that a multiprocessor holds: enough to even out, few enough to walk far.
  const int64_t wanted = 16 * device.multiprocessors, without = chunks * column_blocks * s.batch;
  const int64_t steps = ceil_div(all_steps, larger(1, smaller(all_steps, ceil_div(wanted, without))));
  const int64_t segments = ceil_div(all_steps, steps);
  const int64_t step_rows = row_strips * kPatchRows * s.stride, in_rows = step_rows - s.stride + s.kernel;
  const int64_t ring_rows = steps > 1 ? in_rows + step_rows : in_rows;
  const int64_t ring_columns = (column_strips * columns - 1) * s.stride + s.kernel;
  DepthwisePlan plan{};
  plan.blocks = without * segments;
  plan.shared_bytes = s.kernel * s.kernel * own * per_vector * 4 + ring_rows * ring_columns * own * 16;
  plan.threads = tile.threads;
  plan.vectors = static_cast<int32_t>(own);
  plan.chunks = static_cast<int32_t>(chunks);
  plan.column_blocks = static_cast<int32_t>(column_blocks);
  plan.segments = static_cast<int32_t>(segments);
  plan.column_strips = static_cast<int32_t>(column_strips);
  plan.row_strips = static_cast<int32_t>(row_strips);
  plan.steps = static_cast<int32_t>(steps);
  plan.in_rows = static_cast<int32_t>(in_rows);
  plan.step_rows = static_cast<int32_t>(step_rows);
  plan.ring_rows = static_cast<int32_t>(ring_rows);
  plan.ring_columns = static_cast<int32_t>(ring_columns);
  return plan;
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
