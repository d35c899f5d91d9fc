// int8 matrix product.   y[m, n] = act(float(Σ_k (x[m, k] − z) · w[n, k]) · scale[n] + bias[n] + residual[m, n]), cast or requantised
//
// x: rows of [c_in] bytes, one zero point and scale for all or one for each row. See int8_gemm.cuh for the tile. Large products are
// bound by `mma` (4096 operations a byte of shared memory read at 64×64 a warp), thin ones by reading w.
#include "int8_gemm.cuh"

namespace kernelpress::cuda {

Status int8_matmul(const Int8MatmulArgs& args, const Device& device, void* stream) {
  const Rows<int8_t> x{static_cast<const int8_t*>(args.x), args.x_stride, args.rows, args.c_in};
  const RowTerms terms{args.row_scale, args.row_zero_point, args.weight_sums, args.c_out};
  return launch_int8("int8_matmul", args, x, args.rows, args.c_in, terms, device, stream);
}

}  // namespace kernelpress::cuda
