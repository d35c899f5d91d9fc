// The parts of Winograd's convolution that know nothing of images: transforms, and a register tile over packed rows.
//
// F(m×m, 3×3):  Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        (Lavin and Gray, arXiv 1509.09308)
// of points p, the last of which is ∞: a row of Bᵀ has the coefficients of Π_{q≠p} (x - q), a column of Aᵀ the powers of p. The factors
// 1 / Π_{q≠p} (p - q) are in G, which is applied in double when weights are packed. Each transform below is one dimension of one.
#pragma once

#include <utility>

#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {

struct F2 {  // 0, 1, -1, ∞
  static constexpr int kOut = 2, kIn = 4;

  static KP_INLINE void input(const Vec* d, Vec* v) {
    v[0] = d[2] - d[0];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }

  static KP_INLINE void output(const Vec* m, Vec* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

// Reciprocal points lose least: half the error of 0, ±1, ±2, ∞, and for these two B has no product a²b² but 1.
struct F4 {  // 0, a, -a, b, -b, ∞
  static constexpr int kOut = 4, kIn = 6;
  static constexpr float a = 0.70710678118654752440f, b = 1.41421356237309504880f, a2 = 0.5f, b2 = 2.0f;

  static KP_INLINE void input(const Vec* d, Vec* v) {
    const Vec sum = broadcast(-(a2 + b2));
    const Vec even_a = fma(broadcast(-b2), d[2], d[4]), odd_a = fma(broadcast(-b2), d[1], d[3]);
    const Vec even_b = fma(broadcast(-a2), d[2], d[4]), odd_b = fma(broadcast(-a2), d[1], d[3]);
    v[0] = fma(sum, d[2], d[4] + d[0]);
    v[1] = fma(broadcast(a), odd_a, even_a);
    v[2] = fma(broadcast(-a), odd_a, even_a);
    v[3] = fma(broadcast(b), odd_b, even_b);
    v[4] = fma(broadcast(-b), odd_b, even_b);
    v[5] = fma(sum, d[3], d[5] + d[1]);
  }

  static KP_INLINE void output(const Vec* m, Vec* y) {
    const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = fma(broadcast(b), difference_b, broadcast(a) * difference_a);
    y[2] = fma(broadcast(b2), sum_b, broadcast(a2) * sum_a);
    y[3] = fma(broadcast(b * b2), difference_b, fma(broadcast(a * a2), difference_a, m[5]));
  }
};

// c[m][n] = Σ_k a[m][k] · b[k][n], a packed as [k / kLanes][kRows][kLanes]: read front to back, every row at a constant displacement.
// `ahead` is brought to the second-level cache meanwhile, half a panel of it.
template <int kRows, int kVecs>
void packed_tile(const float* a, const float* b, float* c, int64_t c_stride, int64_t depth, const float* ahead) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[m][v] = zero();
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec weight[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) weight[v] = load(b + v * kLanes);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) __builtin_prefetch(b + kPrefetchSteps * kPanel + v * kLanes);
    __builtin_prefetch(a + (kRows + k) * kLanes);  // the next block of rows, a line with every step
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec x = broadcast(a[m * kLanes + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[m][v] = fma(x, weight[v], acc[m][v]);
    }
    b += kPanel;
    ahead += kLanes;
  };
  for (int64_t whole = depth / kLanes; whole > 0; --whole, a += kRows * kLanes) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kLanes; ++k) step(k);
  }
  for (int64_t k = 0; k < depth % kLanes; ++k) step(k);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) store(c + m * c_stride + v * kLanes, acc[m][v]);
  }
}

using PackedTile = void (*)(const float*, const float*, float*, int64_t, int64_t, const float*);

template <int kVecs, int... kIndex>
KP_INLINE PackedTile packed_tile_with(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr PackedTile kTable[] = {packed_tile<kIndex + 1, kVecs>...};
  return kTable[rows - 1];
}

// How rows are cut into groups of nearly equal height, each for one register tile.
struct RowGroups {
  int64_t count, height, higher;

  explicit RowGroups(int64_t rows) : count(ceil_div(rows, kTileRows)), height(rows / count), higher(rows % count) {}

  KP_INLINE int64_t begin(int64_t group) const { return group * height + minimum(group, higher); }
  KP_INLINE int64_t rows(int64_t group) const { return height + (group < higher); }
  KP_INLINE int64_t group_of(int64_t row) const {
    const int64_t in_higher = higher * (height + 1);
    return row < in_higher ? row / (height + 1) : higher + (row - in_higher) / height;
  }
};

// All groups of rows, one behind the other, with one panel of weights; `next` is the panel to come, or the same.
inline void multiply_packed(const RowGroups& groups, const float* a, int64_t a_depth, const float* b, float* c, int64_t c_stride,
                            int64_t depth, int64_t columns, const float* next) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t begin = groups.begin(g), rows = groups.rows(g);
    const PackedTile tile = columns > kLanes ? packed_tile_with<2>(rows, Rows{}) : packed_tile_with<1>(rows, Rows{});
    tile(a + begin * a_depth, b, c + begin * c_stride, c_stride, depth, g < 2 ? next + g * depth * kLanes : b);
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
