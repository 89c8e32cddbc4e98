// Vectors for one instruction-set level.
//
// A source is compiled once per level (baseline x86-64, AVX2+FMA, AVX-512, AVX-512+BF16; NEON on Arm) and each level
// becomes its own shared object. The compiler's predefined macros choose the width here and nowhere else. Vec<T> is
// the GCC/Clang vector extension, so + - * / < & << work on it directly and a * b + c becomes one FMA where there is
// one; intrinsics appear only for what the compiler does not find by itself.
//
// Everything is in an anonymous namespace: a template shared between two levels would be merged by the linker, and a
// machine without AVX-512 would run the AVX-512 copy.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PK_VECTOR_BYTES 64
#define PK_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define PK_VECTOR_BYTES 32
#define PK_VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#define PK_VECTOR_BYTES 16
#define PK_VECTOR_REGISTERS 32
#else
#define PK_VECTOR_BYTES 16
#define PK_VECTOR_REGISTERS 16
#endif

#define PK_INLINE static inline __attribute__((always_inline))
#define PK_UNROLL _Pragma("GCC unroll 32")

namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <class T>
constexpr int lanes = PK_VECTOR_BYTES / sizeof(T);

template <class T, int N = lanes<T>>
struct VecType {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N = lanes<T>>
using Vec = typename VecType<T, N>::type;

// The integers of a float's width, for bit manipulation and lane masks.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class V>
PK_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
PK_INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

template <class T>
PK_INLINE Vec<T> broadcast(T x) { return x - Vec<T>{}; }

// mask: lanes of Bits<T>, all ones or all zeros (what a comparison gives).
template <class T>
PK_INLINE Vec<T> select(Vec<Bits<T>> mask, Vec<T> a, Vec<T> b) { return mask ? a : b; }

template <class T>
PK_INLINE Vec<T> iota() {
  Vec<T> v;
  PK_UNROLL
  for (int i = 0; i < lanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

// max(a, b); where a lane is NaN, either. Callers let NaN travel through the exponential instead.
template <class T>
PK_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Whether a > b in any lane (false where either is NaN).
template <class T>
PK_INLINE bool any_greater(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(a > b)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)(a > b)) != 0;
#else
  auto words = (Vec<int64_t>)(a > b);
  return (words[0] | words[1]) != 0;
#endif
}

template <class T>
PK_INLINE T reduce_max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
  else return _mm512_reduce_max_pd((__m512d)v);
#endif
  T r = v[0];
  for (int i = 1; i < lanes<T>; ++i) r = v[i] > r ? v[i] : r;
  return r;
}

// Added in halves, so the rounding error grows with the logarithm of the width.
template <class T>
PK_INLINE T reduce_add(Vec<T> v) {
  alignas(PK_VECTOR_BYTES) T x[lanes<T>];
  store(x, v);
  for (int n = lanes<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}

// ---- storage and accumulator types ----------------------------------------------------------------------------------
//
// Conversion between the two, a vector at a time. No arithmetic is done in 16 bits.

template <class Acc, class Storage>
PK_INLINE Vec<Acc> load_as(const Storage* p) {
  if constexpr (std::is_same_v<Acc, Storage>) {
    return load<Vec<Acc>>(p);
  } else if constexpr (std::is_same_v<Storage, BFloat16>) {
    auto wide = __builtin_convertvector((load<Vec<uint16_t, lanes<float>>>(p)), Vec<uint32_t>);
    return (Vec<float>)(wide << 16);
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Storage, Half>) return (Vec<float>)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
    if constexpr (std::is_same_v<Storage, Half>) return (Vec<float>)_mm256_cvtph_ps(load<__m128i>(p));
#endif
    Vec<Acc> v;
    for (int i = 0; i < lanes<Acc>; ++i) v[i] = static_cast<Acc>(p[i]);
    return v;
  }
}

// bf16 bits of a float vector, rounded to nearest even; a NaN stays a NaN.
PK_INLINE Vec<uint32_t> bf16_bits(Vec<float> v) {
  auto u = (Vec<uint32_t>)v;
  auto rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return v == v ? rounded : (Vec<uint32_t>{} + 0x7FC0u);
}

template <class Acc, class Storage>
PK_INLINE void store_as(Storage* p, Vec<Acc> v) {
  if constexpr (std::is_same_v<Acc, Storage>) {
    store(p, v);
  } else if constexpr (std::is_same_v<Storage, BFloat16>) {
    store(p, __builtin_convertvector(bf16_bits(v), Vec<uint16_t, lanes<float>>));
  } else {
#if defined(__AVX512F__)
    store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    store(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < lanes<Acc>; ++i) p[i] = static_cast<Storage>(v[i]);
#endif
  }
}

