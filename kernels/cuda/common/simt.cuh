// The seam between nvcc and the host emulator: thread indices, shared memory, launches.
//
// Kernel text includes this file and is compiled twice: by nvcc, and by g++ with KERNELPRESS_SIMT defined, where tests/simt
// stands in for the device. Both sides have
//   threadIdx, blockIdx, blockDim, gridDim, dim3, min, max and CUDA's float functions
//   SIMT_SHARED(type, name, [rows][columns])   an array in shared memory, 16-byte aligned, of unknown contents
//   SIMT_DYN_SMEM(name)                        unsigned char* to the dynamic shared memory of the launch, 128-byte aligned
//   launch(kernel, grid, arguments...)         0 or the cudaError_t of the launch
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef KERNELPRESS_SIMT

#include "device.h"

#else

#include <cuda_runtime.h>

#include <tuple>
#include <utility>

#define SIMT_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

#define SIMT_DYN_SMEM(name)                                        \
  extern __shared__ __align__(128) unsigned char simt_dynamic[]; \
  unsigned char* const name = simt_dynamic

namespace kernelpress::cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes = 0;   // dynamic
  void* stream = nullptr;
};

namespace detail {

constexpr size_t kSharedByDefault = 48 * 1024;

template <class... Parameters, size_t... kIndex>
cudaError_t launch_with(void (*kernel)(Parameters...), const Grid& grid, std::tuple<Parameters...>& values,
            std::index_sequence<kIndex...>) {
  void* pointers[] = {static_cast<void*>(&std::get<kIndex>(values))..., nullptr};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid.blocks, grid.threads, pointers, grid.shared_bytes,
              static_cast<cudaStream_t>(grid.stream));
}

}  // namespace detail

// A grid without blocks is success: there was nothing to compute. An error that the launch causes is returned and cleared.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return 0;
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > detail::kSharedByDefault)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(grid.shared_bytes));
  if (error == cudaSuccess) {
    std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    error = detail::launch_with(kernel, grid, values, std::index_sequence_for<Parameters...>{});
  }
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace kernelpress::cuda

#endif
