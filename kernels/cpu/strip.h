// A strip of padded input in scratch, under a run of outputs.
//
//   channel 0 │ positions → │     one plane of `width` columns, with the padding among them, for each remainder of row and column by
//           1 │             │     the stride: then a run of outputs, numbered through the rows of such a plane, reads a run of one
//           … │             │     plane for every tap. Columns of outputs beyond the image's are computed and not stored.
#pragma once

#include <algorithm>

#include "args.h"
#include "transpose.h"

namespace kernelpress::KERNELPRESS_ISA {

struct StripForm {
  int64_t width, phases_h, phases_w, phase_pitch;

  KP_INLINE int64_t pitch() const { return phases_h * phases_w * phase_pitch; }  // between channels
};

// An image: channels or pixels are neighbours in memory. `padding` stands around it.
struct StripSource {
  const float* x;
  bool channels_last;
  int64_t channels, channel_stride, pixel_stride, in_h, in_w;
  float padding = 0;
};

// Calls body(row, column, from, count) for every run of positions [begin, end) that stand in one row of `width`; `from` counts from begin.
template <class Body>
KP_INLINE void over_runs(int64_t begin, int64_t end, int64_t width, const Body& body) {
  for (int64_t v = begin; v < end;) {
    const int64_t row = v / width, column = v % width, count = minimum(width - column, end - v);
    body(row, column, v - begin, count);
    v += count;
  }
}

// Channels of `count` pixels `step` apart.
inline void copy_channels(const StripSource& from, float* to, int64_t pitch, const float* x, int64_t step, int64_t count) {
  if (from.channels_last) return transpose_copy(to, pitch, x, step * from.pixel_stride, count, from.channels);
  for (int64_t c = 0; c < from.channels; ++c, to += pitch, x += from.channel_stride) {
    if (step == 1) {
      for (int64_t i = 0; i < count; i += kLanes) store_up_to(to + i, load_up_to(x + i, count - i), count - i);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = x[i * step];
    }
  }
}

inline void pad_channels(const StripSource& from, float* to, int64_t pitch, int64_t count) {
  for (int64_t c = 0; c < from.channels && count > 0; ++c, to += pitch) std::fill_n(to, count, from.padding);
}

// What outputs from `first` on read, as much as the form holds.
inline void load_strip(const StripSource& from, const StripForm& form, const Window& w, int64_t first, float* scratch) {
  for (int64_t phase = 0; phase < form.phases_h * form.phases_w; ++phase) {
    const int64_t down = phase / form.phases_w - w.pad_h, right = phase % form.phases_w - w.pad_w;
    const int64_t lowest = right < 0 ? ceil_div(-right, w.stride_w) : 0;  // columns with an input pixel: lowest … highest - 1
    const int64_t highest = right < from.in_w ? ceil_div(from.in_w - right, w.stride_w) : 0;
    float* plane = scratch + phase * form.phase_pitch;
    over_runs(first, first + form.phase_pitch, form.width, [&](int64_t row, int64_t column, int64_t at, int64_t count) {
      const int64_t h = row * w.stride_h + down;
      if (h < 0 || h >= from.in_h) return pad_channels(from, plane + at, form.pitch(), count);
      const int64_t left = minimum(maximum(lowest, column), column + count), end = maximum(left, minimum(highest, column + count));
      pad_channels(from, plane + at, form.pitch(), left - column);
      if (end > left) {
        const float* x = from.x + (h * from.in_w + left * w.stride_w + right) * from.pixel_stride;
        copy_channels(from, plane + at + left - column, form.pitch(), x, w.stride_w, end - left);
      }
      pad_channels(from, plane + at + end - column, form.pitch(), column + count - end);
    });
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
