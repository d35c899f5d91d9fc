// Depthwise convolution of 5×5 and 7×7 windows at stride 1 in 16 bits, on tensor cores: exact products, sums in float32.
//
// For one channel and one input row h, two rows of eight outputs are a product with a band matrix of the taps (Toeplitz):
//
//                     16 input columns               8 patches
//       output    ┌ w[h]   w w w w w w w . . .  ┐   ┌ x[h] of  ┐
//       row 0 × 8 │ w[h]   . w w w w w w w . .  │   │ 8 places │     A: the taps, in registers for the whole life of the warp; the
//                 │        …                    │ · │ of the   │        half of row 1 is that of row 0 for the input row before
//       row 1 × 8 │ w[h-1] w w w w w w w . . .  │   │ image    │     B: from the ring, two columns interleaved into a register
//                 └        …                    ┘   └          ┘     k + 1 `mma` make 16 × 8 outputs
//
//   one block: 32 bytes of channels × 8 patches of 4 × 8 outputs, walking down the image     one warp: four of the channels
//
//     x ──cp.async──▶ ring of planes [row][4 channels][column] ──▶ mma ──▶ stage [pixel][16 channels] of sums ──▶ y
//
// 128 multiply-adds an output for 7×7 (49 are needed), at ten times the rate of FMA; 5 inputs read from the ring an output. Bound by
// memory traffic. Zeros of the band are multiplied too: an infinity or a NaN of x makes NaN of the patches whose 16 columns hold it.
#include "depthwise_tensor.cuh"

#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/simt.cuh"
#include "depthwise_ring.cuh"

namespace kernelpress::cuda {
namespace {

constexpr int kMaxThreads = kDepthwiseTiles[kTensorTile].threads;
constexpr int kPatchPixels = kTensorRows * kTensorColumns;
constexpr int kStagePitch = kTensorStageBytes / (kTensorPatches * kPatchPixels);
constexpr int kPairs = kTensorRows / 2;  // of output rows, one fragment each

// Byte of column `column` in a plane: eight lanes that read four columns each of four neighbouring patches meet no bank twice.
__device__ __forceinline__ int plane_offset(int column) { return (column ^ (column >> 2 & 4)) * 8; }

// The input rows of a block, by planes of four channels; zeros beyond the borders. What the arguments tell is not kept in registers.
template <class T>
class Planes {
 public:
  __device__ __forceinline__ Planes(unsigned char* memory, const DepthwisePlan& plan, const DepthwiseConv2dArgs& a, const RingBlock& block)
      : memory_(memory), plan_(plan), a_(a), next_row_(static_cast<int>(block.first_row - a.window.pad_h)),
        first_column_(static_cast<int>(block.first_column - a.window.pad_w)) {
    const int64_t channel = block.first_channel + thread() % quads() * kPatchChannels;
    has_channels_ = channel < a.channels;
    channels_ = static_cast<const T*>(a.x) + block.image * a.in_h * a.in_w * a.x_stride + (has_channels_ ? channel : 0);
  }

  // Starts the copies of the next `count` rows; whatever their slots held is lost.
  __device__ __forceinline__ void advance(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const bool inside = has_channels_ && next_row_ >= 0 && next_row_ < a_.in_h;
      const T* row = channels_ + (inside ? next_row_ * a_.in_w * a_.x_stride : 0);
      unsigned char* slot = memory_ + next_slot_ * pitch() + thread() % quads() * plane();
#pragma unroll 1
      for (int column = thread() / quads(); column < plan_.ring_columns; column += 32) {
        const int w = first_column_ + column;
        const bool valid = inside && w >= 0 && w < a_.in_w;
        cp_async_8(slot + plane_offset(column), valid ? row + w * a_.x_stride : channels_, valid);
      }
      ++next_row_;
      next_slot_ = next_slot_ + 1 == plan_.ring_rows ? 0 : next_slot_ + 1;
    }
  }

  // Bytes between two rows, and between the planes of a row.
  __device__ __forceinline__ int pitch() const { return quads() * plane(); }
  __device__ __forceinline__ int plane() const { return plan_.plane_columns * 8; }

 private:
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int quads() { return static_cast<int>(blockDim.x) / 32; }

