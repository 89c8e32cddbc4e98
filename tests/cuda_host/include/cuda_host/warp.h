// Warp operations. All lanes that the mask names come to the same operation with the same mask, or the launch is ended;
// a mask may name lanes that a block whose size is no multiple of 32 lacks. A lane that the mask does not name has no
// value to give: what is read from it is NaN, or −1.
#pragma once

#include <type_traits>

#include "thread.h"

namespace cuda_host {

// Gives `size` bytes and waits for the lanes of the mask; the values of all 32, which stay until this lane's next call.
const void* exchange(unsigned mask, const void* mine, unsigned size, const char* operation, Here here);

template <class T>
const T* exchange(unsigned mask, T mine, const char* operation, Here here) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  return static_cast<const T*>(exchange(mask, &mine, sizeof(T), operation, here));
}

// The values of all 32 lanes, until this lane's next warp operation: what a matrix instruction is computed from.
template <class T>
const T* gather(T mine, Here here = Here::current()) {
  return exchange(~0u, mine, "gather", here);
}

inline unsigned lane() { return current->rank % 32; }

template <class T, class F>
T reduce(unsigned mask, T mine, const char* operation, Here here, F combine) {
  const T* values = exchange(mask, mine, operation, here);
  mask &= current->mask;
  T result = values[__builtin_ctz(mask)];
  for (mask &= mask - 1; mask; mask &= mask - 1) result = combine(result, values[__builtin_ctz(mask)]);
  return result;
}

}  // namespace cuda_host

#define CUDA_HOST_HERE cuda_host::Here here = cuda_host::Here::current()

inline void __syncwarp(unsigned mask = ~0u, CUDA_HOST_HERE) { cuda_host::exchange(mask, '\0', "__syncwarp", here); }

// The lanes that have not exited. (A device may say fewer: those that happen to be together.)
inline unsigned __activemask() {
  const cuda_host::Warp& warp = cuda_host::current->block->warps[cuda_host::current->rank / 32];
  return warp.lanes & ~warp.exited;
}

template <class T>
T __shfl_sync(unsigned mask, T mine, int source, int width = 32, CUDA_HOST_HERE) {
  const T* values = cuda_host::exchange(mask, mine, "__shfl_sync", here);
  return values[(cuda_host::lane() & ~(width - 1)) | (source & (width - 1))];
}
template <class T>
T __shfl_up_sync(unsigned mask, T mine, unsigned delta, int width = 32, CUDA_HOST_HERE) {
  const T* values = cuda_host::exchange(mask, mine, "__shfl_up_sync", here);
  const unsigned lane = cuda_host::lane();
  return (lane & (width - 1)) < delta ? mine : values[lane - delta];
}
template <class T>
T __shfl_down_sync(unsigned mask, T mine, unsigned delta, int width = 32, CUDA_HOST_HERE) {
  const T* values = cuda_host::exchange(mask, mine, "__shfl_down_sync", here);
  const unsigned lane = cuda_host::lane();
  return (lane & (width - 1)) + delta >= unsigned(width) ? mine : values[lane + delta];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int bits, int width = 32, CUDA_HOST_HERE) {
  const T* values = cuda_host::exchange(mask, mine, "__shfl_xor_sync", here);
  const unsigned lane = cuda_host::lane(), source = lane ^ bits;
  return source > (lane | (width - 1)) ? mine : values[source];
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_HERE) {
  const bool* values = cuda_host::exchange(mask, predicate != 0, "__ballot_sync", here);
  unsigned ballot = 0;
  for (mask = cuda_host::current->mask; mask; mask &= mask - 1)
    ballot |= unsigned(values[__builtin_ctz(mask)]) << __builtin_ctz(mask);
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, predicate != 0, "__any_sync", here, [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, predicate != 0, "__all_sync", here, [](bool a, bool b) { return a && b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T mine, CUDA_HOST_HERE) {
  const T* values = cuda_host::exchange(mask, mine, "__match_any_sync", here);
  unsigned equal = 0;
  for (mask = cuda_host::current->mask; mask; mask &= mask - 1)
    if (std::memcmp(&values[__builtin_ctz(mask)], &mine, sizeof(T)) == 0) equal |= mask & -mask;
  return equal;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T mine, int* all, CUDA_HOST_HERE) {
  const T* values = cuda_host::exchange(mask, mine, "__match_all_sync", here);
  *all = 1;
  for (unsigned left = cuda_host::current->mask; left; left &= left - 1)
    if (std::memcmp(&values[__builtin_ctz(left)], &mine, sizeof(T)) != 0) *all = 0;
  return *all ? mask : 0;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned mine, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, mine, "__reduce_add_sync", here, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int mine, CUDA_HOST_HERE) {
  return __reduce_add_sync(mask, unsigned(mine), here);
}
template <class T>
T __reduce_max_sync(unsigned mask, T mine, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, mine, "__reduce_max_sync", here, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T mine, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, mine, "__reduce_min_sync", here, [](T a, T b) { return std::min(a, b); });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned mine, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, mine, "__reduce_and_sync", here, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned mine, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, mine, "__reduce_or_sync", here, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned mine, CUDA_HOST_HERE) {
  return cuda_host::reduce(mask, mine, "__reduce_xor_sync", here, [](unsigned a, unsigned b) { return a ^ b; });
}

#undef CUDA_HOST_HERE
