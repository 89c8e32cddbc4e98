// The one vocabulary for re-checking an op's arguments before its memory is touched. The Python side has already
// raised ValueError or TypeError with the user's argument names; these guard against a direct call of the op.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_rank(const Tensor& t, int64_t rank, const char* name) {
  STD_TORCH_CHECK(t.dim() == rank, name, ": expected ", rank, " dimensions, got ", t.dim());
}

inline void check_size(const Tensor& t, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.size(dim) == size, name, ": expected size ", size, " in dimension ", dim, ", got ", t.size(dim));
}

// A dimension that may be broadcast.
inline void check_size_or_one(const Tensor& t, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.size(dim) == size || t.size(dim) == 1, name, ": expected size ", size, " or 1 in dimension ", dim,
                  ", got ", t.size(dim));
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_cpu_tensor(const Tensor& t, int64_t rank, ScalarType dtype, const char* name) {
  check_cpu(t, name);
  check_rank(t, rank, name);
  check_dtype(t, dtype, name);
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
