// 1×1 convolution and the linear layer: argument struct and launcher.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers. Absent tensors are null. Memory is channels_last; sizes and strides
// count elements; a `*_stride` is the distance between two neighbouring pixels.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace kernelpress::cuda {

// y = activation((x · input_scale) · weightᵀ · scale + bias + residual); x, weight, residual, input_scale and y are of `dtype`.
struct PointwiseConv2dArgs {
  const void *x, *weight;      // weight: [c_out, c_in]
  const float *bias, *scale;   // [c_out]
  const void *residual, *input_scale;  // input_scale: [batch, c_in]
  void *y, *workspace;         // workspace: partial sums of a split K, 16-byte aligned; null: K is not split
  int64_t batch, positions, c_in, c_out;
  int64_t x_stride, residual_stride, y_stride;
  int64_t workspace_bytes;
  DataType dtype;              // float32 (multiplied in TF32), float16, bfloat16; sums are float32
  Activation activation;
  int64_t configuration;       // -1: the heuristic's; else an index into kDenseTiles
};

Status pointwise_conv2d(const PointwiseConv2dArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
