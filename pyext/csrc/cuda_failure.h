// What the user reads when a launch fails: what failed, where, why, and what to do about it.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/common/status.h"

namespace kernelpress::cuda {

// What this module holds code for: sm_80 is machine code, compute_90 text that the driver compiles.
std::vector<std::string> compiled_architectures();

// Why CUDA cannot be used at all, from the code that asking for devices gave.
std::string unavailability(int code);

// A failed launch on device `index`.
std::string describe_failure(const char* launcher, const Status& status, int index);

}  // namespace kernelpress::cuda
