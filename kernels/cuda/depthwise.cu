// Depthwise convolution, channels_last.   y[n,p,q,c] = act(scale[c] · Σ_rs w[r,s,c] · x[n, p·S-P+r·D, q·S-P+s·D, c/m] + b[c] + residual)
//
//   one block: up to 128 bytes of channels × a strip of columns, walking down the image     one thread: 2 rows × 4 or 8 columns
//                                                                                                      × 4 channels
//     x ──cp.async──▶ ring of rows ──▶ registers ──▶ y        an input vector is read from the ring once for all taps of all
//         (zero-filled beyond the borders: no branch            outputs that it touches; sums are float32; the weights lie in
//          in the inner loop)                                   shared memory as float32
//
// Bound by memory traffic: x is read once, y written once. 5×5 and 7×7 at stride 1 in 16 bits would be bound by their FMA (7×7 at half
// of copy bandwidth) and run on tensor cores where their fragments fill: depthwise_tensor.cu. Whatever the ring is not compiled for runs
// on `depthwise_any`.
#include "depthwise_ring.cuh"
#include "depthwise_tensor.cuh"

namespace kernelpress::cuda {
namespace {

// Adds one row of the ring to the patch's output rows kFirst … kLast. `taps`: of output row 0 for this input row; row i of the
// patch looks kStride rows further back.
template <class T, int kKernel, int kStride, int kFirst, int kLast>
__device__ __forceinline__ void add_row(float (&sums)[kPatchRows][kPatchColumns<kKernel, kStride>][kPatchChannels],
                                        const unsigned char* row, int pixel, const float* taps, int tap_pitch) {
  constexpr int kColumns = kPatchColumns<kKernel, kStride>, kInColumns = (kColumns - 1) * kStride + kKernel;
  using Weight = Vector<float, kPatchChannels>;
  Weight weights[kLast - kFirst + 1][kKernel];
#pragma unroll
  for (int i = kFirst; i <= kLast; ++i)
#pragma unroll
    for (int s = 0; s < kKernel; ++s)
      weights[i - kFirst][s] = *reinterpret_cast<const Weight*>(taps + (s - i * kStride * kKernel) * tap_pitch);
#pragma unroll
  for (int j = 0; j < kInColumns; ++j) {
    float x[kPatchChannels];
    to_float(*reinterpret_cast<const Vector<T, kPatchChannels>*>(row + j * pixel), x);
#pragma unroll
    for (int i = kFirst; i <= kLast; ++i)
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
        if (j < s || (j - s) % kStride != 0 || (j - s) / kStride >= kColumns) continue;
        float(&sum)[kPatchChannels] = sums[i][(j - s) / kStride];
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c) sum[c] = fmaf(x[c], weights[i - kFirst][s][c], sum[c]);
      }
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseMaxThreads, kKernel == 3 ? 4 : kKernel == 5 ? 3 : 2) depthwise_ring(
    const DepthwiseConv2dArgs a, const DepthwisePlan plan, const Epilogue<T> epilogue) {
  static_assert(kPatchRows == 2, "the three loops below are the rows of the first, of both and of the second output row");
  constexpr int kColumns = kPatchColumns<kKernel, kStride>, kVector = Element<T>::kPer16Bytes;
  constexpr int kUnroll = kKernel == 3 ? kKernel : 1;
  SIMT_DYN_SMEM(shared);
  const RingBlock block = ring_block<T>(plan, a.out_h, kPatchRows, kColumns);
  const int chunk = plan.vectors * kVector;  // channels of the block
  float* weights = reinterpret_cast<float*>(shared);
  unsigned char* memory = shared + kKernel * kKernel * chunk * 4;

  Ring<T> ring(memory, plan, static_cast<const T*>(a.x) + block.image * a.in_h * a.in_w * a.x_stride, a.in_h, a.in_w, a.x_stride,
               block.first_row * kStride - a.window.pad_h, block.first_column * kStride - a.window.pad_w, block.first_channel,
               a.channels);
  ring.advance(plan.in_rows);
  cp_async_commit();
  for (int i = static_cast<int>(threadIdx.x); i < chunk; i += static_cast<int>(blockDim.x)) {
    const int64_t channel = block.first_channel + i;
    const T* from = static_cast<const T*>(a.weight) + channel;
#pragma unroll
    for (int tap = 0; tap < kKernel * kKernel; ++tap)
      weights[tap * chunk + i] = channel < a.channels ? to_float(from[tap * a.channels]) : 0.0f;
  }

  const PatchPlace at = patch_place<T>(plan, kColumns);
  const float* taps = weights + at.quad * kPatchChannels;
  const int place = at.column * kStride * ring.pixel() + at.quad * kPatchChannels * static_cast<int>(sizeof(T));

  int first_slot = 0;
  for (int step = 0; step < block.steps; ++step) {
    cp_async_wait<0>();
    block_barrier();
    if (step + 1 < block.steps) ring.advance(plan.step_rows);
    cp_async_commit();
    if (vote_any(at.works)) {
      float sums[kPatchRows][kColumns][kPatchChannels] = {};
      int slot = ring.behind(first_slot, at.row * kStride);
      const float* row_taps = taps;
      const auto add_rows = [&](auto first, auto last) {
        add_row<T, kKernel, kStride, decltype(first)::value, decltype(last)::value>(sums, ring.row(slot) + place, ring.pixel(), row_taps, chunk);
        row_taps += kKernel * chunk;
        slot = ring.behind(slot, 1);
      };
#pragma unroll
      for (int h = 0; h < kStride; ++h) add_rows(Constant<0>{}, Constant<0>{});
#pragma unroll kUnroll
      for (int h = kStride; h < kKernel; ++h) add_rows(Constant<0>{}, Constant<1>{});
#pragma unroll
      for (int h = kKernel; h < kKernel + kStride; ++h) add_rows(Constant<1>{}, Constant<1>{});
      store_patch(sums, epilogue, at, block, plan, step, a.out_h, a.out_w);
    }
    first_slot = ring.behind(first_slot, plan.step_rows);
  }
}

// Any window and multiplier: a thread computes kAnyPatchColumns neighbouring outputs of kVector channels, straight from global memory.
template <class T, int kVector>
__global__ void __launch_bounds__(kDepthwiseMaxThreads) depthwise_any(const DepthwiseConv2dArgs a, const Epilogue<T> epilogue) {
  using Group = Vector<T, kVector>;
  const Window& w = a.window;
  const int64_t c_out = a.channels * a.multiplier, groups = c_out / kVector;
  const int64_t wide = (a.out_w + kAnyPatchColumns - 1) / kAnyPatchColumns;
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= groups * wide * a.out_h * a.batch) return;
  const int64_t channel = index % groups * kVector;
  index /= groups;
  const int64_t q0 = index % wide * kAnyPatchColumns;
  index /= wide;
  const int64_t p = index % a.out_h, image = index / a.out_h;
  const T* x = static_cast<const T*>(a.x) + image * a.in_h * a.in_w * a.x_stride + (kVector > 1 ? channel : channel / a.multiplier);
  const T* weight = static_cast<const T*>(a.weight) + channel;

