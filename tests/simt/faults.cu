// Kernels as ours are, each with faults that a number switches on: tests/test_simt.py sees the emulator catch them all.
//
//   gemm       int8, C[m][n] = Σ_k A[m][k] B[n][k]: tiles of 64 × 64 × 64 through three stages of cp.async into swizzled shared memory,
//              ldmatrix.x4, mma.m16n8k32; four warps of 32 × 32
//   reduction  sums of rows, by warps, then by the last block through a workspace and a counter
//   transpose  tiles of 32 × 32 through a shared array
#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/simt.cuh"

#define KERNELPRESS_EXPORT extern "C" __attribute__((visibility("default")))

namespace kernelpress::cuda {

namespace {

enum Fault : int {
  kHealthy,
  kWaitsForTooFew,         // gemm: a stage is read while its copies are in flight
  kNoBarrierAfterWait,     // … before other threads' copies are seen
  kNoCommit,               // … copies belong to no group
  kOverwritesStage,        // the copies of the next stage go where slower warps still read
  kNoSwizzleOnStore,       // stored straight, loaded swizzled
  kWrongSwizzle,           // a bijection of its own on each side
  kNoRowGuard,             // reads rows beyond A's end
  kNoZeroFill,             // a ragged last step of K is not filled with zeros
  kSwappedFragments,       // a[1] and a[2] change places
  kWrongLane,              // stores a neighbour's columns
  kStoreGuardOffByOne,     // writes one row beyond C's end
  kBarrierInBranch,        // one warp passes another barrier
  kEarlyReturn,            // threads that have nothing to store leave before the barrier
  kMisalignedCopy,         // a 16-byte copy from an address that is not
  kTooLittleShared,        // the launch asks for less than it uses
  kTransposeNoBarrier,     // transpose: reads the tile before it is whole
  kTransposeGuard,         // … and takes rows for columns at ragged edges
  kTransposeTwoWriters,    // … and several threads write other values to one element
  kTransposeReadsOutput,   // … and reads what another thread wrote
  kReductionNoWarpBarrier, // reduction: lane 0 reads what others write
  kReductionUnwritten,     // … and sums slots of warps that there are not
  kReductionPartialWarp,   // … with a shuffle in a branch of some lanes
  kReductionOtherBlock,    // … and the last block by its number, not by the counter
  kReductionNoFence,       // … or before the partial sums are seen
  kReductionLocalIndex,    // … with an index beyond a local array
  kSlowTranspose,          // no wrong result: a column of the tile lies in one bank
  kSameValue,              // … several threads write the same value to one element
  kUnswizzled,             // … rows of the gemm's tiles as they come
};

constexpr int kTile = 64, kStages = 3, kTileBytes = kTile * kTile, kStageBytes = 2 * kTileBytes;

struct GemmProblem {
  const int8_t *a, *b;
  int32_t* c;
  int64_t m, n, k;  // k: a multiple of 16
  int fault;
};

// Byte of 16-byte chunk `chunk` of row `row`: the four chunks of eight neighbouring rows lie in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk, int fault) {
  return row * kTile + (fault == kUnswizzled ? chunk : chunk ^ (row / 2 % 4)) * 16;
}

__device__ __forceinline__ void copy_tile(const GemmProblem& p, const int8_t* from, int64_t rows, int64_t row_start, int64_t k_start,
                                          unsigned char* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 16; i += static_cast<int>(blockDim.x)) {
    const int row = i / 4, chunk = i % 4;
    const int64_t r = row_start + row, k = k_start + chunk * 16;
    const bool valid = (r < rows || p.fault == kNoRowGuard) && (k < p.k || (p.fault == kNoZeroFill && k + r * p.k < rows * p.k));
    int place = swizzled(row, chunk, p.fault);
    if (p.fault == kNoSwizzleOnStore) place = row * kTile + chunk * 16;
    if (p.fault == kWrongSwizzle) place = row * kTile + ((chunk ^ (row % 4)) * 16);
    const int64_t shift = p.fault == kMisalignedCopy && i == 77 ? 4 : 0;
    cp_async_16(tile + place, valid ? from + r * p.k + k + shift : from, valid);
  }
}

