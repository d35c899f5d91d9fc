// How an int8 product is cut into blocks: the table of configurations, and the heuristic from problem to plan. Costs are those of
// dense_tiles.h, which counts K in bytes.  Plain C++, no CUDA header.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "dense_tiles.h"

namespace kernelpress::cuda {

inline constexpr DenseTile kInt8Tiles[] = {
    {"128x128, 8 warps, 3 stages of 128 bytes", 128, 128, 128, 2, 4, 3, 1, false},
    {"128x64, 4 warps, 3 stages of 128 bytes", 128, 64, 128, 2, 2, 3, 2, false},
    {"64x64, 4 warps, 3 stages of 128 bytes", 64, 64, 128, 2, 2, 3, 3, false},
    {"128x32, 4 warps, 3 stages of 128 bytes", 128, 32, 128, 4, 1, 3, 3, false},
    {"16x64, 4 warps, 4 stages of 128 bytes", 16, 64, 128, 1, 4, 4, 4, false},
    {"64x64 of any alignment, 8 warps, 3 stages of 128 bytes", 64, 64, 128, 2, 4, 3, 2, true},
    {"256x128, 8 warps, 3 stages of 128 bytes", 256, 128, 128, 4, 2, 3, 1, false},
};
inline constexpr int kInt8TileCount = sizeof kInt8Tiles / sizeof kInt8Tiles[0];
inline constexpr int kInt8AnyAlignment = 5;

// Windows take the registers that the last tile needs for its sums.
inline constexpr DenseTile kInt8WindowTiles[] = {kInt8Tiles[0], kInt8Tiles[1], kInt8Tiles[2],
                                                 kInt8Tiles[3], kInt8Tiles[4], kInt8Tiles[5]};
inline constexpr int kInt8WindowTileCount = sizeof kInt8WindowTiles / sizeof kInt8WindowTiles[0];

// Among the first `count` of kInt8Tiles.
inline int choose_int8_tile(const GemmShape& s, int count, const Device& device) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int index = 0; index < count; ++index) {
    if (kInt8Tiles[index].any_alignment) continue;
    const int64_t cost = dense::cost(s, kInt8Tiles[index], device);
    if (cost < least) {
      best = index;
      least = cost;
    }
  }
  return best;
}

// Splits K while tiles leave multiprocessors idle, as far as the workspace goes.
inline DensePlan plan_int8(const GemmShape& s, int tile, const Device& device, int64_t workspace_bytes) {
  const DenseTile& t = kInt8Tiles[tile];
  const int64_t steps = dense::steps(s, t), partial_bytes = s.m * dense::ceil_div(s.n, 4) * 16;
  int64_t splits = device.multiprocessors / dense::tiles(s, t);
  for (const int64_t most : {kDenseMostSplits, steps / kDenseLeastSteps, workspace_bytes / partial_bytes})
    splits = dense::at_most(splits, most);
  if (splits < 2) return {tile, 1, steps};
  const int64_t per_split = dense::ceil_div(steps, splits);
  return {tile, dense::ceil_div(steps, per_split), per_split};
}

}  // namespace kernelpress::cuda
