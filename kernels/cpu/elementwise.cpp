// Arithmetic and copies of strided tensors.     y[i] = act(scale · a[i] · b[i] + c_scale · c[i] + shift)
//
//   any tensor of up to kMostDims dimensions, each operand with strides of its own: 0 repeats it along a dimension, so that
//   [N, C, 1, 1] · [N, C, H, W], a sum of two images, a normalisation, a concatenation's part, a border of padding, an image made larger
//   by whole numbers, and a copy into another memory format are all one loop. Dimensions come with y's largest stride first, and
//   merged where every operand runs on: most images are one dimension or two.
//   bound: bandwidth
//
// One task: a run of elements of y, cut into its rows of the last dimension.
#include "args.h"
#include "epilogue.h"
#include "runtime.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kElementsWorthATask = 4096;
const float kOne = 1.0f;  // what an absent `a` is

KP_INLINE Vec load_strided(const float* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_up_to(p, n);
  if (stride == 0) return broadcast(*p);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i * stride];
  return load(lanes);
}

KP_INLINE void store_strided(float* p, int64_t stride, Vec value, int64_t n) {
  if (stride == 1) return store_up_to(p, value, n);
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

// Where a row begins, and how far apart its elements are.
struct Row {
  const float* at;
  int64_t stride;

  template <bool kDense>
  KP_INLINE Vec elements(int64_t i, int64_t n) const {
    return kDense ? load_up_to(at + i, n) : load_strided(at + i * stride, stride, n);
  }
};

struct Formula {
  ActivationFunction activation;
  Vec scale, c_scale, shift;
  bool is_scaled;  // else a copy would make +0 of −0

  explicit Formula(const ElementwiseArgs& args)
      : activation(args.activation),
        scale(broadcast(static_cast<float>(args.scale))),
        c_scale(broadcast(static_cast<float>(args.c_scale))),
        shift(broadcast(static_cast<float>(args.shift))),
        is_scaled(args.scale != 1 || args.shift != 0) {}

  template <bool kDense>
  KP_INLINE Vec at(const Row& a, const Row& b, const Row& c, int64_t i, int64_t n) const {
    Vec value = a.elements<kDense>(i, n);
    if (b.at) value = value * b.elements<kDense>(i, n);
    if (is_scaled) value = fma(value, scale, shift);
    if (c.at) value = fma(c.elements<kDense>(i, n), c_scale, value);
    return activation(value);
  }
};

void compute_row(const Formula& formula, const Row& a, const Row& b, const Row& c, float* y, int64_t y_stride, int64_t count) {
  const bool is_dense = a.stride == 1 && (!b.at || b.stride == 1) && (!c.at || c.stride == 1) && y_stride == 1;
  int64_t i = 0;
  if (is_dense) {
    for (; i + kLanes <= count; i += kLanes) store(y + i, formula.at<true>(a, b, c, i, kLanes));
    if (i < count) store_up_to(y + i, formula.at<true>(a, b, c, i, count - i), count - i);
    return;
  }
  for (; i < count; i += kLanes) {
    const int64_t n = minimum(kLanes, count - i);
    store_strided(y + i * y_stride, y_stride, formula.at<false>(a, b, c, i, n), n);
  }
}

// Distance of an element, by its index in every dimension but the last, from the first one.
KP_INLINE int64_t offset_of(const int64_t* index, const int64_t* strides) {
  int64_t offset = 0;
  for (int d = 0; d + 1 < ElementwiseArgs::kMostDims; ++d) offset += index[d] * strides[d];
  return offset;
}

void compute_elements(const ElementwiseArgs& args, int64_t begin, int64_t end) {
  constexpr int kLast = ElementwiseArgs::kMostDims - 1;
  const Formula formula(args);
  const int64_t length = args.sizes[kLast];
  int64_t index[kLast];
  for (int64_t d = kLast - 1, rest = begin / length; d >= 0; --d) index[d] = rest % args.sizes[d], rest /= args.sizes[d];
  for (int64_t from = begin % length; begin < end; from = 0) {
    const int64_t count = minimum(length - from, end - begin);
    const auto row = [&](const float* base, const int64_t* strides) {
      return Row{base ? base + offset_of(index, strides) + from * strides[kLast] : nullptr, strides[kLast]};
    };
    const Row a = args.a ? row(args.a, args.a_strides) : Row{&kOne, 0};
    float* y = args.y + offset_of(index, args.y_strides) + from * args.y_strides[kLast];
    compute_row(formula, a, row(args.b, args.b_strides), row(args.c, args.c_strides), y, args.y_strides[kLast], count);
    begin += count;
    for (int d = kLast - 1; d >= 0 && ++index[d] == args.sizes[d]; --d) index[d] = 0;
  }
}

}  // namespace

void elementwise(const ElementwiseArgs& args) {
  int64_t count = 1;
  for (const int64_t size : args.sizes) count *= size;
  const int64_t tasks = minimum(thread_count(), ceil_div(count, kElementsWorthATask));
  parallel(tasks, [&](int64_t first, int64_t last) { compute_elements(args, count * first / tasks, count * last / tasks); });
}

}  // namespace kernelpress::KERNELPRESS_ISA
