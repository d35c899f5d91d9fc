// Layers streamed by rows, so that no map between them is ever whole.
//
//   x ─stem→ ring ─depthwise→ rows ─1×1→ ring ─depthwise→ rows ─1×1→ y
//            ▲                 ▲
//            │                 └ a 1×1 convolution takes exactly the rows that were just made: they lie flat, from slot 0 on
//            └ a window asks for rows that overlap with those of the step before: row h lies in slot h mod capacity, and stays
//
//   one task:  a run of output rows, in steps; a step asks its layer for rows, which asks the layer before it for the rows under
//   its windows that are not there yet
#pragma once

#include "args.h"
#include "rows.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {

// A layer as the stream sees it.
struct StreamedLayer {
  int64_t in_h, out_h, out_w;
  int64_t stride;  // elements from pixel to pixel of its output where that is held
  bool is_pointwise;
  Window window;
};

// Rows of one layer's output while they are needed.
template <class Element>
struct HeldRows {
  Element* memory;
  int64_t stride, row_elements, capacity;
  bool flat;
  int64_t next;
};

// `Layers` knows the layers of a chain and computes their rows:
//   int64_t count() const;  StreamedLayer at(int64_t i) const;
//   void compute(int64_t i, int64_t image, int64_t first, int64_t last, const HeldRows<Element>* from, Element* to) const
// output rows [first, last) of layer i, from what is held, or the chain's input where `from` is null; one behind the other from `to` on,
// or to the chain's output where that is null. It may use `thread_scratch`.
template <class Layers>
class RowStream {
  using Element = typename Layers::Element;

 public:
  // For tasks of at most `rows` output rows; what is held takes about `elements`.
  RowStream(const Layers& layers, int64_t rows, int64_t elements) : layers_(layers), ends_(layers.count() - 1) {
    const StreamedLayer last = layers.at(ends_);
    const int64_t least = minimum(rows, ceil_div(kTileRows, last.out_w));
    step_ = rows;
    while (step_ > least && hold(step_) > elements) --step_;
    step_ = ceil_div(rows, ceil_div(rows, step_));
    elements_ = hold(step_);
  }

  // Output rows [begin, end) of one image.
  void run(int64_t image, int64_t begin, int64_t end) {
    image_ = image;
    auto* memory = reinterpret_cast<Element*>(held_scratch(ceil_div(elements_ * static_cast<int64_t>(sizeof(Element)), sizeof(float))));
    for (int64_t i = 0; i < ends_; ++i) {
      held_[i].memory = memory;
      held_[i].next = 0;
      memory += held_[i].capacity * held_[i].row_elements;
    }
    for (int64_t p = begin; p < end; p += step_) compute(ends_, p, minimum(end, p + step_), nullptr);
  }

 private:
  // Sizes what is held for steps of `rows` output rows; returns the elements it takes.
  int64_t hold(int64_t rows) {
    int64_t elements = 0;
    for (int64_t i = ends_; i > 0; --i) {
      const StreamedLayer layer = layers_.at(i), producer = layers_.at(i - 1);
      HeldRows<Element>& held = held_[i - 1];
      held.flat = layer.is_pointwise;
      held.stride = producer.stride;
      held.row_elements = producer.out_w * held.stride;
      held.capacity = maximum(1, minimum(layer.in_h, held.flat ? rows : (rows - 1) * layer.window.stride_h + layer.window.reach_h()));
      elements += held.capacity * held.row_elements;
      rows = held.capacity;
    }
    return elements;
  }

  // Makes output rows [first, last) of layer i available; a ring may drop rows before `first`.
  void provide(int64_t i, int64_t first, int64_t last) {
    HeldRows<Element>& held = held_[i];
    if (held.flat) return compute(i, first, last, held.memory);
    for (int64_t h = maximum(first, held.next); h < last;) {
      const int64_t slot = h % held.capacity, run = minimum(last - h, held.capacity - slot);
      compute(i, h, h + run, held.memory + slot * held.row_elements);
      h += run;
    }
    held.next = maximum(held.next, last);
  }

  void compute(int64_t i, int64_t first, int64_t last, Element* to) {
    if (i > 0) {
      const StreamedLayer layer = layers_.at(i);
      const int64_t top = first * layer.window.stride_h - layer.window.pad_h;
      const int64_t bottom = top + (last - first - 1) * layer.window.stride_h + layer.window.reach_h();
      provide(i - 1, maximum(0, top), minimum(layer.in_h, bottom));
    }
    layers_.compute(i, image_, first, last, i > 0 ? &held_[i - 1] : nullptr, to);
  }

  const Layers& layers_;
  const int64_t ends_;
  HeldRows<Element> held_[kMostChainLayers];
  int64_t step_ = 1, elements_ = 0, image_ = 0;
};

// The whole chain, a task's intermediates held in about `elements`.
template <class Layers>
void stream_rows(const Layers& layers, int64_t batch, int64_t elements) {
  over_output_rows(batch, layers.at(layers.count() - 1).out_h, [&](int64_t image, int64_t begin, int64_t end) {
    RowStream<Layers>(layers, end - begin, elements).run(image, begin, end);
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
