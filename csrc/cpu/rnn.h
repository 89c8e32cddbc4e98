// What forward and backward of LSTM, GRU and RNN share: the arguments, which sequences run at which step, and the
// cells' mathematics.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "gemm_tile.h"
#include "tasks.h"
#include "team.h"
#include "view.h"

namespace {

enum class Cell : int64_t { LSTM, GRU, RNN_TANH, RNN_RELU };

constexpr int gates_of(Cell cell) { return cell == Cell::LSTM ? 4 : cell == Cell::GRU ? 3 : 1; }        // rows, in H
constexpr int saved_of(Cell cell) { return cell == Cell::LSTM || cell == Cell::GRU ? 4 : 0; }  // of `gates`, in H
constexpr bool has_state(Cell cell) { return cell == Cell::LSTM || cell == Cell::GRU; }  // carried beside h

// ---- the arguments of both ops --------------------------------------------------------------------------------------

struct RnnArguments {
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
    constexpr Layout ANY = Layout::ANY;
    const ScalarType dtype = storage();
    ::check(weight_hh, {ANY_SIZE, ANY_SIZE}, dtype, "weight_hh", ANY);
    ::check(h0, {ANY_SIZE, P()}, dtype, "h0", ANY);
    if (step()) ::check(input, {B(), ANY_SIZE}, dtype, "input", ANY);
    else if (packed()) ::check(input, {ANY_SIZE, ANY_SIZE}, dtype, "input", ANY);
    else ::check(input, {ANY_SIZE, B(), ANY_SIZE}, dtype, "input", ANY);
    const int64_t rows = weight_hh.size(0);
    STD_TORCH_CHECK(rows > 0 && rows % gates_of(cell) == 0, "weight_hh: expected ", gates_of(cell),
                    "·H rows, got ", rows);
    ::check(weight_ih, {rows, I()}, dtype, "weight_ih", ANY);
    STD_TORCH_CHECK(c0.has_value() == (cell == Cell::LSTM), "c0: expected for the LSTM and for no other cell");
    ::check(c0, {B(), H()}, dtype, "c0", ANY);
    STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "bias_hh: expected together with bias_ih");
    ::check(bias_ih, {rows}, dtype, "bias_ih", ANY);
    ::check(bias_hh, {rows}, dtype, "bias_hh", ANY);
    STD_TORCH_CHECK(!weight_hr || cell == Cell::LSTM, "weight_hr: expected none but for the LSTM");
    ::check(weight_hr, {P(), H()}, dtype, "weight_hr", ANY);
    if (!weight_hr) ::check(weight_hh, {rows, H()}, dtype, "weight_hh", ANY);
    STD_TORCH_CHECK(!(lengths || resets) || input.dim() == 3, "lengths, resets: expected with a padded input only");
    STD_TORCH_CHECK(!step() || !reverse, "reverse: expected false for one step");
    ::check(batch_sizes, {ANY_SIZE}, ScalarType::Long, "batch_sizes", ANY);
    ::check(lengths, {B()}, ScalarType::Long, "lengths", ANY);
    ::check(resets, {T(), B()}, ScalarType::Bool, "resets", ANY);
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

  explicit Schedule(const RnnArguments& a) : T(a.T()), B(a.B()), reverse_(a.reverse) {
    resets_ = View<const bool, 2>(a.resets);
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
  S* at(const View<S, 3>& rows, int64_t t, int64_t slot) const {
    return first_row_.empty() ? rows.at(t, sequence(slot)) : rows.at(0, first_row_[t] + slot);
  }
  bool ragged() const { return !sequence_.empty(); }  // some steps have rows that stay inactive
  bool any_resets() const { return bool(resets_); }
  bool reset(int64_t t, int64_t slot) const {
    return resets_ && *resets_.at(t, sequence(slot));
  }

 private:
  bool reverse_;
  std::vector<int64_t> sequence_;   // of each slot; empty: slot and sequence are the same
  std::vector<int64_t> active_;     // [T]; empty: all B
  std::vector<int64_t> first_row_;  // [T], of packed rows
  View<const bool, 2> resets_;      // [T, B]
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

}  // namespace
