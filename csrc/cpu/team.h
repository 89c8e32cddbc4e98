// A team of threads that meets at every step.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "tasks.h"
#include "vec.h"

namespace {

PK_INLINE void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that run at the same time and can therefore wait for each other. parallel_for promises no such thing: it may
// give fewer threads than asked for, one thread with the whole range (a nested call), or, in a thread pool, the chunks
// one after the other. So every call of its body joins the team, and the team is complete when all chunks are in it;
// if that takes too long it is closed without the missing ones, which then have nothing left to do. Members only ever
// wait for members.
class Team {
 public:
  explicit Team(int64_t chunks) : chunks_(chunks), seats_(chunks) {
    for (int64_t i = 0; i < chunks; ++i) new (&seats_[i]) Seat;
  }

  // The number of members: constant once join has returned.
  int64_t size() const { return (state_.load(std::memory_order_acquire) & ~CLOSED) / MEMBER; }

  // The caller's number, or −1 if the team was closed without it. The caller stands for `chunks` of the range.
  int64_t join(int64_t chunks) {
    int64_t seen = state_.load();
    do {
      if (seen & CLOSED) return -1;
    } while (!state_.compare_exchange_weak(seen, seen + MEMBER + chunks));
    auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
    wait([&] {
      int64_t state = state_.load(std::memory_order_acquire);
      if (state & CLOSED || state % MEMBER == chunks_) return true;
      if (std::chrono::steady_clock::now() > deadline) state_.fetch_or(CLOSED);
      return false;
    });
    return seen / MEMBER;
  }

  // Returns when every member has called it as often as this one. What they wrote before is then visible.
  void meet(int64_t member) {
    const int64_t size = this->size(), meeting = seats_[member].meetings.load(std::memory_order_relaxed) + 1;
    seats_[member].meetings.store(meeting, std::memory_order_release);
    for (int64_t i = 0; i < size; ++i)
      wait([&] { return seats_[i].meetings.load(std::memory_order_acquire) >= meeting; });
  }

 private:
  static constexpr int64_t MEMBER = int64_t(1) << 24, CLOSED = int64_t(1) << 60;
  struct alignas(64) Seat {  // a cache line of its own
    std::atomic<int64_t> meetings{0};
  };

  // Cores may be shared: after some ten microseconds others get their turn.
  template <class Done>
  static void wait(const Done& done) {
    for (int64_t spins = 0; !done(); ++spins)
      if (spins < 500) spin_pause();
      else std::this_thread::yield();
  }

  const int64_t chunks_;
  std::atomic<int64_t> state_{0};  // CLOSED?, members, chunks they stand for
  Buffer<Seat> seats_;
};

// Calls f(team, member) on at most `most` threads at once, for members 0 .. team.size() - 1. f must not throw.
template <class F>
void run_team(int64_t most, const F& f) {
  Team team(most);
  auto body = [&](int64_t begin, int64_t end) {
    int64_t member = team.join(end - begin);
    if (member >= 0) f(team, member);
  };
  if (most == 1) body(0, 1);  // without a parallel region, which costs microseconds
  else torch::stable::parallel_for(0, most, 1, body);
}

// A member's even share of [0, count): its first and the one after its last.
inline std::pair<int64_t, int64_t> member_share(int64_t count, int64_t member, int64_t members) {
  return {count * member / members, count * (member + 1) / members};
}

}  // namespace
