// Tensor cores: C += A B of 16×8×16 numbers in bf16 or fp16, summed in fp32, by the 32 lanes of a warp.
#pragma once

#include "device.h"

namespace {

// With g = lane / 4 and t = lane % 4 a lane holds, in pairs whose first number is the lower half,
//   a: A[g][2t, 2t+1], A[g+8][2t, 2t+1], A[g][2t+8, 2t+9], A[g+8][2t+8, 2t+9]      A: [16, 16]
//   b: B[2t, 2t+1][g], B[2t+8, 2t+9][g]                                            B: [16, 8]
//   c: C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]                              C: [16, 8]
template <class T>
__device__ inline void mma_16x8x16(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4],
                                   const unsigned (&b)[2]) {
  static_assert(sizeof(T) == 2);
#if defined(CUDA_ON_HOST)
  struct Pair {
    T at[2];
  };
  struct Lane {
    unsigned a[4], b[2];
  };
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Lane* all = cuda_host::gather(Lane{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  float* c[4] = {&c0, &c1, &c2, &c3};
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned high = k / 8, from = k % 8 / 2;
      const Pair x = std::bit_cast<Pair>(all[4 * g + from].a[i / 2 + 2 * high]);
      const Pair y = std::bit_cast<Pair>(all[4 * (2 * t + i % 2) + from].b[high]);
      *c[i] += float(x.at[k % 2]) * float(y.at[k % 2]);
    }
#else
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace
