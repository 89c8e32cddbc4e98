// The cells of LSTM and GRU and their derivatives, of one unit and sequence: a CUDA thread's.
#pragma once

#include "device.h"

namespace {

enum Cell { LSTM, GRU };

constexpr float LOG2E = 1.4426950408889634f;

// Quotients whose denominators lie in (0, 2], so that several share one reciprocal: an LSTM's cell takes three exp2 and
// two reciprocals. What shares one shares its NaN: only gates that meet in the same result do.

struct Quotient {
  float numerator, denominator;
};

__device__ inline Quotient sigmoid(float x) {
  const float e = exp2_fast(fabsf(x) * -LOG2E);
  return {x < 0 ? e : 1.0f, 1.0f + e};
}

// Eigen's minimax quotient (ptanh_float): 3 ulp, from 0 to infinity.
__device__ inline Quotient tanh_quotient(float x) {
  x = x > 7.905311f ? 7.905311f : x < -7.905311f ? -7.905311f : x;
  const float z = x * x;
  float p = fmaf(-2.76076847742355e-16f, z, 2.00018790482477e-13f);
  p = fmaf(fmaf(p, z, -8.60467152213735e-11f), z, 5.12229709037114e-08f);
  p = fmaf(fmaf(p, z, 1.48572235717979e-05f), z, 6.37261928875436e-04f);
  const float q = fmaf(fmaf(1.19825839466702e-06f, z, 1.18534705686654e-04f), z, 2.26843463243900e-03f);
  return {fmaf(p, z, 4.89352455891786e-03f) * x, fmaf(q, z, 4.89352518554385e-03f)};
}

// Pre-activations s (GRU: of r, z and the two halves of n), state c or h → h'; the new state; what backward reads.
template <Cell CELL>
__device__ inline float advance(const float (&s)[4], float& state, float (&saved)[4]) {
  const Quotient a = sigmoid(s[0]), b = sigmoid(s[1]);
  const float both = a.denominator * b.denominator;
  if constexpr (CELL == LSTM) {
    const Quotient g = tanh_quotient(s[2]);
    float inverse = reciprocal_fast(both * g.denominator);
    saved[2] = g.numerator * (both * inverse);
    inverse *= g.denominator;
    saved[0] = a.numerator * (b.denominator * inverse);
    saved[1] = b.numerator * (a.denominator * inverse);
    state = fmaf(saved[1], state, saved[0] * saved[2]);
    const Quotient o = sigmoid(s[3]), u = tanh_quotient(state);
    const float o_numerator = o.numerator * reciprocal_fast(o.denominator * u.denominator);
    saved[3] = o_numerator * u.denominator;
    return o_numerator * u.numerator;
  } else {
    const float inverse = reciprocal_fast(both);
    saved[0] = a.numerator * (b.denominator * inverse);
    saved[1] = b.numerator * (a.denominator * inverse);
    const Quotient n = tanh_quotient(fmaf(saved[0], s[3], s[2]));
    saved[2] = n.numerator * reciprocal_fast(n.denominator);
    saved[3] = s[3];
    return state = fmaf(saved[1], state - saved[2], saved[2]);
  }
}

// dh', dc', what forward saved, c', the state before → gradients of the gates (GRU: of n, r, z, W_hn h + b_hn), and of
// the state before, past the product.
template <Cell CELL>
__device__ inline float retreat(float dh, float dc, const float (&g)[4], float c, float before, float (&d)[4]) {
  if constexpr (CELL == LSTM) {
    const Quotient t = tanh_quotient(c);
    const float u = t.numerator * reciprocal_fast(t.denominator);
    dc = fmaf(dh * g[3], 1 - u * u, dc);
    d[0] = dc * g[2] * (g[0] * (1 - g[0]));
    d[1] = dc * before * (g[1] * (1 - g[1]));
    d[2] = dc * g[0] * (1 - g[2] * g[2]);
    d[3] = dh * u * (g[3] * (1 - g[3]));
    return dc * g[1];
  } else {
    d[0] = dh * (1 - g[1]) * (1 - g[2] * g[2]);
    d[1] = d[0] * g[3] * (g[0] * (1 - g[0]));
    d[2] = dh * (before - g[2]) * (g[1] * (1 - g[1]));
    d[3] = d[0] * g[0];
    return dh * g[1];
  }
}

}  // namespace
