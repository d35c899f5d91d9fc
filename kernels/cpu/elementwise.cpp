// Arithmetic and copies of strided tensors.     y[i] = act(scale · a[i] · b[i] + c_scale · c[i] + shift)
//
//   any tensor of up to kMostDims dimensions, each operand with strides of its own: 0 repeats it along a dimension, so that
//   [N, C, 1, 1] · [N, C, H, W], a sum of two images, a normalisation, a concatenation's part, a border of padding, an image made larger
//   by whole numbers, and a copy into another memory format are all one loop. Dimensions come with y's largest stride first, and
//   merged where every operand runs on: most images are one dimension or two. A copy whose elements are neighbours along the other
//   dimension than y's is turned in registers (transpose.h).
//   bound: bandwidth
//
// One task: rows of the last dimension, whole ones where there are enough for all threads, else a part of each.
#include "args.h"
#include "epilogue.h"
#include "runtime.h"
#include "transpose.h"

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

// Where a block of rows begins, and how far apart its rows and its elements are; those of dense ones are neighbours, or one for all.
struct Block {
  const float* at;
  int64_t row_stride, stride;

  template <bool kDense>
  KP_INLINE Vec elements(const float* row, int64_t i, int64_t n) const {
    if (!kDense) return load_strided(row + i * stride, stride, n);
    return stride ? load_up_to(row + i, n) : broadcast(*row);
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
};

template <bool kHasB, bool kHasC, bool kDense>
void compute_rows(const Formula& formula, const Block& a, const Block& b, const Block& c, float* y, int64_t y_row_stride, int64_t y_stride,
                  int64_t rows, int64_t count) {
  const Formula f = formula;  // which y cannot be a part of
  const auto at = [&](const float* a_row, const float* b_row, const float* c_row, int64_t i, int64_t n) __attribute__((always_inline)) {
    Vec value = a.elements<kDense>(a_row, i, n);
    if (kHasB) value = value * b.elements<kDense>(b_row, i, n);
    if (f.is_scaled) value = fma(value, f.scale, f.shift);
    if (kHasC) value = fma(c.elements<kDense>(c_row, i, n), f.c_scale, value);
    return f.activation(value);
  };
  for (int64_t r = 0; r < rows; ++r, y += y_row_stride) {
    const float *a_row = a.at + r * a.row_stride, *b_row = kHasB ? b.at + r * b.row_stride : nullptr,
                *c_row = kHasC ? c.at + r * c.row_stride : nullptr;
    int64_t i = 0;
    if (kDense) {
      for (; i + kLanes <= count; i += kLanes) store(y + i, at(a_row, b_row, c_row, i, kLanes));
      if (i < count) store_up_to(y + i, at(a_row, b_row, c_row, i, count - i), count - i);
    } else {
      for (; i < count; i += kLanes) {
        const int64_t n = minimum(kLanes, count - i);
        store_strided(y + i * y_stride, y_stride, at(a_row, b_row, c_row, i, n), n);
      }
    }
  }
}

using ComputeRows = void (*)(const Formula&, const Block&, const Block&, const Block&, float*, int64_t, int64_t, int64_t, int64_t);

template <bool kHasB, bool kHasC>
ComputeRows rows_function(bool is_dense) {
  return is_dense ? compute_rows<kHasB, kHasC, true> : compute_rows<kHasB, kHasC, false>;
}

ComputeRows rows_function(const ElementwiseArgs& args) {
  constexpr int kLast = ElementwiseArgs::kMostDims - 1;
  const auto is_run = [](const int64_t* strides) { return strides[kLast] == 0 || strides[kLast] == 1; };
  const bool is_dense = is_run(args.a_strides) && is_run(args.b_strides) && is_run(args.c_strides) && args.y_strides[kLast] == 1;
  if (args.b) return args.c ? rows_function<true, true>(is_dense) : rows_function<true, false>(is_dense);
  return args.c ? rows_function<false, true>(is_dense) : rows_function<false, false>(is_dense);
}

// Whether it is a copy of squares that stand the other way.
bool turns(const ElementwiseArgs& args) {
  constexpr int kLast = ElementwiseArgs::kMostDims - 1;
  const bool is_copy = args.a && !args.b && !args.c && args.activation == Activation::identity && !Formula(args).is_scaled;
  const bool is_square = args.sizes[kLast] >= kLanes && args.sizes[kLast - 1] >= kLanes;
  return is_copy && is_square && args.a_strides[kLast - 1] == 1 && args.a_strides[kLast] > 1 && args.y_strides[kLast] == 1;
}

// Rows [begin, end) of the last dimension, of each its elements [from, to).
void compute_block(const ElementwiseArgs& args, int64_t begin, int64_t end, int64_t from, int64_t to) {
  constexpr int kLast = ElementwiseArgs::kMostDims - 1, kRows = kLast - 1;
  const Formula formula(args);
  const ComputeRows compute = rows_function(args);
  const bool is_turned = turns(args);
  int64_t index[kLast];
  for (int64_t d = kRows, rest = begin; d >= 0; --d) index[d] = rest % args.sizes[d], rest /= args.sizes[d];
  while (begin < end) {
    const int64_t rows = minimum(args.sizes[kRows] - index[kRows], end - begin);
    const auto offset = [&](const int64_t* strides) {
      int64_t elements = from * strides[kLast];
      for (int d = 0; d < kLast; ++d) elements += index[d] * strides[d];
      return elements;
    };
    const auto block = [&](const float* base, const int64_t* strides) {
      return base ? Block{base + offset(strides), strides[kRows], strides[kLast]} : Block{&kOne, 0, 0};
    };
    float* y = args.y + offset(args.y_strides);
    if (is_turned) {
      transpose_copy(y, args.y_strides[kRows], args.a + offset(args.a_strides), args.a_strides[kLast], to - from, rows);
    } else {
      compute(formula, block(args.a, args.a_strides), block(args.b, args.b_strides), block(args.c, args.c_strides), y, args.y_strides[kRows],
              args.y_strides[kLast], rows, to - from);
    }
    begin += rows;
    index[kRows] += rows - 1;
    for (int d = kRows; d >= 0 && ++index[d] == args.sizes[d]; --d) index[d] = 0;
  }
}

}  // namespace

void elementwise(const ElementwiseArgs& args) {
  constexpr int kLast = ElementwiseArgs::kMostDims - 1;
  const int64_t length = args.sizes[kLast];
  int64_t rows = 1;
  for (int d = 0; d < kLast; ++d) rows *= args.sizes[d];
  const int64_t tasks = minimum(thread_count(), ceil_div(rows * length, kElementsWorthATask));
  parallel(tasks, [&](int64_t first, int64_t last) {
    if (rows >= tasks) compute_block(args, rows * first / tasks, rows * last / tasks, 0, length);
    else compute_block(args, 0, rows, length * first / tasks, length * last / tasks);
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
