// Between float32 and int8.     quantize: y = clamp(round(x / scale) + zero_point)     dequantize: y = (x − zero_point) · scale
//                               int8_add: y = act((x − zero_point) · scale + (other − other_zero_point) · other_scale), then quantized
//                               int8_gate: y = act((x − zero_point) · scale · (gate − gate_zero_point) · gate_scale), then quantized
//                               quantize_rows: as quantize, each row by the range that it has
//
//   Each number is rounded where kernels/reference/int8_quantize.py says, so the integers are its integers. Rows that run on into
//   one another are one, whatever their channels. Images that `quantize` reads may lie anyhow; what is not channels_last,
//
//       plane 0  ▇▇▇▇▇▇▇▇ ──┐                     goes plane by plane through a block of int8 in the first-level cache, whose
//       plane 1  ▇▇▇▇▇▇▇▇ ──┼─▶ ▇▇▇ ▇▇▇ ▇▇▇ …     pixels are then put together.
//       plane 2  ▇▇▇▇▇▇▇▇ ──┘
//   bound: bandwidth
//
// One task: a run of rows.
#include "args.h"
#include "int8_epilogue.h"
#include "rows.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kElementsWorthATask = 16384;
constexpr int64_t kBlockPixels = 64;   // of a plane
constexpr int64_t kBlockPlanes = 32;
constexpr int kGateVectors = 4;

// `body(row, first, count)` over all elements of `rows` rows, split among threads. Where the rows of all tensors run on, they are cut
// anywhere, at multiples of a vector.
template <class Body>
void over_rows(int64_t rows, int64_t channels, bool run_on, const Body& body) {
  const int64_t elements = rows * channels;
  if (run_on) {
    const int64_t tasks = maximum(1, minimum(thread_count(), elements / kElementsWorthATask));
    const int64_t length = round_up(ceil_div(elements, tasks), 4 * kLanes);
    const auto task = [&](int64_t begin, int64_t end) {
      const int64_t first = begin * length, last = minimum(elements, end * length);
      if (first < last) body(0, first, last - first);
    };
    if (tasks == 1) task(0, 1);
    else parallel(tasks, task);
    return;
  }
  const auto task = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row, 0, channels);
  };
  if (elements < kElementsWorthATask) task(0, rows);
  else parallel(rows, task);
}

// clamp(round(x / scale) + zero_point), half to even; NaN becomes the zero point.
struct Quantizer {
  Vec inverse_scale, low, high;
  Ints zero_point;

  Quantizer(float inverse, int32_t zero)
      : inverse_scale(broadcast(inverse)),
        low(broadcast(static_cast<float>(-128 - zero))),
        high(broadcast(static_cast<float>(127 - zero))),
        zero_point(broadcast_int(zero)) {}

  KP_INLINE Ints operator()(Vec x) const { return rounded(zero_for_nan(at_most(at_least(x * inverse_scale, low), high))) + zero_point; }
};

KP_INLINE void quantize_run(const Quantizer& quantizer, const float* x, int8_t* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_int8(y + i, quantizer(load(x + i)));
  if (i < count) store_int8_up_to(y + i, quantizer(load_up_to(x + i, count - i)), count - i);
}

// Pixels of a row whose channels lie apart.
void quantize_planes(const QuantizeArgs& a, const Quantizer& quantizer, const float* x, int8_t* y) {
  alignas(64) int8_t block[kBlockPlanes][kBlockPixels];
  float gathered[kBlockPixels];
  for (int64_t w = 0; w < a.width; w += kBlockPixels) {
    const int64_t pixels = minimum(kBlockPixels, a.width - w);
    for (int64_t c0 = 0; c0 < a.channels; c0 += kBlockPlanes) {
      const int64_t planes = minimum(kBlockPlanes, a.channels - c0);
      for (int64_t c = 0; c < planes; ++c) {
        const float* from = x + w * a.x_stride_w + (c0 + c) * a.x_stride_c;
        if (a.x_stride_w != 1) {
          for (int64_t i = 0; i < pixels; ++i) gathered[i] = from[i * a.x_stride_w];
          from = gathered;
        }
        quantize_run(quantizer, from, block[c], pixels);
      }
      int8_t* to = y + w * a.y_stride + c0;
      if (planes == 3 && a.y_stride == 3) {
        for (int64_t i = 0; i < pixels; ++i) {
          to[3 * i] = block[0][i];
          to[3 * i + 1] = block[1][i];
          to[3 * i + 2] = block[2][i];
        }
      } else {
        for (int64_t i = 0; i < pixels; ++i) {
          for (int64_t c = 0; c < planes; ++c) to[i * a.y_stride + c] = block[c][i];
        }
      }
    }
  }
}

