// Work shared out over torch's threads, and the memory it needs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// Nanoseconds of work that repay a thread; 0: any work does, which the tests ask for. A parallel region costs 2 to 10 µs
// where all threads have a core, and where they have none, milliseconds. Weak: one for all files of a library.
extern "C" __attribute__((visibility("default"), weak)) int64_t pykernels_least_work;
int64_t pykernels_least_work = 20000;

namespace {

// Work is told in nanoseconds of one core. These are rough, of an AVX-512 core; a decision needs no better.
constexpr double MULTIPLY_ADD = 1.0 / 32;  // in fp32, of operands in the nearest caches
constexpr double BYTE = 1.0 / 32;          // read or written: twice as much from a cache, half from memory

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// As many threads as the work is worth.
inline int64_t threads_for(double work) {
  const double repaid = work / std::max(static_cast<double>(pykernels_least_work), 1e-3);
  return static_cast<int64_t>(std::clamp(repaid, 1.0, static_cast<double>(thread_count())));
}

// Calls f(worker, task) for every task in [0, count), on as many threads as the work of all of them repays: little work
// wakes none. Tasks are handed out one by one, in order, because their sizes differ (a causal row block late in the
// sequence costs many times an early one) and cores may be shared. Each task must own the memory that it writes, so the
// result does not depend on who runs it. 0 <= worker < min(count, thread_count()). f must not throw: an exception here
// loses its message.
template <class F>
void run_tasks(int64_t count, double work, const F& f) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  auto body = [&](int64_t worker, int64_t) {
    for (int64_t task = next++; task < count; task = next++) f(worker, task);
  };
  const int64_t threads = std::min(count, threads_for(work));
  if (threads == 1) body(0, 1);
  else torch::stable::parallel_for(0, threads, 1, body);
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

// Arrays one after the other in one piece of memory, each at a cache line. An arena without memory only measures.
class Arena {
 public:
  Arena() = default;
  explicit Arena(void* memory) : memory_(static_cast<std::byte*>(memory)) {}

  bool measures() const { return memory_ == nullptr; }
  int64_t bytes() const { return used_; }  // of what was placed

  template <class T>
  void place(T*& array, int64_t count) {
    array = measures() ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  std::byte* memory_ = nullptr;
  int64_t used_ = 0;
};

// A Scratch for each worker. Scratch(arena, arguments...) places its arrays, and touches them only where there is
// memory.
template <class Scratch>
class Workspace {
 public:
  template <class... Arguments>
  explicit Workspace(int64_t workers, const Arguments&... arguments)
      : bytes_(measure(arguments...)), memory_(workers * bytes_) {
    for (int64_t i = 0; i < workers; ++i) {
      Arena arena(memory_.get() + i * bytes_);
      scratch_.emplace_back(arena, arguments...);
    }
  }
  Scratch& operator[](int64_t worker) { return scratch_[worker]; }

 private:
  template <class... Arguments>
  static int64_t measure(const Arguments&... arguments) {
    Arena arena;
    Scratch(arena, arguments...);
    return arena.bytes();
  }

  int64_t bytes_;
  Buffer<std::byte> memory_;
  std::vector<Scratch> scratch_;
};

// Large results are fresh pages from the system, and a page fault for every 4 KB costs more than writing them.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A result, contiguous; made by the shim itself, since new_empty looks its op up by name: 4 µs of a step.
inline torch::stable::Tensor empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t d = sizes.size() - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  AtenTensorHandle made;
  auto error = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), to<int32_t>(from(dtype)),
                                        aoti_torch_device_type_cpu(), 0, &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "expected room for a result");
  torch::stable::Tensor result(made);
  ask_for_huge_pages(result.data_ptr(), result.numel() * result.element_size());
  return result;
}

}  // namespace
