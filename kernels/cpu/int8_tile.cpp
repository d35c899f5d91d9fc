// The register tile of int8_tile.h: its function for every number of rows and vectors, and the loop over tiles.
#include "int8_tile.h"

#include <utility>

namespace kernelpress::KERNELPRESS_ISA {
namespace {

constexpr int kAheadLines = 4;  // tiles that fetch a part of the next panel each

// One tile's place in the product; `bounded`: no value can be NaN or leave what an int32 holds.
struct Place {
  int64_t row, channel;
  bool bounded;
};

constexpr int kMostAddresses = 9;  // of rows, that there are registers for

// Rows that one address serves. A tile that has one for each row may cross lines; for higher ones it is base, base + stride,
// base + 2 · stride, on one line.
constexpr int rows_an_address(int vecs) { return int8_tile_rows(vecs) > kMostAddresses ? 3 : 1; }

template <int kRows, int kVecs>
struct RowAddresses {
  static constexpr int kEach = rows_an_address(kVecs), kCount = (kRows + kEach - 1) / kEach;
  const Staged* base[kCount];
  int64_t row_stride;

  KP_INLINE RowAddresses(const Int8TileInput& in, int64_t column) : row_stride(in.row_stride) {
    const Staged* row = in.a + column * row_stride;
    const int64_t to_next_line = kEach > 1 || column + kRows <= in.width ? 0 : in.line_stride - in.width * row_stride;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m += kEach) {
      base[m / kEach] = row + m * row_stride;
      if (to_next_line && ++column == in.width) column = 0, row += to_next_line;
    }
  }
  KP_INLINE RowAddresses(const RowAddresses& from, int64_t offset) : row_stride(from.row_stride) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) base[i] = from.base[i] + offset;
  }
  KP_INLINE const Staged* at(int m) const { return base[m / kEach] + m % kEach * row_stride; }
};

template <int kRows, int kVecs>
KP_INLINE void accumulate(Ints (&sums)[kRows][kVecs], const RowAddresses<kRows, kVecs>& rows, const int8_t* b, int64_t groups,
                          const int8_t* ahead) {
  constexpr int64_t kStep = int64_t{kVecs} * kLanes * kGroup;
  for (int64_t k = 0; k < groups; ++k) {
    Ints weight[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) weight[v] = load_weights(b + k * kStep + v * kLanes * kGroup);
    __builtin_prefetch(ahead + k * 64, 0, 2);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      int32_t group;
      std::memcpy(&group, rows.at(m) + k * kGroup, sizeof group);
      const Ints x = broadcast_int(group);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) dot(sums[m][v], x, weight[v]);
    }
  }
}

template <class Activate>
KP_INLINE void finish_stored(const Int8Product& p, const int32_t* sums, int64_t rows, int64_t vecs, const Place& place,
                             const Activate& activate) {
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = place.row + m;
    for (int64_t v = 0; v < vecs; ++v) {
      const int64_t channel = place.channel + v * kLanes;
      Vec value = to_floats(load_ints(sums + (m * vecs + v) * kLanes));
      if (p.row_scale) value = value * broadcast(p.row_scale[row]);
      p.epilogue.finish(value, row, channel, p.c_out - channel, activate);
    }
  }
}

// Bounded int8 results in whole vectors of bytes. `kPlain`: of whole vectors, and without a residual. `activate` may leave clamping to the
// range of bytes.
template <bool kPlain, int kRows, int kVecs, class Activate>
KP_INLINE void finish_bytes(const Int8Product& p, Ints (&sums)[kRows][kVecs], const Place& place, const Activate& activate) {
  const Int8Epilogue& e = p.epilogue;
  const int64_t columns = p.c_out - place.channel;
  const auto lanes = [&](int v) { return kPlain || v + 1 < kVecs ? kLanes : columns - v * kLanes; };
  Vec scale[kVecs], bias[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    scale[v] = load_up_to(e.scale + place.channel + v * kLanes, lanes(v));
    bias[v] = e.bias ? load_up_to(e.bias + place.channel + v * kLanes, lanes(v)) : zero();
  }
  int8_t* y = static_cast<int8_t*>(e.y) + place.row * e.y_stride + place.channel;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m, y += e.y_stride) {
    Vec values[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) values[v] = fma_rounded_once(to_floats(sums[m][v]), scale[v], bias[v]);
    if (!kPlain && e.residual) {
      const int8_t* residual = static_cast<const int8_t*>(e.residual) + (place.row + m) * e.residual_stride + place.channel;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) values[v] = e.plus_residual(values[v], residual + v * kLanes, lanes(v));
    }
    Ints steps[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) steps[v] = rounded(activate(values[v]) * e.inverse_scale);
    store_bytes(y, steps, e.bytes, kPlain ? kVecs * kLanes : columns);
  }
}

