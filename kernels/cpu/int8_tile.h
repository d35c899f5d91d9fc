// The register tile that the int8 products run on.
#pragma once

#include "int8_epilogue.h"

namespace kernelpress::KERNELPRESS_ISA {

constexpr int kInt8Vecs = kLanes == 16 ? 4 : 2;
constexpr int kInt8Panel = kInt8Vecs * kLanes;

}  // namespace kernelpress::KERNELPRESS_ISA
