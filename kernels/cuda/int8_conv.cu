// int8 convolution as one product over output pixels (implicit GEMM).
//
//     y[n,p,q,o] = act(float(Σ_rsc (x[n, p·S-P+r·D, q·S-P+s·D, c] − z) · w[o,r,s,c]) · scale[o] + bias[o] + residual[n,p,q,o])
//
//   A row of A is the window of one output pixel; its K runs over (r, s, c), 16 channels of one tap per copy:
//
//       tap (0,0) │ tap (0,1) │ …          outside of the image the copy is a store of the zero point, which the
//       c ······· │ c ······· │            sums' correction takes off again: padding stands for 0
//
//   1×1 windows of stride 1 are the rows of x as they lie. See int8_gemm.cuh for the tile.
#include "int8_gemm.cuh"

namespace kernelpress::cuda {

namespace {

bool is_pointwise(const Window& w) {
  return w.kernel_h == 1 && w.kernel_w == 1 && w.stride_h == 1 && w.stride_w == 1 && w.pad_h == 0 && w.pad_w == 0;
}

// The product that a 1×1 convolution is.
Int8MatmulArgs rows_of(const Int8Conv2dArgs& a, int64_t pixels) {
  return {a.x,         a.weight,       a.corrections,       a.scale,        a.bias,
          a.residual,  nullptr,        nullptr,             nullptr,        a.y,
          a.workspace, pixels,         a.c_in,              a.c_out,        a.weight_stride,
          a.x_stride,  a.residual_stride, a.y_stride,       a.workspace_bytes, a.output,
          a.dtype,     a.activation,   a.configuration,     a.output_scale, a.output_zero_point,
          a.residual_scale, a.residual_zero_point};
}

}  // namespace

Status int8_conv2d(const Int8Conv2dArgs& args, const Device& device, void* stream) {
  const Window& w = args.window;
  const int64_t pixels = args.batch * args.out_h * args.out_w;
  if (is_pointwise(w)) return int8_matmul(rows_of(args, pixels), device, stream);
  const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
  const ConvWindows<int8_t> windows{static_cast<const int8_t*>(args.x),
                                    args.x_stride,
                                    pixels,
                                    small(args.in_h),
                                    small(args.in_w),
                                    small(args.c_in),
                                    small(args.out_h),
                                    small(args.out_w),
                                    small(w.kernel_h),
                                    small(w.kernel_w),
                                    small(w.stride_h),
                                    small(w.stride_w),
                                    small(w.pad_h),
                                    small(w.pad_w),
                                    small(w.dilation_h),
                                    small(w.dilation_w),
                                    static_cast<int8_t>(args.input_zero_point)};
  const RowTerms none{nullptr, nullptr, nullptr, args.c_out};
  return launch_int8("int8_conv2d", args, windows, pixels, w.kernel_h * w.kernel_w * args.c_in, none, device, stream);
}

}  // namespace kernelpress::cuda