// min(count, lanes) elements `stride` apart, then zeros.
template <class Acc, class Storage>
PK_INLINE Vec<Acc> load_some(const Storage* from, int64_t count, int64_t stride = 1) {
  if (count >= lanes<Acc> && stride == 1) return load_as<Acc>(from);
  Vec<Acc> v = {};
  for (int64_t i = 0; i < (count < lanes<Acc> ? count : lanes<Acc>); ++i) v[i] = static_cast<Acc>(from[i * stride]);
  return v;
}

// The first min(count, lanes) elements.
template <class Acc, class Storage>
PK_INLINE void store_some(Storage* to, Vec<Acc> v, int64_t count) {
  if (count >= lanes<Acc>) return store_as<Acc>(to, v);
  Storage all[lanes<Acc>];
  store_as<Acc>(all, v);
  std::memcpy(to, all, count * sizeof(Storage));
}

// ---- functions ------------------------------------------------------------------------------------------------------

template <class T, int N>
PK_INLINE Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
  Vec<T> y = broadcast(c[N - 1]);
  PK_UNROLL
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// 2^f on [0, 1], minimax in relative error (Remez): 1.9e-9 for fp32, 3.1e-18 for fp64.
template <class T>
struct Exp2Coefficients;
template <>
struct Exp2Coefficients<float> {
  static constexpr float c[] = {1.00000000185579773f,    0.693146983840438679f,   0.240229836275894224f,
                                0.05548334197771016f,    0.00967884100704367232f, 0.00124396877471487475f,
                                0.000217022556805203094f};
};
template <>
struct Exp2Coefficients<double> {
  static constexpr double c[] = {0.999999999999999997,    0.693147180559946235,    0.240226506959054714,
                                 0.0555041086657111406,   0.00961812909879262171,  0.00133335586615757574,
                                 0.000154035114464905525, 0.0000152531902488312434, 1.32081934957471215e-6,
                                 1.02544573790145502e-7,  6.55445716265483915e-9,  6.27243446480288956e-10};
};

// 2^x for x below the largest exponent. Zero from where the result would be subnormal (so at -inf too): subnormal
// operands cost a microcode assist on some processors. NaN stays NaN.
template <class T>
PK_INLINE Vec<T> exp2(Vec<T> x) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) {
    // reduce: x - floor(x); scalef: p * 2^floor(x).
    __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec<T> p = polynomial(Exp2Coefficients<T>::c, (Vec<T>)f);
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return (Vec<T>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
  }
#endif
  constexpr int fraction = std::numeric_limits<T>::digits - 1;
  constexpr int bias = std::numeric_limits<T>::max_exponent - 1;
  const T lowest = 1 - bias, magic = T(1.5) * T(int64_t(1) << fraction);
  Vec<Bits<T>> subnormal = x < lowest;
  x = select<T>(subnormal, broadcast(lowest), x);
  // Adding 1.5 * 2^fraction rounds to an integer and leaves it in the low bits; shifted, it is the exponent field.
  Vec<T> shifted = (x - T(0.5)) + magic;
  Vec<T> p = polynomial(Exp2Coefficients<T>::c, x - (shifted - magic));
  using U = std::make_unsigned_t<Bits<T>>;
  auto power = ((Vec<U>)shifted << fraction) + (U(bias) << fraction);
  return select<T>(subnormal, Vec<T>{}, p * (Vec<T>)power);
}

// e^r - 1 = r + r^2 q(r) for |r| <= ln 2 / 2, minimax in relative error (Remez): 1.3e-8 for fp32, 2.6e-19 for fp64.
// x - n ln 2 is exact but for the last, small term: n has few bits, and so has `high`.
template <class T>
struct ExpCoefficients;
template <>
struct ExpCoefficients<float> {
  static constexpr float q[] = {0.499999981496257446f, 0.166665434243472583f, 0.0416672007108164951f,
                                0.00836654712515003976f, 0.00138825164992094015f};
  static constexpr float high = 0.693359375f, low = -2.12194440054690583e-4f;
};
template <>
struct ExpCoefficients<double> {
  static constexpr double q[] = {0.500000000000000000852, 0.166666666666666765467,  0.0416666666666665081655,
                                 0.00833333333332165445,  0.00138888888889625967816, 0.000198412698860726775648,
                                 2.48015871722482944e-5,  2.75572442550164549873e-6, 2.75574027590925814475e-7,
                                 2.51090241655403306e-8,  2.08753342001070099488e-9};
  static constexpr double high = 6.93147180369123816490e-1, low = 1.90821492927058770002e-10;
};

