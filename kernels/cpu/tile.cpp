// The register tile of tile.h: its function for every number of rows, and the loops over tiles and panels.
#include "tile.h"

#include <utility>

namespace kernelpress::KERNELPRESS_ISA {
namespace {

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

// Adds the residual to output m, v of a tile, and stores what `activate` makes of it; where others stand between, behind these.
template <class Activate>
KP_INLINE void finish(const TileOutput& out, Vec value, int64_t m, int64_t v, int64_t columns, bool between, const Activate& activate) {
  const int64_t lanes = columns - v * kLanes;
  if (out.residual) value = value + load_up_to(out.residual + m * out.residual_stride + v * kLanes, lanes);
  value = activate(value);
  if (!between) return store_up_to(out.y + m * out.y_stride + v * kLanes, value, lanes);
  const Vec before = load_up_to(out.between.values + m * out.between.stride + v * kLanes, lanes);
  store_interleaved(out.y + m * out.y_stride + 2 * v * kLanes, before, value, lanes);
}

// As `store_whole`, of some columns, or of values behind those that stand between.
template <int kRows, int kVecs, bool kBetween>
KP_INLINE void store_clamped(Vec (&acc)[kRows][kVecs], const TileOutput& out, int64_t columns) {
  const Vec low = out.activation.low, high = out.activation.high;
  const auto clamp = [low, high](Vec x) __attribute__((always_inline)) { return at_most(at_least(x, low), high); };
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) finish(out, acc[m][v], m, v, columns, kBetween, clamp);
  }
}

// Sums that were stored, [rows][vecs · kLanes], through an activation that is no clamp. A call within the tile's own function would cost
// it registers even where it is not made: the compiler kept twelve of 28 sums in memory.
__attribute__((noinline)) void store_curved(const float* sums, int64_t rows, int64_t vecs, const TileOutput& out, int64_t columns) {
  with_curve(out.activation.kind, [&](const auto& curve) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t v = 0; v < vecs; ++v, sums += kLanes) finish(out, load(sums), m, v, columns, out.between.values != nullptr, curve);
    }
  });
}

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
  if (__builtin_expect(out.activation.clamps, 1)) {
    if (__builtin_expect(out.between.values != nullptr, 0)) return store_clamped<kRows, kVecs, true>(acc, out, columns);
    if (__builtin_expect(columns >= kVecs * kLanes, 1)) return store_whole<kRows, kVecs>(acc, out);
    return store_clamped<kRows, kVecs, false>(acc, out, columns);
  }
  alignas(64) float sums[kRows * kVecs * kLanes];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) store(sums + (m * kVecs + v) * kLanes, acc[m][v]);
  }
  store_curved(sums, kRows, kVecs, out, columns);
}

template <int kVecs, int... kIndex>
KP_INLINE TileFunction tile_with(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr TileFunction kTable[] = {compute_tile<kIndex + 1, kVecs>...};
  return kTable[rows - 1];
}

}  // namespace

TileFunction tile_function(int64_t rows, int64_t columns) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  return columns > kLanes ? tile_with<2>(rows, Rows{}) : tile_with<1>(rows, Rows{});
}

void multiply(const TileInput& in, const float* panel, const float* next, const TileOutput& out, int64_t rows, int64_t columns,
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

void multiply_panels(const TileInput& in, const float* weight, const TileOutput& out, int64_t rows, int64_t c_out, int64_t first_panel,
                     int64_t last_panel, Lookahead later) {
  const int64_t panel_size = in.depth() * kPanel;
  for (int64_t j = first_panel; j < last_panel; ++j) {
    const float* panel = weight + j * panel_size;
    const float* next = j + 1 < last_panel ? panel + panel_size : panel;
    multiply(in, panel, next, out.at(0, j * kPanel), rows, minimum(kPanel, c_out - j * kPanel), later);
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
