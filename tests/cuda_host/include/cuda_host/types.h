// Keywords and vector types.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
// In a section of its own, so that the scheduler can fill it with NaN and give each resident block its copy; a plain
// static variable, so that AddressSanitizer puts its red zones around it.
#define __shared__ __attribute__((section("cuda_shared"))) static

struct uint3 {
  unsigned x, y, z;
};
struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 u) : x(u.x), y(u.y), z(u.z) {}
};

#define CUDA_HOST_VECTORS(T, name)                                             \
  struct alignas(2 * sizeof(T)) name##2 {                                      \
    T x, y;                                                                    \
  };                                                                           \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 {            \
    T x, y, z, w;                                                              \
  };                                                                           \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(signed char, char)
CUDA_HOST_VECTORS(unsigned char, uchar)
CUDA_HOST_VECTORS(short, short)
CUDA_HOST_VECTORS(unsigned short, ushort)
CUDA_HOST_VECTORS(int, int)
CUDA_HOST_VECTORS(unsigned, uint)
CUDA_HOST_VECTORS(long long, longlong)
CUDA_HOST_VECTORS(unsigned long long, ulonglong)
CUDA_HOST_VECTORS(float, float)
CUDA_HOST_VECTORS(double, double)
#undef CUDA_HOST_VECTORS
