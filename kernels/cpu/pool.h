// The mean over all pixels of an image, as kernels that begin with it call it.
#pragma once

#include <cstdint>

namespace kernelpress::KERNELPRESS_ISA {

// Floats of scratch memory for `channel_means`.
int64_t mean_scratch_floats(int64_t batch, int64_t channels);

// y[n, c] = mean over the pixels of x[n, :, c], on all threads; y [batch, channels].
void channel_means(const float* x, int64_t batch, int64_t positions, int64_t channels, int64_t x_stride, float* y, float* scratch);

}  // namespace kernelpress::KERNELPRESS_ISA
