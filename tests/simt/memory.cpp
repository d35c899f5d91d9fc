// Shared and global memory: what may be touched, what has been written, and who touched it since which barrier.
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <unordered_map>

#include "machine.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // of this module: its constants may be read

namespace kernelpress::simt {

namespace {

constexpr size_t kDynamicRegion = 256 * 1024, kStaticRegion = 64 * 1024, kSharedRegion = kDynamicRegion + kStaticRegion;
constexpr size_t kStaticLimit = 48 * 1024, kGap = 32;
constexpr unsigned char kPoison = 0xfd;

// Who touched a byte: a thread's index, or one of
constexpr uint32_t kSeveralOfWarp = kMaxThreads, kSeveralWarps = kSeveralOfWarp + kMaxWarps, kAtomic = kSeveralWarps + 1;
constexpr uint32_t kWhoBits = 11, kWhoMask = (1u << kWhoBits) - 1;

// A touch of shared memory: time << 12 | is a cp.async in flight << 11 | who. Zero is long ago.
constexpr uint32_t kInFlight = 1u << kWhoBits, kTimeShift = kWhoBits + 1, kTimeLimit = 1u << (32 - kTimeShift);
struct SharedHistory {
  uint32_t write, read;
};

// A touch of global memory: launch << 53 | block << 33 | time << 11 | who. Zero is before every launch.
constexpr int kGlobalTimeShift = kWhoBits, kBlockShift = kGlobalTimeShift + 22, kLaunchShift = kBlockShift + 20;
constexpr uint32_t kSeveralBlocks = (1u << 20) - 1, kLaunchLimit = 1u << 11;
struct GlobalHistory {
  uint64_t write, read;
};

struct Unmap {
  size_t bytes;
  void operator()(GlobalHistory* histories) const { munmap(histories, bytes); }
};

struct Extent {
  uintptr_t begin, end;
  std::string name;
  std::vector<unsigned char> mask;     // empty: every byte may be touched
  std::vector<unsigned char> written;  // empty: all were written before
  std::unique_ptr<GlobalHistory[], Unmap> histories;
};

struct StaticArray {
  const char* owner;
  int line;
  const char* name;
  size_t offset, bytes;
};

// A write to bytes that another thread touched: a race if it changes them.
struct SuspectWrite {
  const unsigned char* address;
  std::vector<unsigned char> before;
  std::string conflict;
  const void* caller;
};

alignas(1024) unsigned char shared[kSharedRegion];
SharedHistory shared_histories[kSharedRegion];
std::vector<StaticArray> statics;
size_t static_bytes;

std::vector<Extent> extents;  // by address
size_t recent_extent;
SuspectWrite suspect;
std::unordered_map<const void*, std::vector<uint32_t>> released_blocks;
std::vector<uint32_t> seen_blocks;  // by the running block, through atomic operations

bool is_ordered(uint32_t time, uint32_t who, const Thread& thread) {
  if (time < machine.last_barrier || who == static_cast<uint32_t>(thread.index)) return true;
  if (who >= kSeveralWarps) return false;
  const uint32_t warp = who < kSeveralOfWarp ? who / kLanes : who - kSeveralOfWarp;
  return warp == static_cast<uint32_t>(thread.index / kLanes) && time < machine.warps[warp].last_barrier;
}

// Readers since the last barrier, with `thread` among them.
uint32_t joined_by(uint32_t time, uint32_t who, const Thread& thread) {
  const auto self = static_cast<uint32_t>(thread.index), warp = self / kLanes;
  if (time < machine.last_barrier || who == self) return self;
  const bool same_warp = (who < kSeveralOfWarp && who / kLanes == warp) || who == kSeveralOfWarp + warp;
  if (!same_warp) return kSeveralWarps;
  return time < machine.warps[warp].last_barrier ? self : kSeveralOfWarp + warp;
}

std::string text_of(uint32_t who) {
  if (who < kSeveralOfWarp) return "thread " + std::to_string(who);
  if (who < kSeveralWarps) return "several threads of warp " + std::to_string(who - kSeveralOfWarp);
  return who == kAtomic ? "an atomic operation" : "threads of several warps";
}

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates atomically";
}

std::string describe_shared(size_t offset) {
  if (offset < kDynamicRegion) return "dynamic shared memory, byte " + std::to_string(offset);
  std::string nearest = "static shared memory";
  for (const StaticArray& array : statics) {
    if (array.offset <= offset) nearest = std::string("shared array ") + array.name + ", byte " + std::to_string(offset - array.offset);
  }
  return nearest;
}

std::string sentence(const Thread& thread, Access access, size_t bytes, const std::string& place) {
  return name_of(thread) + " " + verb(access) + " " + std::to_string(bytes) + " bytes at " + place;
}

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

Extent* extent_at(uintptr_t address) {
  if (recent_extent < extents.size() && address >= extents[recent_extent].begin && address < extents[recent_extent].end)
    return &extents[recent_extent];
  for (size_t i = 0; i < extents.size(); ++i) {
    if (address >= extents[i].begin && address < extents[i].end) {
      recent_extent = i;
      return &extents[i];
    }
  }
  return nullptr;
}

std::string describe_global(uintptr_t address) {
  const Extent* nearest = nullptr;
  std::ostringstream text;
  for (const Extent& extent : extents) {
    if (extent.begin <= address) nearest = &extent;
  }
  if (nearest == nullptr) {
    text << "address " << reinterpret_cast<const void*>(address);
  } else {
    text << nearest->name << ", byte " << address - nearest->begin << " of " << nearest->end - nearest->begin;
  }
  return text.str();
}

bool is_ordered(uint64_t touch, const Thread& thread) {
  if (touch >> kLaunchShift != machine.launch_number) return true;
  const auto block = static_cast<uint32_t>(touch >> kBlockShift) & kSeveralBlocks;
  if (block == machine.block_number)
    return is_ordered(static_cast<uint32_t>(touch >> kGlobalTimeShift) & ((1u << 22) - 1), static_cast<uint32_t>(touch) & kWhoMask, thread);
  if (block == kSeveralBlocks) return !seen_blocks.empty();
  return std::find(seen_blocks.begin(), seen_blocks.end(), block) != seen_blocks.end();
}

std::string text_of(uint64_t touch) {
  const auto block = static_cast<uint32_t>(touch >> kBlockShift) & kSeveralBlocks;
  if (block == kSeveralBlocks) return "threads of several blocks";
  return text_of(static_cast<uint32_t>(touch) & kWhoMask) + " of block number " + std::to_string(block);
}

uint64_t touch_by(uint32_t block, uint32_t who) {
  return static_cast<uint64_t>(machine.launch_number) << kLaunchShift | static_cast<uint64_t>(block) << kBlockShift |
         static_cast<uint64_t>(machine.time) << kGlobalTimeShift | who;
}

uint64_t joined_by(uint64_t touch, const Thread& thread) {
  const auto self = static_cast<uint32_t>(thread.index);
  if (touch >> kLaunchShift != machine.launch_number) return touch_by(machine.block_number, self);
  const auto block = static_cast<uint32_t>(touch >> kBlockShift) & kSeveralBlocks;
  if (block != machine.block_number) return touch_by(kSeveralBlocks, kSeveralWarps);
  const uint32_t time = static_cast<uint32_t>(touch >> kGlobalTimeShift) & ((1u << 22) - 1);
  return touch_by(block, joined_by(time, static_cast<uint32_t>(touch) & kWhoMask, thread));
}

bool is_readable_constant(uintptr_t address, size_t bytes) {
  const auto within = [&](uintptr_t begin, uintptr_t end) { return address >= begin && address + bytes <= end; };
  const auto call = reinterpret_cast<uintptr_t>(machine.call);
  return within(reinterpret_cast<uintptr_t>(&__ehdr_start), reinterpret_cast<uintptr_t>(&_end)) || within(call, call + machine.call_bytes);
}

void touch_global(const Thread& thread, uintptr_t address, size_t bytes, Access access, const void* caller) {
  Extent* const extent = extent_at(address);
  if (extent == nullptr || address + bytes > extent->end) {
    if (extent == nullptr && access == Access::read && is_readable_constant(address, bytes)) return;
    fail("out of bounds: " + sentence(thread, access, bytes, describe_global(address)), caller);
  }
  const size_t offset = address - extent->begin;
  std::string conflict;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!extent->mask.empty() && !extent->mask[i])
      fail("out of bounds: " + sentence(thread, access, bytes, describe_global(address)) + ", which lies between the tensor's elements",
           caller);
    GlobalHistory& history = extent->histories[i];
    const bool is_second_atomic = access == Access::atomic && (static_cast<uint32_t>(history.write) & kWhoMask) == kAtomic;
    if (!is_second_atomic && !is_ordered(history.write, thread)) {
      conflict = ", which " + text_of(history.write) + " of the same launch wrote, with nothing to order them";
      if (access == Access::read)
        fail("race in global memory: " + sentence(thread, access, bytes, describe_global(address)) + conflict, caller);
    }
    if (access != Access::read && !is_ordered(history.read, thread))
      conflict = ", which " + text_of(history.read) + " of the same launch read, with nothing to order them";
    if (access != Access::write && !extent->written.empty() && !extent->written[i])
      fail("unwritten memory: " + sentence(thread, access, bytes, describe_global(address)) + ", which nobody wrote", caller);
    if (access == Access::read) {
      history.read = joined_by(history.read, thread);
    } else {
      if (!extent->written.empty()) extent->written[i] = 1;
      const auto who = access == Access::atomic ? kAtomic : static_cast<uint32_t>(thread.index);
      const bool is_first = history.write >> kLaunchShift != machine.launch_number;
      const auto block = static_cast<uint32_t>(history.write >> kBlockShift) & kSeveralBlocks;
      const bool is_joint = is_second_atomic && !is_first && block != machine.block_number;
      history.write = touch_by(is_joint ? kSeveralBlocks : machine.block_number, who);
    }
  }
  if (access != Access::write) return;
  settle_writes();
  if (!conflict.empty()) {
    const auto* memory = reinterpret_cast<const unsigned char*>(address);
    suspect = {memory, {memory, memory + bytes}, sentence(thread, access, bytes, describe_global(address)) + conflict, caller};
  }
}

}  // namespace

