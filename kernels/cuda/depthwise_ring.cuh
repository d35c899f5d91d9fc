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
__device__ __forceinline__ RingBlock ring_block(const DepthwisePlan& plan, int64_t out_h, int patch_rows, int columns) {
  int64_t index = blockIdx.x;
  RingBlock block;
  block.first_channel = index % plan.chunks * plan.vectors * Element<T>::kPer16Bytes;
  index /= plan.chunks;
  block.first_column = index % plan.column_blocks * plan.column_strips * columns;
  index /= plan.column_blocks;
  const int64_t rows = plan.row_strips * patch_rows;
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
  int quad;
  int row, column;  // of the patch, from the step's first output row and the block's first output column
  bool works;       // else it computes along with its warp, and writes nothing
};

template <class T>
__device__ __forceinline__ PatchPlace patch_place(const DepthwisePlan& plan, int columns) {
  const int thread = static_cast<int>(threadIdx.x), quads = plan.vectors * Element<T>::kPer16Bytes / kPatchChannels;
  const int strip = thread / quads;
  PatchPlace at;
  at.quad = thread % quads;
  at.works = strip < plan.column_strips * plan.row_strips;
  at.row = at.works ? strip / plan.column_strips * kPatchRows : 0;
  at.column = strip % plan.column_strips * columns;
  return at;
}

// Four finished values of one pixel, in the bits of 32-bit words.
template <class Out>
struct FinishedQuad {
  static constexpr int kWords = sizeof(Out);
  uint32_t words[kWords];
};

// Finishes the sums of four neighbouring channels. `exists`: else there is no residual to read, and the result is nobody's.
template <class Out>
__device__ __forceinline__ FinishedQuad<Out> finish_quad(const Epilogue<Out>& epilogue, const ChannelTerms<kPatchChannels>& terms,
                                                         const float (&sums)[kPatchChannels], int64_t pixel, int64_t channel, bool exists) {
  float values[kPatchChannels];
#pragma unroll
  for (int c = 0; c < kPatchChannels; ++c) values[c] = fmaf(sums[c], terms.scale[c], terms.bias[c]);
  if (epilogue.residual != nullptr && exists) {
    const Out* residual = epilogue.residual + pixel * epilogue.residual_stride + channel;
    if (epilogue.aligned && channel + kPatchChannels <= epilogue.channels) {
      const auto four = *reinterpret_cast<const Vector<Out, kPatchChannels>*>(residual);
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) values[c] = detail::plus_residual(epilogue, values[c], four[c]);
    } else {
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c)
        if (channel + c < epilogue.channels) values[c] = detail::plus_residual(epilogue, values[c], residual[c]);
    }
  }
  activate(values, epilogue.activation);
  FinishedQuad<Out> quad;
  if constexpr (sizeof(Out) == 4) {
    memcpy(quad.words, values, 16);
  } else if constexpr (sizeof(Out) == 2) {
    quad.words[0] = pack<Out>(values[0], values[1]);
    quad.words[1] = pack<Out>(values[2], values[3]);
  } else {
    uint32_t bytes[kPatchChannels];
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) bytes[c] = static_cast<uint32_t>(detail::output_value(epilogue, values[c]));
    quad.words[0] = byte_permute(byte_permute(bytes[0], bytes[1], 0x0040), byte_permute(bytes[2], bytes[3], 0x0040), 0x5410);
  }
  return quad;
}

// kLanes neighbouring lanes hold one quad each of kLanes pixels; afterwards the i-th of them holds all quads of pixel i.
template <int kLanes, class Quad>
__device__ __forceinline__ void exchange_quads(const Quad (&own)[kLanes], int lane, Quad (&whole)[kLanes]) {
#pragma unroll
  for (int turn = 0; turn < kLanes; ++turn) {
    const int other = lane ^ turn;
#pragma unroll
    for (int word = 0; word < Quad::kWords; ++word) {
      uint32_t given = own[0].words[word];
#pragma unroll
      for (int pixel = 1; pixel < kLanes; ++pixel) given = other == pixel ? own[pixel].words[word] : given;
      const uint32_t taken = turn == 0 ? given : shuffle_xor(given, turn);
#pragma unroll
      for (int quad = 0; quad < kLanes; ++quad)
        if (other == quad) whole[quad].words[word] = taken;
    }
  }
}

// Finishes a patch of sums and writes it: 16 bytes a lane, whose quads of one pixel come from its neighbours. Every lane of the warp
// calls it.
template <class Out, class Sum, int kColumns>
__device__ __forceinline__ void store_patch(const Sum (&sums)[kPatchRows][kColumns][kPatchChannels], const Epilogue<Out>& epilogue,
                                            const PatchPlace& at, const RingBlock& block, const DepthwisePlan& plan, int step,
                                            int64_t out_h, int64_t out_w) {
  constexpr int kLanes = 4 / static_cast<int>(sizeof(Out));
  using Quad = FinishedQuad<Out>;
  static_assert(kColumns % kLanes == 0);
  const int lane = at.quad % kLanes;
  const int64_t channel = block.first_channel + at.quad * kPatchChannels, vector = channel - lane * kPatchChannels;
  const bool whole = epilogue.aligned && vector + kLanes * kPatchChannels <= epilogue.channels;
  const ChannelTerms<kPatchChannels> terms = channel_terms<kPatchChannels>(epilogue, channel);
  const int64_t first_row = block.first_row + static_cast<int64_t>(step) * plan.row_strips * kPatchRows + at.row;
  const int64_t first_column = block.first_column + at.column;
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    const int64_t row = first_row + i, first_pixel = (block.image * out_h + row) * out_w + first_column;
    const int64_t left = at.works && row < out_h ? out_w - first_column : 0;
#pragma unroll
    for (int q = 0; q < kColumns; q += kLanes) {
      Quad own[kLanes], vectors[kLanes];
#pragma unroll
      for (int pixel = 0; pixel < kLanes; ++pixel) {
        float values[kPatchChannels];
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c) values[c] = static_cast<float>(sums[i][q + pixel][c]);
        own[pixel] = finish_quad(epilogue, terms, values, first_pixel + q + pixel, channel, q + pixel < left);
      }
      exchange_quads(own, lane, vectors);
      if (whole) {
        if (q + lane < left) store_global(epilogue.y + (first_pixel + q + lane) * epilogue.y_stride + vector, vectors);
      } else {
#pragma unroll
        for (int pixel = 0; pixel < kLanes; ++pixel) {
          if (q + pixel >= left) break;
          Out* y = epilogue.y + (first_pixel + q + pixel) * epilogue.y_stride + channel;
          Vector<Out, kPatchChannels> values;
          memcpy(&values, own[pixel].words, sizeof values);
#pragma unroll
          for (int c = 0; c < kPatchChannels; ++c)
            if (channel + c < epilogue.channels) y[c] = values[c];
        }
      }
    }
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
