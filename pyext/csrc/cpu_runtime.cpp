// The host side of kernels/cpu/runtime.h: torch's thread pool where its address was handed in, a serial loop elsewhere.
#include "cpu_runtime.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/cpu/runtime.h"

namespace kernelpress {
namespace {

HostParallelFor host_parallel_for = nullptr;
HostThreadCount host_thread_count = nullptr;

struct Scratch {
  float* memory = nullptr;
  int64_t floats = 0;
  ~Scratch() { std::free(memory); }

  float* of(int64_t wanted) {
    if (wanted > floats) {
      std::free(memory);
      const size_t bytes = (static_cast<size_t>(wanted) * sizeof(float) + 4095) / 4096 * 4096;
      memory = static_cast<float*>(std::aligned_alloc(64, bytes));
      floats = memory ? wanted : 0;
      if (!memory) throw std::bad_alloc();
    }
    return memory;
  }
};

// Waits some microseconds without letting go of the core, then lets others have it in between: they may be who is waited for.
template <class Condition>
void wait_until(const Condition& condition) {
  constexpr int kSpins = 100;
  for (int i = 0; !condition(); ++i) {
    if (i >= kSpins) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
}

class Team;
thread_local Team* led = nullptr;  // by this thread

// Threads that wait for parallel loops of the one that leads them. Every line of memory has one writer.
class Team {
 public:
  explicit Team(int64_t most) : most_(most), members_(new Member[static_cast<size_t>(most)]) {}

  int64_t size() const { return size_; }

  // By each thread that the host sends, with its part of [0, most): who has the first part leads, and the others serve.
  void enter(int64_t begin, int64_t end, void (*body)(void*), void* context) {
    if (begin > 0) return serve(begin);
    size_ = (most_ + end - 1) / end;
    part_.store(end, std::memory_order_release);
    struct Leading {
      Team& team;
      explicit Leading(Team& team) : team(team) { led = &team; }
      ~Leading() { led = nullptr, team.post({}); }
    } leading(*this);
    body(context);
  }

  // A parallel loop, by the leader.
  void run(int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context) {
    if (!is_complete()) {
      const OneThread alone;
      return body(begin, end, context);
    }
    post({body, context, begin, end, (end - begin + size_ - 1) / size_});
    bool is_done = take_part(0);
    for (int64_t i = 1; i < size_; ++i) {
      wait_until([&] { return members_[i].done.load(std::memory_order_acquire) == loops_; });
      is_done = is_done && !members_[i].has_failed;
    }
    if (!is_done) throw std::bad_alloc();
  }

 private:
  static constexpr uint64_t kAway = ~uint64_t{0};

  struct Job {
    void (*body)(int64_t, int64_t, void*);  // null: go home
    void* context;
    int64_t begin, end, share;
  };
  struct alignas(64) Member {
    std::atomic<uint64_t> done{kAway};  // loops
    bool has_failed = false;
  };

  void serve(int64_t begin) {
    wait_until([this] { return part_.load(std::memory_order_acquire) != 0; });
    const int64_t index = begin / part_.load(std::memory_order_relaxed);
    Member& member = members_[index];
    uint64_t loop = 0;
    member.done.store(loop, std::memory_order_release);
    for (;;) {
      wait_until([&] { return posted_.load(std::memory_order_acquire) != loop; });
      if (!job_.body) return;
      if (!take_part(index)) member.has_failed = true;
      member.done.store(++loop, std::memory_order_release);
    }
  }

  void post(const Job& job) {
    job_ = job;
    posted_.store(++loops_, std::memory_order_release);
  }

  // The host may not have sent all yet: they are waited for at the first loop, for a while.
  bool is_complete() {
    for (; here_ < size_; ++here_) {
      for (; members_[here_].done.load(std::memory_order_acquire) == kAway; --patience_) {
        if (patience_ <= 0) return false;
        std::this_thread::yield();
      }
    }
    return true;
  }

  // False where the body threw: it does for want of scratch memory alone.
  bool take_part(int64_t index) const {
    const OneThread alone;
    const int64_t begin = job_.begin + index * job_.share, end = begin + job_.share;
    try {
      if (begin < job_.end) job_.body(begin, end < job_.end ? end : job_.end, job_.context);
      return true;
    } catch (...) {
      return false;
    }
  }

  const int64_t most_;
  const std::unique_ptr<Member[]> members_;
  int64_t size_ = 0, here_ = 1;  // the leader, and the members behind it
  int patience_ = 1000;
  uint64_t loops_ = 0;
  std::atomic<int64_t> part_{0};  // of [0, most), that each was sent with
  alignas(64) std::atomic<uint64_t> posted_{0};
  Job job_{};
};

thread_local Scratch scratch, held;
thread_local bool is_alone = false;

}  // namespace

void use_host_threads(HostParallelFor parallel_for, HostThreadCount thread_count) {
  host_parallel_for = parallel_for;
  host_thread_count = thread_count;
}

OneThread::OneThread() : before_(is_alone) { is_alone = true; }

OneThread::~OneThread() { is_alone = before_; }

void parallel_for(int64_t begin, int64_t end, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return;
  if (!host_parallel_for || is_alone || end - begin == 1) return body(begin, end, context);
  if (led) return led->run(begin, end, body, context);
  // The host catches what a body throws, which can only be the allocation of scratch memory, and returns an error code.
  if (host_parallel_for(begin, end, 1, body, context) != 0) throw std::bad_alloc();
}

int64_t thread_count() {
  uint32_t count = 1;
  if (led && !is_alone) return led->size();
  if (is_alone || !host_parallel_for || !host_thread_count || host_thread_count(&count) != 0) return 1;
  return count;
}

void with_team(void (*body)(void*), void* context) {
  const int64_t threads = thread_count();
  if (threads == 1 || led) return body(context);
  Team team(threads);
  parallel(threads, [&](int64_t begin, int64_t end) { team.enter(begin, end, body, context); });
}

float* thread_scratch(int64_t floats) { return scratch.of(floats); }

float* held_scratch(int64_t floats) { return held.of(floats); }

void advise_huge_pages(int64_t address, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 4096;
  const int64_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace kernelpress
