// Output rows of a depthwise convolution, for the kernels that consume them: depthwise.cpp stores them, separable.cpp multiplies on.
#pragma once

#include "epilogue.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

struct DepthwiseProblem {
  Window window;
  int64_t in_h, in_w, out_w, channels;
  int64_t x_stride;
  const float* weight;  // [kernel_h][kernel_w], each with its channels, `weight_stride` apart
  int64_t weight_stride;
  const float* bias;
  ActivationFunction activation;
};

// Where input rows are found: row h at base + (h mod capacity) * row_floats. With `edges`, the rows before `first` end at its row
// `edge_rows`, and those from `last` on begin there.
struct RowSource {
  const float* base;
  int64_t row_floats, capacity;
  const float* edges = nullptr;
  int64_t edge_rows = 0, first = 0, last = 0;

  const float* row(int64_t h) const {
    if (edges && (h < first || h >= last)) return edges + (h - (h < first ? first : last) + edge_rows) * row_floats;
    return base + h % capacity * row_floats;
  }
};

// Where output rows go: row i, pixel q at y + (i * row_pixels + q) * y_stride.
struct DepthwiseOutput {
  float* y;
  int64_t y_stride;
  const float* residual;
  int64_t residual_stride;
  int64_t row_pixels;

  DepthwiseOutput at(int64_t pixel) const {
    return {y + pixel * y_stride, y_stride, residual ? residual + pixel * residual_stride : nullptr, residual_stride, row_pixels};
  }
};

// Residual and activation of channels [first, last) of sums that lie where their results go: `pixels` of each of `rows` rows. Apart from
// what makes the sums, whose registers a call between would cost.
void finish_sums(const ActivationFunction& activation, const DepthwiseOutput& out, int64_t rows, int64_t pixels, int64_t first, int64_t last);

// Pixels of x with each channel `multiplier` times, one behind the other.
void widen(const float* x, int64_t x_stride, float* to, int64_t to_stride, int64_t pixels, int64_t channels, int64_t multiplier);

// Output rows [begin, end) of one image.
void depthwise_rows(const DepthwiseProblem& problem, const RowSource& source, int64_t begin, int64_t end, const DepthwiseOutput& out);

}  // namespace kernelpress::KERNELPRESS_ISA
