// Hands the host's thread pool to the CPU kernels.
#pragma once

#include <cstdint>

namespace kernelpress {

// The signatures of libtorch's exported C functions torch_parallel_for and torch_get_num_threads; both return 0 for success.
using HostParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
using HostThreadCount = int (*)(uint32_t* count);

// Null addresses mean: run serially.
void use_host_threads(HostParallelFor parallel_for, HostThreadCount thread_count);

// While it lives, parallel loops that start on this thread run on this thread alone.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const bool before_;
};

// Runs body(context) on this thread, while the host's others wait for the parallel loops that it starts: each then costs a hand-over
// of a cache line to and fro instead of a call of the host's pool, which takes a microsecond or more.
void with_team(void (*body)(void*), void* context);

template <class Body>
void with_team(const Body& body) {
  with_team([](void* context) { (*static_cast<const Body*>(context))(); }, const_cast<Body*>(&body));
}

// Asks for huge pages under the whole pages of a block; where the system has none, nothing changes.
void advise_huge_pages(int64_t address, int64_t bytes);

}  // namespace kernelpress
