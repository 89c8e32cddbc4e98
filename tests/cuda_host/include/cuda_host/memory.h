// Atomics, loads and stores with cache hints, fences, asynchronous copies.
//
// One OS thread runs everything and only waits switch threads, so a plain read-modify-write is atomic, and a fence has
// nothing to do.
#pragma once

#include <type_traits>

#include "thread.h"

namespace cuda_host {

// From its issue until its wait, the destination of an asynchronous copy holds NaN: neither the old values nor the new
// ones are to be relied on. The source is read at the issue.
void copy_async(void* shared, const void* global, int bytes, bool inside);
void commit_copies();
void wait_copies(unsigned pending);

template <int BYTES>
void copy_async(void* shared, const void* global, bool inside) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  copy_async(shared, global, BYTES, inside);
}

template <class T>
using Value = std::type_identity_t<T>;  // a parameter that takes its type from the pointer beside it

template <class T, class F>
T modify(T* place, F change) {
  const T old = *place;
  *place = change(old);
  return old;
}

// Integers wrap around in atomics, as on a device, and that is not undefined.
template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
  else return a + b;
}

}  // namespace cuda_host

template <class T>
T atomicAdd(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return cuda_host::wrapping_add(old, value); });
}
template <class T>
T atomicSub(T* place, cuda_host::Value<T> value) {
  using U = std::make_unsigned_t<T>;
  return cuda_host::modify(place, [=](T old) { return T(U(old) - U(value)); });
}
template <class T>
T atomicMax(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicAnd(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return T(old & value); });
}
template <class T>
T atomicOr(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return T(old | value); });
}
template <class T>
T atomicXor(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return T(old ^ value); });
}
template <class T>
T atomicExch(T* place, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* place, cuda_host::Value<T> expected, cuda_host::Value<T> value) {
  return cuda_host::modify(place, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* place, unsigned limit) {
  return cuda_host::modify(place, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* place, unsigned limit) {
  return cuda_host::modify(place, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

template <class T> T __ldg(const T* place) { return *place; }
template <class T> T __ldca(const T* place) { return *place; }
template <class T> T __ldcg(const T* place) { return *place; }
template <class T> T __ldcs(const T* place) { return *place; }
template <class T> T __ldcv(const T* place) { return *place; }
template <class T> T __ldlu(const T* place) { return *place; }
template <class T> void __stwb(T* place, cuda_host::Value<T> value) { *place = value; }
template <class T> void __stcg(T* place, cuda_host::Value<T> value) { *place = value; }
template <class T> void __stcs(T* place, cuda_host::Value<T> value) { *place = value; }
template <class T> void __stwt(T* place, cuda_host::Value<T> value) { *place = value; }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
