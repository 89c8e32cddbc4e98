// Work shared out over torch's threads, and the memory it needs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include <torch/csrc/stable/ops.h>

namespace {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Calls f(worker, task) for every task in [0, count). Tasks are handed out one by one, in order, because their sizes
// differ (a causal row block late in the sequence costs many times an early one) and cores may be shared. Each task
// must own what it writes, so the result does not depend on who runs it. 0 <= worker < min(count, thread_count()).
// f must not throw: an exception here loses its message.
template <class F>
void run_tasks(int64_t count, const F& f) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, thread_count()), 1, [&](int64_t worker, int64_t) {
    for (int64_t task = next++; task < count; task = next++) f(worker, task);
  });
}

// Uninitialised memory aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace
