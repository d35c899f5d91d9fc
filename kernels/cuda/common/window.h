// Window of a convolution, as the argument structs of the families hold it.  Plain C++, no CUDA header.
#pragma once

#include <cstdint>

namespace kernelpress::cuda {

// [height, width] pairs, in pixels.
struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

}  // namespace kernelpress::cuda
