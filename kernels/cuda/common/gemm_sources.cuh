// Where the operands of gemm.cuh come from. A source is a plain struct among a kernel's arguments; its cursor is one thread's way
// through it.
//
//   kResident              the operand lies in shared memory already, at `base`, and no cursor moves
//   Cursor<Share>          this thread's chunk of its rows first_row + Share::row(i)
//     start(first_row, k)  goes to a tile's rows, and this thread's chunk of the step that begins at element k
//     seek()               is called once before the `find`s of a position
//     find(i, address)     whether there is data in row i here, and where; else any valid address
//     advance(n)           n elements of K further
//     kPads                absent data is padding() instead of zero
// Beyond the last row or element of K a source finds nothing; of A and B at least one has zeros there.
#pragma once

#include "gemm.cuh"

namespace kernelpress::cuda {

// Rows of `depth` elements, fewer than 2³¹, `stride` elements apart.
template <class T>
struct Rows {
  static constexpr bool kResident = false;
  const T* base;
  int64_t stride, count, depth;

  template <class Share>
  class Cursor {
   public:
    static constexpr bool kPads = false;
    static constexpr int kChunk = Element<T>::kPer16Bytes;

    __device__ __forceinline__ explicit Cursor(const Rows& rows) : rows_(rows) {}
    __device__ __forceinline__ void start(int64_t first_row, int64_t k) {
      const int64_t row = first_row + Share::row(0);
      left_ = static_cast<int>(min(rows_.count - row, static_cast<int64_t>(INT32_MAX)));
      row_ = rows_.base + row * rows_.stride;
      k_ = static_cast<int>(k) + Share::chunk() * kChunk;
    }
    __device__ __forceinline__ void seek() {}
    __device__ __forceinline__ bool find(int i, const T*& address) const {
      const bool valid = i * Share::kRowStep < left_ && k_ < rows_.depth;
      address = valid ? row_ + i * (Share::kRowStep * rows_.stride) + k_ : rows_.base;
      return valid;
    }
    __device__ __forceinline__ void advance(int n) { k_ += n; }
    __device__ __forceinline__ T padding() const { return T{}; }

   private:
    const Rows& rows_;
    const T* row_;
    int k_, left_;
  };
};

// The windows of a convolution as rows, one per output pixel (n, p, q); K runs over (kernel row, kernel column, channel). Pixels
// are `stride` elements apart. Outside of the image lies `padding`: int8's zero point. Height, width and the window's reach
// are below 2¹⁵, pixels of all images below 2³¹.
template <class T>
struct ConvWindows {
  static constexpr bool kResident = false;
  const T* base;
  int64_t stride, count;  // count = batch · out_h · out_w
  int32_t in_h, in_w, channels, out_h, out_w;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  T padding;

  template <class Share>
  class Cursor {
   public:
    static constexpr bool kPads = std::is_same_v<T, int8_t>;
    static constexpr int kChunk = Element<T>::kPer16Bytes;

    __device__ __forceinline__ explicit Cursor(const ConvWindows& source) : source_(source) {}
    __device__ __forceinline__ void start(int64_t first_row, int64_t k) {
      const ConvWindows& source = source_;
      const uint32_t image = static_cast<uint32_t>(source.out_h) * source.out_w;
#pragma unroll
      for (int i = 0; i < Share::kCount; ++i) {
        const int64_t row = first_row + Share::row(i);
        if (row < source.count) {
          const uint32_t index = static_cast<uint32_t>(row), n = index / image, inside = index % image;
          const int p = static_cast<int>(inside / source.out_w), q = static_cast<int>(inside % source.out_w);
          const int h = p * source.stride_h - source.pad_h, w = q * source.stride_w - source.pad_w;
          pixel_[i] = (static_cast<int>(n) * source.in_h + h) * source.in_w + w;
          corner_[i] = static_cast<int>(static_cast<uint32_t>(h) << 16 | (static_cast<uint32_t>(w) & 0xffffu));
        } else {
          pixel_[i] = 0;
          corner_[i] = INT32_MIN;  // a row of the image that no tap brings back inside
        }
      }
      const uint32_t at = static_cast<uint32_t>(k) + Share::chunk() * kChunk;
      const uint32_t tap = at / source_.channels;
      channel_ = static_cast<int>(at % source_.channels);
      tap_h_ = static_cast<int>(tap / source_.kernel_w);
      tap_w_ = static_cast<int>(tap % source_.kernel_w);
    }
    __device__ __forceinline__ void seek() {
      down_ = tap_h_ * source_.dilation_h;
      right_ = tap_w_ * source_.dilation_w;
      address_ = source_.base + static_cast<int64_t>(down_ * source_.in_w + right_) * source_.stride + channel_;
    }
    __device__ __forceinline__ bool find(int i, const T*& address) const {
      const uint32_t h = static_cast<uint32_t>((corner_[i] >> 16) + down_);
      const uint32_t w = static_cast<uint32_t>(static_cast<int16_t>(corner_[i] & 0xffff) + right_);
      const bool valid = h < static_cast<uint32_t>(source_.in_h) && w < static_cast<uint32_t>(source_.in_w) &&
                         tap_h_ < source_.kernel_h;
      address = valid ? address_ + pixel_[i] * source_.stride : source_.base;
      return valid;
    }
    __device__ __forceinline__ void advance(int n) {
      channel_ += n;
      while (channel_ >= source_.channels) {
        channel_ -= source_.channels;
        if (++tap_w_ == source_.kernel_w) {
          tap_w_ = 0;
          ++tap_h_;
        }
      }
    }
    __device__ __forceinline__ T padding() const { return source_.padding; }
    __device__ __forceinline__ uint32_t padding_word() const {
      return static_cast<uint8_t>(source_.padding) * 0x01010101u;
    }

