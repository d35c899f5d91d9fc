// A chain of float32 layers on row_stream.h.   bound: FMA; the memory traffic is x, y and the weights
#include "chain.h"

#include "conv_rows.h"
#include "depthwise_rows.h"
#include "row_stream.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kChainFloats = 160 * 1024;

Conv2dArgs stem_of(const ChainArgs& a) {
  const ChainLayer& l = a.layers[0];
  return {a.x,   l.weight, l.bias,       nullptr,      nullptr,      a.batch,      l.in_h, l.in_w,           l.c_in,   l.out_h,
          l.out_w, l.c_out,  a.x_stride_n, a.x_stride_c, a.x_stride_h, a.x_stride_w, 0,      padded(l.c_out), l.window, l.activation};
}

class FloatLayers {
 public:
  using Element = float;
  using Held = HeldRows<float>;

  explicit FloatLayers(const ChainArgs& args) : a_(args) {}

  int64_t count() const { return a_.count; }
  StreamedLayer at(int64_t i) const {
    const ChainLayer& l = a_.layers[i];
    return {l.in_h, l.out_h, l.out_w, padded(l.c_out), l.kind == LayerKind::pointwise, l.window};
  }

  void compute(int64_t i, int64_t image, int64_t first, int64_t last, const Held* from, float* to) const {
    const ChainLayer& layer = a_.layers[i];
    const int64_t pixel = (image * layer.out_h + first) * layer.out_w;
    float* const y = to ? to : a_.y + pixel * a_.y_stride;
    const int64_t y_stride = to ? padded(layer.c_out) : a_.y_stride;
    const float* residual = !to && a_.residual ? a_.residual + pixel * a_.residual_stride : nullptr;
    const Interleaved between{!to && a_.between ? a_.between + pixel * a_.between_stride : nullptr, a_.between_stride};
    const ActivationFunction activation(layer.activation);
    if (layer.kind == LayerKind::conv) {
      Conv2dArgs stem = stem_of(a_);
      stem.y_stride = y_stride;
      stem.y = y - pixel * y_stride;
      return conv_rows(stem, image, first, last, 0, ceil_div(layer.c_out, kPanel), thread_scratch(conv_scratch_floats(stem, last - first)));
    }
    const float* x = a_.x + image * a_.x_stride_n;
    if (layer.kind == LayerKind::depthwise) {
      const RowSource source = from ? RowSource{from->memory, from->row_elements, from->capacity} : RowSource{x, a_.x_stride_h, layer.in_h};
      const DepthwiseProblem problem{layer.window, layer.in_h, layer.in_w, layer.out_w, layer.c_out, from ? from->stride : a_.x_stride_w,
                                     layer.weight, layer.c_out, layer.bias, activation};
      return depthwise_rows(problem, source, first, last, {y, y_stride, residual, a_.residual_stride, layer.out_w});
    }
    const TileInput in = from ? contiguous_rows(from->memory, from->stride, layer.c_in)
                              : contiguous_rows(x + first * a_.x_stride_h, a_.x_stride_w, layer.c_in);
    multiply_panels(in, layer.weight, {y, y_stride, layer.bias, residual, a_.residual_stride, activation, between},
                    (last - first) * layer.out_w, layer.c_out, 0, ceil_div(layer.c_out, kPanel));
  }

 private:
  const ChainArgs& a_;
};

}  // namespace

void run_chain(const ChainArgs& a, int64_t floats) { stream_rows(FloatLayers(a), a.batch, floats); }

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
