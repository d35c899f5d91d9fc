// The emulated device: one block at a time, its threads as fibers, and what they have been seen to do.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "instructions.h"

namespace kernelpress::simt {

constexpr int kMaxThreads = 1024, kLanes = 32, kMaxWarps = kMaxThreads / kLanes;

enum class Order { random, ascending, descending };

enum class State : uint8_t { running, in_collective, at_barrier, returned };

// A cp.async that was issued and has not been waited for.
struct Copy {
  unsigned char* destination;
  const unsigned char* source;
  const void* caller;
  uint8_t bytes;
  bool valid, has_landed;
};

struct Thread {
  void* stack_pointer;
  int index;
  State state;
  dim3 position;
  const char* waits_in;
  Site site;
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;
  size_t landed_groups;
};

// What one lane hands to its warp's collective; the pointers are to its own stack.
struct Operands {
  void* result;
  const void *first, *second;
  int number;
  const void* caller;
};

struct Warp {
  uint32_t members, runnable, arrived;
  uint32_t last_barrier;  // time
  const char* operation;
  Site site;
  Operands lanes[kLanes];
};

struct Statistics {
  int64_t blocks, switches, collectives;
  int64_t ldmatrix_accesses, ldmatrix_conflicts;  // of eight rows each
  int64_t shared_accesses, shared_conflicts;      // of one instruction's passes: 32 lanes × 4, 16 × 8 or 8 × 16 bytes
};

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(static_cast<uint64_t>(next()) * limit >> 31); }
};

struct Machine {
  // Set before a launch.
  Order order = Order::random;
  uint64_t seed = 0;
  bool counts_shared = false;
  size_t shared_limit = 227 * 1024;  // per block

  // The launch.
  const void* kernel;
  dim3 grid, block, block_position;
  uint32_t launch_number, block_number;
  size_t dynamic_bytes;
  const void* call;
  size_t call_bytes;
  void (*enter)(const void*);
  Random random;

  // The block. Time advances at every barrier.
  uint32_t time, block_start, last_barrier;
  int thread_count, warp_count, live, at_barrier;
  Site barrier_site;
  uint32_t runnable_warps;
  int chosen_warp;
  uint32_t chosen_lanes;
  Thread* current;  // null: no kernel is running
  void* launcher_stack_pointer;
  bool has_failed, block_has_fenced;
  std::array<Thread, kMaxThreads> threads;
  std::array<Warp, kMaxWarps> warps;

  std::string report;  // of the last launch that failed
  Statistics statistics;
};

extern Machine machine;

// scheduler.cpp
[[noreturn]] void fail(const std::string& what, const void* caller = nullptr);
void join(const char* operation, Site site, const Operands& operands, void (*carry_out)(Warp&));
bool is_on_stack(const void* address);
std::string name_of(const Thread& thread);
inline int lane_of(const Thread& thread) { return thread.index % kLanes; }
inline Warp& warp_of(const Thread& thread) { return machine.warps[static_cast<size_t>(thread.index / kLanes)]; }

// memory.cpp, shared_memory.cpp, global_memory.cpp
enum class Access { read, write, atomic };
void check_access(const void* address, size_t bytes, Access access, const void* caller);
void check_access_by(const Thread& thread, const void* address, size_t bytes, Access access, const void* caller);
void begin_launch_memory();
void begin_block_memory();
void settle_writes();
uint32_t next_time();
void begin_copy(void* shared, const void* global, int bytes, bool valid, const void* caller);
void land_copy(const Thread& thread, Copy& copy);
void acquire_blocks(const void* address);
bool is_shared(const void* address);
size_t shared_offset(const void* address);
bool has_room_for_shared(size_t dynamic_bytes);

void register_extent(uintptr_t address, size_t bytes, const std::string& name, const unsigned char* mask, bool is_unwritten);
void clear_extents();
std::string unwritten_outputs();

// conflicts.cpp
void note_shared_access(const Thread& thread, const void* address, size_t bytes, const void* caller);
void count_shared_conflicts(int warp_index);
int bank_conflicts(const uint32_t* offsets, int count, int bytes);

}  // namespace kernelpress::simt
