// The table of one instruction set's kernels, by which the module reaches them.
#include "args.h"
#include "tile.h"

#define KP_TEXT_OF(name) #name
#define KP_TEXT(name) KP_TEXT_OF(name)
#define KP_TABLE_OF(name) kernels_##name
#define KP_TABLE(name) KP_TABLE_OF(name)

namespace kernelpress::KERNELPRESS_ISA {

#define KP_DECLARE(name, Args) void name(const Args&);
KP_KERNELS(KP_DECLARE)

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

}  // namespace
}  // namespace kernelpress::KERNELPRESS_ISA

namespace kernelpress {

extern const KernelTable KP_TABLE(KERNELPRESS_ISA);
#define KP_ENTRY(name, Args) KERNELPRESS_ISA::name,
const KernelTable KP_TABLE(KERNELPRESS_ISA) = {
    KP_TEXT(KERNELPRESS_ISA),
    KERNELPRESS_ISA::kPanel,
    KERNELPRESS_ISA::fma_burst,
    KP_KERNELS(KP_ENTRY)
};

}  // namespace kernelpress
