// How the fused blocks are cut, and when fusing loses.  Plain C++, no CUDA header.
//
// One block makes an 8×8 patch of outputs: the halo of inputs that they need, and for every 128 bytes of hidden channels one chunk of
// depthwise results as the A operand of the 1×1 convolution.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// `tile_n`: output channels of a block; more of them compute the depthwise part again. 0: the kernels run one after the other.
struct SeparableTile {
  const char* name;
  int tile_n, warps_m, warps_n;
};

inline constexpr SeparableTile kSeparableTiles[] = {
    {"fused, 8x8 pixels, 64 channels", 64, 2, 2},
    {"fused, 8x8 pixels, 128 channels", 128, 2, 2},
    {"fused, 8x8 pixels, 256 channels", 256, 2, 4},
    {"one kernel after the other", 0, 0, 0},
};
inline constexpr int kSeparableTileCount = sizeof kSeparableTiles / sizeof kSeparableTiles[0];
inline constexpr int kUnfusedTile = kSeparableTileCount - 1;

inline constexpr int kFusedRows = 8, kFusedColumns = 8, kFusedPixels = kFusedRows * kFusedColumns;
inline constexpr int kChunkBytes = 128;  // of hidden channels

// What is asked, for both ops. `expanded`: hidden channels are made from `c_in` of x; else they are x's.
struct SeparableShape {
  int64_t batch, in_h, in_w, c_in, hidden, out_h, out_w, c_out, element_bytes;
  Window window;
  bool expanded;
};

struct SeparablePlan {
  int64_t blocks, shared_bytes;
  int32_t tiles_h, tiles_w, tiles_n;
  int32_t halo_h, halo_w;      // pixels of input under a patch
  int32_t halo_rows;           // halo_h · halo_w in whole fragments of 16 rows
  int32_t chunks;              // of hidden channels
  int32_t expand_steps;        // 128-byte steps of c_in; 0 where nothing expands
  int32_t x_bytes, weight_bytes, expand_bytes, project_bytes;  // of the parts of shared memory, of one buffer each
};

namespace separable {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr double larger(double a, double b) { return a > b ? a : b; }

// Clocks of one multiprocessor, from the peaks of an H200 (132 of them at 1.76 GHz): 4.3 TB/s between memory and multiprocessors,
// 2.3 times that from the second-level cache, mma at what mma.sync reaches of them.
inline constexpr double kMemoryBytes = 18.5, kCacheBytes = 42, kLaunch = 5000, kBarrier = 60;
inline double macs_per_clock(int64_t element_bytes) { return element_bytes == 2 ? 1200 : 300; }
// Results of the depthwise stage, per clock: 128 FMA lanes, of which loads and conversions take a good part.
inline double results_per_clock(int64_t taps) { return 128.0 / (2.0 * static_cast<double>(taps) + 8.0); }

}  // namespace separable

// Of the workspace: the expanded map, and behind it the depthwise results.
inline int64_t expanded_bytes(const SeparableShape& s) {
  return s.expanded ? (s.batch * s.in_h * s.in_w * s.hidden * s.element_bytes + 15) / 16 * 16 : 0;
}

