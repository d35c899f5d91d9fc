// int8 matrix product and convolution: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers, then doubles. Absent tensors are null. Memory is channels_last; sizes
// and strides count elements; a `*_stride` is the distance between two neighbouring rows or pixels.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// y = activation(Σ_k (x[m, k] − zero_point) · weight[n, k] · scale[n] + bias[n] + residual[m, n]), cast or requantised.
//
// Rows of `weight` are `weight_stride` apart, a multiple of 16, zeros beyond c_in; its address is a multiple of 16. Added to the sums are
// `corrections` = −zero_point · Σ_k weight[n, k]; with zero points of rows, `weight_sums` are Σ_k weight[n, k].
struct Int8MatmulArgs {
  const void *x, *weight;
  const int32_t* corrections;        // [c_out]
  const float *scale, *bias;         // [c_out]; scale: of the weight, times that of x if it has one for all
  const void* residual;              // of `output`
  const float* row_scale;            // [rows]
  const int32_t *row_zero_point, *weight_sums;  // [rows], [c_out]
  void *y, *workspace;               // workspace: partial sums of a split K, 16-byte aligned; null: K is not split
  int64_t rows, c_in, c_out;
  int64_t weight_stride, x_stride, residual_stride, y_stride;
  int64_t workspace_bytes;
  DataType output;                   // int8, float16, bfloat16, float32
  DataType dtype;                    // int8: of x and weight
  Activation activation;
  int64_t configuration;             // -1: the heuristic's; else an index into kInt8Tiles
  double output_scale, output_zero_point;      // of an int8 y
  double residual_scale, residual_zero_point;  // of an int8 residual
};

// The same for the windows of a convolution; k runs over (kernel row, kernel column, channel). Outside of the image x is
// `input_zero_point`.
struct Int8Conv2dArgs {
  const void *x, *weight;
  const int32_t* corrections;
  const float *scale, *bias;
  const void* residual;
  void *y, *workspace;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out;
  int64_t weight_stride, x_stride, residual_stride, y_stride;
  Window window;
  int64_t input_zero_point;
  int64_t workspace_bytes;
  DataType output, dtype;
  Activation activation;
  int64_t configuration;
  double output_scale, output_zero_point;
  double residual_scale, residual_zero_point;
};

Status int8_matmul(const Int8MatmulArgs&, const Device&, void* stream);
Status int8_conv2d(const Int8Conv2dArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
