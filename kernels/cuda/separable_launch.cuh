// What the launchers of the fused separable kernels share: the choice of a tile, and from its index to the kernel compiled for it.
#pragma once

#include "separable_stages.cuh"

namespace kernelpress::cuda {

// Whether rows of 16-byte vectors can be copied from this address.
template <class T>
bool copies_vectors(const void* address, int64_t stride) {
  return is_aligned(address) && is_aligned<T>(stride);
}

// The configuration asked for, or the cost model's. `fusible`: rows are aligned to 16 bytes.
inline int64_t separable_tile(const SeparableShape& shape, const Device& device, bool fusible, int64_t configuration) {
  if (configuration < 0 || configuration >= kSeparableTileCount) return choose_separable_tile(shape, device, fusible);
  return fusible ? configuration : kUnfusedTile;
}

inline Grid separable_grid(const SeparablePlan& plan, int threads, void* stream) {
  return {dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(plan.shared_bytes), stream};
}

namespace detail {

template <class T, int kTile, class Launcher>
int launch_window(const Launcher& launcher, const Window& w) {
  constexpr SeparableTile tile = kSeparableTiles[kTile];
  using Config = GemmConfig<T, kFusedPixels, tile.tile_n, kChunkBytes, tile.warps_m, tile.warps_n, 2>;
  if constexpr (sizeof(T) == 2) {
    if (w.kernel_h == 3 && w.kernel_w == 3 && w.stride_h == w.stride_w && w.dilation_h == 1 && w.dilation_w == 1) {
      if (w.stride_h == 1) return launcher.template launch_fused<Config, 3, 1>(tile);
      if (w.stride_h == 2) return launcher.template launch_fused<Config, 3, 2>(tile);
    }
  }
  return launcher.template launch_fused<Config, 0, 0>(tile);
}

}  // namespace detail

// Calls launcher.launch_fused<Config, kKernel, kStride>(tile) for a fused tile: kKernel 3 with stride 1 or 2 (in
// 16 bits), or 0: any window.
template <class T, class Launcher>
int launch_separable(const Launcher& launcher, int64_t tile, const Window& window) {
  switch (tile) {
    case 0: return detail::launch_window<T, 0>(launcher, window);
    case 1: return detail::launch_window<T, 1>(launcher, window);
    default: return detail::launch_window<T, 2>(launcher, window);
  }
}

}  // namespace kernelpress::cuda