__global__ void __launch_bounds__(128) gemm(const GemmProblem p) {
  SIMT_DYN_SMEM(memory);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile, first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int steps = static_cast<int>((p.k + kTile - 1) / kTile);
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  int32_t sums[2][4][4] = {};

  const auto issue = [&](int step) {
    unsigned char* stage = memory + step % kStages * kStageBytes;
    if (step < steps) {
      copy_tile(p, p.a, p.m, first_row, static_cast<int64_t>(step) * kTile, stage);
      copy_tile(p, p.b, p.n, first_column, static_cast<int64_t>(step) * kTile, stage + kTileBytes);
    }
    if (p.fault != kNoCommit) cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) issue(step);

  for (int step = 0; step < steps; ++step) {
    if (p.fault == kWaitsForTooFew) {
      cp_async_wait<kStages - 1>();
    } else {
      cp_async_wait<kStages - 2>();
    }
    if (p.fault == kBarrierInBranch && warp == 1) {
      block_barrier();
    } else if (p.fault != kNoBarrierAfterWait) {
      block_barrier();
    }
    issue(p.fault == kOverwritesStage ? step + kStages : step + kStages - 1);
    const unsigned char* stage = memory + step % kStages * kStageBytes;
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4], b[4][2];
      for (int i = 0; i < 2; ++i) ldmatrix_x4(a[i], stage + swizzled(warp_row + 16 * i + lane % 16, 2 * half + lane / 16, p.fault));
      for (int j = 0; j < 4; j += 2) {
        uint32_t both[4];
        ldmatrix_x4(both, stage + kTileBytes + swizzled(warp_column + 8 * j + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2, p.fault));
        for (int i = 0; i < 4; ++i) b[j + i / 2][i % 2] = both[i];
      }
      for (int i = 0; i < 2; ++i) {
        if (p.fault == kSwappedFragments) {
          const uint32_t other = a[i][1];
          a[i][1] = a[i][2];
          a[i][2] = other;
        }
        for (int j = 0; j < 4; ++j) mma_m16n8k32_s8(sums[i][j], a[i], b[j]);
      }
    }
  }
  cp_async_wait<0>();
  if (p.fault == kEarlyReturn && first_row + warp_row >= p.m) return;
  block_barrier();

  const int group = lane / 4, pair = p.fault == kWrongLane ? (lane + 1) % 4 : lane % 4;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int64_t row = first_row + warp_row + 16 * i + group + e / 2 * 8;
        const int64_t column = first_column + warp_column + 8 * j + 2 * pair + e % 2;
        if (row < p.m + (p.fault == kStoreGuardOffByOne ? 1 : 0) && column < p.n) p.c[row * p.n + column] = sums[i][j][e];
      }
    }
  }
}

constexpr int kSide = 32;

template <int kPitch>
__device__ __forceinline__ void transpose_tile(const float* x, float* y, int64_t rows, int64_t columns, int fault) {
  SIMT_SHARED(float, tile, [kSide][kPitch]);
  const int64_t row_start = static_cast<int64_t>(blockIdx.y) * kSide, column_start = static_cast<int64_t>(blockIdx.x) * kSide;
  for (int i = static_cast<int>(threadIdx.y); i < kSide; i += static_cast<int>(blockDim.y)) {
    const int64_t row = row_start + i, column = column_start + threadIdx.x;
    if (row < rows && column < columns) tile[i][threadIdx.x] = x[row * columns + column];
  }
  if (fault != kTransposeNoBarrier) block_barrier();
  for (int i = static_cast<int>(threadIdx.y); i < kSide; i += static_cast<int>(blockDim.y)) {
    const int64_t row = row_start + threadIdx.x, column = column_start + i;
    const bool inside = fault == kTransposeGuard ? row < columns && column < rows : row < rows && column < columns;
    if (inside) y[column * rows + row] = tile[threadIdx.x][i];
    if (inside && fault == kTransposeTwoWriters) y[column * rows] = tile[threadIdx.x][i];
    if (inside && fault == kTransposeReadsOutput) y[column * rows + row] = y[column * rows + (row ^ 1)];
    if (inside && fault == kSameValue && row_start == 0) y[column * rows] = tile[0][i];
  }
}

