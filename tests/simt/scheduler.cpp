// Fibers: threads of a block run one at a time, in an order drawn from the seed, and change places only where they wait for others.
#include <sys/mman.h>

#include <cstdio>
#include <numeric>
#include <sstream>

#include "machine.h"

// void switch_fiber(void** save, void* next): keeps what a callee must keep.
asm(R"(
.text
.p2align 4
.local kernelpress_switch_fiber
.type kernelpress_switch_fiber, @function
kernelpress_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kernelpress_switch_fiber, .-kernelpress_switch_fiber
)");
extern "C" __attribute__((visibility("hidden"))) void kernelpress_switch_fiber(void** save, void* next);

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start;  // where this module begins

namespace kernelpress::simt {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSavedRegisters = 6;
constexpr uint64_t kCanary = 0x5afe57acc0ffee11;
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t

unsigned char* stacks() {
  static unsigned char* const memory = [] {
    void* mapped = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("stacks of the emulated threads");
      std::abort();
    }
    return static_cast<unsigned char*>(mapped);
  }();
  return memory;
}

unsigned char* const stack_memory = stacks();

uint64_t& canary(int index) { return *reinterpret_cast<uint64_t*>(stack_memory + static_cast<size_t>(index) * kStackBytes); }

int highest(uint32_t mask) { return 31 - __builtin_clz(mask); }

int random_bit(uint32_t mask) {
  const uint32_t start = machine.random.next() & 31u;
  const uint32_t rotated = mask >> start | mask << (-start & 31u);
  return static_cast<int>((static_cast<uint32_t>(__builtin_ctz(rotated)) + start) & 31u);
}

int choose_bit(uint32_t mask) {
  if (machine.order == Order::ascending) return __builtin_ctz(mask);
  if (machine.order == Order::descending) return highest(mask);
  return random_bit(mask);
}

// In random order, all of a warp's threads that can run have their turn before another warp is drawn.
Thread* choose_thread() {
  if (machine.runnable_warps == 0) return nullptr;
  const auto chosen = static_cast<size_t>(machine.chosen_warp);
  uint32_t lanes = machine.chosen_lanes & machine.warps[chosen].runnable;
  if (machine.order != Order::random || lanes == 0) {
    machine.chosen_warp = choose_bit(machine.runnable_warps);
    lanes = machine.warps[static_cast<size_t>(machine.chosen_warp)].runnable;
  }
  const int lane = choose_bit(lanes);
  machine.chosen_lanes = lanes & ~(1u << lane);
  return &machine.threads[static_cast<size_t>(machine.chosen_warp * kLanes + lane)];
}

void set_runnable(int warp_index, uint32_t lanes) {
  machine.warps[static_cast<size_t>(warp_index)].runnable |= lanes;
  machine.runnable_warps |= 1u << warp_index;
}

void set_waiting(const Thread& thread) {
  Warp& warp = warp_of(thread);
  warp.runnable &= ~(1u << lane_of(thread));
  if (warp.runnable == 0) machine.runnable_warps &= ~(1u << thread.index / kLanes);
}

// For addr2line: build.py's `readable` puts functions and lines in its place.
std::string place_in_module(const void* address) {
  std::ostringstream text;
  text << "[" << std::hex << static_cast<const char*>(address) - &__ehdr_start << "]";
  return text.str();
}

std::string where(Site site) {
  std::ostringstream text;
  text << site.file << ":" << site.line;
  return text.str();
}

std::string ranges(const std::vector<int>& indices) {
  std::ostringstream text;
  for (size_t i = 0; i < indices.size();) {
    size_t last = i;
    while (last + 1 < indices.size() && indices[last + 1] == indices[last] + 1) ++last;
    text << (i == 0 ? "" : ", ") << indices[i];
    if (last > i) text << "-" << indices[last];
    i = last + 1;
  }
  return text.str();
}

