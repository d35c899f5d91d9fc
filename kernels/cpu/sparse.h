// The walk over a sparse weight:   acc[n + j, v] = bias[n + j] + Σ_q values[q, j] · x[steps[q] + v]      v = neighbouring positions
//
//   steps   3  9 12 40 │ 0  7 31 │ …          one row of the weight at a time, kRows output channels of it: a step names where the
//   values  a  b  c  d │ e  f  g │ …          channel (and tap) begins in scratch, and is multiplied with kVectors vectors there
//
//   bound: loads from the first two levels of cache; kRows = 4 loads a vector once for four channels
#pragma once

#include "epilogue.h"

namespace kernelpress::KERNELPRESS_ISA {

constexpr int kMostVectors = 8;                           // of positions with kRows = 1
constexpr int kMostVectorsOfFour = kLanes == 16 ? 6 : 2;  // with kRows = 4: accumulators and weights stay in registers

struct SparseRows {
  const int32_t *starts, *steps;
  const float *values, *bias;
  int64_t c_out;
};

// Channel n, position v goes to y[n * stride + v]; `positions` there are in all.
struct SparseOutput {
  float* y;
  int64_t stride;
  const float* residual;
  int64_t residual_stride, positions;
  ActivationFunction activation;
};

template <int kRows, int kVectors>
KP_INLINE void add_step(Vec (&acc)[kRows][kVectors], const SparseRows& rows, const float* x, int64_t q) {
  const float* at = x + rows.steps[q];
  Vec weight[kRows];
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) weight[j] = broadcast(rows.values[q * kRows + j]);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Vec value = load(at + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) acc[j][v] = fma(value, weight[j], acc[j][v]);
  }
}

// Rows [first, last) of the weight, kRows output channels each, over kVectors vectors of positions of which the last may be partial.
template <int kRows, int kVectors>
__attribute__((noinline)) void sparse_walk(const SparseRows& rows, const float* x, int64_t first, int64_t last, const SparseOutput& out) {
  constexpr int kChains = kRows * kVectors >= 4 ? 1 : 4;  // sums that do not wait for each other
  const int64_t rest = out.positions - (kVectors - 1) * kLanes;
  const ActivationFunction activation = out.activation;
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = i * kRows, channels = minimum(kRows, rows.c_out - n);
    Vec acc[kChains][kRows][kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const Vec bias = broadcast(rows.bias && j < channels ? rows.bias[n + j] : 0.0f);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        acc[0][j][v] = bias;
#pragma GCC unroll 4
        for (int chain = 1; chain < kChains; ++chain) acc[chain][j][v] = zero();
      }
    }
    int64_t q = rows.starts[i];
    const int64_t end = rows.starts[i + 1];
    for (; q + kChains <= end; q += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) add_step<kRows, kVectors>(acc[chain], rows, x, q + chain);
    }
    for (; q < end; ++q) add_step<kRows, kVectors>(acc[0], rows, x, q);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      if (j >= channels) break;
      float* y = out.y + (n + j) * out.stride;
      const float* residual = out.residual ? out.residual + (n + j) * out.residual_stride : nullptr;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lanes = v + 1 < kVectors ? kLanes : rest;
        Vec sum = acc[0][j][v];
#pragma GCC unroll 4
        for (int chain = 1; chain < kChains; ++chain) sum = sum + acc[chain][j][v];
        if (residual) sum = sum + load_up_to(residual + v * kLanes, lanes);
        store_up_to(y + v * kLanes, activation(sum), lanes);
      }
    }
  }
}

using SparseWalk = void (*)(const SparseRows&, const float* x, int64_t first, int64_t last, const SparseOutput&);

inline SparseWalk sparse_walk_of(int64_t rows, int64_t vectors) {
  static constexpr SparseWalk one[] = {sparse_walk<1, 1>, sparse_walk<1, 2>, sparse_walk<1, 3>, sparse_walk<1, 4>,
                                       sparse_walk<1, 5>, sparse_walk<1, 6>, sparse_walk<1, 7>, sparse_walk<1, 8>};
  if (rows == 1) return one[vectors - 1];
  if constexpr (kMostVectorsOfFour == 6) {
    static constexpr SparseWalk four[] = {sparse_walk<4, 1>, sparse_walk<4, 2>, sparse_walk<4, 3>,
                                          sparse_walk<4, 4>, sparse_walk<4, 5>, sparse_walk<4, 6>};
    return four[vectors - 1];
  } else {
    return vectors == 1 ? sparse_walk<4, 1> : sparse_walk<4, 2>;
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