__global__ void transpose(const float* x, float* y, int64_t rows, int64_t columns, int fault) {
  if (fault == kSlowTranspose) {
    transpose_tile<kSide>(x, y, rows, columns, fault);
  } else {
    transpose_tile<kSide + 1>(x, y, rows, columns, fault);
  }
}

struct ReductionProblem {
  const float* x;
  float *partial, *sum;  // [blocks], [1]
  int32_t* counter;      // zero before and after
  int64_t count;
  int fault;
};

__global__ void __launch_bounds__(96) reduction(const ReductionProblem p) {
  SIMT_SHARED(float, lanes, [3][32]);
  SIMT_SHARED(float, warps, [8]);
  SIMT_SHARED(bool, is_last);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float own[4] = {};
  int at = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) {
    own[p.fault == kReductionLocalIndex ? at : at % 4] += p.x[i];
    ++at;
  }
  lanes[warp][lane] = own[0] + own[1] + own[2] + own[3];
  if (p.fault != kReductionNoWarpBarrier) warp_barrier();
  float value = lanes[warp][31 - lane];
  if (p.fault == kReductionPartialWarp) {
    if (lane < 31) value = reduce_add(value);
  } else {
    value = reduce_add(value);
  }
  if (lane == 0) warps[warp] = value;
  block_barrier();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < (p.fault == kReductionUnwritten ? 4 : 3); ++i) total += warps[i];
    p.partial[blockIdx.x] = total;
    if (p.fault != kReductionNoFence) device_fence();
    is_last = p.fault == kReductionOtherBlock ? blockIdx.x == gridDim.x - 1
                                              : atomic_add(p.counter, 1) == static_cast<int32_t>(gridDim.x) - 1;
  }
  block_barrier();
  if (!is_last) return;
  device_fence();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += p.partial[i];
    *p.sum = total;
    *p.counter = 0;
  }
}

}  // namespace

}  // namespace kernelpress::cuda

using namespace kernelpress::cuda;

KERNELPRESS_EXPORT int kernelpress_gemm(const int8_t* a, const int8_t* b, int32_t* c, int64_t m, int64_t n, int64_t k, int fault) {
  const Grid grid{dim3(static_cast<unsigned>((n + kTile - 1) / kTile), static_cast<unsigned>((m + kTile - 1) / kTile)), dim3(128),
                  static_cast<size_t>(kStages * kStageBytes - (fault == kTooLittleShared ? 16 : 0))};
  return launch(gemm, grid, GemmProblem{a, b, c, m, n, k, fault});
}

KERNELPRESS_EXPORT int kernelpress_transpose(const float* x, float* y, int64_t rows, int64_t columns, int fault) {
  const Grid grid{dim3(static_cast<unsigned>((columns + kSide - 1) / kSide), static_cast<unsigned>((rows + kSide - 1) / kSide)),
                  dim3(kSide, 4)};
  return launch(transpose, grid, x, y, rows, columns, fault);
}

KERNELPRESS_EXPORT int kernelpress_reduction(const float* x, float* partial, float* sum, int32_t* counter, int64_t count, int blocks,
                                             int fault) {
  return launch(reduction, Grid{dim3(static_cast<unsigned>(blocks)), dim3(96)}, ReductionProblem{x, partial, sum, counter, count, fault});
}

KERNELPRESS_EXPORT int kernelpress_refused(int threads, int shared_bytes) {
  const Grid grid{dim3(1), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared_bytes)};
  return launch(transpose, grid, nullptr, nullptr, 0, 0, 0);
}
