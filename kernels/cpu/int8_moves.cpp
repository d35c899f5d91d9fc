// int8 that only moves: copies between memory of any form, and the channel shuffle.
//
//   int8_copy             y[i] = x[i], each with strides of its own; what runs on in both is one memcpy a row
//   int8_shuffle_concat   channel i · C / groups + k of a and b, one behind the other, becomes channel k · groups + i of y
//
//   bound: bandwidth
#include "args.h"
#include "runtime.h"
#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kBytesWorthATask = 32768;

void copy_row(const int8_t* __restrict x, int64_t x_stride, int8_t* __restrict y, int64_t y_stride, int64_t count) {
  if (x_stride == 1 && y_stride == 1) {
    std::memcpy(y, x, static_cast<size_t>(count));
  } else if (y_stride == 1) {
    for (int64_t i = 0; i < count; ++i) y[i] = x[i * x_stride];
  } else {
    for (int64_t i = 0; i < count; ++i) y[i * y_stride] = x[i * x_stride];
  }
}

// The halves of a pixel in turn.
void interleave(const int8_t* __restrict a, const int8_t* __restrict b, int8_t* __restrict y, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    y[2 * k] = a[k];
    y[2 * k + 1] = b[k];
  }
}

}  // namespace

void int8_copy(const Int8CopyArgs& args) {
  const Int8CopyArgs a = args;
  constexpr int kInner = Int8CopyArgs::kMostDims - 1;
  int64_t rows = 1;
  for (int d = 0; d < kInner; ++d) rows *= a.sizes[d];
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t rest = row, x = 0, y = 0;
      for (int d = kInner - 1; d >= 0; --d) {
        const int64_t index = rest % a.sizes[d];
        rest /= a.sizes[d];
        x += index * a.x_strides[d];
        y += index * a.y_strides[d];
      }
      copy_row(a.x + x, a.x_strides[kInner], a.y + y, a.y_strides[kInner], a.sizes[kInner]);
    }
  };
  if (rows * a.sizes[kInner] < kBytesWorthATask) body(0, rows);
  else parallel(rows, body);
}

void int8_shuffle_concat(const Int8ShuffleConcatArgs& a) {
  const int64_t channels = a.c_a + a.c_b, per_group = channels / a.groups;
  const bool alternates = a.groups == 2 && (a.c_b == 0 || a.c_a == a.c_b);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int8_t *first = a.a + m * a.a_stride, *second = a.c_b ? a.b + m * a.b_stride : nullptr;
      int8_t* y = a.y + m * a.y_stride;
      if (alternates) {
        interleave(first, second ? second : first + per_group, y, per_group);
        continue;
      }
      for (int64_t i = 0, c = 0; i < a.groups; ++i) {
        for (int64_t k = 0; k < per_group; ++k, ++c) y[k * a.groups + i] = c < a.c_a ? first[c] : second[c - a.c_a];
      }
    }
  };
  if (a.pixels * channels < kBytesWorthATask) body(0, a.pixels);
  else parallel(a.pixels, body);
}

}  // namespace kernelpress::KERNELPRESS_ISA
