// Argument blocks of other kernels as layers of a chain, float32 or int8.
#pragma once

#include <utility>

#include "args.h"

namespace kernelpress {

struct ImageSize {
  int64_t h, w;
};

// Builds a chain of float32 layers from calls in the order they run. An `append` that returns false leaves a chain that must not be used.
class FloatChainBuilder {
 public:
  const ChainArgs& chain() const { return chain_; }

  bool append(const Conv2dArgs& a) {
    return chain_.count == 0 && start(a.x, a.batch, a.x_stride_n, a.x_stride_c, a.x_stride_h, a.x_stride_w) &&
           add({LayerKind::conv, a.weight, a.bias, a.in_h, a.in_w, a.c_in, a.out_h, a.out_w, a.c_out, a.window, a.activation}) &&
           end(a.y, a.y_stride, a.residual, a.residual_stride);
  }
  bool append(const PointwiseConv2dArgs& a) {
    const ImageSize at = chain_.count ? ImageSize{out_h(), out_w()} : ImageSize{a.positions, 1};
    return !a.input_scale && at.h * at.w == a.positions && follow(a.x, a.batch, at, a.c_in, a.x_stride) &&
           add(pointwise(a.weight, a.bias, at, a.c_in, a.c_out, a.activation)) && end(a.y, a.y_stride, a.residual, a.residual_stride);
  }
  bool append(const DepthwiseConv2dArgs& a) {
    const ImageSize in{a.in_h, a.in_w}, out{a.out_h, a.out_w};
    return a.multiplier == 1 && follow(a.x, a.batch, in, a.channels, a.x_stride) &&
           add(depthwise(a.weight, a.bias, in, out, a.channels, a.window, a.activation)) &&
           end(a.y, a.y_stride, a.residual, a.residual_stride);
  }
  bool append(const SeparableConv2dArgs& a) {
    const ImageSize in{a.in_h, a.in_w}, out{a.out_h, a.out_w};
    return follow(a.x, a.batch, in, a.channels, a.x_stride) &&
           add(depthwise(a.depthwise_weight, a.depthwise_bias, in, out, a.channels, a.window, a.depthwise_activation)) &&
           add(pointwise(a.pointwise_weight, a.pointwise_bias, out, a.channels, a.c_out, a.activation)) &&
           end(a.y, a.y_stride, a.residual, a.residual_stride);
  }
  bool append(const InvertedResidualArgs& a) {
    const ImageSize in{a.in_h, a.in_w}, out{a.out_h, a.out_w};
    return follow(a.x, a.batch, in, a.c_in, a.x_stride) &&
           add(pointwise(a.expand_weight, a.expand_bias, in, a.c_in, a.hidden, a.expand_activation)) &&
           add(depthwise(a.depthwise_weight, a.depthwise_bias, in, out, a.hidden, a.window, a.depthwise_activation)) &&
           add(pointwise(a.project_weight, a.project_bias, out, a.hidden, a.c_out, a.activation)) &&
           end(a.y, a.y_stride, a.residual, a.residual_stride);
  }
  bool append(const SeparableStemArgs& a) {
    const ImageSize mid{a.mid_h, a.mid_w}, out{a.out_h, a.out_w};
    return chain_.count == 0 && start(a.x, a.batch, a.x_stride_n, a.x_stride_c, a.x_stride_h, a.x_stride_w) &&
           add({LayerKind::conv, a.stem_weight, a.stem_bias, a.in_h, a.in_w, a.c_in, a.mid_h, a.mid_w, a.hidden, a.stem_window,
                a.stem_activation}) &&
           add(depthwise(a.depthwise_weight, a.depthwise_bias, mid, out, a.hidden, a.window, a.depthwise_activation)) &&
           add(pointwise(a.pointwise_weight, a.pointwise_bias, out, a.hidden, a.c_out, a.activation)) && end(a.y, a.y_stride, nullptr, 0);
  }
  // A shuffle in two groups, the second of which the chain has made: its last layer puts the first between.
  bool append(const ShuffleConcatArgs& a) {
    if (chain_.count == 0 || chain_.layers[chain_.count - 1].kind != LayerKind::pointwise || chain_.between) return false;
    const int64_t channels = chain_.layers[chain_.count - 1].c_out;
    if (a.groups != 2 || a.c_a != channels || a.c_b != channels) return false;
    if (a.b != chain_.y || a.b_stride != chain_.y_stride || a.a == chain_.y) return false;
    chain_.between = a.a, chain_.between_stride = a.a_stride, chain_.y = a.y, chain_.y_stride = a.y_stride;
    return true;
  }

 private:
  int64_t out_h() const { return chain_.count ? chain_.layers[chain_.count - 1].out_h : 0; }
  int64_t out_w() const { return chain_.count ? chain_.layers[chain_.count - 1].out_w : 0; }

