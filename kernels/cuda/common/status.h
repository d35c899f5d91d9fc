// What the launchers of every family share with their callers: the enumerations in their argument structs, the device, the outcome.
// Plain C++, no CUDA header.
#pragma once

#include <cstdint>

namespace kernelpress::cuda {

// In the order of DATA_TYPES in pyext/ops/backends/cuda.py.
enum class DataType : int64_t { float32, float16, bfloat16, int8, int32 };

// In the order of ACTIVATIONS in kernels/reference/activation.py.
enum class Activation : int64_t { identity, relu, relu6, silu, hardswish, hardsigmoid, sigmoid, gelu };

// What heuristics and launchers may ask of the device that they launch on.
struct Device {
  int64_t capability = 0;       // 10 · major + minor: 80, 86, 90, 120
  int64_t multiprocessors = 0;
  int64_t shared_bytes = 0;     // most shared memory of one block, opted in to
  int64_t l2_bytes = 0;
};

// How a launch went: cudaError_t, and which kernel in which configuration it was. The texts live as long as the program.
struct Status {
  int code = 0;  // 0 = success
  const char* kernel = nullptr;
  const char* configuration = nullptr;
};

}  // namespace kernelpress::cuda
