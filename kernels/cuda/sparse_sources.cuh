// Where block-CSR finds its A operand: the K of the main loop runs over the blocks of one row of blocks, and each names the channels
// (and the place in the window) that it multiplies. Sources as gemm_sources.cuh describes them.
//
//     columns  2      5      9                    step s copies the chunks of these blocks; the column of step s + 1
//     K        ├ c ──┼ c ──┼ c ──┤  zeros         was read when step s was issued, so that no copy waits for its index
#pragma once

#include "common/gemm_sources.cuh"

namespace kernelpress::cuda {

// The blocks of a row: `count` of 2^log2_width elements of K each, at least 16 bytes.
struct BlockList {
  const int32_t* columns;
  int32_t count, log2_width;
};

// One thread's chunk of K on its way along the blocks.
template <class Share, int kChunk>
class BlockWalk {
  static constexpr int kStep = Share::kChunks * kChunk;

 public:
  __device__ __forceinline__ explicit BlockWalk(const BlockList& list) : list_(list) {}
  __device__ __forceinline__ void start(int64_t k) {
    k_ = static_cast<int>(k) + Share::chunk() * kChunk;
    column_ = read(k_);
    ahead_ = read(k_ + kStep);
  }
  // Pieces of a chunk stay in its block; what is longer ends at the same chunk of the next step.
  __device__ __forceinline__ void advance(int n) {
    k_ += n;
    if (n < kChunk) return;
    column_ = ahead_;
    ahead_ = read(k_ + kStep);
  }
  __device__ __forceinline__ bool inside() const { return k_ >> list_.log2_width < list_.count; }
  __device__ __forceinline__ int column() const { return column_; }
  __device__ __forceinline__ int within() const { return k_ & ((1 << list_.log2_width) - 1); }

 private:
  __device__ __forceinline__ int read(int k) const {
    const int entry = k >> list_.log2_width;
    return entry < list_.count ? list_.columns[entry] : 0;
  }

  const BlockList& list_;
  int k_, column_, ahead_;
};

// Rows of `depth` channels, `stride` elements apart.
template <class T>
struct ListedRows {
  static constexpr bool kResident = false;
  const T* base;
  int64_t stride, count;
  int32_t depth;
  BlockList list;

  template <class Share>
  class Cursor {
   public:
    static constexpr bool kPads = false;

    __device__ __forceinline__ explicit Cursor(const ListedRows& rows) : rows_(rows), walk_(rows.list) {}
    __device__ __forceinline__ void start(int64_t first_row, int64_t k) {
      const int64_t row = first_row + Share::row(0);
      left_ = static_cast<int>(min(rows_.count - row, static_cast<int64_t>(INT32_MAX)));
      row_ = rows_.base + row * rows_.stride;
      walk_.start(k);
    }
    __device__ __forceinline__ void seek() {
      const int channel = (walk_.column() << rows_.list.log2_width) + walk_.within();
      valid_ = walk_.inside() && channel < rows_.depth ? left_ : 0;
      address_ = row_ + channel;
    }
    __device__ __forceinline__ bool find(int i, const T*& address) const {
      const bool valid = i * Share::kRowStep < valid_;
      address = valid ? address_ + i * (Share::kRowStep * rows_.stride) : rows_.base;
      return valid;
    }
    __device__ __forceinline__ void advance(int n) { walk_.advance(n); }
    __device__ __forceinline__ T padding() const { return T{}; }

   private:
    const ListedRows& rows_;
    BlockWalk<Share, Element<T>::kPer16Bytes> walk_;
    const T *row_, *address_;
    int left_, valid_;
  };
};

// The windows of a convolution, one per output pixel (n, p, q). Block column (kh · KW + kw) · blocks_per_tap + j holds channels
// j · c … of the window's pixel (kh, kw); those from `channels` on do not exist. Outside of the image lies zero. Height, width and the
// window's reach are below 2¹⁵, pixels of all images below 2³¹.
template <class T>
struct ListedWindows {
  static constexpr bool kResident = false;
  const T* base;
  int64_t stride, count;
  int32_t in_h, in_w, channels, out_h, out_w;
  int32_t kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  uint32_t blocks_per_tap;
  BlockList list;

  template <class Share>
  class Cursor {
   public:
    static constexpr bool kPads = false;

    __device__ __forceinline__ explicit Cursor(const ListedWindows& source) : source_(source), walk_(source.list) {}
    __device__ __forceinline__ void start(int64_t first_row, int64_t k) {
      const uint32_t image = static_cast<uint32_t>(source_.out_h) * source_.out_w;
#pragma unroll
      for (int i = 0; i < Share::kCount; ++i) {
        const int64_t row = first_row + Share::row(i);
        pixel_[i] = 0;
        corner_[i] = kNowhere;
        if (row < source_.count) {
          const uint32_t index = static_cast<uint32_t>(row), n = index / image, inside = index % image;
          const int p = static_cast<int>(inside / source_.out_w), q = static_cast<int>(inside % source_.out_w);
          const int h = p * source_.stride_h - source_.pad_h, w = q * source_.stride_w - source_.pad_w;
          pixel_[i] = (static_cast<int>(n) * source_.in_h + h) * source_.in_w + w;
          corner_[i] = static_cast<int>(static_cast<uint32_t>(h) << 16 | (static_cast<uint32_t>(w) & 0xffffu));
        }
      }
      walk_.start(k);
    }
    __device__ __forceinline__ void seek() {
      const uint32_t column = static_cast<uint32_t>(walk_.column()), tap = column / source_.blocks_per_tap;
      const int block = static_cast<int>(column - tap * source_.blocks_per_tap);
      const int tap_h = static_cast<int>(tap / source_.kernel_w), tap_w = static_cast<int>(tap) - tap_h * source_.kernel_w;
      const int channel = (block << source_.list.log2_width) + walk_.within();
      // A height of zero has no pixel inside.
      height_ = walk_.inside() && channel < source_.channels ? source_.in_h : 0;
      down_ = tap_h * source_.dilation_h;
      right_ = tap_w * source_.dilation_w;
      address_ = source_.base + static_cast<int64_t>(down_ * source_.in_w + right_) * source_.stride + channel;
    }
    __device__ __forceinline__ bool find(int i, const T*& address) const {
      const uint32_t h = static_cast<uint32_t>((corner_[i] >> 16) + down_);
      const uint32_t w = static_cast<uint32_t>(static_cast<int16_t>(corner_[i] & 0xffff) + right_);
      const bool valid = h < height_ && w < static_cast<uint32_t>(source_.in_w);
      address = valid ? address_ + pixel_[i] * source_.stride : source_.base;
      return valid;
    }
    __device__ __forceinline__ void advance(int n) { walk_.advance(n); }
    __device__ __forceinline__ T padding() const { return T{}; }

   private:
    // A row of the image that no tap brings back inside.
    static constexpr int kNowhere = INT32_MIN;

    const ListedWindows& source_;
    BlockWalk<Share, Element<T>::kPer16Bytes> walk_;
    const T* address_;
    int pixel_[Share::kCount], corner_[Share::kCount];
    uint32_t height_;
    int down_, right_;
  };
};

}  // namespace kernelpress::cuda
