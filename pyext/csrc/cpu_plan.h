// A flat list of prepared kernel calls. Addresses that lie in an external buffer are patched at every run; all others are fixed, and
// so is the instruction set that each call was appended with, because its weights were packed for it. Neighbouring layers can be
// joined to a chain, which is a call of its own. Plans of a share of a batch each run side by side.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_runtime.h"
#include "kernels/cpu/args.h"
#include "kernels/cpu/chain_layers.h"
#include "kernels/cpu/runtime.h"

namespace kernelpress {

class Plan {
 public:
  using Run = void (*)(const KernelTable& kernels, const void* arguments);
  using Join = bool (*)(ChainBuilder& chain, const void* arguments);

  // Declares a buffer whose address is given anew at each run; returns its index.
  int64_t external(int64_t address, int64_t bytes) {
    externals_.push_back({address, bytes});
    return static_cast<int64_t>(externals_.size()) - 1;
  }

  // Appends a call of `kernels` with an argument block of eight-byte words, the first `addresses` of which are addresses.
  void append(Run run, Join join, const KernelTable& kernels, std::vector<int64_t> words, int addresses) {
    const int64_t step = static_cast<int64_t>(steps_.size());
    for (int field = 0; field < addresses; ++field) {
      for (size_t buffer = 0; buffer < externals_.size(); ++buffer) {
        const int64_t offset = words[field] - externals_[buffer].address;
        if (words[field] && offset >= 0 && offset < externals_[buffer].bytes) {
          patches_.push_back({step, field, static_cast<int64_t>(buffer), offset});
          break;
        }
      }
    }
    steps_.push_back({run, join, &kernels, std::move(words), addresses});
  }

  // Joins steps [first, last), each of which reads what the one before writes and nobody else does. Returns false, with the plan as it
  // was, where they are no layers that a chain can hold.
  bool join(int64_t first, int64_t last, Run run_chain, Run run_int8_chain) {
    check_range(first, last);
    if (last - first < 2) return false;
    ChainBuilder builder;
    for (int64_t step = first; step < last; ++step) {
      if (steps_[step].kernels != steps_[first].kernels || !steps_[step].join(builder, words_as_appended(step).data())) return false;
    }
    const Plan before = *this;
    steps_.clear(), patches_.clear();
    for (int64_t step = 0; step < before.size(); ++step) {
      if (step > first && step < last) continue;
      const Step& old = before.steps_[step];
      if (step != first) {
        append(old.run, old.join, *old.kernels, before.words_as_appended(step), old.addresses);
        continue;
      }
      if (builder.is_float()) append_chain(run_chain, *old.kernels, builder.floats());
      else append_chain(run_int8_chain, *old.kernels, builder.bytes());
    }
    return true;
  }

  int64_t size() const { return static_cast<int64_t>(steps_.size()); }

  // Runs steps [first, last) with the external buffers at `addresses`.
  void run(int64_t first, int64_t last, const std::vector<int64_t>& addresses) {
    check_range(first, last);
    check_addresses(addresses);
    for (const Patch& patch : patches_) {
      if (patch.step >= first && patch.step < last) steps_[patch.step].words[patch.field] = addresses[patch.buffer] + patch.offset;
    }
    const auto compute = [&] {
      for (int64_t step = first; step < last; ++step) steps_[step].run(*steps_[step].kernels, steps_[step].words.data());
    };
    if (last - first < 2) compute();
    else with_team(compute);
  }

  // Runs every plan whole, once for each of its lists of addresses: the plans side by side, each on one thread.
  static void run_side_by_side(const std::vector<Plan*>& plans, const std::vector<std::vector<std::vector<int64_t>>>& addresses) {
    if (addresses.size() != plans.size()) {
      throw std::invalid_argument("addresses: expected lists for each of " + std::to_string(plans.size()) + " plans, got " +
                                  std::to_string(addresses.size()));
    }
    for (size_t i = 0; i < plans.size(); ++i) {
      for (const std::vector<int64_t>& run : addresses[i]) plans[i]->check_addresses(run);
    }
    parallel(static_cast<int64_t>(plans.size()), [&](int64_t begin, int64_t end) {
      const OneThread alone;
      for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
        for (const std::vector<int64_t>& run : addresses[i]) plans[i]->run(0, plans[i]->size(), run);
      }
    });
  }

 private:
  template <class Args>
  void append_chain(Run run, const KernelTable& kernels, const Args& chain) {
    const auto* words = reinterpret_cast<const int64_t*>(&chain);
    const auto cannot_join = [](ChainBuilder&, const void*) { return false; };
    append(run, cannot_join, kernels, {words, words + sizeof chain / sizeof(int64_t)}, Args::kAddresses);
  }

  void check_addresses(const std::vector<int64_t>& addresses) const {
    if (addresses.size() != externals_.size()) {
      throw std::invalid_argument("addresses: expected one for each of " + std::to_string(externals_.size()) +
                                  " external buffers, got " + std::to_string(addresses.size()));
    }
  }

  void check_range(int64_t first, int64_t last) const {
    if (first < 0 || last > size() || first > last) {
      throw std::out_of_range("steps: expected 0 <= first <= last <= " + std::to_string(size()) + ", got " + std::to_string(first) +
                              " and " + std::to_string(last));
    }
  }

  // The words of a step before any run patched them.
  std::vector<int64_t> words_as_appended(int64_t step) const {
    std::vector<int64_t> words = steps_[step].words;
    for (const Patch& patch : patches_) {
      if (patch.step == step) words[patch.field] = externals_[patch.buffer].address + patch.offset;
    }
    return words;
  }

  struct External {
    int64_t address, bytes;
  };
  struct Patch {
    int64_t step;
    int field;
    int64_t buffer, offset;
  };
  struct Step {
    Run run;
    Join join;
    const KernelTable* kernels;
    std::vector<int64_t> words;
    int addresses;
  };
  std::vector<External> externals_;
  std::vector<Patch> patches_;
  std::vector<Step> steps_;
};

}  // namespace kernelpress
