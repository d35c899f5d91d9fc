// Layers of low rank: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers. Absent tensors are null. Memory is channels_last, or rows; sizes and
// strides count elements; a `*_stride` is the distance between two neighbouring pixels or rows. x, weights, residual and y are of
// `dtype`, the bias float32; float32 is multiplied in TF32.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

// `rank`: the largest, of the channels that stay in shared memory.
struct LowrankTile {
  const char* name;
  int rank;
};

inline constexpr LowrankTile kLowrankTiles[] = {{"64 pixels, rank 64", 64}, {"64 pixels, rank 128", 128}};

// y = activation(last · (first · x) + bias + residual)
struct LowrankLinearArgs {
  const void *x, *first_weight, *last_weight;  // [rank, c_in], [c_out, rank]
  const float* bias;                           // [c_out]
  const void* residual;
  void* y;
  int64_t rows, c_in, rank, c_out;
  int64_t x_stride, residual_stride, y_stride;
  DataType dtype;
  Activation activation;
  int64_t configuration;                       // -1: the smallest that holds the rank; else an index into kLowrankTiles
};

Status lowrank_linear(const LowrankLinearArgs&, const Device&, void* stream);

// y = activation(last · (core ∗ (first · x)) + bias + residual); first · x lies in `workspace`, 16-byte aligned.
struct LowrankConv2dArgs {
  const void *x, *first_weight, *core_weight, *last_weight;  // [rank_in, c_in], [rank_out, kernel_h, kernel_w, rank_in], [c_out, rank_out]
  const float* bias;                                         // [c_out]
  const void* residual;
  void *y, *workspace;
  int64_t batch, in_h, in_w, c_in, rank_in, rank_out, out_h, out_w, c_out;
  int64_t x_stride, residual_stride, y_stride;
  Window window;                                             // of the core
  DataType dtype;
  Activation activation;
  int64_t configuration;                                     // as above, of rank_out
};

Status lowrank_conv2d(const LowrankConv2dArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
