// What forward and backward of LSTM, GRU and RNN share: the arguments, which sequences run at which step, the cells'
// mathematics, and a team of threads that meets at every step.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "gemm_tile.h"
#include "tasks.h"

namespace {

enum class Cell : int64_t { LSTM, GRU, RNN_TANH, RNN_RELU };

constexpr int gates_of(Cell cell) { return cell == Cell::LSTM ? 4 : cell == Cell::GRU ? 3 : 1; }        // rows, in H
constexpr int saved_of(Cell cell) { return cell == Cell::LSTM || cell == Cell::GRU ? 4 : 0; }  // of `gates`, in H
constexpr bool has_state(Cell cell) { return cell == Cell::LSTM || cell == Cell::GRU; }  // carried beside h's operand

// ---- the arguments of both ops --------------------------------------------------------------------------------------

// A matrix, or rows by step and sequence: [T, B, N], [total, N], [B, N], [N]. Strides in elements.
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t step_stride = 0, row_stride = 0, stride = 0;

  Strided() = default;
  explicit Strided(const Tensor& t) : data(::data<T>(t)) {
    stride = t.stride(t.dim() - 1);
    if (t.dim() > 1) row_stride = t.stride(t.dim() - 2);
    if (t.dim() > 2) step_stride = t.stride(0);
  }
  explicit Strided(const std::optional<Tensor>& t) {
    if (t) *this = Strided(*t);
  }
  explicit operator bool() const { return data != nullptr; }
  T* row(int64_t i) const { return data + i * row_stride; }
};

struct Arguments {
  Tensor input;
  std::optional<Tensor> batch_sizes;
  Tensor h0;
  std::optional<Tensor> c0;
  Tensor weight_ih, weight_hh;
  std::optional<Tensor> bias_ih, bias_hh, weight_hr, lengths, resets;
  Cell cell;
  bool reverse;

  bool packed() const { return batch_sizes.has_value(); }
  bool step() const { return !packed() && input.dim() == 2; }
  ScalarType storage() const { return input.scalar_type(); }
  int64_t T() const { return packed() ? batch_sizes->size(0) : step() ? 1 : input.size(0); }
  int64_t B() const { return h0.size(0); }
  int64_t I() const { return input.size(input.dim() - 1); }
  int64_t P() const { return weight_hh.size(1); }
  int64_t H() const { return weight_hh.size(0) / gates_of(cell); }

  // Size of a result with input's leading dimensions.
  std::vector<int64_t> rows_by(int64_t width) const {
    if (input.dim() == 2) return {input.size(0), width};
    return {input.size(0), input.size(1), width};
  }

