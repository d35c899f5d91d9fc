// Products with block-CSR weights: argument struct and launcher. Plain C++, no CUDA header.
//
// `items` and `splits` are the schedule of pyext/ops/sparse_schedule.py: int32 on the device.
//   items  [segments][4]    row of blocks, its first block, number of blocks, slot of `workspace` or -1; longest first
//   splits [split_rows][4]  row of blocks, its first slot, number of slots, 0
// A slot is [pixels][block_h] sums. A matrix product is the convolution by a 1 × 1 window of one image, its rows the pixels.
#pragma once

#include "common/status.h"
#include "common/window.h"

namespace kernelpress::cuda {

struct SparseConv2dArgs {
  const void *x, *columns, *blocks;
  const void *bias, *scale;  // float32
  const void *residual, *items, *splits;
  void *y, *workspace;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out;
  int64_t block_h, block_w, segments, split_rows;  // blocks [nnz][block_h][block_w], each size 16, 32 or 64
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  DataType output;  // of int8 x; else dtype
  DataType dtype;
  Activation activation;
  int64_t configuration;
};

Status sparse_conv2d(const SparseConv2dArgs& args, const Device& device, void* stream);

}  // namespace kernelpress::cuda
