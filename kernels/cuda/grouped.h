// Grouped convolution with a shuffled output, and the channel shuffle: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers, then doubles. Absent tensors are null. Memory is channels_last; sizes
// and strides count elements; a `*_stride` is the distance between two neighbouring pixels.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// y = activation(shuffle(conv(x, weight) · scale + bias) + residual); x, weight, residual and y are of `dtype`.
//
// `groups` are groups of the convolution, or several of them merged into one with zeros between (pyext/ops/grouped_windows.py does that
// where they are narrow): group g makes the channels group_out · g … of the convolution, up to c_out, and reads `window`
// channels of x. They begin at its own first one, group_in · g, moved down to a multiple of `window_step` (the elements of 16 bytes,
// or 1) and to where the window ends inside of x. The shuffle is in `shuffle` groups, 1 for none.
struct GroupedConv2dArgs {
  const void *x, *weight;      // weight: [c_out, kernel_h, kernel_w, window]
  const float *bias, *scale;   // [c_out], in the order of the convolution's channels
  const void* residual;        // in y's order
  void* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out;
  int64_t groups, group_in, group_out, window, window_step, shuffle;
  int64_t x_stride, residual_stride, y_stride;
  Window geometry;
  DataType dtype;              // float32 (multiplied in TF32), float16, bfloat16; sums are float32
  Activation activation;
  int64_t configuration;       // -1: the heuristic's; else an index into kGroupedTiles
};

// y = shuffle(concat(a, b)): channel i · C / groups + k of the two, C in all, becomes channel k · groups + i. Without b:
// `channels_b` is 0. The activation must be the identity.
struct ShuffleConcatArgs {
  const void *a, *b;
  void* y;
  int64_t pixels, channels_a, channels_b, groups;
  int64_t a_stride, b_stride, y_stride;
  DataType dtype;              // any: values are moved, not read
  Activation activation;
  int64_t configuration;       // -1: the heuristic's; else an index into kShuffleTiles
};

Status grouped_conv2d(const GroupedConv2dArgs&, const Device&, void* stream);
Status shuffle_concat(const ShuffleConcatArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
