// Convolution of int8 with a sparse weight.     y[n, p, q] = epilogue(Σ_crs (x[c, p·S-P+r·D, q·S-P+s·D] − z) · w[n, c, r, s])
//
//   x is copied strip by strip to the form of strip.h, four channels side by side in the place of one float, so that a step of the walk
//   multiplies four weights of an output channel with as many inputs of kLanes positions; the sums are turned back into pixels for the
//   epilogue.                                                    bound: loads of the walk; a strip is read C_out · density times
//
// One task: a range of strips × rows of the weight with as many non-zeros as the others'.
#include "int8_tile.h"
#include "sparse_split.h"
#include "strip.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int kCell = 4;  // channels side by side
constexpr int kMostVectors = 8;
constexpr int32_t kRaised = kHasVnni ? 128 : 0;  // by how much x in scratch lies above x

typedef int32_t Words __attribute__((vector_size(sizeof(int32_t) * kLanes)));

#if defined(KP_VNNI)
KP_INLINE void dot_cells(Ints& sums, Ints x, Ints w) { dot(sums, x, w); }
#else
typedef int16_t Shorts __attribute__((vector_size(kCell * kLanes)));
KP_INLINE Ints even_bytes(Ints a) { return {reinterpret_cast<decltype(a.v)>((reinterpret_cast<Shorts>(a.v) << 8) >> 8)}; }
KP_INLINE Ints odd_bytes(Ints a) { return {reinterpret_cast<decltype(a.v)>(reinterpret_cast<Shorts>(a.v) >> 8)}; }
KP_INLINE void dot_cells(Ints& sums, Ints x, Ints w) {
  dot(sums, even_bytes(x), even_bytes(w));
  dot(sums, odd_bytes(x), odd_bytes(w));
}
#endif

// Sums of output channels [first, last) over kVectors vectors of positions, `stride` apart.
template <int kVectors>
__attribute__((noinline)) void walk(const Int8SparseConv2dArgs& a, const int32_t* x, int64_t first, int64_t last, int32_t* to,
                                    int64_t stride) {
  constexpr int kChains = kVectors >= 4 ? 1 : 4;  // sums that do not wait for each other
  const int32_t zero_point = kRaised + static_cast<int32_t>(a.input_zero_point);
  for (int64_t n = first; n < last; ++n, to += stride) {
    Ints sums[kChains][kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[0][v] = broadcast_int(-zero_point * a.weight_sums[n]);
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sums[chain][v] = broadcast_int(0);
    }
    const auto add_step = [&](Ints (&of_chain)[kVectors], int64_t q) {
      const int32_t* at = x + a.steps[q];
      int32_t cell;
      std::memcpy(&cell, a.weight + q * kCell, sizeof cell);
      const Ints weight = broadcast_int(cell);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dot_cells(of_chain[v], load_ints(at + v * kLanes), weight);
    };
    int64_t q = a.row_starts[n];
    const int64_t end = a.row_starts[n + 1];
    for (; q + kChains <= end; q += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) add_step(sums[chain], q + chain);
    }
    for (; q < end; ++q) add_step(sums[0], q);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sums[0][v] = sums[0][v] + sums[chain][v];
      store_ints(to + v * kLanes, sums[0][v]);
    }
  }
}

using Walk = void (*)(const Int8SparseConv2dArgs&, const int32_t*, int64_t, int64_t, int32_t*, int64_t);
constexpr Walk kWalks[kMostVectors] = {walk<1>, walk<2>, walk<3>, walk<4>, walk<5>, walk<6>, walk<7>, walk<8>};

