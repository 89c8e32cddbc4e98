// What the forward and the backward of RWKV-6's and -7's WKV share: their arguments, read row by row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "tasks.h"
#include "vec.h"

namespace {

constexpr int64_t CHUNK = 32;  // steps from one saved state to the next, as in pykernels/ops/linear_recurrence.py

// [B, T, H, width] of any strides but the last, which is 1.
template <class Element>
struct Rows {
  using Acc = AccOf<Element>;
  const Element* data = nullptr;
  int64_t b = 0, t = 0, h = 0;

  Rows() = default;
  explicit Rows(const std::optional<Tensor>& x) {
    if (x) data = ::data<const Element>(*x), b = x->stride(0), t = x->stride(1), h = x->stride(2);
  }
  const Element* row(int64_t ib, int64_t it, int64_t ih) const { return data + ib * b + it * t + ih * h; }

  // A row in the accumulator type, then zeros up to a whole vector.
  void read(int64_t ib, int64_t it, int64_t ih, int64_t width, Acc* to) const {
    const Element* from = row(ib, it, ih);
    for (int64_t i = 0; i < width; i += lanes<Acc>) store(to + i, load_some<Acc>(from + i, width - i));
  }
  void prefetch(int64_t ib, int64_t it, int64_t ih, int64_t width) const {
    const Element* from = row(ib, it, ih);
    for (int64_t i = 0; i < width; i += 64 / sizeof(Element)) __builtin_prefetch(from + i);
  }
};

template <class Storage>
struct Arguments {
  using Acc = AccOf<Storage>;
  static constexpr int64_t W = lanes<Acc>;

  int64_t B, T, H, K, V;
  Rows<Storage> r, k, v, a, b;
  Rows<Acc> w;
  const Acc *u, *state;  // [H][K], [B][H][K][V]; null if there is none
  Acc scale;

  Arguments(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const std::optional<Tensor>& u,
            const std::optional<Tensor>& a, const std::optional<Tensor>& b, const std::optional<Tensor>& state,
            double scale)
      : B(r.size(0)), T(r.size(1)), H(r.size(2)), K(r.size(3)), V(v.size(3)), r(r), k(k), v(v), a(a), b(b), w(w),
        u(data<const Acc>(u)),
        state(data<const Acc>(state)), scale(static_cast<Acc>(scale)) {}

  // e^w of a step, 1 beyond the row.
  void read_decay(int64_t ib, int64_t it, int64_t ih, Acc* to) const {
    const Acc* from = w.row(ib, it, ih);
    for (int64_t i = 0; i < K; i += W) store(to + i, exp_negative<Acc>(load_some<Acc>(from + i, K - i)));
  }

  // The rows of a step to come, v's from column j on.
  void prefetch(int64_t ib, int64_t it, int64_t ih, int64_t j) const {
    if (it >= T) return;
    r.prefetch(ib, it, ih, K);
    k.prefetch(ib, it, ih, K);
    w.prefetch(ib, it, ih, K);
    if (a.data) a.prefetch(ib, it, ih, K), b.prefetch(ib, it, ih, K);
    v.prefetch(ib, it, ih, V - j);
  }
};

inline void check(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const std::optional<Tensor>& u,
                  const std::optional<Tensor>& a, const std::optional<Tensor>& b, const std::optional<Tensor>& state) {
  const ScalarType dtype = r.scalar_type(), exact = accumulator_of(dtype);
  check_cpu_tensor(r, 4, dtype, "r");
  check_cpu_tensor(v, 4, dtype, "v");
  auto alike = [&](const Tensor& t, ScalarType type, const char* name) {
    check_cpu_tensor(t, 4, type, name);
    for (int64_t d = 0; d < 4; ++d) check_size(t, d, r.size(d), name);
  };
  alike(w, exact, "w");
  alike(k, dtype, "k");
  for (int64_t d = 0; d < 3; ++d) check_size(v, d, r.size(d), "v");
  STD_TORCH_CHECK(a.has_value() == b.has_value() && a.has_value() != u.has_value(), "expected u, or a and b");
  if (a) alike(*a, dtype, "a"), alike(*b, dtype, "b");
  if (u) {
    check_cpu_tensor(*u, 2, exact, "u");
    check_size(*u, 0, r.size(2), "u");
    check_size(*u, 1, r.size(3), "u");
  }
  if (state) {
    check_cpu_tensor(*state, 4, exact, "state");
    check_size(*state, 0, r.size(0), "state");
    check_size(*state, 1, r.size(2), "state");
    check_size(*state, 2, r.size(3), "state");
    check_size(*state, 3, v.size(3), "state");
  }
}

// Copies what has other strides than the kernels read: any but the last for rows, none for the others.
inline void dense(std::initializer_list<std::optional<Tensor>*> whole, std::initializer_list<Tensor*> rows,
                  std::initializer_list<std::optional<Tensor>*> more) {
  for (auto* t : whole)
    if (*t) *t = torch::stable::contiguous(**t);
  auto row = [](Tensor& t) {
    if (t.size(3) > 1 && t.stride(3) != 1) t = torch::stable::contiguous(t);
  };
  for (Tensor* t : rows) row(*t);
  for (auto* t : more)
    if (*t) row(**t);
}

}  // namespace
