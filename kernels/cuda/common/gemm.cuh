// The tensor-core main loop of every family: C[m, n] = Σ_k A[m, k] · B[n, k], both operands K-major.
//
// It counts K in bytes. An `mma` A fragment is 16 rows × 32 bytes and a B fragment 8 columns × 32 bytes for f16, bf16, tf32
// and s8 alike, so one loop serves all; `Mma<T>` names the instruction.
//
//        B: kTileN rows ──┐            one stage in shared memory: kStepBytes of K of every row of A and of B,
//                         ▼            16-byte chunks swizzled so that `ldmatrix` and the copies meet no bank twice
//     A: ┌──────┐  ┌───────────┐
//     kTileM    │  │ kWarpsM × │       step s   computes stage s mod kStages, from fragments loaded one 32-byte slice ahead,
//       rows    │  │ kWarpsN   │       while the copies of steps s+1 … s+kStages-1 are in flight (cp.async)
//        └──────┘  └───────────┘       one barrier a step: before the first fragments of the next stage are loaded
//
// Where A and B come from is the business of their sources (gemm_sources.cuh), where C goes that of gemm_store.cuh: a loop on
// other instructions can take this one's place as long as it fills the same `Accumulators`.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "simt.cuh"

namespace kernelpress::cuda {

template <class T>
struct Mma;

template <>
struct Mma<Half> {
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
  }
};

template <>
struct Mma<BFloat16> {
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
  }
};

template <>
struct Mma<float> {
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

template <>
struct Mma<int8_t> {
  __device__ __forceinline__ static void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k32_s8(d, a, b);
  }
};

// What a main loop is specialised for.
//   kStepBytes  64 or 128 bytes of K per stage
//   kAccess     bytes that one copy moves: 16 or 4 (cp.async), or sizeof(T) where rows are aligned to nothing else
template <class T_, int kTileM_, int kTileN_, int kStepBytes_, int kWarpsM_, int kWarpsN_, int kStages_, int kAccess_ = 16>
struct GemmConfig {
  using T = T_;
  using Accumulator = typename Element<T>::Accumulator;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kStepBytes = kStepBytes_, kStages = kStages_, kAccess = kAccess_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kTileM / kWarpsM, kWarpN = kTileN / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static constexpr int kSlices = kStepBytes / 32;
  static constexpr int kStep = kStepBytes / sizeof(T);  // elements of K
  static constexpr int kStageBytesA = kTileM * kStepBytes, kStageBytesB = kTileN * kStepBytes;

  static_assert(kStepBytes == 64 || kStepBytes == 128, "the swizzles are made for these");
  static_assert(kTileM % (16 * kWarpsM) == 0 && kTileN % (16 * kWarpsN) == 0, "B fragments are loaded in pairs");
  static_assert(kStages >= 2, "a stage is filled while another is read");
};

// Byte offset of a 16-byte chunk in a stage: the eight rows of one `ldmatrix` matrix lie in eight different groups of banks.
template <int kStepBytes>
__device__ __forceinline__ int swizzled_offset(int row, int chunk) {
  if constexpr (kStepBytes == 128) return row * 128 + ((chunk ^ (row & 7)) << 4);
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// A warp's part of C, as `mma` leaves it: [m][n][0, 1] row group, columns 2 pair and + 1; [2, 3] row group + 8.
template <class Config>
struct Accumulators {
  typename Config::Accumulator value[Config::kFragmentsM][Config::kFragmentsN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Config::kFragmentsM; ++m)
#pragma unroll
      for (int n = 0; n < Config::kFragmentsN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) value[m][n][i] = 0;
  }
};

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

// First row and column of this warp's part of the tile.
template <class Config>
__device__ __forceinline__ int warp_row() {
  return warp_index() % Config::kWarpsM * Config::kWarpM;
}
template <class Config>
__device__ __forceinline__ int warp_column() {
  return warp_index() / Config::kWarpsM * Config::kWarpN;
}

// Which rows of a tile of kRows a thread copies: row(0), row(0) + kRowStep, …; always the same chunk of them.
template <class Config, int kRows>
struct CopyShare {
  static constexpr int kChunks = Config::kStepBytes / 16;
  static constexpr int kRowStep = Config::kThreads / kChunks;
  static constexpr int kCount = (kRows + kRowStep - 1) / kRowStep;
  static constexpr bool kEven = kRows % kRowStep == 0;

  __device__ __forceinline__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  __device__ __forceinline__ static int row(int i) { return static_cast<int>(threadIdx.x) / kChunks + i * kRowStep; }
};

