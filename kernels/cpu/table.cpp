// The table of one instruction set's kernels, by which the module reaches them.
#include "args.h"
#include "int8_tile.h"
#include "tile.h"

// The instruction set whose float kernels this one takes.
#ifndef KERNELPRESS_BASE
#define KERNELPRESS_BASE KERNELPRESS_ISA
#endif

#define KP_TEXT_OF(name) #name
#define KP_TEXT(name) KP_TEXT_OF(name)
#define KP_TABLE_OF(name) kernels_##name
#define KP_TABLE(name) KP_TABLE_OF(name)

#define KP_DECLARE(name, Args) void name(const Args&);
namespace kernelpress::KERNELPRESS_BASE {
KP_FLOAT_KERNELS(KP_DECLARE)
}
namespace kernelpress::KERNELPRESS_ISA {
KP_INT8_KERNELS(KP_DECLARE)
}

namespace kernelpress::KERNELPRESS_ISA {
namespace {

// Enough independent chains to hide the FMA's latency on two ports, in registers throughout.
int64_t fma_burst(int64_t iterations) {
  constexpr int kChains = 12;
  Vec acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = broadcast(1e-3f * static_cast<float>(i));
  const Vec factor = broadcast(0.999f), term = broadcast(1e-3f);
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], factor, term);
  }
  Vec sum = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum = sum + acc[i];
  float lanes[kLanes];
  store(lanes, sum);
  asm volatile("" : : "r"(lanes) : "memory");
  return iterations * kChains * kLanes * 2;
}

// The same integers, of which the compiler knows nothing: a product with them is computed anew.
KP_INLINE Ints unknown(Ints a) {
  Vec bits;
  std::memcpy(&bits, &a, sizeof bits);
  bits = in_register(bits);
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

int64_t int8_burst(int64_t iterations) {
  constexpr int kChains = kHasVnni ? 12 : 8;
  Ints sums[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast_int(i);
  Ints x = broadcast_int(0x00010001);
  const Ints w = broadcast_int(0x00020002);
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) dot(sums[i], x = unknown(x), w);
  }
  Ints total = broadcast_int(0);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) total = total + sums[i];
  int32_t lanes[kLanes];
  store_ints(lanes, total);
  asm volatile("" : : "r"(lanes) : "memory");
  return iterations * kChains * kLanes * kGroup * 2;
}

}  // namespace
}  // namespace kernelpress::KERNELPRESS_ISA

namespace kernelpress {

extern const KernelTable KP_TABLE(KERNELPRESS_ISA);
#define KP_FLOAT_ENTRY(name, Args) KERNELPRESS_BASE::name,
#define KP_INT8_ENTRY(name, Args) KERNELPRESS_ISA::name,
const KernelTable KP_TABLE(KERNELPRESS_ISA) = {
    KP_TEXT(KERNELPRESS_ISA),
    KERNELPRESS_ISA::kPanel,
    {KERNELPRESS_ISA::kInt8Panel, KERNELPRESS_ISA::kLanes, KERNELPRESS_ISA::kGroup},
    KERNELPRESS_ISA::fma_burst,
    KERNELPRESS_ISA::int8_burst,
    KP_FLOAT_KERNELS(KP_FLOAT_ENTRY)
    KP_INT8_KERNELS(KP_INT8_ENTRY)
};

}  // namespace kernelpress
