// Argument blocks of the CPU kernels.
//
// Every field is eight bytes wide, so that a block can be filled from a flat list of words; they come in this order, as a `Kernel`
// gives them in Python: addresses of operands, of outputs and of the workspace, if there is one, `kAddresses` in all, which a captured
// plan patches; sizes and strides; the window; activations, the last of them the op's `activation`; scalars, each a `double`.
//
// Absent tensors are null. Sizes and strides count elements; memory is channels_last float32; a `*_stride` is the distance between two
// neighbouring pixels, at least their channels, so that channel slices of a wider tensor need no copy; an image is
// height · width · stride long.
#pragma once

#include <cstdint>

namespace kernelpress {

enum class Activation : int64_t { identity, relu, relu6, silu, hardswish, hardsigmoid, sigmoid, gelu };

// Window of a convolution or pooling: [height, width] pairs.
struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  // Input rows and columns under one output pixel.
  int64_t reach_h() const { return (kernel_h - 1) * dilation_h + 1; }
  int64_t reach_w() const { return (kernel_w - 1) * dilation_w + 1; }
};

// One group; x in any memory format.
struct Conv2dArgs {
  static constexpr int kAddresses = 5;
  const float *x, *weight, *bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t residual_stride, y_stride;
  Window window;
  Activation activation;
};

// 3×3, stride 1, one group; `tile` is 2 or 4 outputs a side.
struct WinogradConv2dArgs {
  static constexpr int kAddresses = 5;
  const float *x, *weight, *bias, *residual;
  float* y;
  int64_t tile, batch, in_h, in_w, c_in, out_h, out_w, c_out, pad_h, pad_w;
  int64_t x_stride, residual_stride, y_stride;
  Activation activation;
};

struct PointwiseConv2dArgs {
  static constexpr int kAddresses = 6;
  const float *x, *weight, *bias, *residual, *input_scale;
  float* y;
  int64_t batch, positions, c_in, c_out;
  int64_t x_stride, residual_stride, y_stride;
  Activation activation;
};

struct DepthwiseConv2dArgs {
  static constexpr int kAddresses = 5;
  const float *x, *weight, *bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, channels, multiplier, out_h, out_w;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  Activation activation;
};

// Contiguous images; weight [channels · multiplier, kernel_h, kernel_w].
struct DepthwisePlanesArgs {
  static constexpr int kAddresses = 5;
  const float *x, *weight, *bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, channels, multiplier, out_h, out_w;
  Window window;
  Activation activation;
};

// Channel k · shuffle + i of y is channel i · c_out / shuffle + k of the convolution, whose channels weight and bias follow. `narrow` is
// 1 where the weight was packed for grouped_narrow.h.
struct GroupedConv2dArgs {
  static constexpr int kAddresses = 5;
  const float *x, *weight, *bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out, groups, shuffle, narrow;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  Activation activation;
};

// The weight as sparse.h walks over it: `rows` output channels at a time (1 or 4), whose steps `steps[row_starts[i]] …` are where x
// stands in a strip of scratch, each with `rows` values. The strip: `strip` outputs of `width` columns, those beyond out_w unused, and
// per channel phases_h · phases_w planes `phase_pitch` apart. Without `channels_last` images are contiguous [c, h, w], and strides unused.
struct SparseConv2dArgs {
  static constexpr int kAddresses = 7;
  const float* x;
  const int32_t *row_starts, *steps;
  const float *values, *bias, *residual;
  float* y;
  int64_t rows, batch, in_h, in_w, c_in, out_h, out_w, c_out;
  int64_t strip, width, phases_h, phases_w, phase_pitch;
  int64_t channels_last, x_stride, residual_stride, y_stride;
  Window window;
  Activation activation;
};

// y: `primary` channels, then `cheap` ones, of `primary · multiplier` the first, whose window keeps the size.
struct GhostConv2dArgs {
  static constexpr int kAddresses = 7;
  const float *x, *primary_weight, *primary_bias, *cheap_weight, *cheap_bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, primary, cheap, multiplier;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  int64_t cheap_h, cheap_w;
  Activation cheap_activation, activation;
};

// The channels of a, then those of b, if there is one, shuffled.
struct ShuffleConcatArgs {
  static constexpr int kAddresses = 3;
  const float *a, *b;
  float* y;
  int64_t pixels, c_a, c_b, groups;
  int64_t a_stride, b_stride, y_stride;
};

struct SeparableConv2dArgs {
  static constexpr int kAddresses = 7;
  const float *x, *depthwise_weight, *depthwise_bias, *pointwise_weight, *pointwise_bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, channels, out_h, out_w, c_out;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  Activation depthwise_activation, activation;
};

