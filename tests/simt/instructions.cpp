// What the wrappers of ptx.cuh do: asynchronous copies, ldmatrix, mma, exchanges, votes, vector accesses, atomics.
#include "instructions.h"

#include "machine.h"

namespace kernelpress::simt {

namespace {

void require_aligned(const void* address, const char* operation, const void* caller) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    fail(std::string("misaligned: ") + operation + " of 16 bytes at an address that is " +
             std::to_string(reinterpret_cast<uintptr_t>(address) % 16) + " above a multiple of 16",
         caller);
}

Thread& thread_at(const Warp& warp, int lane) {
  return machine.threads[static_cast<size_t>((&warp - machine.warps.data()) * kLanes + lane)];
}

void require_whole(const Warp& warp) {
  if (warp.members != ~0u) fail(std::string(warp.operation) + ": the warp has fewer than 32 threads");
}

// One 8×8 matrix of 16-bit elements: its rows are read by the lanes that receive them.
void load_matrix(Warp& warp, int matrix, bool transposed) {
  const unsigned char* rows[8];
  uint32_t offsets[8];
  for (int i = 0; i < 8; ++i) {
    const Operands& operands = warp.lanes[8 * matrix + i];
    rows[i] = static_cast<const unsigned char*>(operands.first);
    if (!is_shared(rows[i]))
      fail("ldmatrix: the row of lane " + std::to_string(8 * matrix + i) + " is not in shared memory", operands.caller);
    require_aligned(rows[i], "ldmatrix", operands.caller);
    offsets[i] = static_cast<uint32_t>(shared_offset(rows[i]));
  }
  ++machine.statistics.ldmatrix_accesses;
  machine.statistics.ldmatrix_conflicts += bank_conflicts(offsets, 8, 16);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Thread& thread = thread_at(warp, lane);
    const Operands& operands = warp.lanes[lane];
    unsigned char word[4];
    for (int half = 0; half < 2; ++half) {
      const int row = transposed ? lane % 4 * 2 + half : lane / 4;
      const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
      const unsigned char* element = rows[row] + 2 * column;
      if (transposed || half == 0) check_access_by(thread, element, transposed ? 2 : 4, Access::read, operands.caller);
      std::memcpy(word + 2 * half, element, 2);
    }
    std::memcpy(static_cast<uint32_t*>(operands.result) + matrix, word, 4);
  }
}

template <int kCount, bool kTransposed>
void carry_out_ldmatrix(Warp& warp) {
  require_whole(warp);
  const bool counts_shared = machine.counts_shared;
  machine.counts_shared = false;  // they have a counter of their own
  for (int matrix = 0; matrix < kCount; ++matrix) load_matrix(warp, matrix, kTransposed);
  machine.counts_shared = counts_shared;
}

// Rows of A [16][32 bytes] and columns of B [8][32 bytes], from the fragments of all lanes.
struct Tiles {
  alignas(16) unsigned char a[16][32], b[8][32];

  explicit Tiles(const Warp& warp) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const auto* first = static_cast<const uint32_t*>(warp.lanes[lane].first);
      const auto* second = static_cast<const uint32_t*>(warp.lanes[lane].second);
      for (int i = 0; i < 4; ++i) std::memcpy(&a[group + 8 * (i % 2)][16 * (i / 2) + 4 * pair], first + i, 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&b[group][16 * i + 4 * pair], second + i, 4);
    }
  }
};

template <class Accumulator, int kDepth>
void accumulate(const Warp& warp, const Accumulator (&a)[16][kDepth], const Accumulator (&b)[kDepth][8]) {
  for (int row = 0; row < 16; ++row) {
    Accumulator sums[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      const Operands& operands = warp.lanes[row % 8 * 4 + column / 2];
      Accumulator& target = static_cast<Accumulator*>(operands.result)[row / 8 * 2 + column % 2];
      target += sums[column];
    }
  }
}

struct Float16 {
  static constexpr int kDepth = 16;
  using Accumulator = float;
  static float read(const unsigned char* row, int k) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * k, 2);
    return half_to_float(bits);
  }
};

struct BrainFloat16 {
  static constexpr int kDepth = 16;
  using Accumulator = float;
  static float read(const unsigned char* row, int k) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * k, 2);
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

struct TensorFloat32 {
  static constexpr int kDepth = 8;
  using Accumulator = float;
  static float read(const unsigned char* row, int k) {
    uint32_t bits;
    std::memcpy(&bits, row + 4 * k, 4);
    return __uint_as_float(bits & 0xffffe000u);  // the device does not see the lower 13 bits
  }
};

struct SignedByte {
  static constexpr int kDepth = 32;
  using Accumulator = uint32_t;  // wraps as the device does
  static uint32_t read(const unsigned char* row, int k) { return static_cast<uint32_t>(static_cast<int8_t>(row[k])); }
};

template <class Kind>
void carry_out_mma(Warp& warp) {
  require_whole(warp);
  const Tiles tiles(warp);
  typename Kind::Accumulator a[16][Kind::kDepth], b[Kind::kDepth][8];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < Kind::kDepth; ++k) a[row][k] = Kind::read(tiles.a[row], k);
  }
  for (int column = 0; column < 8; ++column) {
    for (int k = 0; k < Kind::kDepth; ++k) b[k][column] = Kind::read(tiles.b[column], k);
  }
  accumulate<typename Kind::Accumulator, Kind::kDepth>(warp, a, b);
}

constexpr int kExchangeBytes = 16;

