// The host side of kernels/cpu/runtime.h: torch's thread pool where its address was handed in, a serial loop elsewhere.
#include "cpu_runtime.h"

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/cpu/runtime.h"

namespace kernelpress {
namespace {

HostParallelFor host_parallel_for = nullptr;
HostThreadCount host_thread_count = nullptr;

struct Scratch {
  float* memory = nullptr;
  int64_t floats = 0;
  ~Scratch() { std::free(memory); }

  float* of(int64_t wanted) {
    if (wanted > floats) {
      std::free(memory);
      const size_t bytes = (static_cast<size_t>(wanted) * sizeof(float) + 4095) / 4096 * 4096;
      memory = static_cast<float*>(std::aligned_alloc(64, bytes));
      floats = memory ? wanted : 0;
      if (!memory) throw std::bad_alloc();
    }
    return memory;
  }
};

thread_local Scratch scratch, held;
thread_local bool is_alone = false;

}  // namespace

void use_host_threads(HostParallelFor parallel_for, HostThreadCount thread_count) {
  host_parallel_for = parallel_for;
  host_thread_count = thread_count;
}

OneThread::OneThread() : before_(is_alone) { is_alone = true; }

OneThread::~OneThread() { is_alone = before_; }

void parallel_for(int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return;
  if (!host_parallel_for || is_alone || end - begin == 1) return body(begin, end, context);
  // The host catches what a body throws, which can only be the allocation of scratch memory, and returns an error code.
  if (host_parallel_for(begin, end, 1, body, context) != 0) throw std::bad_alloc();
}

int64_t thread_count() {
  uint32_t count = 1;
  if (is_alone || !host_parallel_for || !host_thread_count || host_thread_count(&count) != 0) return 1;
  return count;
}

float* thread_scratch(int64_t floats) { return scratch.of(floats); }

float* held_scratch(int64_t floats) { return held.of(floats); }

void advise_huge_pages(int64_t address, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 4096;
  const int64_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace kernelpress