// Who waits where, one line a place.
std::string waiting_threads() {
  std::vector<std::pair<std::string, std::vector<int>>> places;
  for (int i = 0; i < machine.thread_count; ++i) {
    const Thread& thread = machine.threads[static_cast<size_t>(i)];
    const std::string place = thread.state == State::returned ? "have returned"
                              : thread.state == State::running || (warp_of(thread).runnable >> lane_of(thread) & 1u) != 0
                                  ? "can run"
                                  : std::string("wait in ") + thread.waits_in + " at " + where(thread.site);
    auto found = std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == place; });
    if (found == places.end()) found = places.insert(places.end(), {place, {}});
    found->second.push_back(i);
  }
  std::string text;
  for (const auto& [place, indices] : places) text += "\n  threads " + ranges(indices) + " " + place;
  return text;
}

void leave_fiber() {
  void* abandoned;
  kernelpress_switch_fiber(&abandoned, machine.launcher_stack_pointer);
}

void give_way(void** save) {
  Thread* const next = choose_thread();
  if (next == nullptr) fail("deadlock: nothing that the threads wait for can come" + waiting_threads());
  if (next == machine.current) return;
  machine.current = next;
  ++machine.statistics.switches;
  kernelpress_switch_fiber(save, next->stack_pointer);
}

void run_fiber() {
  machine.enter(machine.call);
  settle_writes();
  Thread& thread = *machine.current;
  if (canary(thread.index) != kCanary) fail("a thread used more than 64 KB of stack");
  thread.state = State::returned;
  set_waiting(thread);
  if (--machine.live == 0) leave_fiber();
  void* abandoned;
  give_way(&abandoned);
}

void prepare(Thread& thread, int index) {
  thread.index = index;
  thread.state = State::running;
  const auto linear = static_cast<unsigned>(index);
  thread.position = dim3(linear % machine.block.x, linear / machine.block.x % machine.block.y, linear / machine.block.x / machine.block.y);
  thread.copies.clear();
  thread.group_ends.clear();
  thread.landed_groups = 0;
  canary(index) = kCanary;
  // Tops are staggered, or all stacks would meet in the same lines of the cache.
  unsigned char* const top = stack_memory + (static_cast<size_t>(index) + 1) * kStackBytes - static_cast<size_t>(index % 32) * 320 - 64;
  auto* frame = reinterpret_cast<void**>(top) - kSavedRegisters - 2;
  std::fill(frame, frame + kSavedRegisters + 2, nullptr);
  frame[kSavedRegisters] = reinterpret_cast<void*>(&run_fiber);
  thread.stack_pointer = frame;
}

void run_block(uint32_t number) {
  const dim3 grid = machine.grid;
  machine.block_number = number;
  machine.block_position = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
  begin_block_memory();
  machine.live = machine.thread_count;
  machine.at_barrier = 0;
  machine.runnable_warps = 0;
  machine.chosen_warp = 0;
  machine.chosen_lanes = 0;
  for (int i = 0; i < machine.warp_count; ++i) {
    const int lanes = std::min(kLanes, machine.thread_count - i * kLanes);
    Warp& warp = machine.warps[static_cast<size_t>(i)];
    warp.members = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warp.arrived = warp.runnable = 0;
    warp.last_barrier = 0;
    set_runnable(i, warp.members);
  }
  for (int i = 0; i < machine.thread_count; ++i) prepare(machine.threads[static_cast<size_t>(i)], i);
  machine.current = choose_thread();
  kernelpress_switch_fiber(&machine.launcher_stack_pointer, machine.current->stack_pointer);
  machine.current = nullptr;
  ++machine.statistics.blocks;
}

}  // namespace

dim3 thread_index() { return machine.current->position; }
dim3 block_index() { return machine.block_position; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }

bool is_on_stack(const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - stack_memory) < kMaxThreads * kStackBytes;
}

std::string name_of(const Thread& thread) {
  std::ostringstream text;
  text << "thread " << thread.index << " (warp " << thread.index / kLanes << ", lane " << lane_of(thread) << ")";
  return text.str();
}

void fail(const std::string& what, const void* caller) {
  std::ostringstream text;
  text << what;
  if (machine.current != nullptr) {
    const dim3 at = machine.block_position;
    text << "\n  seen in " << name_of(*machine.current) << " of block (" << at.x << ", " << at.y << ", " << at.z << ")";
    if (caller != nullptr) text << "\n  at " << place_in_module(static_cast<const char*>(caller) - 1);
  }
  text << "\n  in the kernel " << place_in_module(machine.kernel);
  machine.report = text.str();
  machine.has_failed = true;
  leave_fiber();
  __builtin_unreachable();
}