  void check() const {
    STD_TORCH_CHECK(cell >= Cell::LSTM && cell <= Cell::RNN_RELU, "cell: expected 0 to 3, got ", int64_t(cell));
    const ScalarType dtype = storage();
    check_cpu(input, "input");
    STD_TORCH_CHECK(input.dim() == (packed() ? 2 : 3) || step(), "input: expected 2 or 3 dimensions, got ",
                    input.dim());
    check_cpu_tensor(h0, 2, dtype, "h0");
    check_cpu_tensor(weight_ih, 2, dtype, "weight_ih");
    check_cpu_tensor(weight_hh, 2, dtype, "weight_hh");
    const int64_t rows = weight_hh.size(0);
    STD_TORCH_CHECK(rows > 0 && rows % gates_of(cell) == 0, "weight_hh: expected ", gates_of(cell),
                    "·H rows, got ", rows);
    if (!packed()) check_size(input, input.dim() - 2, B(), "input");
    check_size(h0, 1, P(), "h0");
    check_size(weight_ih, 0, rows, "weight_ih");
    check_size(weight_ih, 1, I(), "weight_ih");
    STD_TORCH_CHECK(c0.has_value() == (cell == Cell::LSTM), "c0: expected for the LSTM and for no other cell");
    if (c0) check_matrix(*c0, B(), H(), "c0");
    STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "bias_hh: expected together with bias_ih");
    if (bias_ih) {
      check_cpu_tensor(*bias_ih, 1, dtype, "bias_ih"), check_size(*bias_ih, 0, rows, "bias_ih");
      check_cpu_tensor(*bias_hh, 1, dtype, "bias_hh"), check_size(*bias_hh, 0, rows, "bias_hh");
    }
    STD_TORCH_CHECK(!weight_hr || cell == Cell::LSTM, "weight_hr: expected none but for the LSTM");
    if (weight_hr) check_matrix(*weight_hr, P(), H(), "weight_hr");
    else check_size(weight_hh, 1, H(), "weight_hh");
    STD_TORCH_CHECK(!(lengths || resets) || input.dim() == 3, "lengths, resets: expected with a padded input only");
    STD_TORCH_CHECK(!step() || !reverse, "reverse: expected false for one step");
    if (batch_sizes) check_cpu_tensor(*batch_sizes, 1, ScalarType::Long, "batch_sizes");
    if (lengths) check_cpu_tensor(*lengths, 1, ScalarType::Long, "lengths"), check_size(*lengths, 0, B(), "lengths");
    if (resets) {
      check_cpu_tensor(*resets, 2, ScalarType::Bool, "resets");
      check_size(*resets, 0, T(), "resets"), check_size(*resets, 1, B(), "resets");
    }
  }

 private:
  void check_matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) const {
    check_cpu_tensor(t, 2, storage(), name);
    check_size(t, 0, rows, name), check_size(t, 1, columns, name);
  }
};

// Calls f with the cell as a compile-time constant.
template <class F>
void for_cell(Cell cell, const F& f) {
  switch (cell) {
    case Cell::LSTM: return f(std::integral_constant<Cell, Cell::LSTM>{});
    case Cell::GRU: return f(std::integral_constant<Cell, Cell::GRU>{});
    case Cell::RNN_TANH: return f(std::integral_constant<Cell, Cell::RNN_TANH>{});
    case Cell::RNN_RELU: return f(std::integral_constant<Cell, Cell::RNN_RELU>{});
  }
}

// ---- which sequences run at which step ------------------------------------------------------------------------------

// Sequences take slots, longest first, so that the ones running at any step are slots 0 .. active(t) - 1. Steps are
// counted in running order, k = 0 .. T-1; t = time(k) is where their rows lie.
class Schedule {
 public:
  const int64_t T, B;

  explicit Schedule(const Arguments& a) : T(a.T()), B(a.B()), reverse_(a.reverse) {
    if (a.resets) resets_ = Strided<const bool>(*a.resets);
    if (a.batch_sizes) {
      const auto* sizes = data<const int64_t>(a.batch_sizes);
      int64_t row = 0, last = B;
      for (int64_t t = 0; t < T; ++t) {
        // Clamped, so that no size leads outside the memory.
        last = std::clamp<int64_t>(sizes[t * a.batch_sizes->stride(0)], 0, std::min(last, a.input.size(0) - row));
        first_row_.push_back(row), active_.push_back(last);
        row += last;
      }
      STD_TORCH_CHECK(row == a.input.size(0), "batch_sizes: expected a descending list of sum ", a.input.size(0));
    } else if (a.lengths) {
      const auto* lengths = data<const int64_t>(a.lengths);
      auto length = [&](int64_t b) { return std::clamp<int64_t>(lengths[b * a.lengths->stride(0)], 0, T); };
      sequence_.resize(B), active_.assign(T, 0);
      std::iota(sequence_.begin(), sequence_.end(), 0);
      std::stable_sort(sequence_.begin(), sequence_.end(), [&](auto b, auto c) { return length(b) > length(c); });
      for (int64_t b = 0; b < B; ++b)
        if (length(b) > 0) ++active_[length(b) - 1];
      for (int64_t t = T - 2; t >= 0; --t) active_[t] += active_[t + 1];
    }
  }