// The cells of a strip as the walk multiplies them.
void load_cells(const Int8SparseConv2dArgs& a, const StripForm& form, const Strip& strip, float* scratch) {
  const int64_t pixels = a.in_h * a.in_w, cells = a.c_in / kCell;
  const uint32_t padding = 0x01010101u * static_cast<uint8_t>(a.input_zero_point);
  StripSource x{reinterpret_cast<const float*>(a.x + strip.image * pixels * a.x_stride), true, cells, 1, a.x_stride / kCell, a.in_h, a.in_w};
  std::memcpy(&x.padding, &padding, sizeof padding);
  load_strip(x, form, a.window, strip.first, scratch);
  if (!kHasVnni) return;
  const int64_t bytes = cells * form.pitch() * kCell;
  stage(reinterpret_cast<Staged*>(scratch), reinterpret_cast<const int8_t*>(scratch), bytes, 0);
}

// An output of int8 as cells, in which a channel is one byte of every position.
struct CellOutput {
  const Int8Epilogue& epilogue;
  bool bounded;
  Vec low, high;  // of steps before the zero point is added, where they are bounded
  Ints zero_point;

  CellOutput(const Int8SparseConv2dArgs& a, const Int8Product& product)
      : epilogue(product.epilogue), bounded(epilogue.gives_bounded_bytes(0, a.c_out, product.depth)) {
    const float zero = static_cast<float>(a.output_zero_point), inverse = static_cast<float>(1.0 / a.output_scale);
    const float six = a.activation == Activation::relu6 ? std::nearbyintf(6.0f * inverse) : 255.0f;
    low = broadcast(a.activation == Activation::relu || a.activation == Activation::relu6 ? 0.0f : -128.0f - zero);
    high = broadcast(std::fmin(six, 127.0f - zero));
    zero_point = broadcast_int(static_cast<int32_t>(a.output_zero_point));
  }

  KP_INLINE Ints steps(Vec value) const {
    if (!bounded || !epilogue.activation.clamps) value = epilogue.activated(value);
    if (!bounded) return epilogue.quantized(value);
    return rounded(at_most(at_least(value * epilogue.inverse_scale, low), high)) + zero_point;
  }

  // Sums of channels n … n + 3, `stride` apart, to `vectors` vectors of cells; `residual`, where there is one, lies as these do.
  void put(int64_t n, const int32_t* sums, int64_t stride, int64_t vectors, const int32_t* residual, int32_t* cells) const {
    Vec scale[kCell], bias[kCell];
    for (int i = 0; i < kCell; ++i) {
      scale[i] = broadcast(epilogue.scale[n + i]);
      bias[i] = broadcast(epilogue.bias ? epilogue.bias[n + i] : 0.0f);
    }
    for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
      Words cell{};
#pragma GCC unroll 4
      for (int i = 0; i < kCell; ++i) {
        Vec value = fma_rounded_once(to_floats(load_ints(sums + i * stride + v)), scale[i], bias[i]);
        if (residual) {
          const Words byte = reinterpret_cast<Words>(load_ints(residual + v).v) << (24 - 8 * i) >> 24;
          value = epilogue.plus_residual(value, Ints{reinterpret_cast<decltype(Ints::v)>(byte)});
        }
        cell |= (reinterpret_cast<Words>(steps(value).v) & 255) << (8 * i);
      }
      store_ints(cells + v, {reinterpret_cast<decltype(Ints::v)>(cell)});
    }
  }
};

bool gives_cells(const Int8SparseConv2dArgs& a) {
  return a.y_is_int8 && a.c_out % kCell == 0 && a.y_stride % kCell == 0 && (!a.residual || a.residual_stride % kCell == 0);
}

// Calls body(pixel, from, count) for every run of outputs of a strip that are an image's: its first pixel, and where in the strip it is.
template <class Body>
void over_pixels(const Int8SparseConv2dArgs& a, const Strip& strip, const Body& body) {
  over_runs(strip.first, strip.last, a.width, [&](int64_t row, int64_t column, int64_t from, int64_t run) {
    const int64_t used = minimum(run, a.out_w - column);
    if (used > 0) body((strip.image * a.out_h + row) * a.out_w + column, from, used);
  });
}