struct InvertedResidualArgs {
  static constexpr int kAddresses = 9;
  const float *x, *expand_weight, *expand_bias, *depthwise_weight, *depthwise_bias, *project_weight, *project_bias, *residual;
  float* y;
  int64_t batch, in_h, in_w, c_in, hidden, out_h, out_w, c_out;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  Activation expand_activation, depthwise_activation, activation;
};

// x in any memory format.
struct SeparableStemArgs {
  static constexpr int kAddresses = 8;
  const float *x, *stem_weight, *stem_bias, *depthwise_weight, *depthwise_bias, *pointwise_weight, *pointwise_bias;
  float* y;
  int64_t batch, in_h, in_w, c_in, mid_h, mid_w, hidden, out_h, out_w, c_out;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t y_stride;
  Window stem_window, window;
  Activation stem_activation, depthwise_activation, activation;
};

// Layers one behind the other; the first may be any of them, a dense convolution only the first. `residual` is the last layer's. With
// `between`, as many channels as the last layer has, a 1×1 convolution then, channel c of each is y's 2c and 2c + 1.
enum class LayerKind : int64_t { conv, depthwise, pointwise };

struct ChainLayer {
  LayerKind kind;
  const float *weight, *bias;
  int64_t in_h, in_w, c_in, out_h, out_w, c_out;
  Window window;
  Activation activation;
};

constexpr int kMostChainLayers = 12;

struct ChainArgs {
  static constexpr int kAddresses = 4;
  const float *x, *residual, *between;
  float* y;
  int64_t batch, x_stride_n, x_stride_c, x_stride_h, x_stride_w, residual_stride, between_stride, y_stride;
  int64_t count;
  ChainLayer layers[kMostChainLayers];
};

// y [batch, channels].
struct GlobalAvgPool2dArgs {
  static constexpr int kAddresses = 2;
  const float* x;
  float* y;
  int64_t batch, positions, channels, x_stride;
};

// y [batch, c_out], its rows `y_stride` apart.
struct SqueezeExciteArgs {
  static constexpr int kAddresses = 6;
  const float *x, *reduce_weight, *reduce_bias, *expand_weight, *expand_bias;
  float* y;
  int64_t batch, positions, c_in, hidden, c_out, x_stride, y_stride;
  Activation reduce_activation, activation;
};