  static ChainLayer pointwise(const float* weight, const float* bias, ImageSize at, int64_t c_in, int64_t c_out, Activation activation) {
    return {LayerKind::pointwise, weight, bias, at.h, at.w, c_in, at.h, at.w, c_out, {1, 1, 1, 1, 0, 0, 1, 1}, activation};
  }
  static ChainLayer depthwise(const float* weight, const float* bias, ImageSize in, ImageSize out, int64_t channels, const Window& window,
                              Activation activation) {
    return {LayerKind::depthwise, weight, bias, in.h, in.w, channels, out.h, out.w, channels, window, activation};
  }

  bool start(const float* x, int64_t batch, int64_t stride_n, int64_t stride_c, int64_t stride_h, int64_t stride_w) {
    chain_.x = x, chain_.batch = batch;
    chain_.x_stride_n = stride_n, chain_.x_stride_c = stride_c, chain_.x_stride_h = stride_h, chain_.x_stride_w = stride_w;
    return true;
  }
  // A layer on channels_last images: the chain's first, or one that reads just what the layer before it writes.
  bool follow(const float* x, int64_t batch, ImageSize in, int64_t c_in, int64_t stride) {
    if (chain_.count == 0) return start(x, batch, in.h * in.w * stride, 1, in.w * stride, stride);
    const ChainLayer& before = chain_.layers[chain_.count - 1];
    return x == chain_.y && stride == chain_.y_stride && !chain_.residual && !chain_.between && batch == chain_.batch && in.h == before.out_h &&
           in.w == before.out_w && c_in == before.c_out;
  }
  bool add(const ChainLayer& layer) {
    if (chain_.count == kMostChainLayers) return false;
    chain_.layers[chain_.count++] = layer;
    return true;
  }
  // A residual that the layer before makes is nowhere whole: its rows are in memory of the chain's own.
  bool end(float* y, int64_t stride, const float* residual, int64_t residual_stride) {
    if (residual && residual == chain_.y) return false;
    chain_.y = y, chain_.y_stride = stride, chain_.residual = residual, chain_.residual_stride = residual_stride;
    return true;
  }

  ChainArgs chain_{};
};

// The same of int8 layers.
class Int8ChainBuilder {
 public:
  const Int8ChainArgs& chain() const { return chain_; }

  bool append(const Int8Conv2dArgs& a) {
    const Window& w = a.window;
    const bool is_pointwise = w.kernel_h == 1 && w.kernel_w == 1 && w.stride_h == 1 && w.stride_w == 1 && w.pad_h == 0 && w.pad_w == 0;
    return a.groups == 1 && (is_pointwise || chain_.count == 0) && add(is_pointwise ? LayerKind::pointwise : LayerKind::conv, a);
  }
  bool append(const Int8DepthwiseConv2dArgs& a) {
    return add(LayerKind::depthwise,
               {a.x, a.weight, a.weight_sums, a.scale, a.bias, a.residual, a.y, a.batch, a.in_h, a.in_w, a.channels, a.out_h, a.out_w,
                a.channels * a.multiplier, a.channels, a.x_stride, a.residual_stride, a.y_stride, a.input_zero_point, a.y_is_int8, a.window,
                a.activation, a.output_scale, a.output_zero_point, a.residual_scale, a.residual_zero_point});
  }

 private:
  bool add(LayerKind kind, const Int8Conv2dArgs& a) {
    if (chain_.count == kMostChainLayers || (a.residual && a.residual == chain_.y)) return false;
    if (chain_.count == 0) {
      chain_.x = a.x, chain_.x_stride = a.x_stride, chain_.batch = a.batch;
    } else if (!follows(a)) {
      return false;
    }
    chain_.y = a.y, chain_.y_stride = a.y_stride, chain_.residual = a.residual, chain_.residual_stride = a.residual_stride;
    chain_.layers[chain_.count++] = {kind, a};
    return true;
  }
  bool follows(const Int8Conv2dArgs& a) const {
    const Int8Conv2dArgs& before = chain_.layers[chain_.count - 1].layer;
    return a.x == chain_.y && a.x_stride == chain_.y_stride && before.y_is_int8 && !chain_.residual && a.batch == chain_.batch &&
           a.in_h == before.out_h && a.in_w == before.out_w && a.c_in == before.c_out;
  }

  Int8ChainArgs chain_{};
};

// Of whichever kind its first layer is.
class ChainBuilder {
 public:
  template <class Args>
  bool append(const Args& a) {
    if constexpr (takes<FloatChainBuilder, Args>(0)) return is_float() && floats_.append(a);
    else if constexpr (takes<Int8ChainBuilder, Args>(0)) return floats_.chain().count == 0 && bytes_.append(a);
    else return false;
  }

  bool is_float() const { return bytes_.chain().count == 0; }
  const ChainArgs& floats() const { return floats_.chain(); }
  const Int8ChainArgs& bytes() const { return bytes_.chain(); }

 private:
  template <class Builder, class Args>
  static constexpr auto takes(int) -> decltype(std::declval<Builder&>().append(std::declval<const Args&>())) {
    return true;
  }
  template <class Builder, class Args>
  static constexpr bool takes(long) {
    return false;
  }

  FloatChainBuilder floats_;
  Int8ChainBuilder bytes_;
};

}  // namespace kernelpress