  unsigned char* memory_;
  const DepthwisePlan& plan_;
  const DepthwiseConv2dArgs& a_;
  int next_row_, first_column_, next_slot_ = 0;
  const T* channels_;
  bool has_channels_;
};

// The bands of all tap rows for four channels. Of the 16 columns, a lane of pair p has p and p + 8 in one register, p + 4 and p + 12 in
// the other; its row is output column `group`.
template <class T, int kKernel>
struct Bands {
  uint32_t taps[kKernel][2][kPatchChannels];

  __device__ __forceinline__ void load(const T* weight, int64_t channel, int64_t channels) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4;
    using Quad = Vector<T, kPatchChannels>;
#pragma unroll
    for (int r = 0; r < kKernel; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Quad columns[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int s = pair + 4 * half + 8 * i - group;
          if (s >= 0 && s < kKernel && channel < channels)
            columns[i] = *reinterpret_cast<const Quad*>(weight + (r * kKernel + s) * channels + channel);
        }
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c) taps[r][half][c] = columns[0][c].bits | static_cast<uint32_t>(columns[1][c].bits) << 16;
      }
  }

  // Adds the products of input row `r` of the window of the first of two output rows.
  template <int r>
  __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&x)[2], int c) const {
    constexpr int kOwn = r < kKernel ? r : 0, kBefore = r > 0 ? r - 1 : 0;
    const uint32_t a[4] = {r < kKernel ? taps[kOwn][0][c] : 0u, r > 0 ? taps[kBefore][0][c] : 0u, r < kKernel ? taps[kOwn][1][c] : 0u,
                           r > 0 ? taps[kBefore][1][c] : 0u};
    if constexpr (std::is_same_v<T, Half>)
      mma_m16n8k16_f16(sum, a, x);
    else
      mma_m16n8k16_bf16(sum, a, x);
  }
};

using Sums = float[kPairs][kPatchChannels][4];

// Adds input row `h` of the patches. `row`: of the warp's plane; offsets: of the lane's four columns.
template <int h, class T, int kKernel>
__device__ __forceinline__ void add_row(Sums& sums, const Bands<T, kKernel>& bands, const unsigned char* row, const int (&offsets)[4]) {
  constexpr int kColumns = kKernel > 5 ? 4 : 3;  // columns 12 … 15 are no window's that is narrower
  uint2 x[4] = {};
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x[i] = *reinterpret_cast<const uint2*>(row + offsets[i]);
#pragma unroll
  for (int c = 0; c < kPatchChannels; ++c) {
    const uint32_t selector = c % 2 == 0 ? 0x5410 : 0x7632;
    uint32_t both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) both[i] = byte_permute(c < 2 ? x[i].x : x[i].y, c < 2 ? x[i + 2].x : x[i + 2].y, selector);
    if constexpr (h <= kKernel) bands.template multiply<h>(sums[0][c], both, c);
    if constexpr (h >= 2) bands.template multiply<h - 2>(sums[1][c], both, c);
  }
}

// Where four sums of a pixel lie in the stage: [patch][pixel][64 bytes], turned so that neither writing (8 columns and every other patch
// a warp) nor reading (whole pixels) meets a bank twice.
__device__ __forceinline__ int stage_offset(int patch, int row, int column, int quad) {
  return (patch * kPatchPixels + row * kTensorColumns + column) * kStagePitch + (quad ^ (patch >> 1 & 3)) * 16;
}

__device__ __forceinline__ void put_on_stage(unsigned char* stage, const Sums& sums, int quad) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4;
#pragma unroll
  for (int row = 0; row < kTensorRows; ++row)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vector<float, kPatchChannels> values;
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) values[c] = sums[row / 2][c][row % 2 * 2 + i];
      store_16(stage + stage_offset(2 * pair + i, row, group, quad), values);
    }
}

// Finishes four channels of a pixel a thread; its neighbours write the rest of their 32 bytes.
template <class T>
__device__ __forceinline__ void store_stage(const unsigned char* stage, const Epilogue<T>& epilogue, const RingBlock& block,
                                            const DepthwisePlan& plan, int step, int64_t out_h, int64_t out_w) {
  const int quads = static_cast<int>(blockDim.x) / 32, quad = static_cast<int>(threadIdx.x) % quads;
  const int pixels = plan.column_strips * plan.row_strips * kPatchPixels;
  const int64_t channel = block.first_channel + quad * kPatchChannels;
  const int64_t first_row = block.first_row + static_cast<int64_t>(step) * plan.row_strips * kTensorRows;
  const ChannelTerms<kPatchChannels> terms = channel_terms<kPatchChannels>(epilogue, channel);
#pragma unroll 1
  for (int pixel = static_cast<int>(threadIdx.x) / quads; pixel < pixels; pixel += 32) {
    const int patch = pixel / kPatchPixels, row = pixel % kPatchPixels / kTensorColumns, column = pixel % kTensorColumns;
    const int64_t p = first_row + patch / plan.column_strips * kTensorRows + row;
    const int64_t q = block.first_column + patch % plan.column_strips * kTensorColumns + column;
    if (p >= out_h || q >= out_w) continue;
    const auto sums = load_16<Vector<float, kPatchChannels>>(stage + stage_offset(patch, row, column, quad));
    finish(epilogue, terms, sums.values, (block.image * out_h + p) * out_w + q, channel);
  }
}

