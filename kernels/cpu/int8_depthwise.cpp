// int8 depthwise convolution, channels_last.     y[n, p, q, o] = epilogue(Σ_rs (x[n, p·S-P+r·D, q·S-P+s·D, o/m] − z) · w[r, s, o])
//
//      x                       staged rows of one block of channels          one column: kGroup rows, interleaved,
//   ┌────────┐            ▒▒ 0 1 2 3 … ▒▒   ▒ = padding, the zero point      is an operand of `dot` for every output it is under
//   │  block │  ───▶      ▒▒ 0 1 2 3 … ▒▒
//   └────────┘            ▒▒ 0 1 2 3 … ▒▒   ──▶  acc₀ acc₁ acc₂ ──▶ y   sums roll along a row: the oldest is finished at every step
//
// Each input row of a block is staged once, in a ring, as `dot` reads it (simd_int8.h): borders, ragged channels and a channel multiplier
// end there. With AVX-512 masked loads read rows where they lie instead. With VNNI a 3×3 window is three products an output vector; rows
// that a window lacks meet weights of zero. Where no more than half a block of channels is left, its other half computes the same channels
// of the next output row.
//
// Weights: [blocks][ceil(kernel_h / kGroup)][kernel_w][kGroup vectors][kLanes][kGroup rows], int8 with VNNI, else int16.
// bound: shuffles and products in cache. One task: a run of output rows of one block of one image.
#include <algorithm>
#include <type_traits>

#include "args.h"
#include "int8_epilogue.h"
#include "int8_rows.h"
#include "simd_interleave.h"
#include "runtime.h"

namespace kernelpress::KERNELPRESS_ISA {
namespace {

using Weight = std::conditional_t<kHasVnni, int8_t, int16_t>;
constexpr int64_t kWeightBlock = kBlock * kGroup;  // of one column of kGroup rows
constexpr int64_t kRowsWorthATask = 4;
constexpr int64_t kHalf = kBlock / 2;

// What a block of channels is computed with; vectors in the order of simd_interleave.h.
struct Block {
  const Weight* weight;
  int64_t first, channels;
  bool is_paired;  // channel kHalf + c is channel c, one output row below
  alignas(64) int32_t initial[kBlock];  // what the offset of staged values adds up to
  alignas(64) float scale[kBlock], bias[kBlock];
  bool is_bounded, is_plain;  // bytes without a residual; by an activation that clamps
};

Block block_of(const Int8DepthwiseConv2dArgs& a, const Int8Epilogue& epilogue, int64_t index) {
  const int64_t groups = ceil_div(a.window.kernel_h, kGroup);
  Block b;
  b.weight = reinterpret_cast<const Weight*>(a.weight) + index * groups * a.window.kernel_w * kWeightBlock;
  b.first = index * kBlock;
  b.channels = minimum(kBlock, a.channels * a.multiplier - b.first);
  b.is_paired = b.channels <= kHalf;
  b.is_bounded = !epilogue.residual && epilogue.gives_bounded_bytes(b.first, b.channels, a.window.kernel_h * a.window.kernel_w);
  b.is_plain = b.is_bounded && epilogue.activation.clamps;
  for (int at = 0; at < kBlock; ++at) {
    const int64_t c = b.is_paired ? channel_at(at) % kHalf : channel_at(at);
    const bool is_there = c < b.channels;
    const int32_t sum = is_there ? a.weight_sums[b.first + c] : 0;
    b.initial[at] = kHasVnni ? -(128 + static_cast<int32_t>(a.input_zero_point)) * sum : 0;
    b.scale[at] = is_there ? a.scale[b.first + c] : 0.0f;
    b.bias[at] = is_there && a.bias ? a.bias[b.first + c] : 0.0f;
  }
  return b;
}

// What stands for 0.
Staged padding_of(const Int8DepthwiseConv2dArgs& a) { return static_cast<Staged>(kHasVnni ? a.input_zero_point + 128 : 0); }

// A row of a block, in halves where it is paired; `x` is null outside of the image. Values beyond the channels are any: what `stage`
// writes behind them is written over by what comes next.
void stage_row(const Int8DepthwiseConv2dArgs& a, const Block& b, const int8_t* const (&x)[2], int64_t columns, Staged* to) {
  const int parts = b.is_paired ? 2 : 1;
  const int64_t size = kBlock / parts;
  for (int64_t w = 0; w < columns; ++w) {
    const int64_t column = w - a.window.pad_w;
    for (int part = 0; part < parts; ++part, to += size) {
      if (!x[part] || column < 0 || column >= a.in_w) {
        std::fill(to, to + size, padding_of(a));
        continue;
      }
      const int8_t* from = x[part] + column * a.x_stride;
      int8_t widened[kBlock];
      if (a.multiplier != 1) {
        for (int64_t i = 0; i < b.channels; ++i) widened[i] = from[(b.first + i) / a.multiplier];
      }
      stage(to, a.multiplier == 1 ? from + b.first : widened, b.channels, static_cast<int32_t>(a.input_zero_point));
    }
  }
}

// Where a row of `columns` outputs goes. What no plain block gives is kept for some pixels, and then finished in one call: a call at each
// pixel would take the registers from the sums that roll.
struct Target {
  static constexpr int64_t kKept = 16;

