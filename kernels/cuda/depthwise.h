// Depthwise convolution: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers, then doubles. Absent tensors are null. Memory is channels_last; sizes
// and strides count elements; a `*_stride` is the distance between two neighbouring pixels.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// y = activation(conv(x, weight) · scale + bias + residual); x, weight, residual and y are of `dtype`.
struct DepthwiseConv2dArgs {
  const void *x, *weight;      // weight: [kernel_h, kernel_w, channels · multiplier]
  const float *bias, *scale;   // [channels · multiplier]
  const void* residual;
  void* y;
  int64_t batch, in_h, in_w, channels, multiplier, out_h, out_w;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  DataType dtype;              // float32 (exact FMA), float16, bfloat16; sums are float32
  Activation activation;
  int64_t configuration;       // -1: the heuristic's; else an index into kDepthwiseTiles
};

Status depthwise_conv2d(const DepthwiseConv2dArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