// (x − zero_point) · scale.
struct Dequantizer {
  Ints zero_point;
  Vec scale;

  Dequantizer(double s, double zero) : zero_point(broadcast_int(static_cast<int32_t>(zero))), scale(broadcast(static_cast<float>(s))) {}

  KP_INLINE Vec shifted(Ints x) const { return to_floats(x - zero_point); }
  KP_INLINE Vec operator()(Ints x) const { return shifted(x) * scale; }
};

// The largest of all lanes; NaN wins.
KP_INLINE float largest_lane(Vec a) {
  float lanes[kLanes], largest = 0.0f;
  store(lanes, a);
  for (const float lane : lanes) largest = lane > largest || lane != lane ? lane : largest;
  return largest;
}

KP_INLINE float inverse_of(double scale) { return static_cast<float>(1.0 / scale); }

}  // namespace

void quantize(const QuantizeArgs& a) {
  const Quantizer quantizer(inverse_of(a.scale), static_cast<int32_t>(a.zero_point));
  const bool by_pixel = a.x_stride_c == 1 || a.channels == 1, is_dense = by_pixel && a.x_stride_w == a.channels && a.y_stride == a.channels;
  const bool run_on = is_dense && a.x_stride_h == a.width * a.x_stride_w && (a.batch == 1 || a.x_stride_n == a.height * a.x_stride_h);
  over_rows(a.batch * a.height, a.width * a.channels, run_on, [&](int64_t row, int64_t first, int64_t count) {
    const float* x = a.x + row / a.height * a.x_stride_n + row % a.height * a.x_stride_h;
    int8_t* y = a.y + row * a.width * a.y_stride;
    if (is_dense) return quantize_run(quantizer, x + first, y + first, count);
    if (!by_pixel) return quantize_planes(a, quantizer, x, y);
    for (int64_t w = 0; w < a.width; ++w) quantize_run(quantizer, x + w * a.x_stride_w, y + w * a.y_stride, a.channels);
  });
}

void dequantize(const DequantizeArgs& a) {
  const Dequantizer dequantizer(a.scale, a.zero_point);
  over_rows(a.rows, a.channels, a.x_stride == a.channels && a.y_stride == a.channels, [&](int64_t row, int64_t first, int64_t count) {
    const int8_t* x = a.x + row * a.x_stride + first;
    float* y = a.y + row * a.y_stride + first;
    for (int64_t i = 0; i < count; i += kLanes) store_up_to(y + i, dequantizer(load_int8_up_to(x + i, count - i)), count - i);
  });
}

void int8_add(const Int8AddArgs& a) {
  const Dequantizer augend(a.scale, a.zero_point), addend(a.other_scale, a.other_zero_point);
  const Int8Output output(a);
  const bool run_on = a.x_stride == a.channels && a.other_stride == a.channels && a.y_stride == a.channels;
  over_rows(a.rows, a.channels, run_on, [&](int64_t row, int64_t first, int64_t count) {
    const int8_t *x = a.x + row * a.x_stride, *other = a.other + row * a.other_stride;
    for (int64_t c = first; c < first + count; c += kLanes) {
      const int64_t lanes = first + count - c;
      const Vec value = augend(load_int8_up_to(x + c, lanes)), steps = addend.shifted(load_int8_up_to(other + c, lanes));
      output.write(fma_rounded_once(steps, addend.scale, value), row, c, lanes);
    }
  });
}