  const Int8Epilogue& epilogue;
  const Block& block;
  int64_t pixel;  // of the row's first output
  int64_t below;  // pixels from there to the row that a paired block computes as well, 0 without one
  int64_t columns;
  alignas(64) mutable int32_t kept[kKept * kBlock];

  Target(const Int8Epilogue& epilogue, const Block& block, int64_t pixel, int64_t below, int64_t columns)
      : epilogue(epilogue), block(block), pixel(pixel), below(below), columns(columns) {}

  KP_INLINE void finish(const Ints (&sums)[kGroup], int64_t q) const {
    if (__builtin_expect(block.is_plain, 1)) return finish_bytes(sums, q, [](Vec x) { return x; });
    const int64_t at = q % kKept;
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) store_ints(kept + at * kBlock + j * kLanes, sums[j]);
    if (at == kKept - 1 || q == columns - 1) finish_kept(q - at, at + 1);
  }

 private:
  template <class Activate>
  KP_INLINE void finish_bytes(const Ints (&sums)[kGroup], int64_t q, const Activate& activate) const {
    Ints steps[kGroup];
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) {
      const Vec value = fma_rounded_once(to_floats(sums[j]), load(block.scale + j * kLanes), load(block.bias + j * kLanes));
      steps[j] = rounded(activate(value) * epilogue.inverse_scale);
    }
    int8_t* y = static_cast<int8_t*>(epilogue.y) + (pixel + q) * epilogue.y_stride + block.first;
    if (below) return store_halves(y, y + below * epilogue.y_stride, steps, epilogue.bytes, block.channels);
    store_block(y, steps, epilogue.bytes, block.channels);
  }

  // Calls body(sums, q) for each pixel that was kept, the first of which is `first`.
  template <class Body>
  KP_INLINE void over_kept(int64_t first, int64_t count, const Body& body) const {
    for (int64_t i = 0; i < count; ++i) {
      Ints sums[kGroup];
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) sums[j] = load_ints(kept + i * kBlock + j * kLanes);
      body(sums, first + i);
    }
  }
  template <class Activate>
  KP_INLINE void finish_kept_bytes(int64_t first, int64_t count, const Activate& activate) const {
    over_kept(first, count, [&](const Ints (&sums)[kGroup], int64_t q) { finish_bytes(sums, q, activate); });
  }

  __attribute__((noinline)) void finish_kept(int64_t first, int64_t count) const {
    if (block.is_bounded) {
      if (epilogue.activation.kind == Activation::hardswish) {
        return finish_kept_bytes(first, count, [this](Vec x) { return epilogue.hard_swish(x); });
      }
      if (epilogue.activation.kind == Activation::silu) return finish_kept_bytes(first, count, [](Vec x) { return x * sigmoid(x); });
    }
    over_kept(first, count, [&](const Ints (&sums)[kGroup], int64_t q) {
      int32_t ordered[kBlock];
      in_order(sums, ordered);
      for (int64_t c = 0; c < block.channels; c += kLanes) {
        epilogue.finish(to_floats(load_ints(ordered + c)), pixel + q, block.first + c, block.channels - c);
        if (below) epilogue.finish(to_floats(load_ints(ordered + kHalf + c)), pixel + below + q, block.first + c, block.channels - c);
      }
    });
  }
};

