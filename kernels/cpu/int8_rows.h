// Output rows of int8 layers: of whole maps, or of maps of which a chain holds some rows (int8_chain.cpp).
#pragma once

#include "args.h"

namespace kernelpress::KERNELPRESS_ISA {

// Output rows [begin, end) of one image, all channels; of one group.
void int8_conv_rows(const Int8Conv2dArgs& args, int64_t image, int64_t begin, int64_t end);

// The same; input row h lies in slot h mod `capacity` of the image.
void int8_depthwise_rows(const Int8DepthwiseConv2dArgs& args, int64_t image, int64_t begin, int64_t end, int64_t capacity);

}  // namespace kernelpress::KERNELPRESS_ISA
