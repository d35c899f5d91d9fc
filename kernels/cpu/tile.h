// The register tile that every dense kernel runs on:   y[m, n] = act(bias[n] + residual[m, n] + Σ_k a[m, k] · b[k, n])
//
//            n: one panel = 2 vectors            a: any rows at a constant stride (channels_last activations, or scratch)
//           ┌──────────┬──────────┐            b: packed panels [k][kPanel], so each step reads two whole vectors
//   m: up   │ acc[m,0] │ acc[m,1] │            k: a few segments of contiguous elements (one for a 1×1 convolution,
//   to      │   …      │   …      │               one per kernel row for k×k), summed without leaving the registers
//   kTile-  │          │          │
//   Rows    └──────────┴──────────┘            bound: FMA ports; per step 14 + 2 loads feed 28 FMAs (AVX-512)
#pragma once

#include <utility>

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

// Where a tile's results go; column 0 is the panel's first.
struct TileOutput {
  float* y;
  int64_t y_stride;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  ActivationFunction activation;

  KP_INLINE TileOutput at(int64_t row, int64_t column) const {
    TileOutput moved = *this;
    moved.y += row * y_stride + column;
    if (bias) moved.bias += column;
    if (residual) moved.residual += row * residual_stride + column;
    return moved;
  }
};

template <int kRows, int kVecs>
KP_INLINE void accumulate(Vec (&acc)[kRows][kVecs], const float* a, int64_t row_stride, int64_t half_offset, const float* b, int64_t length,
                          const float* ahead) {
  constexpr int kHalf = kRows / 2, kGroups = (kRows - kHalf + 2) / 3;  // one address serves three rows: base, base + stride, base + 2·stride
  const float* base[2][kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    base[0][g] = a + 3 * g * row_stride;
    base[1][g] = a + half_offset + 3 * g * row_stride;
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < length; ++k) {
    Vec weight[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) weight[v] = load(b + k * kPanel + v * kLanes);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) __builtin_prefetch(b + (k + kPrefetchSteps) * kPanel + v * kLanes);
    __builtin_prefetch(ahead + k * kLanes, 0, 2);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const int half = m >= kHalf, i = half ? m - kHalf : m;
      const Vec x = broadcast(base[half][i / 3][(i % 3) * row_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[m][v] = fma(x, weight[v], acc[m][v]);
    }
  }
}

// The epilogue of a tile with all its columns and a clamp for activation: no branch between its outputs.
template <int kRows, int kVecs>
KP_INLINE void store_whole(Vec (&acc)[kRows][kVecs], const TileOutput& out) {
  if (out.residual) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[m][v] = acc[m][v] + load(out.residual + m * out.residual_stride + v * kLanes);
    }
  }
  const Vec low = out.activation.low, high = out.activation.high;
  float* y = out.y;
  const int64_t y_stride = out.y_stride;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m, y += y_stride) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) store(y + v * kLanes, at_most(at_least(acc[m][v], low), high));
  }
}

template <int kRows, int kVecs>
KP_INLINE void store_any(Vec (&acc)[kRows][kVecs], const TileOutput& out, int64_t columns) {
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    const int64_t lanes = columns - v * kLanes;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      Vec value = acc[m][v];
      if (out.residual) value = value + load_up_to(out.residual + m * out.residual_stride + v * kLanes, lanes);
      store_up_to(out.y + m * out.y_stride + v * kLanes, out.activation(value), lanes);
    }
  }
}

// `ahead` is half a panel that a later tile will read: it is brought from memory to the second-level cache meanwhile.
template <int kRows, int kVecs>
void compute_tile(const TileInput& in, const float* panel, const TileOutput& out, int64_t columns, const float* ahead) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    const Vec bias = out.bias ? load_up_to(out.bias + v * kLanes, columns - v * kLanes) : zero();
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) acc[m][v] = bias;
  }
  for (int64_t g = 0; g < in.segments; ++g) {
    const int64_t k = g * in.segment_length;
    accumulate<kRows, kVecs>(acc, in.a + in.segment_offsets[g], in.row_stride, in.half_offset, panel + k * kPanel, in.segment_length,
                             ahead + k * kLanes);
  }
  if (__builtin_expect(columns >= kVecs * kLanes && out.activation.clamps, 1)) store_whole<kRows, kVecs>(acc, out);
  else store_any<kRows, kVecs>(acc, out, columns);
}

using TileFunction = void (*)(const TileInput&, const float*, const TileOutput&, int64_t, const float*);

template <int kVecs, int... kIndex>
KP_INLINE TileFunction tile_with(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr TileFunction kTable[] = {compute_tile<kIndex + 1, kVecs>...};
  return kTable[rows - 1];
}

KP_INLINE TileFunction tile_function(int64_t rows, int64_t columns) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  return columns > kLanes ? tile_with<2>(rows, Rows{}) : tile_with<1>(rows, Rows{});
}

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
inline void multiply(const TileInput& in, const float* panel, const float* next, const TileOutput& out, int64_t rows, int64_t columns,
                     Lookahead& later) {
  const int64_t tiles = ceil_div(rows, kTileRows), height = rows / tiles, higher = rows % tiles;
  TileInput part = in;
  for (int64_t t = 0, begin = 0; t < tiles; ++t) {
    const int64_t count = height + (t < higher);
    part.a = in.a + begin * in.row_stride;
    part.half_offset = count / 2 * in.row_stride;
    tile_function(count, columns)(part, panel, out.at(begin, 0), columns, fetched_by(t, panel, next, in.depth(), later));
    begin += count;
  }
}

// The same over all panels in [first_panel, last_panel) of a weight with c_out columns.
inline void multiply_panels(const TileInput& in, const float* weight, const TileOutput& out, int64_t rows, int64_t c_out,
                            int64_t first_panel, int64_t last_panel, Lookahead later = {}) {
  const int64_t panel_size = in.depth() * kPanel;
  for (int64_t j = first_panel; j < last_panel; ++j) {
    const float* panel = weight + j * panel_size;
    const float* next = j + 1 < last_panel ? panel + panel_size : panel;
    multiply(in, panel, next, out.at(0, j * kPanel), rows, minimum(kPanel, c_out - j * kPanel), later);
  }
}

constexpr int64_t kNoOffset[1] = {0};

KP_INLINE TileInput contiguous_rows(const float* a, int64_t row_stride, int64_t depth) {
  return {a, row_stride, kNoOffset, 1, depth};
}

}  // namespace kernelpress::KERNELPRESS_ISA