void join(const char* operation, Site site, const Operands& operands, void (*carry_out)(Warp&)) {
  settle_writes();
  Thread& self = *machine.current;
  Warp& warp = warp_of(self);
  self.state = State::in_collective;
  self.waits_in = operation;
  self.site = site;
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.site = site;
  } else if (warp.operation != operation || warp.site.line != site.line || std::strcmp(warp.site.file, site.file) != 0) {
    fail(std::string("divergent warp: its lanes are in different collectives") + waiting_threads());
  }
  warp.lanes[lane_of(self)] = operands;
  warp.arrived |= 1u << lane_of(self);
  set_waiting(self);
  if (warp.arrived == warp.members) {
    ++machine.statistics.collectives;
    if (machine.counts_shared) count_shared_conflicts(self.index / kLanes);
    carry_out(warp);
    warp.arrived = 0;
    set_runnable(self.index / kLanes, warp.members);
  }
  give_way(&self.stack_pointer);
  self.state = State::running;
}

int run_grid(const void* kernel, dim3 blocks, dim3 threads, size_t shared_bytes, void (*enter)(const void*), const void* call,
             size_t call_bytes) {
  const uint64_t thread_count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  const uint64_t block_count = static_cast<uint64_t>(blocks.x) * blocks.y * blocks.z;
  if (thread_count == 0 || thread_count > kMaxThreads || threads.z > 64 || blocks.y > 65535 || blocks.z > 65535 || blocks.x > INT32_MAX)
    return kInvalidConfiguration;
  if (!has_room_for_shared(shared_bytes)) return kInvalidValue;
  machine.kernel = kernel;
  machine.grid = blocks;
  machine.block = threads;
  machine.dynamic_bytes = shared_bytes;
  machine.enter = enter;
  machine.call = call;
  machine.call_bytes = call_bytes;
  machine.thread_count = static_cast<int>(thread_count);
  machine.warp_count = (machine.thread_count + kLanes - 1) / kLanes;
  machine.has_failed = false;
  machine.random.state = machine.seed * 0x9e3779b97f4a7c15u + 1;
  for (int i = 0; i < 4; ++i) machine.random.next();
  begin_launch_memory();
  std::vector<uint32_t> numbers(block_count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (machine.order == Order::descending) std::reverse(numbers.begin(), numbers.end());
  if (machine.order == Order::random) {
    for (size_t i = numbers.size(); i > 1; --i) std::swap(numbers[i - 1], numbers[machine.random.below(static_cast<uint32_t>(i))]);
  }
  for (const uint32_t number : numbers) {
    run_block(number);
    if (machine.has_failed) return kLaunchFailure;
  }
  return 0;
}

}  // namespace kernelpress::simt

namespace kernelpress::cuda {

void block_barrier(Site site) {
  using simt::machine;
  simt::settle_writes();
  simt::Thread& self = *machine.current;
  self.state = simt::State::at_barrier;
  self.waits_in = "block_barrier";
  self.site = site;
  if (machine.at_barrier == 0) {
    machine.barrier_site = site;
  } else if (machine.barrier_site.line != site.line || std::strcmp(machine.barrier_site.file, site.file) != 0) {
    simt::fail("divergent barrier: the block's threads are at different ones" + simt::waiting_threads());
  }
  simt::set_waiting(self);
  if (++machine.at_barrier == machine.thread_count) {
    machine.at_barrier = 0;
    machine.last_barrier = simt::next_time();
    for (int i = 0; i < machine.warp_count; ++i) {
      if (machine.counts_shared) simt::count_shared_conflicts(i);
      simt::set_runnable(i, machine.warps[static_cast<size_t>(i)].members);
    }
  }
  simt::give_way(&self.stack_pointer);
  self.state = simt::State::running;
}

void warp_barrier(Site site) {
  simt::join("warp_barrier", site, {}, [](simt::Warp& warp) { warp.last_barrier = simt::next_time(); });
}

}  // namespace kernelpress::cuda
