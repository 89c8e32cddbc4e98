// The cells of LSTM and GRU and their derivatives, of one unit and sequence: a CUDA thread's.
#pragma once

#include "device.h"

namespace {

enum Cell { LSTM, GRU };

// How far σ|x| is from 1, as a quotient: its denominator lies in (1, 2], so that several share one reciprocal: an LSTM's
// cell takes five exp2 and two reciprocals. What shares one shares its NaN: only gates that meet in one result do.
struct Distance {
  float numerator, denominator;
};
__device__ inline Distance distance(float x) {
  const float e = exp2_fast(fabsf(x) * -1.4426950408889634f);
  return {e, 1 + e};
}

// From that quotient; 1 exactly where nothing is left of it, since derivatives hang on 1 − σ and 1 − tanh².
__device__ inline float sigmoid_of(float x, float quotient) { return x < 0 ? quotient : 1 - quotient; }

// From the quotient of 2x, but for a small x: there, a minimax polynomial of (tanh x / x − 1) / x². To 2 ulp.
__device__ inline float tanh_of(float x, float quotient) {
  const float z = x * x;
  float p = fmaf(-5.89515036e-3f, z, 2.07959656e-2f);
  p = fmaf(fmaf(fmaf(p, z, -5.37838265e-2f), z, 1.33319244e-1f), z, -3.33332986e-1f);
  return fabsf(x) < 0.6f ? fmaf(p * z, x, x) : copysignf(fmaf(-2.0f, quotient, 1.0f), x);
}

// Pre-activations s (GRU: of r, z and the two halves of n), state c or h → h'; the new state; what backward reads.
template <Cell CELL>
__device__ inline float advance(const float (&s)[4], float& state, float (&saved)[4]) {
  const Distance a = distance(s[0]), b = distance(s[1]);
  const float both = a.denominator * b.denominator;
  if constexpr (CELL == LSTM) {
    const Distance g = distance(2 * s[2]);
    float inverse = reciprocal_fast(both * g.denominator);
    saved[2] = tanh_of(s[2], g.numerator * (both * inverse));
    inverse *= g.denominator;
    saved[0] = sigmoid_of(s[0], a.numerator * (b.denominator * inverse));
    saved[1] = sigmoid_of(s[1], b.numerator * (a.denominator * inverse));
    state = fmaf(saved[1], state, saved[0] * saved[2]);
    const Distance o = distance(s[3]), u = distance(2 * state);
    inverse = reciprocal_fast(o.denominator * u.denominator);
    saved[3] = sigmoid_of(s[3], o.numerator * (u.denominator * inverse));
    return saved[3] * tanh_of(state, u.numerator * (o.denominator * inverse));
  } else {
    const float inverse = reciprocal_fast(both);
    saved[0] = sigmoid_of(s[0], a.numerator * (b.denominator * inverse));
    saved[1] = sigmoid_of(s[1], b.numerator * (a.denominator * inverse));
    const float x = fmaf(saved[0], s[3], s[2]);
    const Distance n = distance(2 * x);
    saved[2] = tanh_of(x, n.numerator * reciprocal_fast(n.denominator));
    saved[3] = s[3];
    return state = fmaf(saved[1], state - saved[2], saved[2]);
  }
}

// dh', dc', what forward saved, c', the state before → gradients of the gates (GRU: of n, r, z, W_hn h + b_hn), and of
// the state before, past the product.
template <Cell CELL>
__device__ inline float retreat(float dh, float dc, const float (&g)[4], float c, float before, float (&d)[4]) {
  if constexpr (CELL == LSTM) {
    const Distance t = distance(2 * c);
    const float u = tanh_of(c, t.numerator * reciprocal_fast(t.denominator));
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
