// Ghost convolution: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers. Absent tensors are null. Memory is channels_last; sizes and strides
// count elements; a `*_stride` is the distance between two neighbouring pixels.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// p = activation(conv(x, primary_weight) + primary_bias); y = concat(p, cheap_activation(depthwise(p) + cheap_bias)) + residual.
// The depthwise window has odd sizes and is padded to keep the size of p.
struct GhostConv2dArgs {
  const void* x;
  const void* primary_weight;  // [primary, kernel_h, kernel_w, c_in]
  const float* primary_bias;   // [primary]
  const void* cheap_weight;    // [cheap_h, cheap_w, kept]
  const float* cheap_bias;     // [at least kept]
  const void* residual;
  void* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w;
  int64_t primary, kept, multiplier;  // channels of p; cheap channels that are kept, a multiple of `multiplier`
  int64_t x_stride, residual_stride, y_stride;
  Window window;                      // of the primary convolution
  int64_t cheap_h, cheap_w;
  Activation cheap_activation;
  DataType dtype;                     // float32 (multiplied in TF32), float16, bfloat16; sums are float32
  Activation activation;
  int64_t configuration;              // -1: the heuristic's; else an index into kGhostTiles
};

Status ghost_conv2d(const GhostConv2dArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
