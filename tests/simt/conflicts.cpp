// Bank conflicts of shared memory: which lanes of a warp meet in one of the 32 banks with different words.
#include <map>

#include "machine.h"

namespace kernelpress::simt {

namespace {

struct Touch {
  uint32_t offset, bytes;
};

// Where the k-th time that each lane came to a place is one instruction of the warp.
struct Instruction {
  const void* caller;
  int occurrence;
  bool operator<(const Instruction& other) const {
    return caller != other.caller ? caller < other.caller : occurrence < other.occurrence;
  }
};

std::map<Instruction, std::vector<Touch>> touches[kMaxWarps];
std::map<const void*, std::array<int, kLanes>> occurrences[kMaxWarps];

}  // namespace

// The extra passes of an access: how many different words the busiest bank must give, less one.
int bank_conflicts(const uint32_t* offsets, int count, int bytes) {
  constexpr int kBanks = 32;
  uint32_t words[kBanks][kLanes * 4];
  int found[kBanks] = {}, most = 1;
  for (int i = 0; i < count; ++i) {
    for (uint32_t word = offsets[i] / 4; word < (offsets[i] + static_cast<uint32_t>(bytes) + 3) / 4; ++word) {
      const uint32_t bank = word % kBanks;
      if (std::find(words[bank], words[bank] + found[bank], word) != words[bank] + found[bank]) continue;
      words[bank][found[bank]++] = word;
      most = std::max(most, found[bank]);
    }
  }
  return most - 1;
}

void note_shared_access(const Thread& thread, const void* address, size_t bytes, const void* caller) {
  const auto warp = static_cast<size_t>(thread.index / kLanes);
  const int occurrence = occurrences[warp][caller][static_cast<size_t>(lane_of(thread))]++;
  touches[warp][{caller, occurrence}].push_back({static_cast<uint32_t>(shared_offset(address)), static_cast<uint32_t>(bytes)});
}

void count_shared_conflicts(int warp_index) {
  auto& instructions = touches[static_cast<size_t>(warp_index)];
  for (const auto& [instruction, lanes] : instructions) {
    const uint32_t bytes = std::max(4u, std::min(16u, lanes.front().bytes));
    const size_t at_once = 128 / bytes;
    for (size_t first = 0; first < lanes.size(); first += at_once) {
      uint32_t offsets[kLanes];
      const size_t count = std::min(at_once, lanes.size() - first);
      for (size_t i = 0; i < count; ++i) offsets[i] = lanes[first + i].offset;
      ++machine.statistics.shared_accesses;
      machine.statistics.shared_conflicts += bank_conflicts(offsets, static_cast<int>(count), static_cast<int>(lanes.front().bytes));
    }
  }
  instructions.clear();
  occurrences[static_cast<size_t>(warp_index)].clear();
}

}  // namespace kernelpress::simt
