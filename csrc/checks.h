// The one vocabulary for re-checking an op's arguments before its memory is touched. The Python side has already
// raised ValueError or TypeError with the user's argument names; these guard against a direct call of the op.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Storage>
using AccOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;  // of sums and states

// A tensor's memory; of an absent one, none.
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

inline bool is_here(const Tensor& t) {
#if defined(__CUDACC__)
  return t.is_cuda();
#else
  return t.is_cpu();  // the CUDA kernels too, compiled for the host
#endif
}

// What `check` expects of a dimension: a size, any size, or a size that may be broadcast from 1.
struct Size {
  int64_t size;
  bool or_one = false;
  Size(int64_t size, bool or_one = false) : size(size), or_one(or_one) {}
};
constexpr int64_t ANY_SIZE = -1;
inline Size or_one(int64_t size) { return {size, true}; }

// What it expects of the strides. ROWS: the last dimension's numbers are neighbours. DENSE: as in a contiguous tensor.
enum class Layout { ANY, ROWS, DENSE };

inline void check(const Tensor& t, std::initializer_list<Size> sizes, ScalarType dtype, const char* name,
                  Layout layout = Layout::DENSE) {
  STD_TORCH_CHECK(is_here(t), name, ": expected a tensor on the device of the kernels that were called");
  STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), name, ": expected ", sizes.size(), " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  int64_t dim = 0;
  for (const Size& expected : sizes) {
    const int64_t size = t.size(dim);
    STD_TORCH_CHECK(size == expected.size || expected.size == ANY_SIZE || (expected.or_one && size == 1), name,
                    ": expected size ", expected.size, expected.or_one ? " or 1" : "", " in dimension ", dim, ", got ",
                    size);
    ++dim;
  }
  if (layout == Layout::ANY || t.numel() == 0) return;
  int64_t stride = 1;
  for (--dim; dim >= 0; --dim) {
    STD_TORCH_CHECK(t.size(dim) == 1 || t.stride(dim) == stride, name, ": expected stride ", stride, " in dimension ",
                    dim, ", got ", t.stride(dim));
    stride *= t.size(dim);
    if (layout == Layout::ROWS) return;
  }
}

inline void check(const std::optional<Tensor>& t, std::initializer_list<Size> sizes, ScalarType dtype,
                  const char* name, Layout layout = Layout::DENSE) {
  if (t) check(*t, sizes, dtype, name, layout);
}

// Calls f with a value of the storage type.
template <class F>
void for_dtype(ScalarType storage, const F& f) {
  switch (storage) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "expected a floating dtype, got ", torch::headeronly::toString(storage));
  }
}

inline ScalarType accumulator_of(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace
