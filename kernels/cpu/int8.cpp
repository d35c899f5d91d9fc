// int8 matrix product.   y[m, n] = epilogue(Σ_k (x[m, k] − z) · w[n, k])
#include <algorithm>

#include "args.h"
#include "int8_tile.h"
#include "runtime.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

void stage_row(Staged* to, const int8_t* from, int64_t count, int32_t zero_point) {
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<Staged>(kHasVnni ? from[k] + 128 : from[k] - zero_point);
  std::fill(to + count, to + round_up(count, kGroup), static_cast<Staged>(0));
}

}  // namespace

void int8_matmul(const Int8MatmulArgs& a) {
  const Int8Epilogue epilogue(a);
  const int64_t groups = ceil_div(a.c_in, kGroup);
  parallel(a.rows, [&](int64_t begin, int64_t end) {
    Staged* row = reinterpret_cast<Staged*>(thread_scratch(groups));
    for (int64_t m = begin; m < end; ++m) {
      const int32_t zero_point = a.row_zero_point ? a.row_zero_point[m] : static_cast<int32_t>(a.input_zero_point);
      stage_row(row, a.x + m * a.x_stride, a.c_in, zero_point);
      for (int64_t n = 0; n < a.c_out; n += kLanes) {
        const int64_t panel = n / kInt8Panel * kInt8Panel, columns = minimum(kInt8Panel, round_up(a.c_out - panel, kLanes));
        const int8_t* weight = a.weight + panel * groups * kGroup + (n - panel) * kGroup;
        const Ints weight_sums = load_ints_up_to(a.weight_sums + n, a.c_out - n);
        Ints sums = kHasVnni ? weight_sums * broadcast_int(-128 - zero_point) : broadcast_int(0);
        for (int64_t k = 0; k < groups; ++k) {
          int32_t x;
          std::memcpy(&x, row + k * kGroup, sizeof x);
          dot(sums, broadcast_int(x), load_weights(weight + k * columns * kGroup));
        }
        Vec value = to_floats(sums);
        if (a.row_scale) value = value * broadcast(a.row_scale[m]);
        epilogue.finish(value, m, n, a.c_out - n);
      }
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