// Copies this thread's share of one step into a stage and moves its cursor on to the next step.
template <class Config, int kRows, class Cursor>
__device__ __forceinline__ void copy_step(unsigned char* stage, Cursor& cursor) {
  using T = typename Config::T;
  using Share = CopyShare<Config, kRows>;
  constexpr int kPieces = 16 / Config::kAccess, kPiece = Config::kAccess / sizeof(T);
  [[maybe_unused]] constexpr int kTogether = Config::kAccess < 4 ? 2 : kPieces;  // single elements wait in registers
#pragma unroll kTogether
  for (int piece = 0; piece < kPieces; ++piece) {
    cursor.seek();
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const int row = Share::row(i);
      if (!Share::kEven && row >= kRows) break;
      unsigned char* target =
          stage + swizzled_offset<Config::kStepBytes>(row, Share::chunk()) + piece * Config::kAccess;
      const T* source;
      const bool valid = cursor.find(i, source);
      if constexpr (Cursor::kPads && Config::kAccess >= 4) {
        if (!valid) {
          const uint32_t word = cursor.padding_word();
#pragma unroll
          for (int at = 0; at < Config::kAccess; at += 4) *reinterpret_cast<uint32_t*>(target + at) = word;
          continue;
        }
      }
      if constexpr (Config::kAccess == 16) {
        cp_async_16(target, source, valid);
      } else if constexpr (Config::kAccess == 4) {
        cp_async_4(target, source, valid);
      } else {
        static_assert(kPiece == 1);
        *reinterpret_cast<T*>(target) = valid ? *source : cursor.padding();
      }
    }
    cursor.advance(piece + 1 < kPieces ? kPiece : Config::kStep - (kPieces - 1) * kPiece);
  }
}

// A transform of A's fragments between shared memory and `mma` may take this one's place: it is called with the fragment as it lies
// in memory, the index m of the fragment in the warp's part, and the element of K at which its 32 bytes begin.
struct Untransformed {
  __device__ __forceinline__ void operator()(uint32_t (&)[4], int, int64_t) const {}
};

template <class Config>
struct Fragments {
  uint32_t a[Config::kFragmentsM][4];
  uint32_t b[Config::kFragmentsN / 2][4];

  __device__ __forceinline__ void load(const unsigned char* stage_a, const unsigned char* stage_b, int slice) {
    constexpr int kStepBytes = Config::kStepBytes;
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < Config::kFragmentsM; ++m) {
      const int row = warp_row<Config>() + 16 * m + lane % 16;
      ldmatrix_x4(a[m], stage_a + swizzled_offset<kStepBytes>(row, 2 * slice + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < Config::kFragmentsN / 2; ++n) {
      const int row = warp_column<Config>() + 16 * n + lane % 8 + lane / 16 * 8;
      ldmatrix_x4(b[n], stage_b + swizzled_offset<kStepBytes>(row, 2 * slice + lane / 8 % 2));
    }
  }

  template <class Transform>
  __device__ __forceinline__ void multiply(Accumulators<Config>& sums, const Transform& transform, int64_t k) {
#pragma unroll
    for (int m = 0; m < Config::kFragmentsM; ++m) {
      transform(a[m], m, k);
      round_to_tf32(a[m]);
    }
#pragma unroll
    for (int n = 0; n < Config::kFragmentsN / 2; ++n) round_to_tf32(b[n]);
#pragma unroll
    for (int n = 0; n < Config::kFragmentsN; ++n) {
      const uint32_t column[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
#pragma unroll
      for (int m = 0; m < Config::kFragmentsM; ++m) Mma<typename Config::T>::multiply(sums.value[m][n], a[m], column);
    }
  }

 private:
  // By itself the instruction would cut fp32 off.
  __device__ __forceinline__ static void round_to_tf32(uint32_t (&words)[4]) {
    if constexpr (std::is_same_v<typename Config::T, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value;
        memcpy(&value, &words[i], 4);
        words[i] = to_tf32(value);
      }
    }
  }
};

// One block's way through K: stages in shared memory, and this thread's cursors in the sources. Every thread of the block takes part.
//
//     Pipeline<…> pipeline(shared, a, b);
//     pipeline.start(first_row, first_column, 0, steps);        copies begin
//     pipeline.run(sums);                                       adds the products of all steps
//
// `shared` is 128-byte aligned, of `bytes(steps)`. After `run` all copies have landed, but other warps may still read `shared`:
// `block_barrier()` before it is used again, by another `start` for instance, which may come before this tile's sums are stored.
// A resident operand has a stage for every step in memory of its own, filled before `run`, which has a barrier before it reads.
template <class Config, class SourceA, class SourceB>
class Pipeline {
 public:
  static constexpr int kStageBytes =
      (SourceA::kResident ? 0 : Config::kStageBytesA) + (SourceB::kResident ? 0 : Config::kStageBytesB);
  static constexpr int64_t bytes(int64_t steps) { return kStageBytes * (steps < Config::kStages ? steps : Config::kStages); }

  __device__ __forceinline__ Pipeline(unsigned char* shared, const SourceA& a, const SourceB& b)
      : shared_(shared), source_a_(a), source_b_(b), cursor_a_(a), cursor_b_(b) {}

