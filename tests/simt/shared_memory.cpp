// Shared memory: what of it the block has, what was written, who touched it since which barrier, which copies are in flight.
#include <algorithm>

#include "history.h"

namespace kernelpress::simt {

namespace {

constexpr size_t kDynamicRegion = 256 * 1024, kStaticRegion = 64 * 1024, kSharedRegion = kDynamicRegion + kStaticRegion;
constexpr size_t kStaticLimit = 48 * 1024, kGap = 32;
constexpr unsigned char kPoison = 0xfd;

// A touch of shared memory: time << 12 | is a cp.async in flight << 11 | who. Zero is long ago.
constexpr uint32_t kInFlight = 1u << kWhoBits, kTimeShift = kWhoBits + 1, kTimeLimit = 1u << (32 - kTimeShift);
struct SharedHistory {
  uint32_t write, read;
};

struct StaticArray {
  const char* owner;
  int line;
  const char* name;
  size_t offset, bytes;
};

alignas(1024) unsigned char shared[kSharedRegion];
SharedHistory shared_histories[kSharedRegion];
std::vector<StaticArray> statics;
size_t static_bytes;

bool is_allocated(size_t offset, size_t bytes) {
  if (offset < kDynamicRegion) return offset + bytes <= machine.dynamic_bytes;
  for (const StaticArray& array : statics) {
    if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) return true;
  }
  return false;
}

[[noreturn, gnu::noinline, gnu::cold]] void fail_shared(const std::string& kind, const Thread& thread, Access access, size_t offset,
                                                        size_t bytes, const std::string& rest, const void* caller) {
  fail(kind + ": " + sentence(thread, access, bytes, describe_shared(offset)) + rest, caller);
}

}  // namespace

std::string describe_shared(size_t offset) {
  if (offset < kDynamicRegion) return "dynamic shared memory, byte " + std::to_string(offset);
  std::string nearest = "static shared memory";
  for (const StaticArray& array : statics) {
    if (array.offset <= offset) nearest = std::string("shared array ") + array.name + ", byte " + std::to_string(offset - array.offset);
  }
  return nearest;
}

void touch_shared(const Thread& thread, size_t offset, size_t bytes, Access access, const void* caller) {
  if (__builtin_expect(!is_allocated(offset, bytes), 0)) {
    const std::string allocated = "; the launch has " + std::to_string(machine.dynamic_bytes) + " bytes of dynamic shared memory";
    fail_shared("out of bounds", thread, access, offset, bytes, allocated, caller);
  }
  const auto self = static_cast<uint32_t>(thread.index);
  const uint32_t now = machine.time << kTimeShift;
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedHistory& history = shared_histories[i];
    const uint32_t write = history.write, writer = write & kWhoMask, write_time = write >> kTimeShift;
    if (__builtin_expect((write & kInFlight) != 0 && write_time >= machine.block_start, 0))
      fail_shared("race in shared memory", thread, access, i, 1, " while a cp.async of " + text_of(writer) + " to it is in flight", caller);
    if (__builtin_expect(write_time >= machine.last_barrier && !is_ordered(write_time, writer, thread), 0) &&
        !(access == Access::atomic && writer == kAtomic))
      fail_shared("race in shared memory", thread, access, i, 1, ", which " + text_of(writer) + " wrote, with no barrier between", caller);
    if (access == Access::write) {
      const uint32_t read = history.read;
      if (__builtin_expect(read >> kTimeShift >= machine.last_barrier && !is_ordered(read >> kTimeShift, read & kWhoMask, thread), 0))
        fail_shared("race in shared memory", thread, access, i, 1,
                    ", which " + text_of(read & kWhoMask) + " read, with no barrier between", caller);
      history.write = now | self;
      continue;
    }
    if (__builtin_expect(write_time < machine.block_start, 0))
      fail_shared("unwritten memory", thread, access, i, 1, ", which nobody wrote", caller);
    const uint32_t read = history.read;
    if (access == Access::read) {
      if (read != (now | self)) history.read = now | joined_by(read >> kTimeShift, read & kWhoMask, thread);
    } else {
      if (read >> kTimeShift >= machine.last_barrier && !is_ordered(read >> kTimeShift, read & kWhoMask, thread))
        fail_shared("race in shared memory", thread, access, i, 1,
                    ", which " + text_of(read & kWhoMask) + " read, with no barrier between", caller);
      history.write = now | kAtomic;
    }
  }
}

