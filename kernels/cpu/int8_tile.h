// The register tile that the int8 products run on:   y[m, n] = epilogue(Σ_k (x[m, k] − z) · w[n, k])
//
//            n: one panel = kInt8Vecs vectors        a: rows of staged activations at a constant stride
//           ┌─────────┬─────────┬───┐            b: packed panels [k / kGroup][channels][kGroup]
//   m: up   │sums[m,0]│sums[m,1]│ … │            k: a few segments of contiguous groups of inputs (one for a 1×1
//   to 6    │    …    │    …    │   │               convolution, one per kernel row for k×k)
//   or more └─────────┴─────────┴───┘            bound: the units that multiply; per group 6 + 4 loads feed 24 products (AVX-512)
//
// With VNNI activations are staged as x + 128, so sums begin with −(128 + z) · Σ_k w[n, k]; without it as x − z.
#pragma once

#include "int8_epilogue.h"

namespace kernelpress::KERNELPRESS_ISA {

constexpr int kInt8Vecs = kLanes == 16 ? 4 : 2;
constexpr int kInt8Panel = kInt8Vecs * kLanes;

// Rows of a tile that is `vecs` vectors wide: as many as leave registers for weights, activations and products.
constexpr int int8_tile_rows(int vecs) {
  if (kLanes == 16) return vecs == 1 ? 14 : ((kHasVnni ? 31 : 30) - vecs) / vecs;
  return vecs == 1 ? 8 : kLanes == 8 ? 6 : 4;
}
constexpr int kInt8TileRows = int8_tile_rows(kInt8Vecs);

// Rows lie row_stride apart, `width` of them on a line: row m, segment g starts at a + m / width * line_stride + m % width * row_stride +
// segment_offsets[g] and has `groups` groups of inputs; what is read behind a segment meets weights that are zero.
struct Int8TileInput {
  const Staged* a;
  int64_t row_stride, width, line_stride;
  const int64_t* segment_offsets;
  int64_t segments, groups;

  KP_INLINE int64_t depth() const { return segments * groups * kGroup; }
};

// What all tiles of a problem have in common.
struct Int8Product {
  Int8Epilogue epilogue;
  const int8_t* weight;
  const int32_t* weight_sums;
  int64_t c_out, depth;  // of the packed weight
  int32_t zero_point;
  const float* row_scale = nullptr;
  const int32_t* row_zero_point = nullptr;

  template <class Args>
  Int8Product(const Args& a, int64_t depth)
      : epilogue(a),
        weight(a.weight),
        weight_sums(a.weight_sums),
        c_out(a.c_out),
        depth(depth),
        zero_point(static_cast<int32_t>(a.input_zero_point)) {}

  int64_t panels() const { return ceil_div(c_out, kInt8Panel); }
};

// Output rows [first_row, first_row + rows) of the product, `in` being staged rows, for one panel. `next` is the panel that comes
// then, or the same: the first tiles bring it to the second-level cache.
void multiply(const Int8Product& product, const Int8TileInput& in, int64_t panel, int64_t next, int64_t first_row, int64_t rows);

// The epilogue alone, of sums [rows][vectors of channels] that are there: output rows from `first_row` on, at most a panel of channels
// from `channel` on, as far as the product has any.
void finish(const Int8Product& product, const int32_t* sums, int64_t channel, int64_t first_row, int64_t rows);

constexpr int64_t kNoSegmentOffset[1] = {0};

// How far apart rows of so many elements are staged: whole groups, and not in the same sets of the first-level cache.
KP_INLINE int64_t staged_stride(int64_t depth) {
  const int64_t stride = round_up(depth, kGroup);
  return stride * static_cast<int64_t>(sizeof(Staged)) % 2048 == 0 ? stride + 64 : stride;
}

// Elements behind the last staged row that a tile reads or the staging writes.
constexpr int64_t kStagedSlack = 64;

// Floats of scratch memory that hold so many staged elements.
KP_INLINE int64_t staged_floats(int64_t elements) {
  return ceil_div((elements + kStagedSlack) * static_cast<int64_t>(sizeof(Staged)), static_cast<int64_t>(sizeof(float)));
}

}  // namespace kernelpress::KERNELPRESS_ISA