KP_INLINE void start(const Block& b, Ints (&sums)[kGroup]) {
#pragma GCC unroll 4
  for (int j = 0; j < kGroup; ++j) sums[j] = load_ints(b.initial + j * kLanes);
}

KP_INLINE Ints weights_at(const Weight* weight, int j) { return load_ints(reinterpret_cast<const int32_t*>(weight + j * kLanes * kGroup)); }

KP_INLINE void add_products(const Ints (&values)[kGroup], const Weight* weight, Ints (&sums)[kGroup]) {
#pragma GCC unroll 4
  for (int j = 0; j < kGroup; ++j) dot(sums[j], values[j], weights_at(weight, j));
}

template <int kKernel>
constexpr int kGroupsOf = (kKernel + kGroup - 1) / kGroup;

// The columns of kKernel staged rows, one after the other.
template <int kKernel>
struct StagedColumns {
  const Staged* grouped[kGroupsOf<kKernel>][kGroup];
  int64_t at = 0;

  explicit StagedColumns(const Staged* const* rows) {
    for (int g = 0; g < kGroupsOf<kKernel>; ++g) {
      for (int r = 0; r < kGroup; ++r) grouped[g][r] = rows[minimum(g * kGroup + r, kKernel - 1)];
    }
  }
  KP_INLINE void read(int g, Ints (&values)[kGroup]) const { interleave(grouped[g], at, values); }
  KP_INLINE void next() { at += kBlock; }
};

#if defined(__AVX512F__) && defined(KP_VNNI)
// The columns of kKernel rows of an image; where it ends, and behind the channels, padding is read.
template <int kKernel, bool kPaired>
struct ColumnsInPlace {
  static constexpr int kParts = kPaired ? 2 : 1;
  const int8_t* rows[kParts][kKernel];
  __mmask64 some[kParts][kKernel];
  __m512i padding;
  int64_t column, in_w, x_stride;

  template <class RowAt>
  ColumnsInPlace(const Int8DepthwiseConv2dArgs& a, const Block& b, int64_t top, const RowAt& row_at)
      : padding(_mm512_set1_epi8(static_cast<char>(a.input_zero_point))), column(-a.window.pad_w), in_w(a.in_w), x_stride(a.x_stride) {
    const __mmask64 channels = b.channels >= 64 ? ~__mmask64{0} : (__mmask64{1} << b.channels) - 1;
    for (int part = 0; part < kParts; ++part) {
      for (int r = 0; r < kKernel; ++r) {
        const int8_t* row = row_at(top + part * a.window.stride_h + r * a.window.dilation_h);
        rows[part][r] = (row ? row : a.x) + b.first;
        some[part][r] = row ? channels : 0;
      }
    }
  }
  KP_INLINE __m512i pixel(int r) const {
    if (r >= kKernel) return _mm512_setzero_si512();
    const int64_t at = column * x_stride;
    if constexpr (!kPaired) return _mm512_mask_loadu_epi8(padding, some[0][r], rows[0][r] + at);
    const __m256i outside = _mm512_castsi512_si256(padding);
    const __m256i above = _mm256_mask_loadu_epi8(outside, static_cast<__mmask32>(some[0][r]), rows[0][r] + at);
    const __m256i below = _mm256_mask_loadu_epi8(outside, static_cast<__mmask32>(some[kParts - 1][r]), rows[kParts - 1][r] + at);
    return _mm512_inserti64x4(_mm512_castsi256_si512(above), below, 1);
  }
  KP_INLINE void read(int g, Ints (&values)[kGroup]) const {
    const __m512i up = _mm512_set1_epi8(static_cast<char>(0x80));
    if (__builtin_expect(column < 0 || column >= in_w, 0)) {
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) values[j].v = _mm512_xor_si512(padding, up);
      return;
    }
    __m512i bytes[kGroup];
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) bytes[r] = _mm512_xor_si512(pixel(g * kGroup + r), up);
    interleave(bytes[0], bytes[1], bytes[2], bytes[3], values);
  }
  KP_INLINE void next() { ++column; }
};
#endif

