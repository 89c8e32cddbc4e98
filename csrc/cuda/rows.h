// Rows of numbers, as kernels read and write them: 16 bytes at a time.
#pragma once

#include "device.h"

namespace {

template <class T>
constexpr int PART_NUMBERS = 16 / sizeof(T);

template <class T>
struct Numbers {
  T at[PART_NUMBERS<T>];
};

// 16 bytes of a row of d numbers, from a column on; zeros beyond d. ALIGNED: d and the row's address allow wide loads.
template <bool ALIGNED, class T>
__device__ inline uint4 load_part(const T* row, int64_t column, int64_t d) {
  if constexpr (ALIGNED) {
    return column < d ? *reinterpret_cast<const uint4*>(row + column) : uint4{};
  } else {
    Numbers<T> part;
#pragma unroll
    for (int e = 0; e < PART_NUMBERS<T>; ++e) part.at[e] = column + e < d ? row[column + e] : T(0.f);
    return std::bit_cast<uint4>(part);
  }
}

template <bool ALIGNED, class T>
__device__ inline void store_part(T* row, int64_t column, int64_t d, const float (&numbers)[PART_NUMBERS<T>]) {
  Numbers<T> part;
#pragma unroll
  for (int e = 0; e < PART_NUMBERS<T>; ++e) part.at[e] = T(numbers[e]);
  if constexpr (ALIGNED) {
    if (column < d) *reinterpret_cast<uint4*>(row + column) = std::bit_cast<uint4>(part);
  } else {
#pragma unroll
    for (int e = 0; e < PART_NUMBERS<T>; ++e)
      if (column + e < d) row[column + e] = part.at[e];
  }
}

// Sums of eight numbers a lane, each over eight neighbouring lanes: lane l of them is left with that of number l % 8.
__device__ inline float sum_across(float (&numbers)[8]) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2)  // half of the numbers go to the other half of the lanes
#pragma unroll
    for (int u = 0; u < step; ++u) {
      const bool upper = threadIdx.x & step;
      const float stays = upper ? numbers[u + step] : numbers[u], goes = upper ? numbers[u] : numbers[u + step];
      numbers[u] = stays + __shfl_xor_sync(~0u, goes, step);
    }
  return numbers[0];
}

}  // namespace
