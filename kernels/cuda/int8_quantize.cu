// quantize, dequantize, int8_add: one pass over memory through the shared epilogue.      quantize_rows: reduction and write in one pass.
//
//   elementwise     8 neighbouring channels a step, 4 steps a thread whose loads are all under way before the first store
//   quantize_rows   a warp (short rows) or a block a row: the row is read once, kept in registers while its range is found, and
//                   written; what exceeds the registers is read again, from the cache
//
// All are bound by memory traffic: x once, y once.
#include "int8_quantize.h"

#include "common/epilogue.cuh"

namespace kernelpress::cuda {

namespace {

constexpr int kVector = 8;  // elements
constexpr int kSteps = 4;
constexpr int kThreads = 256;

// `aligned`: addresses and strides allow 16-byte vectors (8-byte ones of int8).
template <class T>
struct Strided {
  const T* base;
  int64_t stride;
  bool aligned;

  __device__ __forceinline__ void load(float (&values)[kVector], int64_t row, int64_t channel, int64_t channels) const {
    const T* from = base + row * stride + channel;
    if (aligned && channel + kVector <= channels) {
      constexpr int kPart = Element<T>::kPer16Bytes < kVector ? Element<T>::kPer16Bytes : kVector;
#pragma unroll
      for (int i = 0; i < kVector; i += kPart) {
        const auto part = load_vector<Vector<T, kPart>>(from + i);
#pragma unroll
        for (int j = 0; j < kPart; ++j) values[i + j] = to_float(part[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = channel + i < channels ? to_float(from[i]) : 0.0f;
    }
  }
};

template <class T>
Strided<T> strided(const void* base, int64_t stride) {
  return {static_cast<const T*>(base), stride, is_aligned(base) && is_aligned<T>(stride)};
}

// Floating values as they are.
template <class T>
struct Values {
  Strided<T> x;
  __device__ __forceinline__ void operator()(float (&values)[kVector], int64_t row, int64_t channel, int64_t channels) const {
    x.load(values, row, channel, channels);
  }
};

// int8 values by scale and zero point.
struct Dequantized {
  Strided<int8_t> x;
  float scale, zero_point;
  __device__ __forceinline__ void operator()(float (&values)[kVector], int64_t row, int64_t channel, int64_t channels) const {
    x.load(values, row, channel, channels);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = (values[i] - zero_point) * scale;
  }
};

struct Sum {
  Dequantized x;
  Strided<int8_t> other;
  float other_scale, other_zero_point;
  __device__ __forceinline__ void operator()(float (&values)[kVector], int64_t row, int64_t channel, int64_t channels) const {
    float more[kVector];
    x(values, row, channel, channels);
    other.load(more, row, channel, channels);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = fmaf(more[i] - other_zero_point, other_scale, values[i]);
  }
};

template <class Load, class Out>
__global__ void __launch_bounds__(kThreads, 3) elementwise(Load load, int64_t rows, int64_t channels, Epilogue<Out> epilogue) {
  const int64_t vectors = (channels + kVector - 1) / kVector;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kSteps) + threadIdx.x;
  float values[kSteps][kVector];
  int64_t row[kSteps], channel[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t index = first + step * kThreads;
    row[step] = rows == 1 ? 0 : index / vectors;
    channel[step] = (rows == 1 ? index : index % vectors) * kVector;
    if (index < rows * vectors) load(values[step], row[step], channel[step], channels);
  }
  const ChannelTerms<kVector> terms{{1, 1, 1, 1, 1, 1, 1, 1}, {}};
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (first + step * kThreads < rows * vectors) finish(epilogue, terms, values[step], row[step], channel[step]);
}

// Rows that lie one behind the other are one long row.
template <class Load, class Out>
int launch_elementwise(const Load& load, int64_t rows, int64_t channels, bool is_dense, Epilogue<Out> epilogue, void* stream) {
  if (is_dense) {
    epilogue.channels = channels = rows * channels;
    rows = 1;
  }
  const int64_t vectors = rows * ((channels + kVector - 1) / kVector), each = kThreads * kSteps;
  const Grid grid{dim3(static_cast<unsigned>((vectors + each - 1) / each)), dim3(kThreads), 0, stream};
  return launch(elementwise<Load, Out>, grid, load, rows, channels, epilogue);
}

// Of one long row, or of many: then its stride counts for the alignment.
template <class Out, class Args>
Epilogue<Out> output_of(const Args& args, bool is_dense) {
  return make_epilogue<Out>(nullptr, nullptr, nullptr, args.y, 0, is_dense ? 0 : args.y_stride, args.channels, args.activation);
}

template <class T>
int launch_quantize(const QuantizeArgs& args, void* stream) {
  const bool is_dense = args.x_stride == args.channels && args.y_stride == args.channels;
  auto epilogue = output_of<int8_t>(args, is_dense);
  epilogue.inverse_scale = static_cast<float>(1.0 / args.scale);
  epilogue.zero_point = static_cast<float>(args.zero_point);
  const Values<T> x{strided<T>(args.x, is_dense ? 0 : args.x_stride)};
  return launch_elementwise(x, args.rows, args.channels, is_dense, epilogue, stream);
}

// Calls `function(Out{})` with the element type of an output.
template <class Function>
int with_output(DataType dtype, const Function& function) {
  switch (dtype) {
    case DataType::int8: return function(int8_t{});
    case DataType::float16: return function(Half{});
    case DataType::bfloat16: return function(BFloat16{});
    default: return function(float{});
  }
}

// The values of a row that one thread holds: vectors thread, thread + kCount, …
constexpr int kHeld = 4;

template <class T, int kRowWarps>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(Strided<T> x, QuantizeRowsArgs args) {
  constexpr int kRowThreads = 32 * kRowWarps, kRows = kThreads / kRowThreads;
  SIMT_SHARED(float, ranges, [kThreads / 32][3]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int thread = static_cast<int>(threadIdx.x) % kRowThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kRowThreads;
  const int64_t channels = row < args.rows ? args.channels : 0, vectors = (channels + kVector - 1) / kVector;

  float held[kHeld][kVector];
  float low = 0.0f, high = 0.0f;
  bool has_nan = false;
  const auto extend = [&](const float(&values)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      low = fminf(low, values[i]);
      high = fmaxf(high, values[i]);
      has_nan |= values[i] != values[i];
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = thread + i * kRowThreads;
    if (at < vectors) x.load(held[i], row, at * kVector, channels);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * kRowThreads < vectors) extend(held[i]);
  for (int64_t at = thread + kHeld * kRowThreads; at < vectors; at += kRowThreads) {
    float values[kVector];
    x.load(values, row, at * kVector, channels);
    extend(values);
  }
  low = -reduce_max(-low);
  high = reduce_max(high);
  has_nan = vote_any(has_nan);
  if constexpr (kRowWarps > 1) {
    if (lane == 0) {
      ranges[warp][0] = low;
      ranges[warp][1] = high;
      ranges[warp][2] = has_nan ? 1.0f : 0.0f;
    }
    block_barrier();
#pragma unroll
    for (int other = 0; other < kRowWarps; ++other) {
      low = fminf(low, ranges[other][0]);
      high = fmaxf(high, ranges[other][1]);
      has_nan |= ranges[other][2] != 0.0f;
    }
  }
  if (row >= args.rows) return;

  const bool symmetric = args.symmetric != 0;
  const float range = symmetric ? fmaxf(high, -low) * static_cast<float>(1.0 / 127) : (high - low) * static_cast<float>(1.0 / 255);
  const float scale = has_nan ? NAN : fmaxf(range, 1.17549435e-38f);
  const float inverse = 1.0f / scale;
  const auto rounded = [inverse](float value) {
    const float steps = rintf(value * inverse);
    return steps == steps ? steps : 0.0f;
  };
  const auto saturated = [](float value) { return fminf(fmaxf(value, -128.0f), 127.0f); };
  const float zero_point = symmetric ? 0.0f : saturated(-128.0f - rounded(has_nan ? NAN : low));
  if (thread == 0) {
    args.scale[row] = scale;
    args.zero_point[row] = static_cast<int32_t>(zero_point);
  }
  int8_t* y = static_cast<int8_t*>(args.y) + row * channels;
  const bool whole_vectors = channels % kVector == 0;
  const auto write = [&](const float(&values)[kVector], int64_t at) {
    Vector<int8_t, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result[i] = static_cast<int8_t>(static_cast<int>(saturated(rounded(values[i]) + zero_point)));
    if (whole_vectors) {
      store_vector(y + at * kVector, result);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (at * kVector + i < channels) y[at * kVector + i] = result[i];
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (thread + i * kRowThreads < vectors) write(held[i], thread + i * kRowThreads);
  for (int64_t at = thread + kHeld * kRowThreads; at < vectors; at += kRowThreads) {
    float values[kVector];
    x.load(values, row, at * kVector, channels);
    write(values, at);
  }
}

constexpr int kBlockWarps = kThreads / 32;
constexpr int64_t kLongestOfWarp = 32 * kHeld * kVector;

template <class T>
Status launch_quantize_rows(const QuantizeRowsArgs& args, void* stream) {
  const auto x = strided<T>(args.x, args.x_stride);
  const bool is_short = args.channels <= kLongestOfWarp;
  const int64_t rows = is_short ? kBlockWarps : 1;
  const Grid grid{dim3(static_cast<unsigned>((args.rows + rows - 1) / rows)), dim3(kThreads), 0, stream};
  const int code = is_short ? launch(quantize_rows_kernel<T, 1>, grid, x, args) : launch(quantize_rows_kernel<T, kBlockWarps>, grid, x, args);
  return {code, "quantize_rows", is_short ? "a warp a row" : "a block a row"};
}

}  // namespace

Status quantize(const QuantizeArgs& args, const Device&, void* stream) {
  int code;
  switch (args.dtype) {
    case DataType::float16: code = launch_quantize<Half>(args, stream); break;
    case DataType::bfloat16: code = launch_quantize<BFloat16>(args, stream); break;
    default: code = launch_quantize<float>(args, stream);
  }
  return {code, "quantize", "8 values a step"};
}

Status dequantize(const DequantizeArgs& args, const Device&, void* stream) {
  const bool is_dense = args.x_stride == args.channels && args.y_stride == args.channels;
  const Dequantized x{strided<int8_t>(args.x, is_dense ? 0 : args.x_stride), static_cast<float>(args.scale), static_cast<float>(args.zero_point)};
  const int code = with_output(args.output, [&](auto out) {
    return launch_elementwise(x, args.rows, args.channels, is_dense, output_of<decltype(out)>(args, is_dense), stream);
  });
  return {code, "dequantize", "8 values a step"};
}

Status int8_add(const Int8AddArgs& args, const Device&, void* stream) {
  const bool is_dense = args.x_stride == args.channels && args.other_stride == args.channels && args.y_stride == args.channels;
  const Sum sum{{strided<int8_t>(args.x, is_dense ? 0 : args.x_stride), static_cast<float>(args.scale), static_cast<float>(args.zero_point)},
                strided<int8_t>(args.other, is_dense ? 0 : args.other_stride),
                static_cast<float>(args.other_scale),
                static_cast<float>(args.other_zero_point)};
  const int code = with_output(args.output, [&](auto out) {
    auto epilogue = output_of<decltype(out)>(args, is_dense);
    epilogue.inverse_scale = static_cast<float>(1.0 / args.output_scale);
    epilogue.zero_point = static_cast<float>(args.output_zero_point);
    return launch_elementwise(sum, args.rows, args.channels, is_dense, epilogue, stream);
  });
  return {code, "int8_add", "8 values a step"};
}

Status quantize_rows(const QuantizeRowsArgs& args, const Device&, void* stream) {
  switch (args.dtype) {
    case DataType::float16: return launch_quantize_rows<Half>(args, stream);
    case DataType::bfloat16: return launch_quantize_rows<BFloat16>(args, stream);
    default: return launch_quantize_rows<float>(args, stream);
  }
}

}  // namespace kernelpress::cuda
