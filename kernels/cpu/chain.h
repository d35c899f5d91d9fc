// Layers streamed by rows: dense convolution (first only), depthwise convolution and 1×1 convolution in any order, each fed by the one
// before, so that no intermediate map leaves the cache.
#pragma once

#include "args.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {

// The chain's output, the intermediates of each task held in about `floats` of scratch.
void run_chain(const ChainArgs& args, int64_t floats);

// The kernels of short chains, with channels that stand between theirs.
void pointwise_between(const PointwiseConv2dArgs& args, const Interleaved& between);
void separable_between(const SeparableConv2dArgs& args, const Interleaved& between);

}  // namespace kernelpress::KERNELPRESS_ISA