// Sums of channels from `channel` on over a strip, pixels `stride` apart, through any epilogue.
void finish_pixels(const Int8SparseConv2dArgs& a, const Int8Product& product, const Strip& strip, const int32_t* sums, int64_t channel,
                   int64_t stride) {
  over_pixels(a, strip, [&](int64_t pixel, int64_t from, int64_t used) { finish(product, sums + from * stride, channel, pixel, used); });
}

// `count` cells of channels from `channel` on, `stride` apart: to the pixels of y, and from those of the residual.
void store_cells(const Int8SparseConv2dArgs& a, const Strip& strip, const float* cells, int64_t stride, int64_t channel, int64_t count) {
  over_pixels(a, strip, [&](int64_t pixel, int64_t from, int64_t used) {
    float* y = reinterpret_cast<float*>(static_cast<int8_t*>(a.y) + pixel * a.y_stride + channel);
    transpose_copy(y, a.y_stride / kCell, cells + from, stride, count, used);
  });
}
void load_residual(const Int8SparseConv2dArgs& a, const Strip& strip, float* cells, int64_t stride, int64_t channel, int64_t count) {
  over_pixels(a, strip, [&](int64_t pixel, int64_t from, int64_t used) {
    const auto* x = reinterpret_cast<const float*>(static_cast<const int8_t*>(a.residual) + pixel * a.residual_stride + channel);
    transpose_copy(cells + from, stride, x, a.residual_stride / kCell, used, count);
  });
}

}  // namespace

void int8_sparse_conv2d(const Int8SparseConv2dArgs& a) {
  const StripForm form{a.width, a.phases_h, a.phases_w, a.phase_pitch};
  const int64_t cells = a.c_in / kCell, scratch_floats = cells * form.pitch() + 16;
  const Int8Product whole(a, a.c_in * a.window.kernel_h * a.window.kernel_w);
  const CellOutput output(a, whole);
  const bool by_cells = gives_cells(a);
  const SparseWork work{a.batch, a.out_h * a.width, a.strip, a.row_starts, a.c_out, a.phases_h * a.phases_w * cells, kCell};
  over_strips(work, [&](const Strip& strip, int64_t first, int64_t last) {
    float* const scratch = thread_scratch(scratch_floats + (kLanes + kInt8Panel) * a.strip);
    float *const tile = scratch + scratch_floats, *const turned = tile + kLanes * a.strip;
    const auto *x = reinterpret_cast<const int32_t*>(scratch), *sums = reinterpret_cast<const int32_t*>(tile);
    const int64_t vectors = ceil_div(strip.last - strip.first, kLanes);
    load_cells(a, form, strip, scratch);
    Int8Product product = whole;
    product.c_out = last;
    float* const residual = a.residual ? turned + kInt8Panel / kCell * a.strip : nullptr;
    for (int64_t channel = first; channel < last; channel += kInt8Panel) {
      const int64_t end = minimum(channel + kInt8Panel, last), stride = round_up(end - channel, kLanes);
      if (by_cells && residual) load_residual(a, strip, residual, a.strip, channel, (end - channel) / kCell);
      for (int64_t n = channel; n < end; n += kLanes) {
        const int64_t count = minimum(kLanes, end - n);
        kWalks[vectors - 1](a, x, n, n + count, reinterpret_cast<int32_t*>(tile), a.strip);
        if (!by_cells) {
          transpose_copy(turned + n - channel, stride, tile, a.strip, count, vectors * kLanes);
          continue;
        }
        for (int64_t i = 0; i < count; i += kCell) {
          const int64_t at = (n + i - channel) / kCell * a.strip;
          const auto* added = residual ? reinterpret_cast<const int32_t*>(residual + at) : nullptr;
          output.put(n + i, sums + i * a.strip, a.strip, vectors, added, reinterpret_cast<int32_t*>(turned + at));
        }
      }
      if (by_cells) store_cells(a, strip, turned, a.strip, channel, (end - channel) / kCell);
      else finish_pixels(a, product, strip, reinterpret_cast<const int32_t*>(turned), channel, stride);
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
