// int8 depthwise convolution: argument struct and launcher.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers, then doubles. Absent tensors are null. Memory is channels_last; sizes and
// strides count elements; a `*_stride` is the distance between two neighbouring pixels.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// y = activation(Σ_rs (x − input_zero_point) · weight · scale + bias + residual), cast or requantised. Sums are exact in int32; outside
// of the image x is input_zero_point.
struct Int8DepthwiseConv2dArgs {
  const void *x, *weight;      // weight: [kernel_h, kernel_w, channels · multiplier]
  const float *scale, *bias;   // [channels · multiplier]; scale: of the weight, times that of x
  const void* residual;        // of `output`
  void* y;
  int64_t batch, in_h, in_w, channels, multiplier, out_h, out_w;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  int64_t input_zero_point;
  DataType output;             // int8, float16, bfloat16, float32
  DataType dtype;              // int8: of x and weight
  Activation activation;
  int64_t configuration;       // -1: the heuristic's; else an index into kInt8DepthwiseTiles
  double output_scale, output_zero_point;      // of an int8 y
  double residual_scale, residual_zero_point;  // of an int8 residual
};

Status int8_depthwise_conv2d(const Int8DepthwiseConv2dArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
