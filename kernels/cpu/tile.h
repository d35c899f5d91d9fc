// The register tile that every dense kernel runs on:   y[m, n] = act(bias[n] + residual[m, n] + Σ_k a[m, k] · b[k, n])
//
//            n: one panel = 2 vectors            a: any rows at a constant stride (channels_last activations, or scratch)
//           ┌──────────┬──────────┐            b: packed panels [k][kPanel], so each step reads two whole vectors
//   m: up   │ acc[m,0] │ acc[m,1] │            k: a few segments of contiguous elements (one for a 1×1 convolution,
//   to      │   …      │   …      │               one per kernel row for k×k), summed without leaving the registers
//   kTile-  │          │          │
//   Rows    └──────────┴──────────┘            bound: FMA ports; per step 14 + 2 loads feed 28 FMAs (AVX-512)
#pragma once

#include "epilogue.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

constexpr int kPanel = 2 * kLanes;
constexpr int kPrefetchSteps = 8;  // a panel outgrows the first-level cache: its weights are asked for this far ahead

// Where a tile's rows come from: row m, segment g starts at a + m * row_stride + segment_offsets[g]. The second half of a tile's
// rows starts half_offset after the first: two narrow image rows make one tile.
struct TileInput {
  const float* a;
  int64_t row_stride;
  const int64_t* segment_offsets;
  int64_t segments, segment_length;
  int64_t half_offset = 0;

  KP_INLINE int64_t depth() const { return segments * segment_length; }
};

// Channels that stand between those computed: channel c of a pixel in y[2c], the one computed in y[2c + 1].
struct Interleaved {
  const float* values = nullptr;
  int64_t stride = 0;
};

// Where a tile's results go; column 0 is the panel's first.
struct TileOutput {
  float* y;
  int64_t y_stride;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  ActivationFunction activation;
  Interleaved between = {};

  KP_INLINE TileOutput at(int64_t row, int64_t column) const {
    TileOutput moved = *this;
    moved.y += row * y_stride + (between.values ? 2 * column : column);
    if (between.values) moved.between.values += row * between.stride + column;
    if (bias) moved.bias += column;
    if (residual) moved.residual += row * residual_stride + column;
    return moved;
  }
};

using TileFunction = void (*)(const TileInput&, const float* panel, const TileOutput&, int64_t columns, const float* ahead);

// What computes a tile of so many rows, at most kTileRows, and columns, at most a panel's. `ahead` is half a panel that a later tile
// will read: it is brought from memory to the second-level cache meanwhile.
TileFunction tile_function(int64_t rows, int64_t columns);

// Memory that will be read after the tiles at hand, in the order it is to be fetched.
struct Lookahead {
  const float* at = nullptr;
  const float* end = nullptr;

  // The next `depth` lines of it; `otherwise` where none are left.
  KP_INLINE const float* take(int64_t depth, const float* otherwise) {
    if (at >= end) return otherwise;
    const float* lines = at;
    at += depth * kLanes;
    return lines;
  }
};

// What the t-th tile over a panel fetches ahead: one half of the next panel each, then what comes later; else nothing that is not there.
KP_INLINE const float* fetched_by(int64_t t, const float* panel, const float* next, int64_t depth, Lookahead& later) {
  return t < 2 && next != panel ? next + t * depth * kLanes : later.take(depth, panel);
}

// rows × columns of output from one panel; rows are cut into tiles of nearly equal height. `next` is the panel to come, or the same.
void multiply(const TileInput& in, const float* panel, const float* next, const TileOutput& out, int64_t rows, int64_t columns,
              Lookahead& later);

// The same over all panels in [first_panel, last_panel) of a weight with c_out columns.
void multiply_panels(const TileInput& in, const float* weight, const TileOutput& out, int64_t rows, int64_t c_out, int64_t first_panel,
                     int64_t last_panel, Lookahead later = {});

constexpr int64_t kNoOffset[1] = {0};

KP_INLINE TileInput contiguous_rows(const float* a, int64_t row_stride, int64_t depth) {
  return {a, row_stride, kNoOffset, 1, depth};
}

}  // namespace kernelpress::KERNELPRESS_ISA