// The same value written twice is no race. The write itself comes after its check: so it is judged at the next one.
void settle_writes() {
  if (suspect.address == nullptr) return;
  const bool changes = !std::equal(suspect.before.begin(), suspect.before.end(), suspect.address);
  suspect.address = nullptr;
  if (changes) fail("race in global memory: " + suspect.conflict + ", with another value", suspect.caller);
}

bool is_shared(const void* address) { return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared) < kSharedRegion; }

size_t shared_offset(const void* address) { return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared); }

bool has_room_for_shared(size_t dynamic_bytes) { return dynamic_bytes <= machine.shared_limit && dynamic_bytes <= kDynamicRegion; }

void check_access_by(const Thread& thread, const void* address, size_t bytes, Access access, const void* caller) {
  if (is_shared(address)) {
    if (machine.counts_shared) note_shared_access(thread, address, bytes, caller);
    touch_shared(thread, shared_offset(address), bytes, access, caller);
  } else if (!is_on_stack(address)) {
    touch_global(thread, reinterpret_cast<uintptr_t>(address), bytes, access, caller);
  }
}

void check_access(const void* address, size_t bytes, Access access, const void* caller) {
  check_access_by(*machine.current, address, bytes, access, caller);
}

void begin_launch_memory() {
  statics.clear();
  static_bytes = 0;
  suspect.address = nullptr;
  released_blocks.clear();
  if (++machine.launch_number == kLaunchLimit) {
    machine.launch_number = 1;
    for (Extent& extent : extents) std::fill_n(extent.histories.get(), extent.end - extent.begin, GlobalHistory{});
  }
}

