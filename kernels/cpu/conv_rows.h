// Output rows of a dense convolution, for the kernels that consume them: dense.cpp stores them, separable.cpp streams on.
#pragma once

#include "args.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// Whether a convolution multiplies pixels alone.
KP_INLINE bool is_pointwise(const Window& w) {
  return w.kernel_h == 1 && w.kernel_w == 1 && w.stride_h == 1 && w.stride_w == 1 && w.pad_h == 0 && w.pad_w == 0;
}

// Scratch that conv_rows needs for `rows` output rows.
int64_t conv_scratch_floats(const Conv2dArgs& args, int64_t rows);

// Output rows [begin, end) of one image, for the panels [first_panel, last_panel) of output channels.
void conv_rows(const Conv2dArgs& args, int64_t image, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel, float* scratch);

}  // namespace kernelpress::KERNELPRESS_ISA