   private:
    const ConvWindows& source_;
    const T* address_;
    int pixel_[Share::kCount], corner_[Share::kCount];
    int tap_h_, tap_w_, channel_, down_, right_;
  };
};

// The dense blocks of one row of blocks in block-CSR, as B: block j is values[j][row][k], 2^log2_block elements of K wide.
template <class T>
struct BlockValues {
  static constexpr bool kResident = false;
  const T* base;  // the first block of this row of blocks
  int32_t rows, count, log2_block;

  template <class Share>
  class Cursor {
   public:
    static constexpr bool kPads = false;
    static constexpr int kChunk = Element<T>::kPer16Bytes;

    __device__ __forceinline__ explicit Cursor(const BlockValues& blocks) : blocks_(blocks) {}
    __device__ __forceinline__ void start(int64_t first_row, int64_t k) {
      row_ = static_cast<int>(first_row) + Share::row(0);
      k_ = static_cast<int>(k) + Share::chunk() * kChunk;
    }
    __device__ __forceinline__ void seek() {
      const int entry = k_ >> blocks_.log2_block, within = k_ & ((1 << blocks_.log2_block) - 1);
      valid_ = entry < blocks_.count;
      address_ = blocks_.base + (((static_cast<int64_t>(entry) * blocks_.rows + row_) << blocks_.log2_block) + within);
    }
    __device__ __forceinline__ bool find(int i, const T*& address) const {
      const bool valid = valid_ && row_ + i * Share::kRowStep < blocks_.rows;
      address = valid ? address_ + (static_cast<int64_t>(i * Share::kRowStep) << blocks_.log2_block) : blocks_.base;
      return valid;
    }
    __device__ __forceinline__ void advance(int n) { k_ += n; }
    __device__ __forceinline__ T padding() const { return T{}; }

   private:
    const BlockValues& blocks_;
    const T* address_;
    int row_, k_;
    bool valid_;
  };
};

// Rows that the block itself puts into shared memory before the pipeline runs: element k of row r at `resident_offset(r, k)`,
// zeros up to a whole number of steps.
struct Resident {
  static constexpr bool kResident = true;
  unsigned char* base;  // 128-byte aligned, steps · kTileM · kStepBytes bytes

  template <class Share>
  struct Cursor {
    __device__ __forceinline__ explicit Cursor(const Resident&) {}
    __device__ __forceinline__ void start(int64_t, int64_t) {}
  };
};

// Byte offset of element k of a row in a resident operand of kRows rows; 16 bytes from a multiple of 16 bytes on are contiguous.
template <class Config, int kRows>
__device__ __forceinline__ int resident_offset(int row, int k) {
  const int byte = k * static_cast<int>(sizeof(typename Config::T)), step = byte / Config::kStepBytes;
  const int within = byte % Config::kStepBytes;
  return step * kRows * Config::kStepBytes + swizzled_offset<Config::kStepBytes>(row, within / 16) + within % 16;
}

}  // namespace kernelpress::cuda