void int8_gate(const Int8GateArgs& a) {
  const Dequantizer value(a.scale, a.zero_point), factor(a.gate_scale, a.gate_zero_point);
  const Int8Output output(a);
  const Quantizer quantizer(inverse_of(a.output_scale), static_cast<int32_t>(a.output_zero_point));
  const bool is_plain = a.y_is_int8 && a.activation == Activation::identity;
  const auto over_pixels = [&](int64_t image, int64_t begin, int64_t end) {
    const int8_t* gate = a.gate + image * a.gate_stride;
    for (int64_t c = 0; c < a.channels; c += kGateVectors * kLanes) {
      const int64_t left = a.channels - c, vectors = minimum(kGateVectors, ceil_div(left, kLanes));
      Vec factors[kGateVectors] = {};
      for (int64_t v = 0; v < vectors; ++v) factors[v] = factor(load_int8_up_to(gate + c + v * kLanes, left - v * kLanes));
      for (int64_t row = image * a.pixels + begin; row < image * a.pixels + end; ++row) {
        const int8_t* x = a.x + row * a.x_stride + c;
        int8_t* y = static_cast<int8_t*>(a.y) + row * a.y_stride + c;
        if (is_plain && left >= kGateVectors * kLanes) {
#pragma GCC unroll 4
          for (int v = 0; v < kGateVectors; ++v) store_int8(y + v * kLanes, quantizer(value(load_int8(x + v * kLanes)) * factors[v]));
          continue;
        }
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t lanes = left - v * kLanes;
          const Vec gated = value(load_int8_up_to(x + v * kLanes, lanes)) * factors[v];
          if (is_plain) store_int8_up_to(y + v * kLanes, quantizer(gated), lanes);
          else output.write(gated, row, c + v * kLanes, lanes);
        }
      }
    }
  };
  const int64_t rows = a.batch * a.pixels, parts = rows * a.channels < kElementsWorthATask ? minimum(1, rows) : minimum(thread_count(), rows);
  const auto task = [&](int64_t begin, int64_t end) { over_images(rows * begin / parts, rows * end / parts, a.pixels, over_pixels); };
  if (parts == 1) task(0, 1);
  else parallel(parts, task);
}

void quantize_rows(const QuantizeRowsArgs& a) {
  constexpr float kSmallestScale = 0x1p-126f;
  over_rows(a.rows, a.channels, false, [&](int64_t row, int64_t, int64_t) {
    const float* x = a.x + row * a.x_stride;
    // Both begin at 0: the range holds it, and lanes beyond the row are 0.
    Vec least = zero(), most = zero();
    for (int64_t i = 0; i < a.channels; i += kLanes) {
      const Vec value = load_up_to(x + i, a.channels - i), negated = zero() - value;
      most = maximum_keeping_nan(most, value);
      least = maximum_keeping_nan(least, negated);
    }
    const float high = largest_lane(most), low = -largest_lane(least);
    const float span = a.symmetric ? (high > -low || high != high ? high : -low) : high - low;
    const float scaled = span * (a.symmetric ? 1.0f / 127 : 1.0f / 255), scale = scaled < kSmallestScale ? kSmallestScale : scaled;
    const float inverse = 1.0f / scale;
    float zero_point = 0.0f;
    if (!a.symmetric) {
      const float steps = low * inverse;
      zero_point = -128.0f - (steps == steps ? std::nearbyintf(steps) : 0.0f);
      zero_point = zero_point < -128.0f ? -128.0f : zero_point > 127.0f ? 127.0f : zero_point;
    }
    const int32_t integer = static_cast<int32_t>(zero_point);
    quantize_run(Quantizer(inverse, integer), x, a.y + row * a.channels, a.channels);
    a.scale[row] = scale;
    a.zero_point[row] = integer;
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