  int64_t time(int64_t k) const { return reverse_ ? T - 1 - k : k; }
  int64_t active(int64_t t) const { return active_.empty() ? B : active_[t]; }
  int64_t sequence(int64_t slot) const { return sequence_.empty() ? slot : sequence_[slot]; }
  int64_t length(int64_t slot) const {
    return std::partition_point(active_.begin(), active_.end(), [&](int64_t n) { return n > slot; }) -
           active_.begin() + (active_.empty() ? T : 0);
  }
  // The first and last step of a slot, as times; of length > 0.
  int64_t first_time(int64_t slot) const { return reverse_ ? length(slot) - 1 : 0; }
  int64_t last_time(int64_t slot) const { return reverse_ ? 0 : length(slot) - 1; }

  // The row of output, gates and cells, counted through their leading dimensions.
  int64_t row(int64_t t, int64_t slot) const {
    return first_row_.empty() ? t * B + sequence(slot) : first_row_[t] + slot;
  }
  // The row in a tensor of any strides with input's leading dimensions.
  template <class S>
  S* at(const Strided<S>& rows, int64_t t, int64_t slot) const {
    if (!first_row_.empty()) return rows.row(first_row_[t] + slot);
    return rows.data + t * rows.step_stride + sequence(slot) * rows.row_stride;
  }
  bool ragged() const { return !sequence_.empty(); }  // some steps have rows that stay inactive
  bool any_resets() const { return bool(resets_); }
  bool reset(int64_t t, int64_t slot) const {
    return resets_ && resets_.data[t * resets_.row_stride + sequence(slot) * resets_.stride];
  }

 private:
  bool reverse_;
  std::vector<int64_t> sequence_;   // of each slot; empty: slot and sequence are the same
  std::vector<int64_t> active_;     // [T]; empty: all B
  std::vector<int64_t> first_row_;  // [T], of packed rows
  Strided<const bool> resets_;      // [T, B]
};

// ---- the cells ------------------------------------------------------------------------------------------------------

// One step of W units. x: [G] from the input, biases included; s: [G] from the state (GRU: s[2] includes b_hn).
// state: c of the LSTM, h of the GRU; becomes the next one. saved: [saved_of(cell)] gets what backward reads. Returns
// h', of an LSTM before weight_hr.
template <Cell cell, class Acc>
PK_INLINE Vec<Acc> advance(const Vec<Acc>* x, const Vec<Acc>* s, Vec<Acc>& state, Vec<Acc>* saved) {
  if constexpr (cell == Cell::LSTM) {
    Vec<Acc> i = sigmoid<Acc>(x[0] + s[0]), f = sigmoid<Acc>(x[1] + s[1]);
    Vec<Acc> g = tanh<Acc>(x[2] + s[2]), o = sigmoid<Acc>(x[3] + s[3]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    state = f * state + i * g;
    return o * tanh<Acc>(state);
  } else if constexpr (cell == Cell::GRU) {
    Vec<Acc> r = sigmoid<Acc>(x[0] + s[0]), z = sigmoid<Acc>(x[1] + s[1]), n = tanh<Acc>(x[2] + r * s[2]);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = s[2];
    state = (Acc(1) - z) * n + z * state;
    return state;
  } else {
    Vec<Acc> a = x[0] + s[0];
    return cell == Cell::RNN_TANH ? tanh<Acc>(a) : select<Acc>(a < Acc(0), Vec<Acc>{}, a);  // NaN stays
  }
}

// ---- a team of threads ----------------------------------------------------------------------------------------------

PK_INLINE void pause() {
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

  // Members: known, and constant, once join has returned.
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
      if (spins < 500) pause();
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

// Part `i` of `parts` even shares of [0, count).
inline std::pair<int64_t, int64_t> share(int64_t count, int64_t i, int64_t parts) {
  return {count * i / parts, count * (i + 1) / parts};
}

}  // namespace
