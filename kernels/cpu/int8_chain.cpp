// A chain of int8 layers on row_stream.h: what is between them is a quarter of what float32 layers hold.   bound: products
#include "args.h"
#include "int8_rows.h"
#include "row_stream.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int64_t kHeldBytes = 384 * 1024;

Int8DepthwiseConv2dArgs depthwise_of(const Int8Conv2dArgs& l) {
  return {l.x,     l.weight, l.weight_sums, l.scale,    l.bias,            l.residual, l.y,
          l.batch, l.in_h,   l.in_w,        l.c_in,     l.c_out / l.c_in,  l.out_h,    l.out_w,
          l.x_stride, l.residual_stride, l.y_stride, l.window, l.input_zero_point, l.y_is_int8, l.activation,
          l.output_scale, l.output_zero_point, l.residual_scale, l.residual_zero_point};
}

class Int8Layers {
 public:
  using Element = int8_t;
  using Held = HeldRows<int8_t>;

  explicit Int8Layers(const Int8ChainArgs& args) : a_(args) {}

  int64_t count() const { return a_.count; }
  StreamedLayer at(int64_t i) const {
    const Int8Conv2dArgs& l = a_.layers[i].layer;
    return {l.in_h, l.out_h, l.out_w, l.c_out, a_.layers[i].kind == LayerKind::pointwise, l.window};
  }

  void compute(int64_t i, int64_t image, int64_t first, int64_t last, const Held* from, int8_t* to) const {
    const LayerKind kind = a_.layers[i].kind;
    Int8Conv2dArgs l = a_.layers[i].layer;
    l.x = a_.x, l.x_stride = a_.x_stride, l.y = a_.y, l.y_stride = a_.y_stride, l.residual = nullptr;
    if (to) {
      l.y_stride = l.c_out;
      l.y = to - (image * l.out_h + first) * l.out_w * l.y_stride;
    } else if (a_.residual) {
      l.residual = a_.residual, l.residual_stride = a_.residual_stride;
    }
    if (from) {
      const int64_t row = kind == LayerKind::pointwise ? first : 0;
      l.x_stride = from->stride;
      l.x = from->memory - (image * l.in_h + row) * from->row_elements;
    }
    if (kind == LayerKind::depthwise) int8_depthwise_rows(depthwise_of(l), image, first, last, from ? from->capacity : l.in_h);
    else int8_conv_rows(l, image, first, last);
  }

 private:
  const Int8ChainArgs& a_;
};

}  // namespace

void int8_chain(const Int8ChainArgs& a) { stream_rows(Int8Layers(a), a.batch, kHeldBytes); }

}  // namespace kernelpress::KERNELPRESS_ISA