  const ChannelTerms<kVector> terms = channel_terms<kVector>(epilogue, channel);
  float sums[kAnyPatchColumns][kVector] = {};
  for (int64_t r = 0; r < w.kernel_h; ++r) {
    const int64_t h = p * w.stride_h - w.pad_h + r * w.dilation_h;
    if (h < 0 || h >= a.in_h) continue;
    for (int64_t s = 0; s < w.kernel_w; ++s) {
      float tap[kVector];
      to_float(*reinterpret_cast<const Group*>(weight + (r * w.kernel_w + s) * c_out), tap);
#pragma unroll
      for (int q = 0; q < kAnyPatchColumns; ++q) {
        const int64_t column = (q0 + q) * w.stride_w - w.pad_w + s * w.dilation_w;
        if (column < 0 || column >= a.in_w) continue;
        float value[kVector];
        to_float(*reinterpret_cast<const Group*>(x + (h * a.in_w + column) * a.x_stride), value);
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[q][c] = fmaf(value[c], tap[c], sums[q][c]);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kAnyPatchColumns; ++q) {
    if (q0 + q >= a.out_w) break;
    finish(epilogue, terms, sums[q], (image * a.out_h + p) * a.out_w + q0 + q, channel);
  }
}

template <class T>
int launch_any(const DepthwiseConv2dArgs& a, const Epilogue<T>& epilogue, void* stream) {
  constexpr int kVector = Element<T>::kPer16Bytes;
  const bool aligned = a.multiplier == 1 && copy_bytes<T>(a.x, a.x_stride, a.channels) == 16 && is_aligned(a.weight);
  const int64_t threads = kDepthwiseTiles[kAnyWindowTile].threads;
  const int64_t items = a.channels * a.multiplier / (aligned ? kVector : 1) * depthwise::ceil_div(a.out_w, kAnyPatchColumns) * a.out_h * a.batch;
  const Grid grid{dim3(static_cast<unsigned>(depthwise::ceil_div(items, threads))), dim3(static_cast<unsigned>(threads)), 0, stream};
  return aligned ? launch(depthwise_any<T, kVector>, grid, a, epilogue) : launch(depthwise_any<T, 1>, grid, a, epilogue);
}

template <class T>
int launch_ring(const DepthwiseConv2dArgs& a, const DepthwisePlan& plan, const Epilogue<T>& epilogue, void* stream) {
  const Grid grid{dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)),
                  static_cast<size_t>(plan.shared_bytes), stream};
  switch (a.window.kernel_h * 10 + a.window.stride_h) {
    case 31: return launch(depthwise_ring<T, 3, 1>, grid, a, plan, epilogue);
    case 32: return launch(depthwise_ring<T, 3, 2>, grid, a, plan, epilogue);
    case 51: return launch(depthwise_ring<T, 5, 1>, grid, a, plan, epilogue);
    case 52: return launch(depthwise_ring<T, 5, 2>, grid, a, plan, epilogue);
    case 71: return launch(depthwise_ring<T, 7, 1>, grid, a, plan, epilogue);
    default: return launch(depthwise_ring<T, 7, 2>, grid, a, plan, epilogue);
  }
}