void begin_block_memory() {
  if (machine.time > kTimeLimit / 2) {
    std::fill_n(shared_histories, kSharedRegion, SharedHistory{});
    machine.time = 0;
  }
  machine.block_start = machine.last_barrier = ++machine.time;
  machine.block_has_fenced = false;
  seen_blocks.clear();
  std::fill_n(shared, machine.dynamic_bytes, kPoison);
  std::fill_n(shared + kDynamicRegion, static_bytes, kPoison);
}

void begin_copy(void* destination, const void* source, int bytes, bool valid, const void* caller) {
  Thread& thread = *machine.current;
  const auto size = static_cast<size_t>(bytes);
  if (!is_shared(destination)) fail("cp.async: its destination is not in shared memory", caller);
  if (is_shared(source) || is_on_stack(source)) fail("cp.async: its source is not in global memory", caller);
  if (reinterpret_cast<uintptr_t>(destination) % size != 0 || reinterpret_cast<uintptr_t>(source) % size != 0)
    fail("misaligned: cp.async of " + std::to_string(bytes) + " bytes from " + describe_global(reinterpret_cast<uintptr_t>(source)) + " to " +
             describe_shared(shared_offset(destination)),
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
  for (int i = 0; i < copy.bytes; ++i)
    shared_histories[shared_offset(copy.destination) + static_cast<size_t>(i)].write = machine.time << kTimeShift | static_cast<uint32_t>(thread.index);
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

void acquire_blocks(const void* address) {
  std::vector<uint32_t>& released = released_blocks[address];
  seen_blocks.insert(seen_blocks.end(), released.begin(), released.end());
  if (machine.block_has_fenced) released.push_back(machine.block_number);
}

void register_extent(uintptr_t address, size_t bytes, const std::string& name, const unsigned char* mask, bool is_unwritten) {
  if (bytes == 0) return;
  Extent extent{address, address + bytes, name, {}, {}, {nullptr, Unmap{bytes * sizeof(GlobalHistory)}}};
  if (mask != nullptr) extent.mask.assign(mask, mask + bytes);
  if (is_unwritten) extent.written.assign(bytes, 0);
  void* memory = mmap(nullptr, bytes * sizeof(GlobalHistory), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  extent.histories.reset(static_cast<GlobalHistory*>(memory));
  const auto place = std::find_if(extents.begin(), extents.end(), [&](const Extent& other) { return other.begin > address; });
  extents.insert(place, std::move(extent));
}

void clear_extents() {
  extents.clear();
  recent_extent = 0;
}

std::string unwritten_outputs() {
  std::string text;
  for (const Extent& extent : extents) {
    for (size_t i = 0; i < extent.written.size(); ++i) {
      if (!extent.written[i] && (extent.mask.empty() || extent.mask[i])) {
        text += extent.name + ": byte " + std::to_string(i) + " of " + std::to_string(extent.written.size()) + " was never written\n";
        break;
      }
    }
  }
  return text;
}

}  // namespace kernelpress::simt
