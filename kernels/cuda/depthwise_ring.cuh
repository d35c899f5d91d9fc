// The ring of input rows that the depthwise kernels compute from: copied once by cp.async, zero-filled beyond the borders, walked
// down the image.
//
//   ring (shared memory)                 slots are reused modulo ring_rows; while a step computes,
//   ┌───────────────────────┐            the rows that the next one adds are in flight
//   │ row h   ▒▒▒▒▒▒▒▒▒▒▒▒▒ │ ┐
//   │ row h+1 ▒▒▒▒▒▒▒▒▒▒▒▒▒ │ │ in_rows: read by this step        one row = ring_columns pixels × `vectors` 16-byte vectors
//   │ …                     │ ┘
//   │ row …   ← copies      │ ┐ step_rows: for the next
//   └───────────────────────┘ ┘
#pragma once

#include "common/epilogue.cuh"
#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/simt.cuh"
#include "depthwise_tiles.h"

namespace kernelpress::cuda {

// Which part of the output a block computes.
struct RingBlock {
  int64_t image, first_channel;
  int64_t first_column;  // of the output
  int64_t first_row;
  int steps;             // until the segment or the image ends
};

template <class T>
__device__ __forceinline__ RingBlock ring_block(const DepthwisePlan& plan, int64_t out_h, int columns) {
  int64_t index = blockIdx.x;
  RingBlock block;
  block.first_channel = index % plan.chunks * plan.vectors * Element<T>::kPer16Bytes;
  index /= plan.chunks;
  block.first_column = index % plan.column_blocks * plan.column_strips * columns;
  index /= plan.column_blocks;
  const int64_t rows = plan.row_strips * kPatchRows;
  block.first_row = index % plan.segments * plan.steps * rows;
  block.image = index / plan.segments;
  const int64_t left = (out_h - block.first_row + rows - 1) / rows;
  block.steps = static_cast<int>(left < plan.steps ? left : plan.steps);
  return block;
}

// `count` of a vector's elements from global to shared memory, zeros in the rest. `bytes`: the widest access that every pixel
// allows; 0: element by element. With count = 0 nothing is read.
template <class T>
__device__ __forceinline__ void copy_vector(unsigned char* to, const T* from, int count, int bytes) {
  const int valid = count * static_cast<int>(sizeof(T));
  if (bytes == 16) {
    cp_async_16(to, from, valid > 0);
  } else if (bytes == 8) {
#pragma unroll
    for (int i = 0; i < 16; i += 8) cp_async_8(to + i, i < valid ? from + i / sizeof(T) : from, i < valid);
  } else if (bytes == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) cp_async_4(to + i, i < valid ? from + i / sizeof(T) : from, i < valid);
  } else {
    T* elements = reinterpret_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < Element<T>::kPer16Bytes; ++i) elements[i] = i < count ? from[i] : T{};
  }
}

template <class T>
class Ring {
 public:
  // `first_row`, `first_column`: of the input, where slot 0 begins; they may lie outside of it.
  __device__ __forceinline__ Ring(unsigned char* memory, const DepthwisePlan& plan, const T* image, int64_t in_h, int64_t in_w,
                                  int64_t x_stride, int64_t first_row, int64_t first_column, int64_t first_channel, int64_t channels)
      : memory_(memory), rows_(plan.ring_rows), columns_(plan.ring_columns), vectors_(plan.vectors), bytes_(plan.copy_bytes),
        in_h_(in_h), in_w_(in_w), x_stride_(x_stride), next_row_(first_row), first_column_(first_column), image_(image) {
    const int thread = static_cast<int>(threadIdx.x);
    vector_ = thread % vectors_;
    lane_ = thread / vectors_;
    lanes_ = static_cast<int>(blockDim.x) / vectors_;
    const int64_t channel = first_channel + vector_ * Element<T>::kPer16Bytes, left = channels - channel;
    count_ = static_cast<int>(left < 0 ? 0 : left < Element<T>::kPer16Bytes ? left : Element<T>::kPer16Bytes);
    channel_ = count_ > 0 ? channel : 0;
  }

  // Starts the copies of the next `count` rows; whatever their slots held is lost. `padding` stands beyond the borders.
  __device__ __forceinline__ void advance(int count, uint32_t padding = 0) {
    for (int i = 0; i < count; ++i) {
      const bool inside = next_row_ >= 0 && next_row_ < in_h_;
      const T* row = image_ + (inside ? next_row_ * in_w_ * x_stride_ : 0) + channel_;
      unsigned char* slot = memory_ + static_cast<int64_t>(next_slot_) * pitch();
      for (int column = lane_; column < columns_ && lane_ < lanes_; column += lanes_) {
        const int64_t w = first_column_ + column;
        unsigned char* to = slot + (column * vectors_ + vector_) * 16;
        const bool valid = inside && w >= 0 && w < in_w_;
        if (std::is_same_v<T, int8_t> && !valid) {
#pragma unroll
          for (int word = 0; word < 16; word += 4) *reinterpret_cast<uint32_t*>(to + word) = padding;
        } else {
          copy_vector(to, valid ? row + w * x_stride_ : image_, valid ? count_ : 0, bytes_);
        }
      }
      ++next_row_;
      next_slot_ = next_slot_ + 1 == rows_ ? 0 : next_slot_ + 1;
    }
  }