bool is_shared(const void* address) { return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared) < kSharedRegion; }

size_t shared_offset(const void* address) { return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared); }

bool has_room_for_shared(size_t dynamic_bytes) { return dynamic_bytes <= machine.shared_limit && dynamic_bytes <= kDynamicRegion; }

void begin_launch_shared() {
  statics.clear();
  static_bytes = 0;
}

uint32_t next_time() {
  if (machine.time == kTimeLimit - 1) fail("the emulator counts up to " + std::to_string(kTimeLimit / 2) + " barriers of one block");
  return ++machine.time;
}

void begin_block_shared() {
  if (machine.time > kTimeLimit / 2) {
    std::fill_n(shared_histories, kSharedRegion, SharedHistory{});
    machine.time = 0;
  }
  machine.block_start = machine.last_barrier = ++machine.time;
  std::fill_n(shared, machine.dynamic_bytes, kPoison);
  std::fill_n(shared + kDynamicRegion, static_bytes, kPoison);
}

void begin_copy(void* destination, const void* source, int bytes, bool valid, const void* caller) {
  Thread& thread = *machine.current;
  const auto size = static_cast<size_t>(bytes);
  if (!is_shared(destination)) fail("cp.async: its destination is not in shared memory", caller);
  if (is_shared(source) || is_on_stack(source)) fail("cp.async: its source is not in global memory", caller);
  if (reinterpret_cast<uintptr_t>(destination) % size != 0 || reinterpret_cast<uintptr_t>(source) % size != 0)
    fail("misaligned: cp.async of " + std::to_string(bytes) + " bytes from " +
             describe_global(reinterpret_cast<uintptr_t>(source)) + " to " + describe_shared(shared_offset(destination)),
         caller);
  check_access(destination, size, Access::write, caller);
  if (valid) check_access(source, size, Access::read, caller);
  for (size_t i = 0; i < size; ++i) shared_histories[shared_offset(destination) + i].write |= kInFlight;
  thread.copies.push_back({static_cast<unsigned char*>(destination), static_cast<const unsigned char*>(source), caller,
                           static_cast<uint8_t>(bytes), valid, false});
  // It lands at the latest legal moment, or at random at the earliest.
  if (machine.order == Order::random && machine.random.next() % 2 != 0) {
    Copy& copy = thread.copies.back();
    if (valid) std::copy_n(copy.source, bytes, copy.destination);
    else std::fill_n(copy.destination, bytes, 0);
    copy.has_landed = true;
  }
}

void land_copy(const Thread& thread, Copy& copy) {
  if (!copy.has_landed) {
    if (copy.valid) std::copy_n(copy.source, copy.bytes, copy.destination);
    else std::fill_n(copy.destination, copy.bytes, 0);
    copy.has_landed = true;
  }
  SharedHistory* const histories = shared_histories + shared_offset(copy.destination);
  for (int i = 0; i < copy.bytes; ++i) histories[i].write = machine.time << kTimeShift | static_cast<uint32_t>(thread.index);
}

void* shared_array(size_t bytes, const char* owner, int line, const char* name) {
  for (const StaticArray& array : statics) {
    if (array.owner == owner && array.line == line) return shared + array.offset;
  }
  const size_t offset = kDynamicRegion + static_bytes;
  static_bytes += (bytes + 15) / 16 * 16 + kGap;
  size_t used = 0;
  for (const StaticArray& array : statics) used += (array.bytes + 15) / 16 * 16;
  if (used + bytes > kStaticLimit || used + bytes + machine.dynamic_bytes > machine.shared_limit)
    fail(std::string("shared memory: no room for the array ") + name + " of " + std::to_string(bytes) + " bytes");
  statics.push_back({owner, line, name, offset, bytes});
  std::fill_n(shared + offset, bytes, kPoison);
  return shared + offset;
}

unsigned char* dynamic_shared() { return shared; }

}  // namespace kernelpress::simt
