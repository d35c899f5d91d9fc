// The entrance of every access, its order among others, and asynchronous copies.
#include <sstream>

#include "history.h"

namespace kernelpress::simt {

namespace {

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates atomically";
}

}  // namespace

bool is_ordered(uint32_t time, uint32_t who, const Thread& thread) {
  if (time < machine.last_barrier || who == static_cast<uint32_t>(thread.index)) return true;
  if (who >= kSeveralWarps) return false;
  const uint32_t warp = who < kSeveralOfWarp ? who / kLanes : who - kSeveralOfWarp;
  return warp == static_cast<uint32_t>(thread.index / kLanes) && time < machine.warps[warp].last_barrier;
}

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

std::string sentence(const Thread& thread, Access access, size_t bytes, const std::string& place) {
  return name_of(thread) + " " + verb(access) + " " + std::to_string(bytes) + " bytes at " + place;
}

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
  begin_launch_shared();
  begin_launch_global();
}

void begin_block_memory() {
  begin_block_shared();
  begin_block_global();
}

}  // namespace kernelpress::simt