struct MaxPool2dArgs {
  static constexpr int kAddresses = 2;
  const float* x;
  float* y;
  int64_t batch, in_h, in_w, channels, out_h, out_w, x_stride, y_stride;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

// The mean of a window is its sum over `divisor`; over its pixels where that is 0, padding among them or not.
struct AvgPool2dArgs {
  static constexpr int kAddresses = 2;
  const float* x;
  float* y;
  int64_t batch, in_h, in_w, channels, out_h, out_w, x_stride, y_stride;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t counts_padding, divisor;
};

// Pixel i of y lies at (i + shift) · step + offset of x, in rows and in columns.
struct Resize2dArgs {
  static constexpr int kAddresses = 2;
  const float* x;
  float* y;
  int64_t batch, in_h, in_w, channels, out_h, out_w, x_stride, y_stride;
  int64_t is_bilinear;
  double step_h, step_w, shift, offset;
};

// Tensors of any memory format, in dimensions of which y's largest stride comes first; those that a tensor lacks have one element.
struct ElementwiseArgs {
  static constexpr int kAddresses = 4, kMostDims = 6;
  const float *a, *b, *c;
  float* y;
  int64_t sizes[kMostDims], a_strides[kMostDims], b_strides[kMostDims], c_strides[kMostDims], y_strides[kMostDims];
  Activation activation;
  double scale, c_scale, shift;
};

// int8 x [rows, c_in]; y, and the residual, int8 where `y_is_int8`, else float32. The weight is packed for `Int8Packing`; `weight_sums`
// are those of its rows, `scale` is (input scale) · (weight scale). A row's own scale and zero point take the place of the input's.
struct Int8MatmulArgs {
  static constexpr int kAddresses = 9;
  const int8_t *x, *weight;
  const int32_t* weight_sums;
  const float *scale, *bias;
  const void* residual;
  const float* row_scale;
  const int32_t* row_zero_point;
  void* y;
  int64_t rows, c_in, c_out;
  int64_t x_stride, residual_stride, y_stride;
  int64_t input_zero_point, y_is_int8;
  Activation activation;
  double output_scale, output_zero_point, residual_scale, residual_zero_point;
};

// As Int8MatmulArgs; padding has the value of the zero point. The weights of groups are packed one behind the other.
struct Int8Conv2dArgs {
  static constexpr int kAddresses = 7;
  const int8_t *x, *weight;
  const int32_t* weight_sums;
  const float *scale, *bias;
  const void* residual;
  void* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out, groups;
  int64_t x_stride, residual_stride, y_stride;
  int64_t input_zero_point, y_is_int8;
  Window window;
  Activation activation;
  double output_scale, output_zero_point, residual_scale, residual_zero_point;
};

// As Int8Conv2dArgs, one group; the weight as int8_sparse.cpp walks over it: of output channel n the steps `steps[row_starts[n]] …` are
// where four input channels stand in a strip of scratch, each with as many weights. The strip is that of SparseConv2dArgs.
struct Int8SparseConv2dArgs {
  static constexpr int kAddresses = 9;
  const int8_t *x, *weight;
  const int32_t *row_starts, *steps, *weight_sums;
  const float *scale, *bias;
  const void* residual;
  void* y;
  int64_t batch, in_h, in_w, c_in, out_h, out_w, c_out;
  int64_t strip, width, phases_h, phases_w, phase_pitch;
  int64_t x_stride, residual_stride, y_stride;
  int64_t input_zero_point, y_is_int8;
  Window window;
  Activation activation;
  double output_scale, output_zero_point, residual_scale, residual_zero_point;
};

// An image that lies anyhow; y has pixels `y_stride` apart.
struct QuantizeArgs {
  static constexpr int kAddresses = 2;
  const float* x;
  int8_t* y;
  int64_t batch, channels, height, width;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w, y_stride;
  double scale, zero_point;
};

struct DequantizeArgs {
  static constexpr int kAddresses = 2;
  const int8_t* x;
  float* y;
  int64_t rows, channels, x_stride, y_stride;
  double scale, zero_point;
};

// y is int8 where `y_is_int8`, else float32.
struct Int8AddArgs {
  static constexpr int kAddresses = 3;
  const int8_t *x, *other;
  void* y;
  int64_t rows, channels, x_stride, other_stride, y_stride, y_is_int8;
  Activation activation;
  double scale, zero_point, other_scale, other_zero_point, output_scale, output_zero_point;
};

// gate [batch, channels], `gate_stride` apart.
struct Int8GateArgs {
  static constexpr int kAddresses = 3;
  const int8_t *x, *gate;
  void* y;
  int64_t batch, pixels, channels, x_stride, gate_stride, y_stride, y_is_int8;
  Activation activation;
  double scale, zero_point, gate_scale, gate_zero_point, output_scale, output_zero_point;
};

// y [rows, channels]; scale and zero_point [rows].
struct QuantizeRowsArgs {
  static constexpr int kAddresses = 4;
  const float* x;
  int8_t* y;
  float* scale;
  int32_t* zero_point;
  int64_t rows, channels, x_stride, symmetric;
};

// As Int8MatmulArgs; the weight is packed for int8_depthwise.cpp.
struct Int8DepthwiseConv2dArgs {
  static constexpr int kAddresses = 7;
  const int8_t *x, *weight;
  const int32_t* weight_sums;
  const float *scale, *bias;
  const void* residual;
  void* y;
  int64_t batch, in_h, in_w, channels, multiplier, out_h, out_w;
  int64_t x_stride, residual_stride, y_stride;
  Window window;
  int64_t input_zero_point, y_is_int8;
  Activation activation;
  double output_scale, output_zero_point, residual_scale, residual_zero_point;
};

// As ChainArgs, of int8 layers; a depthwise one has as many groups as channels, and its weight is packed as for int8_depthwise.cpp. Of
// the layers' own x, residual and y nothing is read.
struct Int8ChainLayer {
  LayerKind kind;
  Int8Conv2dArgs layer;
};

struct Int8ChainArgs {
  static constexpr int kAddresses = 3;
  const int8_t* x;
  const void* residual;
  void* y;
  int64_t batch, x_stride, residual_stride, y_stride;
  int64_t count;
  Int8ChainLayer layers[kMostChainLayers];
};

// y [batch, channels], `y_stride` apart, int8 where `y_is_int8`, else float32.
struct Int8GlobalAvgPool2dArgs {
  static constexpr int kAddresses = 2;
  const int8_t* x;
  void* y;
  int64_t batch, positions, channels, x_stride, y_stride, y_is_int8;
  double scale, zero_point, output_scale, output_zero_point;
};

struct Int8MaxPool2dArgs {
  static constexpr int kAddresses = 2;
  const int8_t* x;
  int8_t* y;
  int64_t batch, in_h, in_w, channels, out_h, out_w, x_stride, y_stride;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

// As ShuffleConcatArgs.
struct Int8ShuffleConcatArgs {
  static constexpr int kAddresses = 3;
  const int8_t *a, *b;
  int8_t* y;
  int64_t pixels, c_a, c_b, groups;
  int64_t a_stride, b_stride, y_stride;
};

// Dimensions as those of ElementwiseArgs.
struct Int8CopyArgs {
  static constexpr int kAddresses = 2, kMostDims = 6;
  const int8_t* x;
  int8_t* y;
  int64_t sizes[kMostDims], x_strides[kMostDims], y_strides[kMostDims];
};

// Every CPU kernel with its argument block: declarations, table and bindings follow from these lists. A variant of an instruction set
// that differs in the int8 kernels alone takes the others from that set.
#define KP_FLOAT_KERNELS(KERNEL)                  \
  KERNEL(conv2d, Conv2dArgs)                      \
  KERNEL(winograd_conv2d, WinogradConv2dArgs)     \
  KERNEL(pointwise_conv2d, PointwiseConv2dArgs)   \
  KERNEL(depthwise_conv2d, DepthwiseConv2dArgs)   \
  KERNEL(depthwise_planes, DepthwisePlanesArgs)   \
  KERNEL(grouped_conv2d, GroupedConv2dArgs)       \
  KERNEL(shuffle_concat, ShuffleConcatArgs)       \
  KERNEL(sparse_conv2d, SparseConv2dArgs)         \
  KERNEL(ghost_conv2d, GhostConv2dArgs)           \
  KERNEL(separable_conv2d, SeparableConv2dArgs)   \
  KERNEL(inverted_residual, InvertedResidualArgs) \
  KERNEL(separable_stem, SeparableStemArgs)       \
  KERNEL(chain, ChainArgs)                        \
  KERNEL(global_avg_pool2d, GlobalAvgPool2dArgs)  \
  KERNEL(squeeze_excite, SqueezeExciteArgs)       \
  KERNEL(max_pool2d, MaxPool2dArgs)               \
  KERNEL(avg_pool2d, AvgPool2dArgs)               \
  KERNEL(resize2d, Resize2dArgs)                  \
  KERNEL(elementwise, ElementwiseArgs)
#define KP_INT8_KERNELS(KERNEL)                           \
  KERNEL(int8_matmul, Int8MatmulArgs)                     \
  KERNEL(int8_conv2d, Int8Conv2dArgs)                     \
  KERNEL(int8_sparse_conv2d, Int8SparseConv2dArgs)        \
  KERNEL(int8_depthwise_conv2d, Int8DepthwiseConv2dArgs)  \
  KERNEL(int8_chain, Int8ChainArgs)                       \
  KERNEL(quantize, QuantizeArgs)                          \
  KERNEL(dequantize, DequantizeArgs)                      \
  KERNEL(int8_add, Int8AddArgs)                           \
  KERNEL(int8_gate, Int8GateArgs)                         \
  KERNEL(quantize_rows, QuantizeRowsArgs)                 \
  KERNEL(int8_global_avg_pool2d, Int8GlobalAvgPool2dArgs) \
  KERNEL(int8_max_pool2d, Int8MaxPool2dArgs)              \
  KERNEL(int8_shuffle_concat, Int8ShuffleConcatArgs)      \
  KERNEL(int8_copy, Int8CopyArgs)
#define KP_KERNELS(KERNEL) KP_FLOAT_KERNELS(KERNEL) KP_INT8_KERNELS(KERNEL)

// How int8 weights lie: panels of `outputs` output channels, a narrower last one of a multiple of `lanes`; each [depth / inputs, its
// channels, inputs].
struct Int8Packing {
  int64_t outputs, lanes, inputs;
};

// One instruction set's kernels. Packed dense weights are panels of `panel_width` output channels.
struct KernelTable {
  const char* variant;
  int64_t panel_width;
  Int8Packing int8_packing;
  // Run `iterations` rounds of independent register-only FMAs, or products of int8; return the operations done.
  int64_t (*fma_burst)(int64_t iterations);
  int64_t (*int8_burst)(int64_t iterations);
#define KP_MEMBER(name, Args) void (*name)(const Args&);
  KP_KERNELS(KP_MEMBER)
#undef KP_MEMBER
};

}  // namespace kernelpress
