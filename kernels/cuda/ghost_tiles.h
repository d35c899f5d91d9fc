// How a ghost convolution is cut into blocks: the table of configurations, and the heuristic problem -> index.
// Plain C++, no CUDA header.
//
// One kernel computes a tile of p with the pixels around it and both halves of y from there; pixels around a tile are computed by
// its neighbours too. Two kernels compute p once, and read it back. What each costs is estimated in cycles of a multiprocessor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/status.h"
#include "ghost.h"

namespace kernelpress::cuda {

// Of the fused kernel: GEMM tiles of rows × channels, one after the other until tile_h × tile_w pixels and those around are done.
struct GhostTile {
  const char* name;
  int rows, channels;
  int tile_h, tile_w;  // tile_w is a multiple of kGhostStrip
};

inline constexpr int kGhostStrip = 4;     // pixels of a row that one thread of the cheap operation computes
inline constexpr int kGhostVector = 4;    // and channels
inline constexpr int kGhostStepBytes = 64;
inline constexpr int kGhostStages = 3;
inline constexpr int kGhostThreads = 128;
inline constexpr int kGhostReach = 1;     // pixels around a tile: of a 3×3 window

inline constexpr GhostTile kGhostTiles[] = {
    {"one kernel, 64x32, 4x8 pixels", 64, 32, 4, 8},
    {"one kernel, 64x32, 7x8 pixels", 64, 32, 7, 8},
    {"one kernel, 128x16, 7x16 pixels", 128, 16, 7, 16},
    {"one kernel, 128x32, 7x16 pixels", 128, 32, 7, 16},
    {"one kernel, 128x32, 14x16 pixels", 128, 32, 14, 16},
    {"one kernel, 128x64, 14x16 pixels", 128, 64, 14, 16},
    {"one kernel, 128x16, 14x28 pixels", 128, 16, 14, 28},
    {"one kernel, 128x32, 14x28 pixels", 128, 32, 14, 28},
    {"convolution, then cheap operation", 0, 0, 0, 0},
};
inline constexpr int kGhostTileCount = sizeof kGhostTiles / sizeof kGhostTiles[0];
inline constexpr int kGhostTwoKernels = kGhostTileCount - 1;

namespace ghost {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t element_bytes(DataType dtype) { return dtype == DataType::float32 ? 4 : 2; }

// A pixel of p in shared memory is that many elements longer than its channels: 16-byte aligned, and the pairs of values that a warp
// writes, in eight pixels (fp32: in four at a time), in different banks.
inline constexpr int kPitchPadding = 8;

inline int64_t shared_bytes(const GhostTile& tile, int64_t c_in, int64_t element) {
  const int64_t positions = (tile.tile_h + 2 * kGhostReach) * (tile.tile_w + 2 * kGhostReach);
  const int64_t stages = smaller(ceil_div(c_in * element, kGhostStepBytes), kGhostStages);
  return stages * kGhostStepBytes * (tile.rows + tile.channels) + positions * (tile.channels + kPitchPadding) * element;
}

inline bool is_multiple(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace ghost

// Whether the fused kernel takes the problem: 1×1 → 3×3 depthwise of multiplier 1 with nothing cut off, and memory that can be
// read 16 bytes at a time and written by fours of channels.
inline bool ghost_is_fusible(const GhostConv2dArgs& a) {
  using namespace ghost;
  const int64_t e = element_bytes(a.dtype), four = kGhostVector * e;
  const Window& w = a.window;
  const bool shapes = w.kernel_h == 1 && w.kernel_w == 1 && w.pad_h == 0 && w.pad_w == 0 && a.cheap_h == 3 && a.cheap_w == 3 &&
                      a.multiplier == 1 && a.kept == a.primary;
  const bool reads = is_multiple(a.x, 16) && a.x_stride * e % 16 == 0 && a.c_in * e % 16 == 0 && is_multiple(a.primary_weight, 16);
  const bool writes = a.primary % kGhostVector == 0 && a.y_stride % kGhostVector == 0 && a.residual_stride % kGhostVector == 0 &&
                      is_multiple(a.y, four) && is_multiple(a.residual, four) && is_multiple(a.cheap_weight, four);
  return shapes && reads && writes;
}

namespace ghost {

// What a multiprocessor does per cycle, in round figures of an A100 and an H100: bytes of memory, multiply-additions of `mma` in
// fp16, plain ones; and how long it waits.
constexpr int64_t kBytes = 20, kTensorMacs = 1024, kPlainMacs = 128;
constexpr int64_t kStepLatency = 150, kTileLatency = 1200, kLaunch = 4000;
constexpr int64_t kPlainPerOutput = 18;  // of the cheap operation: 9 products, conversions, addresses

inline int64_t fused_cycles(const GhostConv2dArgs& a, const GhostTile& tile, const Device& device) {
  const int64_t e = element_bytes(a.dtype), shared = shared_bytes(tile, a.c_in, e);
  const int64_t slices = ceil_div(a.primary, tile.channels), channels = smaller(tile.channels, a.primary);
  const int64_t blocks = a.batch * ceil_div(a.out_h, tile.tile_h) * ceil_div(a.out_w, tile.tile_w) * slices;
  const int64_t rows = smaller(tile.tile_h + 2 * kGhostReach, a.out_h) * smaller(tile.tile_w + 2 * kGhostReach, a.out_w);
  const int64_t pixels = smaller(tile.tile_h, a.out_h) * smaller(tile.tile_w, a.out_w);
  const int64_t gemms = ceil_div(rows, tile.rows), steps = ceil_div(a.c_in * e, kGhostStepBytes);
  const int64_t read = (rows + gemms * tile.channels) * a.c_in * e;
  const int64_t written = pixels * channels * 2 * e * (a.residual == nullptr ? 1 : 2);
  const int64_t products = gemms * tile.rows * tile.channels * steps * kGhostStepBytes / 2 / kTensorMacs;
  const int64_t busy = larger((read + written) / kBytes, products + pixels * tile.channels * kPlainPerOutput / kPlainMacs);
  const int64_t waiting = gemms * (steps * kStepLatency + kTileLatency);
  const int64_t rounds = ceil_div(blocks, device.multiprocessors), together = larger(1, device.shared_bytes / shared);
  return kLaunch + larger(rounds * busy, ceil_div(rounds, smaller(together, 8)) * waiting);
}

inline int64_t two_kernels_cycles(const GhostConv2dArgs& a, const Device& device) {
  const int64_t e = element_bytes(a.dtype), pixels = a.batch * a.out_h * a.out_w;
  const int64_t depth = a.c_in * a.window.kernel_h * a.window.kernel_w, steps = ceil_div(depth * e, kGhostStepBytes);
  const int64_t blocks = ceil_div(pixels, 128) * ceil_div(a.primary, 64);
  const int64_t block_bytes = (128 + 64) * depth * e + 128 * smaller(64, a.primary) * e;
  const int64_t rounds = ceil_div(blocks, device.multiprocessors);
  const int64_t gemm = larger(rounds * block_bytes / kBytes, ceil_div(rounds, 4) * (steps * kStepLatency + kTileLatency));
  const int64_t maps = a.residual == nullptr ? 2 : 6;  // p read and the other half written; residuals, and p once more
  const int64_t cheap = pixels * a.kept * e * maps / (kBytes * device.multiprocessors);
  const int64_t launches = a.residual == nullptr ? 2 : 3;
  return launches * kLaunch + gemm + cheap + kTileLatency;
}

}  // namespace ghost

// The configuration that the estimates prefer.
inline int64_t choose_ghost_tile(const GhostConv2dArgs& a, const Device& device) {
  if (!ghost_is_fusible(a)) return kGhostTwoKernels;
  int64_t best = kGhostTwoKernels, least = ghost::two_kernels_cycles(a, device);
  for (int64_t index = 0; index < kGhostTwoKernels; ++index) {
    const GhostTile& tile = kGhostTiles[index];
    if (ghost::shared_bytes(tile, a.c_in, ghost::element_bytes(a.dtype)) > device.shared_bytes) continue;
    const int64_t cycles = ghost::fused_cycles(a, tile, device);
    if (cycles < least) {
      least = cycles;
      best = index;
    }
  }
  return best;
}

}  // namespace kernelpress::cuda