// e^x in two parts, power (1 + less) with power = 2^n and less = e^r - 1, so that e^x - 1 can be had without
// cancellation. x must leave 2^n normal. NaN stays, in `less`.
template <class T>
struct ExpParts {
  Vec<T> power, less;
};
template <class T>
PK_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  using C = ExpCoefficients<T>;
  using U = std::make_unsigned_t<Bits<T>>;
  constexpr int fraction = std::numeric_limits<T>::digits - 1, bias = std::numeric_limits<T>::max_exponent - 1;
  const T magic = T(1.5) * T(int64_t(1) << fraction);  // as in exp2
  Vec<T> shifted = x * T(1.4426950408889634074) + magic, n = shifted - magic;
  Vec<T> r = (x - n * C::high) - n * C::low;
  auto power = ((Vec<U>)shifted << fraction) + (U(bias) << fraction);
  return {(Vec<T>)power, r + r * r * polynomial(C::q, r)};
}

template <class T>
PK_INLINE Vec<T> absolute(Vec<T> x) { return (Vec<T>)((Vec<Bits<T>>)x & std::numeric_limits<Bits<T>>::max()); }

// e^x for x <= 0, to an ulp. Zero where it would be subnormal. NaN stays NaN.
template <class T>
PK_INLINE Vec<T> exp_negative(Vec<T> x) {
  const T lowest = sizeof(T) == 4 ? T(-87.3) : T(-708.3);  // e^lowest is normal
  Vec<Bits<T>> subnormal = x < lowest;
  auto [power, less] = exp_parts<T>(select<T>(subnormal, broadcast(lowest), x));
  return select<T>(subnormal, Vec<T>{}, power * less + power);
}

// 1 / (1 + e^-x), accurate in relative error in both tails: with e = e^-|x| <= 1, it is 1 / (1 + e) or e / (1 + e).
// Zero where e would be subnormal. NaN stays NaN.
template <class T>
PK_INLINE Vec<T> sigmoid(Vec<T> x) {
  Vec<T> e = exp_negative<T>(-absolute<T>(x));
  return select<T>(x < T(0), e, broadcast(T(1))) / (e + T(1));
}

// tanh(x) = m / (m + 2) with m = e^2|x| - 1, accurate in relative error. One division; NaN stays NaN.
template <class T>
PK_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> a = absolute<T>(x);
  a = select<T>(a > T(20), broadcast(T(20)), a);  // tanh(20) rounds to 1
  auto [power, less] = exp_parts<T>(a + a);
  Vec<T> m = power * less + (power - T(1));
  auto sign = (Vec<Bits<T>>)x & std::numeric_limits<Bits<T>>::min();
  return (Vec<T>)((Vec<Bits<T>>)(m / (m + T(2))) | sign);
}

// ---- shuffles -------------------------------------------------------------------------------------------------------

template <class V, size_t... I>
PK_INLINE V zip_half(V a, V b, size_t first, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
  return first == 0 ? __builtin_shufflevector(a, b, (I / 2 + (I % 2) * n)...)
                    : __builtin_shufflevector(a, b, (n / 2 + I / 2 + (I % 2) * n)...);
#else
  using M = Vec<Bits<std::remove_reference_t<decltype(a[0])>>>;
  return first == 0 ? __builtin_shuffle(a, b, M{static_cast<int>(I / 2 + (I % 2) * n)...})
                    : __builtin_shuffle(a, b, M{static_cast<int>(n / 2 + I / 2 + (I % 2) * n)...});
#endif
}

// In place, the transpose of a lanes x lanes matrix held in vectors. Each of the log2(lanes) rounds zips row i with
// row i + lanes/2: a perfect shuffle of the row and column bits together.
template <class T>
PK_INLINE void transpose(Vec<T> (&m)[lanes<T>]) {
  constexpr int n = lanes<T>;
  constexpr auto sequence = std::make_index_sequence<n>{};
  PK_UNROLL
  for (int round = 1; round < n; round *= 2) {
    Vec<T> zipped[n];
    PK_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      zipped[2 * i] = zip_half(m[i], m[i + n / 2], 0, sequence);
      zipped[2 * i + 1] = zip_half(m[i], m[i + n / 2], 1, sequence);
    }
    PK_UNROLL
    for (int i = 0; i < n; ++i) m[i] = zipped[i];
  }
}

// The sum of each vector's lanes, in the lane of the vector's number. Transposed, these are sums of vectors. They are
// added in halves, so that the rounding error grows with the logarithm of the width.
template <class T>
PK_INLINE Vec<T> row_sums(Vec<T> (&m)[lanes<T>]) {
  transpose<T>(m);
  PK_UNROLL
  for (int n = lanes<T> / 2; n > 0; n /= 2) {
    PK_UNROLL
    for (int i = 0; i < n; ++i) m[i] += m[i + n];
  }
  return m[0];
}

#if defined(__AVX512BF16__)
// acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1], with a and b pairs of bf16 in one 32-bit lane.
PK_INLINE Vec<float> dot_pairs(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
// Two float vectors to one vector of bf16 pairs, in order.
PK_INLINE Vec<uint32_t> to_bf16_pairs(Vec<float> low, Vec<float> high) {
  return (Vec<uint32_t>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#endif

}  // namespace
