// How grouped convolutions and channel shuffles are cut into blocks: tables of configurations, and the heuristics from problem to
// index.  Plain C++, no CUDA header.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "grouped.h"

namespace kernelpress::cuda {

// A tile is `pixels` × `channels` of one group. Where `whole_pixels`, a block makes all tiles of its pixels, one after the other, and
// writes whole lines in the shuffled order; else a block makes one tile, and a shuffle scatters its channels.
struct GroupedTile {
  const char* name;
  int pixels, channels;
  bool whole_pixels;
};

inline constexpr GroupedTile kGroupedTiles[] = {
    {"64 pixels x 16 channels", 64, 16, false},
    {"64 pixels x 32 channels", 64, 32, false},
    {"128 pixels x 64 channels", 128, 64, false},
    {"64 whole pixels, 32 channels at a time", 64, 32, true},
};
inline constexpr int kGroupedTileCount = sizeof kGroupedTiles / sizeof kGroupedTiles[0];
inline constexpr int64_t kGroupedCopiedByValue = 1;  // whatever was chosen, where 16-byte copies of x are not aligned
inline constexpr int kGroupedStages = 4, kGroupedStepBytes = 64;

constexpr int64_t grouped_tiles_per_group(const GroupedTile& tile, int64_t group_out) {
  return (group_out + tile.channels - 1) / tile.channels;
}

// Of the floats in which whole pixels are collected: a row further apart than its channels, by half a round of the banks.
constexpr int64_t grouped_row_pitch(int64_t c_out) { return (c_out + 31) / 32 * 32 + 8; }

// At most: where K is short there are fewer stages.
constexpr int64_t grouped_shared_bytes(const GroupedTile& tile, int64_t c_out) {
  const int64_t stages = static_cast<int64_t>(kGroupedStages) * (tile.pixels + tile.channels) * kGroupedStepBytes;
  return tile.whole_pixels ? stages + tile.pixels * grouped_row_pitch(c_out) * 4 : stages;
}

// Among the tiles of one kind, that which costs a group least: the channels it computes, and its window of x, which every further
// tile reads again and which counts as much as 16 channels.
inline int64_t best_fit(int64_t group_out, bool whole_pixels) {
  int64_t best = -1, least = 0;
  for (int64_t index = 0; index < kGroupedTileCount; ++index) {
    const GroupedTile& tile = kGroupedTiles[index];
    if (tile.whole_pixels != whole_pixels) continue;
    const int64_t cost = grouped_tiles_per_group(tile, group_out) * (tile.channels + 16);
    if (best < 0 || cost <= least) {
      best = index;
      least = cost;
    }
  }
  return best;
}

// Whole pixels where lines would otherwise be written in pieces, if they occupy the device and leave room for two blocks on each
// multiprocessor. The largest tile only where its blocks occupy the device, too.
inline int64_t choose_grouped_tile(const GroupedConv2dArgs& a, const Device& device) {
  const int64_t pixels = a.batch * a.out_h * a.out_w, element = a.dtype == DataType::float32 ? 4 : 2;
  const int64_t whole = best_fit(a.group_out, true);
  const bool in_pieces = a.groups > 1 && (a.shuffle > 1 || a.group_out * element % 32 != 0);
  const bool fits = grouped_shared_bytes(kGroupedTiles[whole], a.c_out) <= device.shared_bytes / 2;
  if (in_pieces && fits && pixels >= 2 * kGroupedTiles[whole].pixels * device.multiprocessors) return whole;
  const int64_t index = best_fit(a.group_out, false);
  const GroupedTile& tile = kGroupedTiles[index];
  const int64_t blocks = (pixels + tile.pixels - 1) / tile.pixels * a.groups * grouped_tiles_per_group(tile, a.group_out);
  return tile.pixels > 64 && blocks < 2 * device.multiprocessors ? 1 : index;
}

// How a shuffle moves its channels: pairs of lanes exchange halves of 16-byte vectors (two equal halves, all of them aligned), or
// blocks turn some pixels' channels in shared memory, or threads gather value by value (pixels too wide for that).
struct ShuffleTile {
  const char* name;
  int threads;
};

inline constexpr ShuffleTile kShuffleTiles[] = {
    {"pairs of lanes, 16-byte vectors", 256},
    {"through shared memory", 256},
    {"value by value", 256},
};
inline constexpr int kShuffleTileCount = sizeof kShuffleTiles / sizeof kShuffleTiles[0];
inline constexpr int64_t kShufflePairs = 0, kShuffleStaged = 1, kShuffleGathered = 2;
inline constexpr int64_t kShuffleStageBytes = 16 * 1024;  // what a block likes to hold: eight blocks on a multiprocessor

constexpr int64_t shuffle_row_bytes(const ShuffleConcatArgs& a, int64_t element) {
  return ((a.channels_a + a.channels_b) * element + 15) / 16 * 16;
}

// Whether y alternates between two equal halves, each of whole 16-byte vectors.
constexpr bool shuffle_alternates(const ShuffleConcatArgs& a, int64_t element) {
  const int64_t half = a.channels_b == 0 ? a.channels_a / 2 : a.channels_a;
  return a.groups == 2 && half * element % 16 == 0 && 2 * half == a.channels_a + a.channels_b;
}

// The configuration asked for, or the quickest; -1 for one that cannot run. `aligned`: pairs of lanes need addresses and strides
// of 16 bytes, and leave others to the next kernel.
inline int64_t choose_shuffle(const ShuffleConcatArgs& a, int64_t element, bool aligned, const Device& device) {
  const bool alternates = shuffle_alternates(a, element), fits = shuffle_row_bytes(a, element) <= device.shared_bytes;
  const int64_t next = fits ? kShuffleStaged : kShuffleGathered;
  switch (a.configuration) {
    case -1: return alternates && aligned ? kShufflePairs : next;
    case kShufflePairs: return !alternates ? -1 : aligned ? kShufflePairs : next;
    case kShuffleStaged: return fits ? kShuffleStaged : -1;
    case kShuffleGathered: return kShuffleGathered;
    default: return -1;
  }
}

}  // namespace kernelpress::cuda
