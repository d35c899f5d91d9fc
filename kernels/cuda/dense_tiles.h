// How a GEMM is cut into blocks: the tables of configurations, and the heuristic from problem to plan.  Plain C++, no CUDA header.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace kernelpress::cuda {

// As many blocks as `blocks` share a multiprocessor's registers; `any_alignment` copies 4 bytes or an element at a time.
struct DenseTile {
  const char* name;
  int tile_m, tile_n, step_bytes, warps_m, warps_n, stages, blocks;
  bool any_alignment;
};

// float16, bfloat16.
inline constexpr DenseTile kDenseTiles[] = {
    {"256x128, 8 warps, 3 stages of 128 bytes", 256, 128, 128, 4, 2, 3, 1, false},
    {"128x128, 4 warps, 3 stages of 128 bytes", 128, 128, 128, 2, 2, 3, 2, false},
    {"128x64, 4 warps, 3 stages of 128 bytes", 128, 64, 128, 2, 2, 3, 3, false},
    {"64x64, 4 warps, 3 stages of 128 bytes", 64, 64, 128, 2, 2, 3, 4, false},
    {"128x32, 4 warps, 3 stages of 128 bytes", 128, 32, 128, 4, 1, 3, 3, false},
    {"16x64, 4 warps, 4 stages of 128 bytes", 16, 64, 128, 1, 4, 4, 4, false},
    {"64x64 of any alignment, 4 warps, 3 stages of 128 bytes", 64, 64, 128, 2, 2, 3, 2, true},
};

// float32: rounding to TF32 takes registers, so its warps have smaller parts.
inline constexpr DenseTile kDenseTf32Tiles[] = {
    {"128x128, 8 warps, 3 stages of 128 bytes", 128, 128, 128, 2, 4, 3, 1, false},
    {"128x64, 4 warps, 3 stages of 128 bytes", 128, 64, 128, 2, 2, 3, 2, false},
    {"64x64, 4 warps, 3 stages of 128 bytes", 64, 64, 128, 2, 2, 3, 3, false},
    {"128x32, 4 warps, 3 stages of 128 bytes", 128, 32, 128, 4, 1, 3, 3, false},
    {"16x64, 4 warps, 4 stages of 128 bytes", 16, 64, 128, 1, 4, 4, 4, false},
    {"64x64 of any alignment, 4 warps, 3 stages of 128 bytes", 64, 64, 128, 2, 2, 3, 2, true},
};

struct DenseTable {
  const DenseTile* tiles;
  int count;

  // The last one is that of any alignment; it also serves where x is scaled on the way.
  constexpr int any_alignment() const { return count - 1; }
};

constexpr DenseTable dense_table(int64_t element_bytes) {
  if (element_bytes == 4) return {kDenseTf32Tiles, sizeof kDenseTf32Tiles / sizeof kDenseTf32Tiles[0]};
  return {kDenseTiles, sizeof kDenseTiles / sizeof kDenseTiles[0]};
}

struct GemmShape {
  int64_t m, n, k_bytes;
};

// K in `splits` parts of `steps` stages.
struct DensePlan {
  int tile;
  int64_t splits, steps;
};

namespace dense {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t steps(const GemmShape& s, const DenseTile& t) { return ceil_div(s.k_bytes, t.step_bytes); }
constexpr int64_t tiles(const GemmShape& s, const DenseTile& t) { return ceil_div(s.m, t.tile_m) * ceil_div(s.n, t.tile_n); }
constexpr int64_t stage_bytes(const DenseTile& t) { return int64_t{t.tile_m + t.tile_n} * t.step_bytes; }

constexpr int64_t stages_bytes(const GemmShape& s, const DenseTile& t) { return stage_bytes(t) * at_most(steps(s, t), t.stages); }
constexpr int64_t store_bytes(const DenseTile& t) { return int64_t{t.warps_m * t.warps_n} * 16 * (t.tile_n / t.warps_n + 8) * 4; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks of so much shared memory that one multiprocessor holds; the driver keeps 1 KiB per block.
constexpr int64_t resident(const DenseTile& t, int64_t shared_bytes, const Device& device) {
  return at_most(t.blocks, (device.shared_bytes + 1024) / (shared_bytes + 1024));
}

// A block stores a tile while the copies of its next one are in flight, through memory beside the stages, unless that memory costs
// a block; then it stores through the stages.
constexpr bool stores_aside(const GemmShape& s, const DenseTile& t, const Device& device) {
  const int64_t stages = stages_bytes(s, t), store = store_bytes(t);
  return resident(t, stages + store, device) == resident(t, larger(stages, store), device);
}

constexpr int64_t shared_bytes(const GemmShape& s, const DenseTile& t, const Device& device) {
  const int64_t stages = stages_bytes(s, t), store = store_bytes(t);
  return stores_aside(s, t, device) ? stages + store : larger(stages, store);
}

constexpr int64_t resident_blocks(const GemmShape& s, const DenseTile& t, const Device& device) {
  return resident(t, shared_bytes(s, t, device), device);
}

// Blocks of a launch: each takes tile after tile, unless there are too few.
constexpr int64_t blocks(const GemmShape& s, const DenseTile& t, const Device& device) {
  const int64_t resident = resident_blocks(s, t, device) * device.multiprocessors;
  return resident > 0 ? at_most(resident, tiles(s, t)) : tiles(s, t);
}

// Bytes that the busiest multiprocessor copies and stores (a ragged tile like a whole one), and the waits that its blocks do not hide
// from each other: about 1500 cycles at 32 bytes a cycle to the first stage and from the last, a tenth of that for each step.
constexpr int64_t cost(const GemmShape& s, const DenseTile& t, const Device& device) {
  const int64_t resident = resident_blocks(s, t, device);
  if (resident == 0) return INT64_MAX;
  const int64_t rounds = ceil_div(tiles(s, t), device.multiprocessors);
  const int64_t wait = 48000 + 4800 * steps(s, t);
  const int64_t bytes = steps(s, t) * stage_bytes(t) + 4 * int64_t{t.tile_m} * t.tile_n;
  return rounds * bytes + ceil_div(rounds, resident) * wait;
}

}  // namespace dense

inline int choose_dense_tile(const GemmShape& s, int64_t element_bytes, const Device& device) {
  const DenseTable table = dense_table(element_bytes);
  int best = 2;
  int64_t least = INT64_MAX;
  for (int index = 0; index < table.any_alignment(); ++index) {
    const int64_t cost = dense::cost(s, table.tiles[index], device);
    if (cost < least) {
      best = index;
      least = cost;
    }
  }
  return best;
}

inline constexpr int64_t kDenseMostSplits = 16;
inline constexpr int64_t kDenseLeastSteps = 4;  // of one split: fewer cost more in partial sums than they gain

// Splits K while tiles leave multiprocessors idle, as far as the workspace goes.
inline DensePlan plan_dense(const GemmShape& s, int64_t element_bytes, int tile, const Device& device, int64_t workspace_bytes) {
  const DenseTile& t = dense_table(element_bytes).tiles[tile];
  const int64_t steps = dense::steps(s, t), partial_bytes = s.m * dense::ceil_div(s.n, 4) * 16;
  int64_t splits = device.multiprocessors / dense::tiles(s, t);
  for (const int64_t most : {kDenseMostSplits, steps / kDenseLeastSteps, workspace_bytes / partial_bytes})
    splits = dense::at_most(splits, most);
  if (splits < 2) return {tile, 1, steps};
  const int64_t per_split = dense::ceil_div(steps, splits);
  return {tile, dense::ceil_div(steps, per_split), per_split};
}

}  // namespace kernelpress::cuda