// A row of `count` outputs under kKernel × kKernel windows. Step t adds columns t · kStride … to the windows that they are under,
// sums[i] being that of output t − i.
template <int kKernel, int kStride, class Columns>
__attribute__((noinline)) void roll_row(const Block& block, Columns columns, int64_t count, const Target& target) {
  constexpr int kGroups = kGroupsOf<kKernel>, kLive = (kKernel + kStride - 1) / kStride;
  constexpr bool kHoldsWeights = kKernel * kGroups <= 3;
  Ints sums[kLive][kGroup], held[kHoldsWeights ? kKernel : 1][kGroup];
#pragma GCC unroll 4
  for (int s = 0; s < (kHoldsWeights ? kKernel : 0); ++s) {
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) held[s][j] = weights_at(block.weight + s * kWeightBlock, j);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLive; ++i) start(block, sums[i]);
  for (int64_t t = 0; t < count + kLive - 1; ++t) {
#pragma GCC unroll 2
    for (int e = 0; e < kStride; ++e, columns.next()) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        Ints values[kGroup];
        columns.read(g, values);
#pragma GCC unroll 8
        for (int i = 0; i < kLive; ++i) {
          const int s = i * kStride + e;
          if (s >= kKernel) continue;
#pragma GCC unroll 4
          for (int j = 0; j < kGroup; ++j) {
            if constexpr (kHoldsWeights) dot(sums[i][j], values[j], held[s][j]);
            else dot(sums[i][j], values[j], weights_at(block.weight + (g * kKernel + s) * kWeightBlock, j));
          }
        }
      }
    }
    if (t >= kLive - 1) target.finish(sums[kLive - 1], t - (kLive - 1));
#pragma GCC unroll 8
    for (int i = kLive - 1; i > 0; --i) {
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) sums[i][j] = sums[i - 1][j];
    }
    start(block, sums[0]);
  }
}

void row_of_any_window(const Window& window, const Block& block, const Staged* const* rows, int64_t count, const Target& target) {
  const int64_t groups = ceil_div(window.kernel_h, kGroup);
  for (int64_t q = 0; q < count; ++q) {
    Ints sums[kGroup];
    start(block, sums);
    for (int64_t g = 0; g < groups; ++g) {
      const Staged* grouped[kGroup];
      for (int r = 0; r < kGroup; ++r) grouped[r] = rows[minimum(g * kGroup + r, window.kernel_h - 1)];
      for (int64_t s = 0; s < window.kernel_w; ++s) {
        Ints values[kGroup];
        interleave(grouped, (q * window.stride_w + s * window.dilation_w) * kBlock, values);
        add_products(values, block.weight + (g * window.kernel_w + s) * kWeightBlock, sums);
      }
    }
    target.finish(sums, q);
  }
}

template <int kKernel>
bool rolls(const Window& w) {
  return w.kernel_h == kKernel && w.kernel_w == kKernel && w.dilation_w == 1 && w.stride_w <= 2;
}

template <int kKernel, class Columns>
void roll(const Window& w, const Block& block, const Columns& columns, int64_t count, const Target& target) {
  if (w.stride_w == 1) roll_row<kKernel, 1>(block, columns, count, target);
  else roll_row<kKernel, 2>(block, columns, count, target);
}

// Staged columns of a row, those included that a rolling row reads ahead.
int64_t staged_columns(const Int8DepthwiseConv2dArgs& a) {
  return (a.out_w - 1) * a.window.stride_w + a.window.reach_w() + a.window.stride_w;
}

// Output rows [begin, end) of one block of one image, whose input row h lies in slot h mod `capacity`.
struct Rows {
  const Int8DepthwiseConv2dArgs& a;
  const Int8Epilogue& epilogue;
  const Block block;
  const int8_t* x;
  int64_t image, begin, end, capacity;

  Rows(const Int8DepthwiseConv2dArgs& a, const Int8Epilogue& epilogue, int64_t index, int64_t image, int64_t begin, int64_t end, int64_t capacity)
      : a(a),
        epilogue(epilogue),
        block(block_of(a, epilogue, index)),
        x(a.x + image * a.in_h * a.in_w * a.x_stride),
        image(image),
        begin(begin),
        end(end),
        capacity(capacity) {}

  void compute() const {
    if (!in_place<3>() && !in_place<5>() && !in_place<7>()) staged();
  }

