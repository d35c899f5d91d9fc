// Winograd's dense 3×3 convolution of stride 1, channels_last:   y[p, q, n] = act(bias[n] + residual[p, q, n] + Σ_rsc x[p-P+r, q-P+s, c] · w[n, c, r, s])
//
// Tiles of m × m outputs, m = 2 or 4, read k × k inputs, k = m + 2, and multiply k² times where m² · 9 products stood: 2.25 or 4 times fewer.
//
//     x ──Bᵀ d B──▶ V [k²][tile][c] ──k² products with U [k²][c][n]──▶ M [tile][k²][n] ──Aᵀ M A, epilogue──▶ y
//
//   one block:  as many tiles as keep V in the second-level cache, over a range of panels of U; M is one panel's
//   one task:   a range of tiles × a range of panels; tasks that share tiles each transform them, which costs less than handing them over
//   bound:      FMA; the transforms take a fifth of the time at 64 channels, a twelfth at 256; on small maps, reading U
#include "args.h"
#include "dense_winograd.h"
#include "split.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kBlockFloats = 128 * 1024;  // of V
constexpr int64_t kLeastTiles = 28;           // of a block that has them: with fewer, U is read too often
constexpr int64_t kMostTiles = 56;            // with more, M leaves the inner caches
constexpr int64_t kStripTiles = 14;           // transformed at a time, their columns in the first-level cache
constexpr double kInputCost = 0.35;           // of transforming a tile, beside its products with one panel

constexpr float kZeros[kLanes] = {};

// Streams that are written together at a power-of-two distance would share one set of the cache.
KP_INLINE int64_t odd_lines(int64_t floats) { return (ceil_div(floats, kLanes) | 1) * kLanes; }

template <class F>
struct Winograd {
  static constexpr int kIn = F::kIn, kOut = F::kOut, kPositions = kIn * kIn;
  static constexpr int64_t kTileFloats = kPositions * kPanel + kLanes;  // of M

  const WinogradConv2dArgs& args;
  const int64_t across = ceil_div(args.out_w, kOut), down = ceil_div(args.out_h, kOut);
  const int64_t depth = round_up(args.c_in, kLanes);
  const ActivationFunction activation{args.activation};

  // A block's scratch memory.
  struct Scratch {
    float *v, *m, *columns;
    int64_t position;  // from one position's tiles to the next one's, in V
  };

  Scratch scratch_for(int64_t tiles) const {
    const int64_t position = odd_lines(tiles * depth), v = kPositions * position, m = tiles * kTileFloats;
    float* memory = thread_scratch(v + m + (kStripTiles * kOut + 2) * kIn * kLanes);
    return {memory, memory + v, memory + v + m, position};
  }

  // Where a tile lies: its image, and its first output pixel there.
  struct Place {
    int64_t image, top, left;
  };

  KP_INLINE Place place_of(int64_t tile) const {
    const int64_t row = tile / across;
    return {row / down, row % down * kOut, tile % across * kOut};
  }

