// A team of threads that runs one whole computation: they meet at barriers instead of being sent home and woken again
// for every operation, and take work from a common counter, so that a thread that was interrupted holds up nobody long.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

struct Team {
  int size = 1;
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  // One in use, one made ready for the phase after.
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  } counters[2];
};

namespace {  // each instruction set has its own copy: a shared one might be compiled for a processor that is not there

// One thread's view of its team. Every thread makes the same calls in the same order.
class Member {
 public:
  Member(Team& team, int index) : index(index), team_(team) {}

  const int index;

  int team_size() const { return team_.size; }

  // Calls f(i) once for each i in [0, count), on any thread; returns on all threads when all calls have returned.
  template <class F>
  void for_each(int64_t count, F&& f) {
    if (team_.size == 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    std::atomic<int64_t>& next = team_.counters[phase_ & 1].next;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
    barrier();
  }

  // Work whose items are small: each thread takes `grain` of them at a time.
  template <class F>
  void for_each_range(int64_t count, int64_t grain, F&& f) {
    for_each((count + grain - 1) / grain, [&](int64_t i) {
      f(i * grain, (i + 1) * grain < count ? (i + 1) * grain : count);
    });
  }

 private:
  void barrier() {
    const uint32_t generation = team_.generation.load(std::memory_order_relaxed);
    if (team_.waiting.fetch_add(1, std::memory_order_acq_rel) == team_.size - 1) {
      team_.waiting.store(0, std::memory_order_relaxed);
      team_.counters[phase_ & 1].next.store(0, std::memory_order_relaxed);
      team_.generation.store(generation + 1, std::memory_order_release);
    } else {
      // Long enough for an even finish; then the core is left to whoever keeps the others from finishing.
      for (int spins = 0; team_.generation.load(std::memory_order_acquire) == generation; ++spins) {
        if (spins < 4000)
          _mm_pause();
        else
          sched_yield();
      }
    }
    ++phase_;
  }

  Team& team_;
  uint32_t phase_ = 0;
};

}  // namespace