 private:
  const int8_t* row_at(int64_t h) const { return h >= 0 && h < a.in_h ? x + h % capacity * a.in_w * a.x_stride : nullptr; }
  int64_t step() const { return block.is_paired ? 2 : 1; }
  int64_t top_of(int64_t p) const { return p * a.window.stride_h - a.window.pad_h; }
  Target target_of(int64_t p) const {
    return {epilogue, block, (image * a.out_h + p) * a.out_w, block.is_paired && p + 1 < end ? a.out_w : 0, a.out_w};
  }

  template <int kKernel>
  bool in_place() const {
#if defined(__AVX512F__) && defined(KP_VNNI)
    if (a.multiplier != 1 || !rolls<kKernel>(a.window)) return false;
    const auto found = [this](int64_t h) { return row_at(h); };
    for (int64_t p = begin; p < end; p += step()) {
      if (block.is_paired) roll<kKernel>(a.window, block, ColumnsInPlace<kKernel, true>(a, block, top_of(p), found), a.out_w, target_of(p));
      else roll<kKernel>(a.window, block, ColumnsInPlace<kKernel, false>(a, block, top_of(p), found), a.out_w, target_of(p));
    }
    return true;
#else
    return false;
#endif
  }

  void staged() const {
    const Window& window = a.window;
    const int64_t columns = staged_columns(a), reach = window.reach_h();
    const int64_t row_size = (columns + 1) * kBlock;  // `stage` writes behind the last column
    const int64_t pointers = ceil_div(window.kernel_h * static_cast<int64_t>(sizeof(const Staged*)), sizeof(float));
    float* scratch = thread_scratch(round_up(pointers, 16) + ceil_div((reach + 1) * row_size * static_cast<int64_t>(sizeof(Staged)), sizeof(float)));
    const Staged** rows = reinterpret_cast<const Staged**>(scratch);
    Staged* ring = reinterpret_cast<Staged*>(scratch + round_up(pointers, 16));
    Staged* outside = ring + reach * row_size;
    std::fill(outside, outside + row_size, padding_of(a));
    const auto staged_at = [&](int64_t h) {
      const bool is_there = row_at(h) || (block.is_paired && row_at(h + window.stride_h));
      return is_there ? ring + (h + window.pad_h) % reach * row_size : nullptr;
    };
    for (int64_t p = begin, made = -window.pad_h; p < end; p += step()) {
      const int64_t top = top_of(p);
      for (int64_t h = maximum(made, top); h < top + reach; ++h) {
        Staged* to = staged_at(h);
        if (!to) continue;
        stage_row(a, block, {row_at(h), row_at(h + window.stride_h)}, columns, to);
      }
      made = maximum(made, top + reach);
      for (int64_t r = 0; r < window.kernel_h; ++r) {
        const Staged* found = staged_at(top + r * window.dilation_h);
        rows[r] = found ? found : outside;
      }
      const Target target = target_of(p);
      if (rolls<3>(window)) roll<3>(window, block, StagedColumns<3>(rows), a.out_w, target);
      else if (rolls<5>(window)) roll<5>(window, block, StagedColumns<5>(rows), a.out_w, target);
      else if (rolls<7>(window)) roll<7>(window, block, StagedColumns<7>(rows), a.out_w, target);
      else row_of_any_window(window, block, rows, a.out_w, target);
    }
  }
};

}  // namespace

void int8_depthwise_rows(const Int8DepthwiseConv2dArgs& a, int64_t image, int64_t begin, int64_t end, int64_t capacity) {
  const Int8Epilogue epilogue(a);
  const int64_t blocks = ceil_div(a.channels * a.multiplier, kBlock);
  for (int64_t index = 0; index < blocks; ++index) Rows(a, epilogue, index, image, begin, end, capacity).compute();
}

void int8_depthwise_conv2d(const Int8DepthwiseConv2dArgs& a) {
  const Int8Epilogue epilogue(a);
  const int64_t blocks = ceil_div(a.channels * a.multiplier, kBlock), planes = a.batch * blocks, threads = thread_count();
  const int64_t cuts = a.batch % threads == 0 ? 1 : maximum(1, minimum(threads, a.out_h / kRowsWorthATask));
  parallel(planes * cuts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task % planes, cut = task / planes;  // a thread keeps to its rows, as products before and after do
      Rows(a, epilogue, plane % blocks, plane / blocks, a.out_h * cut / cuts, a.out_h * (cut + 1) / cuts, a.in_h).compute();
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
