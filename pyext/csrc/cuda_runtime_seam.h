// The seam between the module and the CUDA runtime. `cuda_runtime.cpp` implements it on a real device; the host emulator of the
// tests brings an implementation of its own and takes that file's place in the link. Codes are cudaError_t, 0 = success.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/cuda/common/status.h"

namespace kernelpress::cuda::runtime {

struct DeviceDescription {
  Device device;
  std::string name;
};

int device_count(int* count);
int describe_device(int index, DeviceDescription* description);
int current_device(int* index);
int set_device(int index);

// Clears what a failed call left behind, so that the next one does not report it again; returns what was left.
int clear_error();
std::string error_text(int code);

// 1000 · major + 10 · minor: of the toolkit that built this, and of the newest CUDA that the driver takes (0: there is no driver).
int toolkit_version();
int driver_version();

}  // namespace kernelpress::cuda::runtime