// Rows of stored sums as `finish_bytes` takes them.
template <int kVecs, class Activate>
KP_INLINE void finish_stored_bytes(const Int8Product& p, const int32_t* stored, int64_t rows, Place place, const Activate& activate) {
  const bool plain = !p.epilogue.residual && p.c_out - place.channel >= kVecs * kLanes;
  for (int64_t m = 0; m < rows; ++m, ++place.row, stored += kVecs * kLanes) {
    Ints sums[1][kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[0][v] = load_ints(stored + v * kLanes);
    if (plain) finish_bytes<true>(p, sums, place, activate);
    else finish_bytes<false>(p, sums, place, activate);
  }
}

template <class Activate>
void finish_stored_as(const Int8Product& p, const int32_t* sums, int64_t rows, int64_t vecs, const Place& place, const Activate& activate) {
  if (!place.bounded) return finish_stored(p, sums, rows, vecs, place, activate);
  if (vecs == 1) return finish_stored_bytes<1>(p, sums, rows, place, activate);
  if (vecs == 2) return finish_stored_bytes<2>(p, sums, rows, place, activate);
  if constexpr (kInt8Vecs > 2) {
    if (vecs == 3) return finish_stored_bytes<3>(p, sums, rows, place, activate);
    finish_stored_bytes<4>(p, sums, rows, place, activate);
  }
}

constexpr auto kClamped = [](Vec x) { return x; };

// Sums that were stored, [rows][vecs * kLanes], through all that an epilogue may be.
__attribute__((noinline)) void finish_any(const Int8Product& p, const int32_t* sums, int64_t rows, int64_t vecs, const Place& place) {
  const Int8Epilogue& e = p.epilogue;
  if (place.bounded && e.activation.clamps) return finish_stored_as(p, sums, rows, vecs, place, kClamped);
  switch (e.activation.kind) {
    case Activation::hardswish: return finish_stored_as(p, sums, rows, vecs, place, [&e](Vec x) { return e.hard_swish(x); });
    case Activation::silu: return finish_stored_as(p, sums, rows, vecs, place, [](Vec x) { return x * sigmoid(x); });
    default: return finish_stored_as(p, sums, rows, vecs, place, [&e](Vec x) { return e.activated(x); });
  }
}

template <int kRows, int kVecs>
void compute_tile(const Int8Product& p, const Int8TileInput& in, int64_t column, const int8_t* panel, const int8_t* ahead, const Place& place) {
  const RowAddresses<kRows, kVecs> rows(in, column);
  Ints sums[kRows][kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const int64_t channel = place.channel + v * kLanes;
    const Ints of_weights = kHasVnni ? load_ints_up_to(p.weight_sums + channel, p.c_out - channel) : broadcast_int(0);
    const Ints first = of_weights * broadcast_int(-128 - p.zero_point);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) sums[m][v] = first;
    if (!kHasVnni || !p.row_zero_point) continue;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) sums[m][v] = of_weights * broadcast_int(-128 - p.row_zero_point[place.row + m]);
  }
  for (int64_t g = 0; g < in.segments; ++g) {
    const int64_t k = g * in.groups;
    accumulate<kRows, kVecs>(sums, {rows, in.segment_offsets[g]}, panel + k * kVecs * kLanes * kGroup, in.groups, ahead + k * 64);
  }
  if (__builtin_expect(place.bounded && p.epilogue.activation.clamps, 1)) {
    if (!p.epilogue.residual && p.c_out - place.channel >= kVecs * kLanes) return finish_bytes<true>(p, sums, place, kClamped);
    return finish_bytes<false>(p, sums, place, kClamped);
  }
  alignas(64) int32_t stored[kRows * kVecs * kLanes];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store_ints(stored + (m * kVecs + v) * kLanes, sums[m][v]);
  }
  finish_any(p, stored, kRows, kVecs, place);
}

using TileFunction = void (*)(const Int8Product&, const Int8TileInput&, int64_t, const int8_t*, const int8_t*, const Place&);

template <int kVecs, int... kIndex>
KP_INLINE TileFunction tile_with(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr TileFunction kTable[] = {compute_tile<kIndex + 1, kVecs>...};
  return kTable[rows - 1];
}

TileFunction tile_function(int64_t rows, int64_t vecs) {
  if (vecs == 1) return tile_with<1>(rows, std::make_integer_sequence<int, int8_tile_rows(1)>{});
  if (vecs == 2) return tile_with<2>(rows, std::make_integer_sequence<int, int8_tile_rows(2)>{});
  if constexpr (kInt8Vecs > 2) {
    if (vecs == 3) return tile_with<3>(rows, std::make_integer_sequence<int, int8_tile_rows(3)>{});
    return tile_with<4>(rows, std::make_integer_sequence<int, int8_tile_rows(4)>{});
  }
  return nullptr;
}

}  // namespace

void finish(const Int8Product& p, const int32_t* sums, int64_t channel, int64_t first_row, int64_t rows) {
  const int64_t columns = minimum(kInt8Panel, p.c_out - channel), vecs = ceil_div(columns, kLanes);
  const Place place{first_row, channel, p.epilogue.gives_bounded_bytes(channel, columns, p.depth)};
  finish_any(p, sums, rows, vecs, place);
}

void multiply(const Int8Product& p, const Int8TileInput& in, int64_t panel, int64_t next, int64_t first_row, int64_t rows) {
  const int64_t channel = panel * kInt8Panel, vecs = minimum(kInt8Vecs, ceil_div(p.c_out - channel, kLanes));
  const int8_t* weight = p.weight + channel * p.depth;
  const int64_t quarter = in.segments * in.groups * 64;
  const int64_t run = rows_an_address(static_cast<int>(vecs)) > 1 ? minimum(rows, in.width) : rows;
  const int64_t tiles = ceil_div(run, int8_tile_rows(static_cast<int>(vecs))), height = run / tiles, higher = run % tiles;
  const bool bounded = !p.row_scale && p.epilogue.gives_bounded_bytes(channel, minimum(kInt8Panel, p.c_out - channel), p.depth);
  Int8TileInput part = in;
  int64_t column = 0;
  for (int64_t t = 0, begin = 0; begin < rows; ++t) {
    const int64_t count = minimum(rows - begin, height + (t % tiles < higher));
    const bool fetches = next != panel && t < kAheadLines;
    tile_function(count, vecs)(p, part, column, weight, fetches ? p.weight + next * kInt8Panel * p.depth + t * quarter : weight,
                               {first_row + begin, channel, bounded});
    begin += count, column += count;
    for (; column >= in.width; column -= in.width) part.a += in.line_stride;
  }
}

}  // namespace kernelpress::KERNELPRESS_ISA
