// What the CUDA kernels of all WKVs share.
#pragma once

#include <optional>

#include "device.h"

namespace {

constexpr int LANES = 32;
constexpr int SAVED = 32;  // steps from one saved state to the next, as in pykernels/ops/wkv4.py and linear_recurrence.py
constexpr float LOG2E = 1.44269504f;

template <class Storage, int N>
struct alignas(N * sizeof(Storage)) Pack {
  Storage of[N];
};

// dense: every stride is that of a contiguous tensor, else the last is.
inline void check_shape(const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype, const char* name,
                        bool dense = true) {
  check_device_tensor(t, int64_t(sizes.size()), dtype, name);
  int64_t dim = 0;
  for (int64_t size : sizes) check_size(t, dim++, size, name);
  int64_t stride = 1;
  if (t.numel() == 0) return;
  for (--dim; dim >= 0; --dim) {
    if (dense || dim == int64_t(sizes.size()) - 1)
      STD_TORCH_CHECK(t.size(dim) <= 1 || t.stride(dim) == stride, name, ": expected stride ", stride, " in dimension ",
                      dim, ", got ", t.stride(dim));
    stride *= t.size(dim);
  }
}

}  // namespace
