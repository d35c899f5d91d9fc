// Global memory: the tensors that a launch may touch, what of its outputs is written, and who touched a byte in this launch.
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <unordered_map>

#include "history.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // of this module: its constants may be read

namespace kernelpress::simt {

namespace {

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

// A write to bytes that another thread touched: a race if it changes them.
struct SuspectWrite {
  const unsigned char* address;
  std::vector<unsigned char> before;
  std::string conflict;
  const void* caller;
};

std::vector<Extent> extents;  // by address
size_t recent_extent;
SuspectWrite suspect;
std::unordered_map<const void*, std::vector<uint32_t>> released_blocks;
std::vector<uint32_t> seen_blocks;  // by the running block, through atomic operations

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

bool is_ordered(uint64_t touch, const Thread& thread) {
  if (touch >> kLaunchShift != machine.launch_number) return true;
  const auto block = static_cast<uint32_t>(touch >> kBlockShift) & kSeveralBlocks;
  if (block == machine.block_number)
    return is_ordered(static_cast<uint32_t>(touch >> kGlobalTimeShift) & ((1u << 22) - 1), static_cast<uint32_t>(touch) & kWhoMask, thread);
  if (block == kSeveralBlocks) return !seen_blocks.empty();
  return std::find(seen_blocks.begin(), seen_blocks.end(), block) != seen_blocks.end();
}

std::string text_of_touch(uint64_t touch) {
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

}  // namespace

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
      conflict = ", which " + text_of_touch(history.write) + " of the same launch wrote, with nothing to order them";
      if (access == Access::read)
        fail("race in global memory: " + sentence(thread, access, bytes, describe_global(address)) + conflict, caller);
    }
    if (access != Access::read && !is_ordered(history.read, thread))
      conflict = ", which " + text_of_touch(history.read) + " of the same launch read, with nothing to order them";
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

// The same value written twice is no race. The write itself comes after its check: so it is judged at the next one.
void settle_writes() {
  if (suspect.address == nullptr) return;
  const bool changes = !std::equal(suspect.before.begin(), suspect.before.end(), suspect.address);
  suspect.address = nullptr;
  if (changes) fail("race in global memory: " + suspect.conflict + ", with another value", suspect.caller);
}

void begin_launch_global() {
  suspect.address = nullptr;
  released_blocks.clear();
  if (++machine.launch_number == kLaunchLimit) {
    machine.launch_number = 1;
    for (Extent& extent : extents) std::fill_n(extent.histories.get(), extent.end - extent.begin, GlobalHistory{});
  }
}

void begin_block_global() {
  machine.block_has_fenced = false;
  seen_blocks.clear();
}

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
