// Between floating and int8 tensors: argument structs and launchers.  Plain C++, no CUDA header.
//
// Every field is eight bytes wide: addresses, then integers, then doubles. Memory is `rows` rows (or pixels) of `channels` elements; a
// `*_stride` is the distance in elements between two of them.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace kernelpress::cuda {

// y = saturate(round(x / scale) + zero_point), int8.
struct QuantizeArgs {
  const void* x;
  void* y;
  int64_t rows, channels, x_stride, y_stride;
  DataType dtype;            // of x: float32, float16, bfloat16
  Activation activation;     // identity
  int64_t configuration;
  double scale, zero_point;
};

// y = (x − zero_point) · scale of int8 x, cast.
struct DequantizeArgs {
  const void* x;
  void* y;
  int64_t rows, channels, x_stride, y_stride;
  DataType output, dtype;
  Activation activation;     // identity
  int64_t configuration;
  double scale, zero_point;
};

// y = activation(x + other) of int8 tensors, each of its own scale and zero point; cast or requantised.
struct Int8AddArgs {
  const void *x, *other;
  void* y;
  int64_t rows, channels, x_stride, other_stride, y_stride;
  DataType output, dtype;
  Activation activation;
  int64_t configuration;
  double scale, zero_point, other_scale, other_zero_point;
  double output_scale, output_zero_point;
};

// Every row by its own range; y, scale and zero_point are contiguous.
struct QuantizeRowsArgs {
  const void* x;
  void* y;
  float* scale;              // [rows]
  int32_t* zero_point;       // [rows]
  int64_t rows, channels, x_stride;
  int64_t symmetric;         // 1: zero point 0 and a range of ±127
  DataType dtype;
  Activation activation;     // identity
  int64_t configuration;
};

Status quantize(const QuantizeArgs&, const Device&, void* stream);
Status dequantize(const DequantizeArgs&, const Device&, void* stream);
Status int8_add(const Int8AddArgs&, const Device&, void* stream);
Status quantize_rows(const QuantizeRowsArgs&, const Device&, void* stream);

}  // namespace kernelpress::cuda