  // Bytes between the rows, and between the pixels of a row.
  __device__ __forceinline__ int pitch() const { return columns_ * vectors_ * 16; }
  __device__ __forceinline__ int pixel() const { return vectors_ * 16; }

  // The slot `offset` < ring_rows places behind `slot`.
  __device__ __forceinline__ int behind(int slot, int offset) const {
    const int found = slot + offset;
    return found >= rows_ ? found - rows_ : found;
  }
  __device__ __forceinline__ const unsigned char* row(int slot) const { return memory_ + static_cast<int64_t>(slot) * pitch(); }

 private:
  unsigned char* memory_;
  int rows_, columns_, vectors_, bytes_;
  int64_t in_h_, in_w_, x_stride_, next_row_, first_column_, channel_;
  const T* image_;
  int vector_, lane_, lanes_, count_, next_slot_ = 0;
};

// Where a thread's patch lies. Its four channels are `quad` of the block's; the quads of one 16-byte vector are in neighbouring lanes.
struct PatchPlace {
  int quad, lane;          // lane: the quad's place in its vector
  int row, column;         // of the patch, from the step's first output row and the block's first output column
  int64_t vector_channel;  // where the vector begins, in the tensor
  bool works;              // else it computes along with its warp, and writes nothing
};

template <class T>
__device__ __forceinline__ PatchPlace patch_place(const DepthwisePlan& plan, const RingBlock& block, int columns) {
  constexpr int kVector = Element<T>::kPer16Bytes, kLanes = kVector / kPatchChannels;
  const int thread = static_cast<int>(threadIdx.x), quads = plan.vectors * kLanes, strip = thread / quads;
  PatchPlace at;
  at.quad = thread % quads;
  at.lane = at.quad % kLanes;
  at.works = strip < plan.column_strips * plan.row_strips;
  at.row = at.works ? strip / plan.column_strips * kPatchRows : 0;
  at.column = strip % plan.column_strips * columns;
  at.vector_channel = block.first_channel + at.quad / kLanes * kVector;
  return at;
}

// kLanes neighbouring lanes hold one quad each of kLanes pixels; afterwards the i-th of them holds all quads of pixel i.
template <int kLanes, class Sum>
__device__ __forceinline__ void exchange_quads(const Sum (&own)[kLanes][kPatchChannels], int lane, Sum (&whole)[kLanes * kPatchChannels]) {
#pragma unroll
  for (int turn = 0; turn < kLanes; ++turn) {
    const int other = lane ^ turn;
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      Sum given = own[0][c];
#pragma unroll
      for (int pixel = 1; pixel < kLanes; ++pixel) given = other == pixel ? own[pixel][c] : given;
      const Sum taken = turn == 0 ? given : shuffle_xor(given, turn);
#pragma unroll
      for (int quad = 0; quad < kLanes; ++quad)
        if (other == quad) whole[quad * kPatchChannels + c] = taken;
    }
  }
}

// Finishes a patch and writes it, a whole 16-byte vector of T a lane. Every lane of the warp calls it.
//   convert(sums, values)   sums → float
template <class T, class Sum, int kColumns, class Out, class Convert>
__device__ __forceinline__ void store_patch(const Sum (&sums)[kPatchRows][kColumns][kPatchChannels], const Epilogue<Out>& epilogue,
                                            const PatchPlace& at, const RingBlock& block, const DepthwisePlan& plan, int step,
                                            int64_t out_h, int64_t out_w, const Convert& convert) {
  constexpr int kVector = Element<T>::kPer16Bytes, kLanes = kVector / kPatchChannels;
  static_assert(kColumns % kLanes == 0);
  const ChannelTerms<kVector> terms = channel_terms<kVector>(epilogue, at.vector_channel);
  const int64_t first_row = block.first_row + static_cast<int64_t>(step) * plan.row_strips * kPatchRows + at.row;
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i)
#pragma unroll
    for (int q = 0; q < kColumns; q += kLanes) {
      Sum own[kLanes][kPatchChannels], whole[kVector] = {};
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane)
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c) own[lane][c] = sums[i][q + lane][c];
      exchange_quads(own, at.lane, whole);
      const int64_t row = first_row + i, column = block.first_column + at.column + q + at.lane;
      if (!at.works || row >= out_h || column >= out_w) continue;
      float values[kVector];
      convert(whole, values);
      finish(epilogue, terms, values, (block.image * out_h + row) * out_w + column, at.vector_channel);
    }
}

// The widest cp.async that all vectors of a tensor allow: 16, 8, 4 bytes, or 0: none.
template <class T>
int copy_bytes(const void* address, int64_t stride, int64_t channels) {
  const int64_t size = sizeof(T), start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
  for (const int bytes : {16, 8, 4})
    if (bytes >= size && start % bytes == 0 && stride * size % bytes == 0 && channels * size % bytes == 0) return bytes;
  return 0;
}

}  // namespace kernelpress::cuda
