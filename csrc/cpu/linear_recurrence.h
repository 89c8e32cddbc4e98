// The arguments of the linear recurrence, read row by row, which its forward and its backward share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tasks.h"
#include "vec.h"
#include "view.h"

namespace {

constexpr int64_t SAVED = 32;  // steps from one saved state to the next, as in pykernels/ops/linear_recurrence.py

// [B, T, H, width] of any strides but the last, which is 1.
template <class Element>
using RowView = View<const Element, 4>;

// A row in the accumulator type, then zeros up to a whole vector.
template <class Element>
PK_INLINE void read_row(const Element* from, int64_t width, AccOf<Element>* to) {
  using Acc = AccOf<Element>;
  for (int64_t i = 0; i < width; i += lanes<Acc>) store(to + i, load_some<Acc>(from + i, width - i));
}

// e^w of a step, 1 beyond the row.
template <class Acc>
PK_INLINE void read_decay(const Acc* w, int64_t K, Acc* to) {
  for (int64_t i = 0; i < K; i += lanes<Acc>) store(to + i, exp_negative<Acc>(load_some<Acc>(w + i, K - i)));
}

template <class Element>
PK_INLINE void ask_for_row(const Element* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / sizeof(Element)) __builtin_prefetch(row + i);
}

template <class Storage>
struct RecurrenceArguments {
  using Acc = AccOf<Storage>;
  static constexpr int64_t W = lanes<Acc>;

  int64_t B, T, H, K, V;
  RowView<Storage> r, k, v, a, b;
  RowView<Acc> w;
  const Acc *u, *state;  // [H][K], [B][H][K][V]; null if there is none
  Acc scale;

  RecurrenceArguments(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                      const std::optional<Tensor>& u, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                      const std::optional<Tensor>& state, double scale)
      : B(r.size(0)), T(r.size(1)), H(r.size(2)), K(r.size(3)), V(v.size(3)), r(r), k(k), v(v), a(a), b(b), w(w),
        u(data<const Acc>(u)), state(data<const Acc>(state)), scale(static_cast<Acc>(scale)) {}

  // Asks for the rows of a step to come, v's from column j on.
  void prefetch(int64_t ib, int64_t it, int64_t ih, int64_t j) const {
    if (it >= T) return;
    ask_for_row(r.at(ib, it, ih), K);
    ask_for_row(k.at(ib, it, ih), K);
    ask_for_row(w.at(ib, it, ih), K);
    if (a) ask_for_row(a.at(ib, it, ih), K), ask_for_row(b.at(ib, it, ih), K);
    ask_for_row(v.at(ib, it, ih), V - j);
  }
};

inline void check_recurrence(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                             const std::optional<Tensor>& u, const std::optional<Tensor>& a,
                             const std::optional<Tensor>& b, const std::optional<Tensor>& state) {
  constexpr Layout ANY = Layout::ANY;
  const ScalarType dtype = r.scalar_type(), exact = accumulator_of(dtype);
  check(r, {ANY_SIZE, ANY_SIZE, ANY_SIZE, ANY_SIZE}, dtype, "r", ANY);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), K = r.size(3);
  check(w, {B, T, H, K}, exact, "w", ANY);
  check(k, {B, T, H, K}, dtype, "k", ANY);
  check(v, {B, T, H, ANY_SIZE}, dtype, "v", ANY);
  STD_TORCH_CHECK(a.has_value() == b.has_value() && a.has_value() != u.has_value(), "expected u, or a and b");
  check(a, {B, T, H, K}, dtype, "a", ANY);
  check(b, {B, T, H, K}, dtype, "b", ANY);
  check(u, {H, K}, exact, "u", ANY);
  check(state, {B, H, K, v.size(3)}, exact, "state", ANY);
}

}  // namespace