// The tile asked for if it can compute the problem, or the heuristic's.
int64_t depthwise_tile(const DepthwiseShape& shape, int64_t bytes, const DepthwiseConv2dArgs& a, const Device& device) {
  if (!depthwise_is_specialised(a.window, a.multiplier)) return kAnyWindowTile;
  const bool tensor = tensor_is_possible(shape, bytes, device) && is_aligned(a.weight);
  if (a.configuration >= 0 && a.configuration < kDepthwiseTileCount && (tensor || a.configuration != kTensorTile)) return a.configuration;
  return tensor && tensor_pays(shape, bytes, device) ? kTensorTile : choose_depthwise_tile(shape, device);
}

template <class T>
Status launch_depthwise(const DepthwiseConv2dArgs& a, const Device& device, void* stream) {
  const int64_t kernel = a.window.kernel_h, bytes = copy_bytes<T>(a.x, a.x_stride, a.channels);
  const DepthwiseShape shape{a.batch, a.channels, a.out_h, a.out_w, kernel, a.window.stride_h, sizeof(T),
                             depthwise::float_words(static_cast<int>(kernel))};
  const DepthwiseTile& tile = kDepthwiseTiles[depthwise_tile(shape, bytes, a, device)];
  const auto epilogue = make_epilogue<T>(a.scale, a.bias, a.residual, a.y, a.residual_stride, a.y_stride, a.channels * a.multiplier,
                                         a.activation);
  Status status{0, "depthwise_conv2d", tile.name};
  if (tile.kernel == DepthwiseKernel::any_window) {
    status.code = launch_any<T>(a, epilogue, stream);
  } else if (tile.kernel == DepthwiseKernel::tensor) {
    if constexpr (sizeof(T) == 2) status.code = launch_depthwise_tensor(a, plan_depthwise_tensor(shape, device), epilogue, stream);
  } else {
    DepthwisePlan plan = plan_depthwise_ring(shape, tile, device);
    plan.copy_bytes = static_cast<int32_t>(bytes);
    status.code = launch_ring<T>(a, plan, epilogue, stream);
  }
  return status;
}

}  // namespace

Status depthwise_conv2d(const DepthwiseConv2dArgs& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case DataType::float16: return launch_depthwise<Half>(a, device, stream);
    case DataType::bfloat16: return launch_depthwise<BFloat16>(a, device, stream);
    default: return launch_depthwise<float>(a, device, stream);
  }
}

}  // namespace kernelpress::cuda