  // Neighbouring tiles of one row, kLanes channels from `c` on: columns first, which neighbours share, then tile by tile.
  // kInside: all rows are inside of the image, and all lanes channels.
  template <bool kInside>
  void transform_strip(const Place& place, int64_t c, int64_t tiles, const RowGroups& groups, int64_t first_tile, const Scratch& s) const {
    const int64_t lanes = args.c_in - c, top = place.top - args.pad_h, left = place.left - args.pad_w;
    const float* row[kIn];
    int64_t stride[kIn];
    for (int i = 0; i < kIn; ++i) {
      const int64_t h = top + i;
      const bool inside = kInside || (h >= 0 && h < args.in_h);
      row[i] = inside ? args.x + (place.image * args.in_h + h) * args.in_w * args.x_stride + c : kZeros;
      stride[i] = inside ? args.x_stride : 0;
    }
    for (int64_t q = 0; q < tiles * kOut + 2; ++q) {
      const int64_t w = left + q;
      Vec d[kIn], v[kIn];
      if (w >= 0 && w < args.in_w) {
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) d[i] = kInside ? load(row[i] + w * args.x_stride) : load_up_to(row[i] + w * stride[i], lanes);
        F::input(d, v);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) v[i] = zero();
      }
#pragma GCC unroll 8
      for (int i = 0; i < kIn; ++i) store(s.columns + (q * kIn + i) * kLanes, v[i]);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t group = groups.group_of(first_tile + t), begin = groups.begin(group), rows = groups.rows(group);
      float* to = s.v + begin * depth + c * rows + (first_tile + t - begin) * kLanes;
      const float* from = s.columns + t * kOut * kIn * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kIn; ++i) {
        Vec d[kIn], v[kIn];
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) d[j] = load(from + (j * kIn + i) * kLanes);
        F::input(d, v);
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) store(to + (i * kIn + j) * s.position, v[j]);
      }
    }
  }

  void transform_input(int64_t first, int64_t last, const RowGroups& groups, const Scratch& s) const {
    for (int64_t t = first; t < last;) {
      const Place place = place_of(t);
      const int64_t tiles = minimum(minimum(last - t, across - t % across), kStripTiles), top = place.top - args.pad_h;
      const bool rows_inside = top >= 0 && top + kIn <= args.in_h;
      for (int64_t c = 0; c < args.c_in; c += kLanes) {
        if (rows_inside && c + kLanes <= args.c_in) transform_strip<true>(place, c, tiles, groups, t - first, s);
        else transform_strip<false>(place, c, tiles, groups, t - first, s);
      }
      t += tiles;
    }
  }

  // kLanes output channels of one tile, from channel n on.
  void transform_output(const Place& place, int64_t n, const float* m) const {
    const int64_t lanes = args.c_out - n, rows = minimum(kOut, args.out_h - place.top), columns = minimum(kOut, args.out_w - place.left);
    const int64_t pixel = (place.image * args.out_h + place.top) * args.out_w + place.left;
    const Vec bias = args.bias ? load_up_to(args.bias + n, lanes) : zero();
    const float* residual = args.residual ? args.residual + pixel * args.residual_stride + n : nullptr;
    float* y = args.y + pixel * args.y_stride + n;
    Vec half[kOut][kIn];
#pragma GCC unroll 8
    for (int j = 0; j < kIn; ++j) {
      Vec column[kIn], out[kOut];
#pragma GCC unroll 8
      for (int i = 0; i < kIn; ++i) column[i] = load(m + (i * kIn + j) * kPanel);
      F::output(column, out);
#pragma GCC unroll 8
      for (int i = 0; i < kOut; ++i) half[i][j] = out[i];
    }
    const bool whole = rows == kOut && columns == kOut && lanes >= kLanes && activation.clamps;
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) {
      Vec out[kOut];
      F::output(half[i], out);
      if (__builtin_expect(whole, 1)) {
#pragma GCC unroll 8
        for (int j = 0; j < kOut; ++j) {
          Vec value = out[j] + bias;
          if (residual) value = value + load(residual + j * args.residual_stride);
          store(y + j * args.y_stride, at_most(at_least(value, activation.low), activation.high));
        }
      } else if (i < rows) {
#pragma GCC unroll 8
        for (int j = 0; j < kOut; ++j) {
          if (j >= columns) break;
          Vec value = out[j] + bias;
          if (residual) value = value + load_up_to(residual + j * args.residual_stride, lanes);
          store_up_to(y + j * args.y_stride, activation(value), lanes);
        }
      }
      y += args.out_w * args.y_stride;
      if (residual) residual += args.out_w * args.residual_stride;
    }
  }

  void block(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) const {
    const RowGroups groups(last - first);
    const Scratch s = scratch_for(last - first);
    transform_input(first, last, groups, s);
    const int64_t panel = args.c_in * kPanel;
    const float *u = args.weight + first_panel * kPositions * panel, *end = args.weight + last_panel * kPositions * panel;
    for (int64_t j = first_panel; j < last_panel; ++j) {
      const int64_t columns = minimum(kPanel, args.c_out - j * kPanel);
      for (int64_t position = 0; position < kPositions; ++position, u += panel) {
        multiply_packed(groups, s.v + position * s.position, depth, u, s.m + position * kPanel, kTileFloats, args.c_in, columns,
                        u + panel < end ? u + panel : u);
      }
      for (int64_t t = first; t < last; ++t) {
        const Place place = place_of(t);
        for (int64_t v = 0; v < columns; v += kLanes) transform_output(place, j * kPanel + v, s.m + (t - first) * kTileFloats + v);
      }
    }
  }

  void run() const {
    const int64_t tiles = args.batch * down * across, panels = ceil_div(args.c_out, kPanel);
    const int64_t fitting = maximum(kLeastTiles, minimum(kBlockFloats / (kPositions * depth), kMostTiles));
    over_grid(split_work(tiles, kPositions * args.c_in, panels, kInputCost, 0, args.c_out), tiles, panels,
              [&](int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
                const int64_t count = end - begin, blocks = ceil_div(count, fitting);
                for (int64_t i = 0; i < blocks; ++i) {
                  block(begin + count * i / blocks, begin + count * (i + 1) / blocks, first_panel, last_panel);
                }
              });
  }
};

}  // namespace

void winograd_conv2d(const WinogradConv2dArgs& args) {
  if (args.tile == 2) Winograd<F2>{args}.run();
  else Winograd<F4>{args}.run();
}

}  // namespace kernelpress::KERNELPRESS_ISA
