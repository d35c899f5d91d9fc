// How a convolution with a sparse weight is divided among threads: strips of outputs × rows of the weight with as many non-zeros.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// Outputs [first, last) of an image.
struct Strip {
  int64_t image, first, last;
};

// `outputs` of each image, at most `strip` of them at a time; non-zeros of row i of the weight: row_starts[i] … row_starts[i + 1] - 1.
// `planes` are copied to scratch for a strip. Rows are divided at multiples of `step`.
struct SparseWork {
  int64_t batch, outputs, strip;
  const int32_t* row_starts;
  int64_t rows, planes, step = 1;
};

struct SparseSplit {
  int64_t strip_parts, row_parts;
};

// Least time of the slowest thread, in steps of the walk; filling a strip takes a few per plane.
inline SparseSplit split_sparse(const SparseWork& work, int64_t strips) {
  constexpr double kFilling = 3;
  SparseSplit best{1, 1};
  double least = 0;
  for (int64_t row_parts = 1; row_parts <= minimum(thread_count(), work.rows); ++row_parts) {
    const int64_t strip_parts = minimum(thread_count() / row_parts, strips);
    const double walked = static_cast<double>(work.row_starts[work.rows] + work.rows) / static_cast<double>(row_parts);
    const double cost = static_cast<double>(ceil_div(strips, strip_parts)) * (walked + kFilling * static_cast<double>(work.planes));
    if (row_parts == 1 || cost < least) best = {strip_parts, row_parts}, least = cost;
  }
  return best;
}

// Rows and non-zeros both count: the rows of part k of `parts` end where its share of their sum does.
inline int64_t sparse_row(const SparseWork& work, int64_t k, int64_t parts) {
  if (k == parts) return work.rows;
  const int64_t share = (work.row_starts[work.rows] + work.rows) * k / parts;
  int64_t low = 0, high = work.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work.row_starts[middle] + middle < share) low = middle + 1;
    else high = middle;
  }
  return low / work.step * work.step;
}

// Runs body(strip, first_row, last_row) over all of it.
template <class Body>
void over_strips(const SparseWork& work, const Body& body) {
  const int64_t vectors = ceil_div(work.outputs, kLanes), strips_of_image = ceil_div(vectors, work.strip / kLanes);
  const int64_t strips = work.batch * strips_of_image;
  const SparseSplit split = split_sparse(work, strips);
  parallel(split.strip_parts * split.row_parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / split.row_parts, j = task % split.row_parts;
      const int64_t first = sparse_row(work, j, split.row_parts), last = sparse_row(work, j + 1, split.row_parts);
      for (int64_t s = strips * i / split.strip_parts; s < strips * (i + 1) / split.strip_parts; ++s) {
        const int64_t k = s % strips_of_image, from = vectors * k / strips_of_image, to = vectors * (k + 1) / strips_of_image;
        body(Strip{s / strips_of_image, from * kLanes, minimum(to * kLanes, work.outputs)}, first, last);
      }
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