template <class T, int kKernel, int... h>
__device__ __forceinline__ void add_rows(Sums& sums, const Bands<T, kKernel>& bands, const unsigned char* first, const unsigned char* slot,
                                         const unsigned char* end, int pitch, const int (&offsets)[4],
                                         std::integer_sequence<int, h...>) {
  const auto next = [&] {
    slot += pitch;
    if (slot >= end) slot = first;
  };
  ((add_row<h>(sums, bands, slot, offsets), next()), ...);
}

// The taps are 16 · (k + 1) registers, as `mma` wants them: two blocks of a multiprocessor have room for 7×7, three for 5×5.
template <class T, int kKernel>
__global__ void __launch_bounds__(kMaxThreads, kKernel > 5 ? 2 : 3) depthwise_tensor(const DepthwiseConv2dArgs a, const DepthwisePlan plan,
                                                                   const Epilogue<T> epilogue) {
  SIMT_DYN_SMEM(shared);
  const RingBlock block = ring_block<T>(plan, a.out_h, kTensorRows, kTensorColumns);
  unsigned char* const stage = shared;
  unsigned char* const memory = shared + kTensorStageBytes;
  Planes<T> planes(memory, plan, a, block);
  planes.advance(plan.in_rows);
  cp_async_commit();

  const int quad = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, pair = lane % 4;
  Bands<T, kKernel> bands;
  bands.load(static_cast<const T*>(a.weight), block.first_channel + quad * kPatchChannels, a.channels);
  const int patch = lane / 4 < plan.column_strips * plan.row_strips ? lane / 4 : 0;
  const int row = patch / plan.column_strips * kTensorRows, column = patch % plan.column_strips * kTensorColumns + pair;
  const int offsets[4] = {plane_offset(column), plane_offset(column + 4), plane_offset(column + 8), plane_offset(column + 12)};
  const unsigned char* const first = memory + quad * planes.plane();
  const unsigned char* const end = first + plan.ring_rows * planes.pitch();

  int first_slot = 0;
#pragma unroll 1
  for (int step = 0; step < block.steps; ++step) {
    cp_async_wait<0>();
    block_barrier();
    if (step + 1 < block.steps) planes.advance(plan.step_rows);
    cp_async_commit();
    const int slot = first_slot + row;
    Sums sums = {};
    add_rows(sums, bands, first, first + (slot >= plan.ring_rows ? slot - plan.ring_rows : slot) * planes.pitch(), end, planes.pitch(),
             offsets, std::make_integer_sequence<int, kTensorRows + kKernel - 1>{});
    put_on_stage(stage, sums, quad);
    block_barrier();
    store_stage(stage, epilogue, block, plan, step, a.out_h, a.out_w);
    first_slot += plan.step_rows;
    if (first_slot >= plan.ring_rows) first_slot -= plan.ring_rows;
  }
}

}  // namespace

template <class T>
int launch_depthwise_tensor(const DepthwiseConv2dArgs& a, const DepthwisePlan& plan, const Epilogue<T>& epilogue, void* stream) {
  const Grid grid{dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)),
                  static_cast<size_t>(plan.shared_bytes), stream};
  return a.window.kernel_h == 5 ? launch(depthwise_tensor<T, 5>, grid, a, plan, epilogue)
                                : launch(depthwise_tensor<T, 7>, grid, a, plan, epilogue);
}

template int launch_depthwise_tensor(const DepthwiseConv2dArgs&, const DepthwisePlan&, const Epilogue<Half>&, void*);
template int launch_depthwise_tensor(const DepthwiseConv2dArgs&, const DepthwisePlan&, const Epilogue<BFloat16>&, void*);

}  // namespace kernelpress::cuda
