// The CPU kernels by name, for callers that hold their arguments as eight-byte words.
#pragma once

#include <map>
#include <string>

#include "cpu_plan.h"

namespace kernelpress {

struct NamedKernel {
  Plan::Run run;
  size_t words;
};

std::map<std::string, NamedKernel>& named_kernels();

// The instruction set in use.
const KernelTable& kernels_in_use();

}  // namespace kernelpress