inline SeparablePlan plan_separable(const SeparableShape& s, const SeparableTile& tile) {
  using namespace separable;
  const Window& w = s.window;
  SeparablePlan plan{};
  plan.tiles_h = static_cast<int32_t>(ceil_div(s.out_h, kFusedRows));
  plan.tiles_w = static_cast<int32_t>(ceil_div(s.out_w, kFusedColumns));
  plan.tiles_n = static_cast<int32_t>(ceil_div(s.c_out, tile.tile_n));
  plan.blocks = s.batch * plan.tiles_h * plan.tiles_w * plan.tiles_n;
  plan.halo_h = static_cast<int32_t>((kFusedRows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1);
  plan.halo_w = static_cast<int32_t>((kFusedColumns - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1);
  plan.halo_rows = static_cast<int32_t>(ceil_div(int64_t{plan.halo_h} * plan.halo_w, 16) * 16);
  plan.chunks = static_cast<int32_t>(ceil_div(s.hidden * s.element_bytes, kChunkBytes));
  plan.expand_steps = s.expanded ? static_cast<int32_t>(ceil_div(s.c_in * s.element_bytes, kChunkBytes)) : 0;
  plan.x_bytes = plan.halo_rows * kChunkBytes;
  plan.weight_bytes = static_cast<int32_t>(w.kernel_h * w.kernel_w) * kChunkBytes;
  plan.expand_bytes = static_cast<int32_t>(plan.expand_steps * (kChunkBytes / s.element_bytes) * kChunkBytes);
  plan.project_bytes = tile.tile_n * kChunkBytes;
  // x: all steps of c_in and the hidden chunk made of them, or two chunks in turn.
  const int64_t x_buffers = s.expanded ? plan.expand_steps + 1 : 2;
  const int64_t working = x_buffers * plan.x_bytes + kFusedPixels * kChunkBytes +
                          2 * (int64_t{plan.weight_bytes} + plan.expand_bytes + plan.project_bytes);
  const int64_t warps = tile.warps_m * tile.warps_n, store = warps * 16 * (tile.tile_n / tile.warps_n + 8) * 4;
  plan.shared_bytes = working > store ? working : store;
  return plan;
}

// Clocks until the last block of the fused kernel is done.
inline double fused_cost(const SeparableShape& s, const SeparableTile& tile, const SeparablePlan& plan, const Device& device) {
  using namespace separable;
  const double chunk = static_cast<double>(kChunkBytes / s.element_bytes), rate = macs_per_clock(s.element_bytes);
  const double taps = static_cast<double>(s.window.kernel_h * s.window.kernel_w), halo = plan.halo_rows;
  const double project = kFusedPixels * chunk * tile.tile_n / rate;
  const double expand = halo * chunk * plan.expand_steps * chunk / rate + (s.expanded ? halo * chunk / 32 : 0);
  const double depthwise = kFusedPixels * chunk / results_per_clock(static_cast<int64_t>(taps));
  const double weights = (taps * kChunkBytes + plan.expand_bytes + plan.project_bytes) / kCacheBytes;
  const double x = s.expanded ? 0 : halo * kChunkBytes / kMemoryBytes;
  const double busy = project + expand + depthwise, copies = weights + x;
  const double y = kFusedPixels * static_cast<double>(tile.tile_n * s.element_bytes) / kMemoryBytes;
  const double first = s.expanded ? plan.expand_steps * halo * kChunkBytes / kMemoryBytes : x;
  const double resident = larger(1, static_cast<double>((device.shared_bytes + 1024) / (plan.shared_bytes + 1024)));
  const double barriers = (s.expanded ? 3 : 2) * kBarrier / resident * 4;
  const double block = plan.chunks * (larger(busy, copies) + barriers) + y + first;
  return kLaunch + static_cast<double>(ceil_div(plan.blocks, device.multiprocessors)) * block;
}

// Clocks of the kernels one after the other; what lies between them is written and read, in the second-level cache if it fits.
inline double unfused_cost(const SeparableShape& s, const Device& device) {
  using namespace separable;
  const double size = static_cast<double>(s.element_bytes), rate = macs_per_clock(s.element_bytes);
  const double in = static_cast<double>(s.batch * s.in_h * s.in_w), out = static_cast<double>(s.batch * s.out_h * s.out_w);
  const double hidden = static_cast<double>(s.hidden), c_out = static_cast<double>(s.c_out), c_in = static_cast<double>(s.c_in);
  const double all = static_cast<double>(device.multiprocessors);
  const auto traffic = [&](double first, double second) {
    const double cached = static_cast<double>(device.l2_bytes) / 2;
    const auto clocks = [&](double bytes) { return bytes / (bytes < cached ? kCacheBytes : kMemoryBytes); };
    return (clocks(first) + clocks(second)) / all;
  };
  const auto gemm = [&](double pixels, double depth, double columns) {
    const double rows = static_cast<double>(ceil_div(static_cast<int64_t>(pixels), 128) * 128);
    return kLaunch + larger(traffic(pixels * depth * size, pixels * columns * size), rows * depth * columns / rate / all);
  };
  const double depthwise = larger(traffic(in * hidden * size, out * hidden * size),
                                  out * hidden / results_per_clock(s.window.kernel_h * s.window.kernel_w) / all);
  return (s.expanded ? gemm(in, c_in, hidden) : 0) + kLaunch + depthwise + gemm(out, hidden, c_out);
}

// The cheapest way by the model; a fused one only where its shared memory fits. `fusible`: rows are aligned to 16 bytes.
inline int64_t choose_separable_tile(const SeparableShape& s, const Device& device, bool fusible) {
  int64_t best = kUnfusedTile;
  double least = unfused_cost(s, device);
  for (int64_t index = 0; fusible && index < kUnfusedTile; ++index) {
    const SeparablePlan plan = plan_separable(s, kSeparableTiles[index]);
    if (plan.shared_bytes > device.shared_bytes) continue;
    const double cost = fused_cost(s, kSeparableTiles[index], plan, device);
    if (cost < least) {
      best = index;
      least = cost;
    }
  }
  return best;
}

}  // namespace kernelpress::cuda
