// A chain of layers, streamed by rows.
//
//   x ─stem→ ring ─depthwise→ rows ─1×1→ ring ─depthwise→ rows ─1×1→ y
//            ▲                 ▲
//            │                 └ a 1×1 convolution takes exactly the rows that were just made: they lie flat, from slot 0 on
//            └ a window asks for rows that overlap with those of the step before: row h lies in slot h mod capacity, and stays
//
//   one task:  a run of output rows, in steps; a step asks its layer for rows, which asks the layer before it for the rows under
//   its windows that are not there yet.   bound: FMA; the memory traffic is x, y and the weights
#include "chain.h"

#include "conv_rows.h"
#include "depthwise_rows.h"
#include "rows.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kChainFloats = 160 * 1024;

Conv2dArgs stem_of(const ChainArgs& a) {
  const ChainLayer& l = a.layers[0];
  return {a.x,   l.weight, l.bias,       nullptr,      nullptr,      a.batch,      l.in_h, l.in_w,           l.c_in,   l.out_h,
          l.out_w, l.c_out,  a.x_stride_n, a.x_stride_c, a.x_stride_h, a.x_stride_w, 0,      padded(l.c_out), l.window, l.activation};
}

// Rows of one layer's output while they are needed.
struct HeldRows {
  float* memory;
  int64_t stride, row_floats, capacity;
  bool flat;
  int64_t next;

  RowSource source() const { return {memory, row_floats, capacity}; }
};

class RowStream {
 public:
  // For tasks of at most `rows` output rows; the intermediates take about `floats`.
  RowStream(const ChainArgs& args, int64_t rows, int64_t floats) : a_(args) {
    const int64_t least = minimum(rows, ceil_div(kTileRows, last().out_w));
    step_ = rows;
    while (step_ > least && hold(step_) > floats) --step_;
    step_ = ceil_div(rows, ceil_div(rows, step_));
    scratch_floats_ = hold(step_);
    if (a_.layers[0].kind == LayerKind::conv) stem_floats_ = conv_scratch_floats(stem_of(a_), a_.count > 1 ? held_[0].capacity : step_);
  }

  // Output rows [begin, end) of one image.
  void run(int64_t image, int64_t begin, int64_t end) {
    image_ = image;
    float* memory = thread_scratch(scratch_floats_ + stem_floats_);
    stem_scratch_ = memory + scratch_floats_;
    for (int64_t i = 0; i + 1 < a_.count; ++i) {
      held_[i].memory = memory;
      held_[i].next = 0;
      memory += held_[i].capacity * held_[i].row_floats;
    }
    for (int64_t p = begin; p < end; p += step_) {
      const int64_t pixel = (image * last().out_h + p) * last().out_w;
      compute(a_.count - 1, p, minimum(end, p + step_), a_.y + pixel * a_.y_stride, a_.y_stride);
    }
  }

 private:
  const ChainLayer& last() const { return a_.layers[a_.count - 1]; }

  // Sizes what is held for steps of `rows` output rows; returns the floats it takes.
  int64_t hold(int64_t rows) {
    int64_t floats = 0;
    for (int64_t i = a_.count - 1; i > 0; --i) {
      const ChainLayer &layer = a_.layers[i], &producer = a_.layers[i - 1];
      HeldRows& held = held_[i - 1];
      held.flat = layer.kind == LayerKind::pointwise;
      held.stride = padded(producer.c_out);
      held.row_floats = producer.out_w * held.stride;
      held.capacity = maximum(1, minimum(layer.in_h, held.flat ? rows : (rows - 1) * layer.window.stride_h + layer.window.reach_h()));
      floats += held.capacity * held.row_floats;
      rows = held.capacity;
    }
    return floats;
  }

  // Makes output rows [first, last) of layer i available; a ring may drop rows before `first`.
  void provide(int64_t i, int64_t first, int64_t last) {
    HeldRows& held = held_[i];
    if (held.flat) return compute(i, first, last, held.memory, held.stride);
    for (int64_t h = maximum(first, held.next); h < last;) {
      const int64_t slot = h % held.capacity, run = minimum(last - h, held.capacity - slot);
      compute(i, h, h + run, held.memory + slot * held.row_floats, held.stride);
      h += run;
    }
    held.next = maximum(held.next, last);
  }

