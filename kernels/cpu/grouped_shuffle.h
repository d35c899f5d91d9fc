// The channel shuffle of one pixel:     to[k · groups + i] = from.group(i)[k]
//
//   group 0   a0 a1 a2 …       a block: one vector of every group becomes as many of the output. Each of those spreads the same
//   group 1   b0 b1 b2 …       neighbours of all groups over its lanes, by one permutation, and merges them by masks; two, four
//   to        a0 b0 a1 b1 …    and eight groups are interleaved by halves, in stages. The last block overlaps the one before it.
//
//   bound: stores; each vector stored costs a permutation per group, or per stage
#pragma once

#include "simd.h"

namespace kernelpress::KERNELPRESS_ISA {

// The groups of one pixel: `groups_in_a` of them one behind the other from a on, the others from b on.
struct ShuffledPixel {
  const float *a, *b;
  int64_t groups_in_a;

  KP_INLINE const float* group(int64_t i, int64_t per_group) const {
    return i < groups_in_a ? a + i * per_group : b + (i - groups_in_a) * per_group;
  }
};

class Shuffle {
 public:
  Shuffle(int64_t groups, int64_t per_group) : groups_(groups), per_group_(per_group) {
    for (int64_t v = 0; v < minimum(groups, kMostPermuted); ++v) {
      int32_t from[kLanes], taken[kLanes];
      for (int l = 0; l < kLanes; ++l) from[l] = static_cast<int32_t>((v * kLanes + l) / groups), taken[l] = l % groups == v;
      spread_[v] = load_ints(from), every_[v] = mask_of(load_ints(taken));
    }
  }

  // `finish(value, channel, lanes)` is what is stored of the value for `lanes` channels of `to`.
  template <class Finish>
  KP_INLINE void pixel(const ShuffledPixel& from, float* to, const Finish& finish) const {
    switch (groups_) {
      case 2: return permuted<2>(from, to, finish);
      case 3: return permuted<3>(from, to, finish);
      case 4: return permuted<4>(from, to, finish);
      case 8: return permuted<8>(from, to, finish);
      default: return groups_ <= kMostPermuted ? permuted<0>(from, to, finish) : collected(from, to, finish);
    }
  }

 private:
  static constexpr int64_t kMostPermuted = 8;  // more groups are collected lane by lane

  template <int kGroups, class Finish>
  void permuted(const ShuffledPixel& from, float* to, const Finish& finish) const {
    if (per_group_ < kLanes) return block<kGroups, false>(from, 0, to, finish);
    for (int64_t k = 0; k < per_group_; k += kLanes) block<kGroups, true>(from, k = minimum(k, per_group_ - kLanes), to, finish);
  }

  // Channels k … k + kLanes - 1 of every group; all of them, fewer, where the block is not whole.
  template <int kGroups, bool kWhole, class Finish>
  KP_INLINE void block(const ShuffledPixel& from, int64_t k, float* to, const Finish& finish) const {
    const int64_t groups = kGroups ? kGroups : groups_, channels = (kWhole ? kLanes : per_group_) * groups;
    constexpr bool kInStages = kGroups == 2 || kGroups == 4 || kGroups == 8;
    Vec values[kGroups ? kGroups : kMostPermuted] = {};
#pragma GCC unroll 8
    for (int64_t i = 0; i < groups; ++i) {
      const float* group = from.group(i, per_group_) + k;
      values[i] = kWhole ? load(group) : load_up_to(group, per_group_);
    }
    if constexpr (kInStages) {
#pragma GCC unroll 3
      for (int stage = 1; stage < kGroups; stage *= 2) interleave_halves(values);
    }
    int64_t shift = 0;  // the group that lane 0 of an output vector belongs to
#pragma GCC unroll 8
    for (int64_t v = 0; v < groups; ++v) {
      if (!kWhole && v * kLanes >= channels) break;
      Vec merged;
      if constexpr (kInStages) {
        merged = values[v];
      } else {
        merged = permute(values[0], spread_[v]);
#pragma GCC unroll 8
        for (int64_t i = 1; i < groups; ++i) {
          merged = choose(every_[i < shift ? i + groups - shift : i - shift], permute(values[i], spread_[v]), merged);
        }
      }
      const int64_t c = v * kLanes, count = kWhole ? kLanes : channels - c;
      store_up_to(to + k * groups + c, finish(merged, k * groups + c, count), count);
      shift = (shift + kLanes) % groups;
    }
  }

  // Each vector of the first half with its partner in the second; log2(kCount) times over, that interleaves them all.
  template <int kCount>
  static KP_INLINE void interleave_halves(Vec (&values)[kCount]) {
    Vec mixed[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount / 2; ++i) {
      mixed[2 * i] = interleaved_low(values[i], values[i + kCount / 2]);
      mixed[2 * i + 1] = interleaved_high(values[i], values[i + kCount / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) values[i] = mixed[i];
  }

  template <class Finish>
  void collected(const ShuffledPixel& from, float* to, const Finish& finish) const {
    const int64_t channels = groups_ * per_group_;
    for (int64_t c = 0, i = 0, k = 0; c < channels; c += kLanes) {
      const int64_t count = channels - c;
      float values[kLanes] = {};
      for (int64_t l = 0; l < minimum(kLanes, count); ++l) {
        values[l] = from.group(i, per_group_)[k];
        if (++i == groups_) i = 0, ++k;
      }
      store_up_to(to + c, finish(load(values), c, count), count);
    }
  }

  int64_t groups_, per_group_;
  Ints spread_[kMostPermuted];    // where the lanes of a block's v-th output vector come from in the vector of their group
  LaneMask every_[kMostPermuted];  // lanes from `first` on, in steps of `groups`
};

}  // namespace kernelpress::KERNELPRESS_ISA
