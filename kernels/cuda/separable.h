// Depthwise → pointwise, alone and behind an expansion: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers. Absent tensors are null. Memory is channels_last; sizes and strides
// count elements; a `*_stride` is the distance between two neighbouring pixels. x, weights, residual and y are of `dtype`, biases
// float32; float32 is multiplied in TF32 by the 1×1 parts. Where fusing loses, the kernels run one after the other, and what
// lies between them in `workspace` (16-byte aligned, the expanded map in whole vectors of 16 bytes, then the depthwise result).
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// y = activation(pointwise(depthwise_activation(depthwise(x) + depthwise_bias)) + pointwise_bias + residual)
struct SeparableConv2dArgs {
  const void *x, *depthwise_weight;  // [kernel_h, kernel_w, channels]
  const float* depthwise_bias;       // [channels]
  const void* pointwise_weight;      // [c_out, channels]
  const float* pointwise_bias;       // [c_out]
  const void* residual;
  void *y, *workspace;
  int64_t batch, in_h, in_w, channels, out_h, out_w, c_out;
  int64_t x_stride, residual_stride, y_stride;
  Window window;                     // of the depthwise convolution
  Activation depthwise_activation;
  DataType dtype;
  Activation activation;
  int64_t configuration;             // -1: the cost model's; else an index into kSeparableTiles
};

Status separable_conv2d(const SeparableConv2dArgs&, const Device&, void* stream);

// The same with hidden = expand_activation(x · expand_weightᵀ + expand_bias) in place of x; the padding is zeros in `hidden`.
struct InvertedResidualArgs {
  const void *x, *expand_weight;     // [hidden, c_in]
  const float* expand_bias;          // [hidden]
  const void* depthwise_weight;      // [kernel_h, kernel_w, hidden]
  const float* depthwise_bias;       // [hidden]
  const void* project_weight;        // [c_out, hidden]
  const float* project_bias;         // [c_out]
  const void* residual;
  void *y, *workspace;
  int64_t batch, in_h, in_w, c_in, hidden, out_h, out_w, c_out;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  Activation expand_activation, depthwise_activation;
  DataType dtype;
  Activation activation;
  int64_t configuration;             // as above
};

Status inverted_residual(const InvertedResidualArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
