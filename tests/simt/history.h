// What shared and global memory have in common: who touched a byte, when, and whether that is ordered before now.
#pragma once

#include "machine.h"

namespace kernelpress::simt {

// Who touched a byte: a thread's index, or one of
constexpr uint32_t kSeveralOfWarp = kMaxThreads, kSeveralWarps = kSeveralOfWarp + kMaxWarps, kAtomic = kSeveralWarps + 1;
constexpr uint32_t kWhoBits = 11, kWhoMask = (1u << kWhoBits) - 1;

// Whether a touch at `time` by `who` of this block comes before what `thread` does now.
bool is_ordered(uint32_t time, uint32_t who, const Thread& thread);
// Readers since the last barrier, with `thread` among them.
uint32_t joined_by(uint32_t time, uint32_t who, const Thread& thread);
std::string text_of(uint32_t who);
std::string sentence(const Thread& thread, Access access, size_t bytes, const std::string& place);

// shared_memory.cpp
void touch_shared(const Thread& thread, size_t offset, size_t bytes, Access access, const void* caller);
std::string describe_shared(size_t offset);
void begin_launch_shared();
void begin_block_shared();

// global_memory.cpp
void touch_global(const Thread& thread, uintptr_t address, size_t bytes, Access access, const void* caller);
std::string describe_global(uintptr_t address);
void begin_launch_global();
void begin_block_global();

}  // namespace kernelpress::simt