  // Output rows [first, last) of layer i, one behind the other at y.
  void compute(int64_t i, int64_t first, int64_t last, float* y, int64_t y_stride) {
    const ChainLayer& layer = a_.layers[i];
    const bool ends = i + 1 == a_.count;
    const int64_t pixel = (image_ * layer.out_h + first) * layer.out_w;
    const float* residual = ends && a_.residual ? a_.residual + pixel * a_.residual_stride : nullptr;
    const Interleaved between{ends && a_.between ? a_.between + pixel * a_.between_stride : nullptr, a_.between_stride};
    const ActivationFunction activation(layer.activation);
    if (layer.kind == LayerKind::conv) {
      Conv2dArgs stem = stem_of(a_);
      stem.y_stride = y_stride;
      stem.y = y - pixel * y_stride;
      return conv_rows(stem, image_, first, last, 0, ceil_div(layer.c_out, kPanel), stem_scratch_);
    }
    const float* x = a_.x + image_ * a_.x_stride_n;
    if (layer.kind == LayerKind::depthwise) {
      const int64_t top = first * layer.window.stride_h - layer.window.pad_h;
      const int64_t bottom = top + (last - first - 1) * layer.window.stride_h + layer.window.reach_h();
      if (i > 0) provide(i - 1, maximum(0, top), minimum(layer.in_h, bottom));
      const RowSource source = i > 0 ? held_[i - 1].source() : RowSource{x, a_.x_stride_h, layer.in_h};
      const int64_t x_stride = i > 0 ? held_[i - 1].stride : a_.x_stride_w;
      const DepthwiseProblem problem{layer.window, layer.in_h,   layer.in_w,  layer.out_w, layer.c_out,
                                     x_stride,     layer.weight, layer.c_out, layer.bias,  activation};
      return depthwise_rows(problem, source, first, last, {y, y_stride, residual, a_.residual_stride, layer.out_w});
    }
    if (i > 0) provide(i - 1, first, last);
    const TileInput in = i > 0 ? contiguous_rows(held_[i - 1].memory, held_[i - 1].stride, layer.c_in)
                               : contiguous_rows(x + first * a_.x_stride_h, a_.x_stride_w, layer.c_in);
    multiply_panels(in, layer.weight, {y, y_stride, layer.bias, residual, a_.residual_stride, activation, between},
                    (last - first) * layer.out_w, layer.c_out, 0, ceil_div(layer.c_out, kPanel));
  }

  const ChainArgs& a_;
  HeldRows held_[ChainArgs::kMostLayers];
  int64_t step_ = 1, scratch_floats_ = 0, stem_floats_ = 0, image_ = 0;
  float* stem_scratch_ = nullptr;
};

}  // namespace

void run_chain(const ChainArgs& a, int64_t floats) {
  over_output_rows(a.batch, a.layers[a.count - 1].out_h, [&](int64_t image, int64_t begin, int64_t end) {
    RowStream(a, end - begin, floats).run(image, begin, end);
  });
}

void chain(const ChainArgs& a) {
  const ChainLayer &first = a.layers[0], &last = a.layers[a.count - 1];
  const Interleaved between{a.between, a.between_stride};
  if (a.count == 1) {
    return pointwise_between({a.x, last.weight, last.bias, a.residual, nullptr, a.y, a.batch, last.out_h * last.out_w, last.c_in,
                              last.c_out, a.x_stride_w, a.residual_stride, a.y_stride, last.activation},
                             between);
  }
  if (a.count == 2 && first.kind == LayerKind::depthwise && last.kind == LayerKind::pointwise) {
    return separable_between({a.x, first.weight, first.bias, last.weight, last.bias, a.residual, a.y, a.batch, first.in_h, first.in_w,
                              first.c_in, last.out_h, last.out_w, last.c_out, a.x_stride_w, a.residual_stride, a.y_stride, first.window,
                              first.activation, last.activation},
                             between);
  }
  run_chain(a, kChainFloats);
}

}  // namespace kernelpress::KERNELPRESS_ISA
