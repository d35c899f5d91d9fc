// 3×3 convolution in groups narrower than a vector, on weights packed for it: what grouped_conv2d does where `narrow` says so.
#pragma once

#include "args.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// The window is 3×3 without dilation, of stride 1 or 2 both ways; groups have kLanes / n channels in and out; nothing is shuffled.
void narrow_grouped_conv2d(const GroupedConv2dArgs& args);

}  // namespace kernelpress::KERNELPRESS_ISA
