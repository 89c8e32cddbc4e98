// The tensor cores' smallest product, for bf16 and fp16.
#pragma once

#include "device.h"

namespace {

// c += a · b of a warp: a: [16, 16], b: [16, 8], c: [16, 8] fp32. In lane 4·g + q (g < 8, q < 4) are, two values a word,
//   a[0], a[1], a[2], a[3]: a[g][2q, 2q+1], a[g+8][2q, 2q+1], a[g][2q+8, 2q+9], a[g+8][2q+8, 2q+9]
//   b[0], b[1]:             b[2q, 2q+1][g], b[2q+8, 2q+9][g]
//   c[0], c[1]; c[2], c[3]: c[g][2q, 2q+1]; c[g+8][2q, 2q+1]
template <class Half>
__device__ inline void multiply_add_16x8x16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                            unsigned b0, unsigned b1) {
#if defined(CUDA_ON_HOST)
  struct Words {
    unsigned a[4], b[2];
  };
  const Words* lanes = cuda_host::gather(Words{{a0, a1, a2, a3}, {b0, b1}});
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  auto value = [](unsigned word, unsigned k) {
    Half half;
    half.x = static_cast<unsigned short>(word >> 16 * (k % 2));
    return static_cast<float>(half);
  };
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k)
      c[i] += value(lanes[4 * g + k % 8 / 2].a[k / 8 * 2 + i / 2], k) * value(lanes[8 * q + i % 2 * 4 + k % 8 / 2].b[k / 8], k);
#else
  if constexpr (std::is_same_v<Half, torch::headeronly::BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

}  // namespace
