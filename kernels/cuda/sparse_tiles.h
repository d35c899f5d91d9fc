// Tile configurations of the sparse family, and how a problem is cut into them. Plain C++, no CUDA header.
//
// A tile is kTileM pixels × one row of blocks, and K runs over that row's blocks only: a handful of steps where a dense product has
// hundreds. What pays is several blocks per multiprocessor: one fills its pipeline while another multiplies or stores.
#pragma once

#include <cstdint>

#include "sparse.h"

namespace kernelpress::cuda {

// `blocks` share a multiprocessor, as far as registers go.
struct SparseTile {
  const char* name;
  int tile_m, stages, blocks;
  bool any_alignment;  // reads element by element; its tile is 64 channels wide whatever the blocks are
};

inline constexpr SparseTile kSparseTiles[] = {
    {"128 pixels, 3 stages", 128, 3, 3, false},
    {"64 pixels, 4 stages", 64, 4, 3, false},
    {"64 pixels, 3 stages, any alignment", 64, 3, 2, true},
};
inline constexpr int kSparseLarge = 0, kSparseSmall = 1, kSparseUnaligned = 2;

constexpr int64_t sparse_element_bytes(DataType dtype) {
  return dtype == DataType::float32 ? 4 : dtype == DataType::int8 ? 1 : 2;
}

constexpr int64_t sparse_shared_bytes(const SparseTile& t, int64_t tile_n) { return t.stages * (t.tile_m + tile_n) * 128; }

// Whether every 16 bytes of channels can be copied as one.
inline bool sparse_is_aligned(const SparseConv2dArgs& args) {
  const int64_t bytes = sparse_element_bytes(args.dtype);
  return reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride * bytes % 16 == 0 && args.c_in * bytes % 16 == 0;
}

// Whether a configuration can run a problem. The large tile is compiled for 16-bit types only.
inline bool sparse_runs(int64_t tile, const SparseConv2dArgs& args) {
  if (tile == kSparseUnaligned) return true;
  return sparse_is_aligned(args) && (tile == kSparseSmall || sparse_element_bytes(args.dtype) == 2);
}

// Tiles of 128 pixels read each weight half as often; those of 64 are for problems that would leave multiprocessors idle.
inline int64_t sparse_tile(const SparseConv2dArgs& args, const Device& device) {
  if (!sparse_is_aligned(args)) return kSparseUnaligned;
  const int64_t items = (args.batch * args.out_h * args.out_w + 127) / 128 * args.segments;
  return sparse_runs(kSparseLarge, args) && items >= 2 * device.multiprocessors ? kSparseLarge : kSparseSmall;
}

// Blocks of a launch: as many as the device holds at a time, `most` on a multiprocessor; each takes item after item.
inline int64_t sparse_blocks(const SparseTile& t, int64_t tile_n, int64_t most, int64_t items, const Device& device) {
  const int64_t by_memory = (device.shared_bytes + 1024) / (sparse_shared_bytes(t, tile_n) + 1024);
  const int64_t resident = (by_memory < most ? by_memory : most) * device.multiprocessors;
  return resident > 0 && resident < items ? resident : items;
}

// Tiles of pixels that go through all rows of blocks together: their part of x takes half of the second-level cache.
inline int64_t sparse_group(const SparseConv2dArgs& args, const SparseTile& t, int64_t tiles, const Device& device) {
  const int64_t pixels = t.tile_m * args.window.stride_h * args.window.stride_w;
  const int64_t group = device.l2_bytes / 2 / (pixels * args.x_stride * sparse_element_bytes(args.dtype));
  return group < 1 ? 1 : group < tiles ? group : tiles;
}

}  // namespace kernelpress::cuda
