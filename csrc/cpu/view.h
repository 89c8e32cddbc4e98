// Tensors as the kernels see them, and the copies that give a tensor the strides which a kernel reads.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"

namespace {

// Typed memory with N sizes and strides, in elements. A tensor of fewer dimensions has none of the leading ones: their
// size is 1 and their stride 0. An absent tensor has no data.
template <class T, int N>
struct View {
  T* data = nullptr;
  std::array<int64_t, N> size = {}, stride = {};

  View() = default;
  explicit View(const Tensor& t) : data(::data<T>(t)) {
    size.fill(1);
    const int absent = N - static_cast<int>(t.dim());
    for (int d = absent; d < N; ++d) size[d] = t.size(d - absent), stride[d] = t.stride(d - absent);
  }
  explicit View(const std::optional<Tensor>& t) {
    if (t) *this = View(*t);
  }
  explicit operator bool() const { return data != nullptr; }

  // Where the element at these indices lies; with fewer than N of them, the row or matrix that begins there.
  template <class... Index>
  T* at(Index... index) const {
    static_assert(sizeof...(Index) <= N);
    T* element = data;
    int d = 0;
    ((element += index * stride[d++]), ...);
    return element;
  }

  // What lies at one index of a dimension, without that dimension.
  View<T, N - 1> select(int dim, int64_t index) const {
    View<T, N - 1> rest;
    rest.data = data + index * stride[dim];
    for (int d = 0; d < N - 1; ++d) rest.size[d] = size[d + (d >= dim)], rest.stride[d] = stride[d + (d >= dim)];
    return rest;
  }
};

// The tensor itself where it is contiguous, else a contiguous copy.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) { return t ? std::optional(dense(*t)) : t; }

// The tensor itself where the numbers of its last dimension are neighbours, else a contiguous copy.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}
inline std::optional<Tensor> dense_rows(const std::optional<Tensor>& t) {
  return t ? std::optional(dense_rows(*t)) : t;
}

}  // namespace
