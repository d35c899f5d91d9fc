// How a kernel that works by rows walks over the images of a batch.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// Pixels of scratch lie one vector further apart than their channels need: a power-of-two distance would collide in the cache.
KP_INLINE int64_t padded(int64_t channels) { return round_up(channels, kLanes) + kLanes; }

// Runs body(image, first, last) for the parts of output rows [begin, end) over all images.
template <class Body>
void over_images(int64_t begin, int64_t end, int64_t out_h, const Body& body) {
  for (int64_t image = begin / out_h; image * out_h < end; ++image) {
    const int64_t top = image * out_h;
    body(image, maximum(begin, top) - top, minimum(end - top, out_h));
  }
}

template <class Body>
void over_output_rows(int64_t batch, int64_t out_h, const Body& body) {
  parallel(batch * out_h, [&](int64_t begin, int64_t end) { over_images(begin, end, out_h, body); });
}

}  // namespace kernelpress::KERNELPRESS_ISA
