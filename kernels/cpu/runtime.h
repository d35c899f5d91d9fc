// What a kernel asks of its host: a parallel loop and scratch memory. Implemented once, outside the per-instruction-set objects,
// so that no inline function compiled for a newer processor is shared with older variants.
#pragma once

#include <cstdint>

namespace kernelpress {

// Calls body(begin, end, context) over disjoint ranges that cover [begin, end), at most one per thread.
void parallel_for(int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context);

// Threads that parallel_for would use.
int64_t thread_count();

// This thread's scratch memory: 64-byte aligned, valid until the next call on the same thread.
float* thread_scratch(int64_t floats);

// More of it, for what is held while kernels run that ask for scratch themselves.
float* held_scratch(int64_t floats);

template <class Body>
inline void parallel(int64_t count, const Body& body) {
  parallel_for(
      0, count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace kernelpress
