// Depthwise convolution on tensor cores: the launcher that depthwise.cu calls.
#pragma once

#include "common/epilogue.cuh"
#include "depthwise.h"
#include "depthwise_tiles.h"

namespace kernelpress::cuda {

// T: Half, BFloat16. The problem is one that `tensor_is_possible`, its weight 16-byte aligned.
template <class T>
int launch_depthwise_tensor(const DepthwiseConv2dArgs& a, const DepthwisePlan& plan, const Epilogue<T>& epilogue, void* stream);

}  // namespace kernelpress::cuda