  // From element first_k on; the tile begins at these rows of A and of B.
  __device__ __forceinline__ void start(int64_t first_row, int64_t first_column, int64_t first_k, int steps) {
    first_k_ = first_k;
    steps_ = steps;
    cursor_a_.start(first_row, first_k);
    cursor_b_.start(first_column, first_k);
#pragma unroll
    for (int step = 0; step < Config::kStages - 1; ++step) {
      if (step < steps) copy(step);
      cp_async_commit();
    }
  }

  template <class Transform = Untransformed>
  __device__ __forceinline__ void run(Accumulators<Config>& sums, const Transform& transform = {}) {
    constexpr int kStages = Config::kStages, kSlices = Config::kSlices;
    constexpr int kSlice = Config::kStep / kSlices;  // elements of K
    if (steps_ == 0) return;
    Fragments<Config> fragments[2];
    cp_async_wait<kStages - 2>();
    block_barrier();
    fragments[0].load(stage_a(0, 0), stage_b(0, 0), 0);
    int read = 0, write = kStages - 1;
#pragma unroll 1
    for (int step = 0; step < steps_; ++step) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        Fragments<Config>& next = fragments[(slice + 1) % 2];
        if (slice + 1 < kSlices) {
          next.load(stage_a(step, read), stage_b(step, read), slice + 1);
        } else {
          read = read + 1 == kStages ? 0 : read + 1;
          if (step + 1 < steps_) {
            cp_async_wait<kStages - 2>();
            block_barrier();
            next.load(stage_a(step + 1, read), stage_b(step + 1, read), 0);
          }
        }
        if (slice == 0) {
          // Into the stage of the step before, whose last fragments were loaded ahead of the barrier just passed.
          if (step + kStages - 1 < steps_) {
            copy(write);
            write = write + 1 == kStages ? 0 : write + 1;
          }
          cp_async_commit();
        }
        const int64_t k = first_k_ + static_cast<int64_t>(step) * Config::kStep + slice * kSlice;
        fragments[slice % 2].multiply(sums, transform, k);
      }
    }
  }

 private:
  __device__ __forceinline__ void copy(int slot) {
    unsigned char* const stage = shared_ + slot * kStageBytes;
    if constexpr (!SourceA::kResident) copy_step<Config, Config::kTileM>(stage, cursor_a_);
    if constexpr (!SourceB::kResident) copy_step<Config, Config::kTileN>(stage + kStageBytes - Config::kStageBytesB, cursor_b_);
  }
  __device__ __forceinline__ const unsigned char* stage_a(int step, int slot) const {
    if constexpr (SourceA::kResident) return source_a_.base + step * Config::kStageBytesA;
    return shared_ + slot * kStageBytes;
  }
  __device__ __forceinline__ const unsigned char* stage_b(int step, int slot) const {
    if constexpr (SourceB::kResident) return source_b_.base + step * Config::kStageBytesB;
    return shared_ + slot * kStageBytes + (kStageBytes - Config::kStageBytesB);
  }

  unsigned char* shared_;
  const SourceA& source_a_;
  const SourceB& source_b_;
  typename SourceA::template Cursor<CopyShare<Config, Config::kTileM>> cursor_a_;
  typename SourceB::template Cursor<CopyShare<Config, Config::kTileN>> cursor_b_;
  int64_t first_k_;
  int steps_;
};

// One tile of one block, from start to end: see Pipeline.
template <class Config, class SourceA, class SourceB, class Transform = Untransformed>
__device__ __forceinline__ void multiply_accumulate(Accumulators<Config>& sums, unsigned char* shared, const SourceA& a,
                                                    const SourceB& b, int64_t first_row, int64_t first_column, int64_t first_k, int steps,
                                                    const Transform& transform = {}) {
  Pipeline<Config, SourceA, SourceB> pipeline(shared, a, b);
  pipeline.start(first_row, first_column, first_k, steps);
  pipeline.run(sums, transform);
}

// Which tile a block computes: tiles of C in groups of kGroup rows of tiles, so that blocks running at the same time share their
// operands in the second-level cache. There are fewer than 2³¹ tiles.
struct TileIndex {
  int64_t m, n;
};

template <int kGroup = 8>
__device__ __forceinline__ TileIndex grouped_tile(int64_t index, int64_t tiles_m, int64_t tiles_n) {
  const uint32_t in_group = static_cast<uint32_t>(kGroup * tiles_n);
  const uint32_t group = static_cast<uint32_t>(index) / in_group, within = static_cast<uint32_t>(index) % in_group;
  const uint32_t rows = min(static_cast<uint32_t>(tiles_m) - group * kGroup, static_cast<uint32_t>(kGroup));
  return {static_cast<int64_t>(group) * kGroup + within % rows, within / rows};
}

}  // namespace kernelpress::cuda