template <Exchange kKind>
void carry_out_exchange(Warp& warp) {
  unsigned char values[kLanes][kExchangeBytes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& operands = warp.lanes[lane];
    if (warp.members >> lane & 1u) std::memcpy(values[lane], operands.first, static_cast<size_t>(operands.number >> 16));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(warp.members >> lane & 1u)) continue;
    const Operands& operands = warp.lanes[lane];
    const int operand = static_cast<int16_t>(operands.number & 0xffff);
    int source = kKind == Exchange::exclusive_or ? lane ^ operand
                 : kKind == Exchange::down       ? lane + operand
                 : kKind == Exchange::up         ? lane - operand
                                                 : operand & (kLanes - 1);
    if (source < 0 || source >= kLanes) source = lane;
    if (!(warp.members >> source & 1u))
      fail(std::string(warp.operation) + ": lane " + std::to_string(source) + " does not exist", operands.caller);
    std::memcpy(operands.result, values[source], static_cast<size_t>(operands.number >> 16));
  }
}

template <bool kAll>
void carry_out_vote(Warp& warp) {
  bool result = kAll;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(warp.members >> lane & 1u)) continue;
    const bool value = warp.lanes[lane].number != 0;
    result = kAll ? result && value : result || value;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.members >> lane & 1u) *static_cast<bool*>(warp.lanes[lane].result) = result;
  }
}

}  // namespace

void copy_async(void* destination, const void* source, int bytes, bool valid) {
  begin_copy(destination, source, bytes, valid, __builtin_return_address(0));
}

void wait_copies(int pending) {
  Thread& thread = *machine.current;
  size_t landed = thread.landed_groups == 0 ? 0 : thread.group_ends[thread.landed_groups - 1];
  while (thread.group_ends.size() - thread.landed_groups > static_cast<size_t>(pending)) {
    const size_t end = thread.group_ends[thread.landed_groups++];
    for (; landed < end; ++landed) land_copy(thread, thread.copies[landed]);
  }
  if (landed == thread.copies.size()) {
    thread.copies.clear();
    thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + static_cast<std::ptrdiff_t>(thread.landed_groups));
    std::fill(thread.group_ends.begin(), thread.group_ends.end(), size_t{0});
    thread.landed_groups = 0;
  }
}

void load_matrices(uint32_t* registers, const void* row, int count, bool transposed, Site site) {
  const Operands operands{registers, row, nullptr, count, __builtin_return_address(0)};
  if (count == 4) {
    transposed ? join("ldmatrix_x4_trans", site, operands, &carry_out_ldmatrix<4, true>)
               : join("ldmatrix_x4", site, operands, &carry_out_ldmatrix<4, false>);
  } else {
    transposed ? join("ldmatrix_x2_trans", site, operands, &carry_out_ldmatrix<2, true>)
               : join("ldmatrix_x2", site, operands, &carry_out_ldmatrix<2, false>);
  }
}

void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  join("mma_m16n8k16_f16", site, {d, a, b, 0, __builtin_return_address(0)}, &carry_out_mma<Float16>);
}

void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  join("mma_m16n8k16_bf16", site, {d, a, b, 0, __builtin_return_address(0)}, &carry_out_mma<BrainFloat16>);
}

void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  join("mma_m16n8k8_tf32", site, {d, a, b, 0, __builtin_return_address(0)}, &carry_out_mma<TensorFloat32>);
}

void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  join("mma_m16n8k32_s8", site, {d, a, b, 0, __builtin_return_address(0)}, &carry_out_mma<SignedByte>);
}

void exchange(void* value, int bytes, Exchange kind, int operand, Site site) {
  const void* caller = __builtin_return_address(0);
  if (bytes > kExchangeBytes) fail("shuffle: expected a value of at most 16 bytes, got " + std::to_string(bytes), caller);
  const Operands operands{value, value, nullptr, bytes << 16 | (operand & 0xffff), caller};
  switch (kind) {
    case Exchange::exclusive_or: return join("shuffle_xor", site, operands, &carry_out_exchange<Exchange::exclusive_or>);
    case Exchange::down: return join("shuffle_down", site, operands, &carry_out_exchange<Exchange::down>);
    case Exchange::up: return join("shuffle_up", site, operands, &carry_out_exchange<Exchange::up>);
    case Exchange::index: return join("shuffle_index", site, operands, &carry_out_exchange<Exchange::index>);
  }
}

bool vote(bool value, bool all, Site site) {
  bool result = false;
  const Operands operands{&result, nullptr, nullptr, value ? 1 : 0, __builtin_return_address(0)};
  all ? join("vote_all", site, operands, &carry_out_vote<true>) : join("vote_any", site, operands, &carry_out_vote<false>);
  return result;
}

void load_vector(void* value, const void* address, bool read_only) {
  const void* caller = __builtin_return_address(0);
  require_aligned(address, "load", caller);
  if (read_only && is_shared(address)) fail("load_streaming_16: expected an address in global memory", caller);
  check_access(address, 16, Access::read, caller);
  std::memcpy(value, address, 16);
}

void store_vector(void* address, const void* value) {
  const void* caller = __builtin_return_address(0);
  require_aligned(address, "store", caller);
  check_access(address, 16, Access::write, caller);
  std::memcpy(address, value, 16);
}

void begin_atomic(void* address, int bytes) {
  const void* caller = __builtin_return_address(0);
  check_access(address, static_cast<size_t>(bytes), Access::atomic, caller);
  if (!is_shared(address)) acquire_blocks(address);
}

}  // namespace kernelpress::simt

namespace kernelpress::cuda {

void cp_async_commit() {
  simt::Thread& thread = *simt::machine.current;
  thread.group_ends.push_back(thread.copies.size());
}

void device_fence() { simt::machine.block_has_fenced = true; }

}  // namespace kernelpress::cuda
