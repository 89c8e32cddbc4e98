// What the CUDA kernels of RWKV-6's and RWKV-7's WKV share: rows of a step, tiles of S: [K, V], and their arguments.
//
// A lane holds 8 rows by some columns of S: columns never meet but in sums over V, rows meet by shuffles. Of every step
// it reads its 8 numbers of each row from shared memory, which all warps of the block have converted together.
#pragma once

#include "device.h"

namespace {

constexpr int GROUP = 8;  // steps that are brought at once
constexpr int ROWS = 8;   // of S a lane
constexpr int WARPS = 4, THREADS = WARPS * LANES;

// ---- rows ----------------------------------------------------------------------------------------------------------

template <class Element>
struct Rows {  // [B, T, H, width], elements of a row side by side
  const Element* first;
  int64_t batch, step, head;
  bool given = true;  // else zeros

  __device__ const Element* at(int b, int h, int t) const { return first + b * batch + h * head + t * step; }
};

struct Head {
  int b, h;
  int64_t index;

  __device__ Head(int64_t index, int H) : b(int(index / H)), h(int(index % H)), index(index) {}
};

// Brings WIDTH elements from `column` on of GROUP rows from `t` on, without waiting; zeros from `stop` and `width` on.
template <int WIDTH, class Element>
__device__ inline void fetch(Element* tile, const Rows<Element>& from, const Head& head, int t, int stop, int column,
                             int width, bool aligned) {
  const Element* const start = from.at(head.b, head.h, t) + column;
  auto bring = [&]<int COUNT>(std::integral_constant<int, COUNT>) {
    constexpr int PIECES = WIDTH / COUNT, BYTES = COUNT * sizeof(Element);
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * PIECES; i += THREADS) {
      const int row = i / PIECES, x = i % PIECES * COUNT;
      const bool inside = from.given && t + row < stop && column + x < width;
      Element* const to = tile + row * WIDTH + x;
      const Element* const at = start + row * from.step + x;
      if constexpr (BYTES >= 4) copy_async<BYTES>(to, at, inside);
      else *to = inside ? *at : Element{};
    }
  };
  if (aligned) bring(std::integral_constant<int, 16 / sizeof(Element)>{});
  else bring(std::integral_constant<int, 1>{});
}

using Quad = Pack<float, 4>;

template <class Element>
__device__ inline Quad to_floats(const Pack<Element, 4>& x) {
  return {static_cast<float>(x.of[0]), static_cast<float>(x.of[1]), static_cast<float>(x.of[2]),
          static_cast<float>(x.of[3])};
}

// Numbers i to i + 3 of a row; zeros from `width` on.
template <class Element>
__device__ inline Quad load_quad(const Element* row, int i, int width, bool aligned) {
  Pack<Element, 4> x{};
  if (aligned) {
    if (i < width) x = *reinterpret_cast<const Pack<Element, 4>*>(row + i);
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (i + n < width) x.of[n] = row[i + n];
  }
  return to_floats(x);
}

__device__ inline Quad decays(const Quad& w) {
  return {exp2_fast(w.of[0] * LOG2E), exp2_fast(w.of[1] * LOG2E), exp2_fast(w.of[2] * LOG2E),
          exp2_fast(w.of[3] * LOG2E)};
}

__device__ inline Quad scaled(const Quad& x, float scale) {
  return {x.of[0] * scale, x.of[1] * scale, x.of[2] * scale, x.of[3] * scale};
}

// Σ x y z
__device__ inline float product(const Quad& x, const Quad& y, const Quad& z) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) sum += x.of[n] * y.of[n] * z.of[n];
  return sum;
}

// The sum over COUNT neighbouring lanes, in each of them.
template <int COUNT>
__device__ inline float sum_over(float x) {
#pragma unroll
  for (int bit = COUNT / 2; bit; bit /= 2) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}

// Sums of N numbers over SPAN lanes that are STRIDE apart, shared among them: the lane whose place there is p is left
// with N / SPAN of them, from number p·N / SPAN on; if SPAN > N, SPAN / N lanes have the same.
template <int N, int SPAN, int STRIDE>
__device__ inline void share_sums(float* x, int place) {
  if constexpr (SPAN > 1) {
    constexpr int HALF = SPAN / 2, LEFT = N > 1 ? N / 2 : 1;
    if constexpr (N == 1) x[0] += __shfl_xor_sync(~0u, x[0], HALF * STRIDE);
    else {
      const bool upper = place & HALF;
#pragma unroll
      for (int i = 0; i < LEFT; ++i) {
        const float sent = upper ? x[i] : x[i + LEFT], kept = upper ? x[i + LEFT] : x[i];
        x[i] = kept + __shfl_xor_sync(~0u, sent, HALF * STRIDE);
      }
    }
    share_sums<LEFT, HALF, STRIDE>(x, place);
  }
}

// ---- tiles of S ----------------------------------------------------------------------------------------------------

// A lane's part of a warp's columns of S: ROWS rows, in two quads, by COLUMNS. KB: K or more.
template <int KB, int COLUMNS>
struct Tile {
  static constexpr int SHARES = KB / ROWS, PLACES = LANES / SHARES;      // lanes of a column, of a row
  static constexpr int WIDTH = PLACES * COLUMNS, BLOCK = WARPS * WIDTH;  // columns of a warp, of a block
  static constexpr int ALIKE = SHARES / COLUMNS;                         // lanes that share_columns leaves the same

  int lane, warp, share, place;
  int first;  // column of the warp's that is the lane's first

  __device__ Tile()
      : lane(threadIdx.x % LANES), warp(threadIdx.x / LANES), share(lane % SHARES), place(lane / SHARES),
        first(place * COLUMNS) {}

  __device__ int row(int i) const { return 4 * (share + i / 4 * SHARES) + i % 4; }

  // The lane's numbers of a row of KB.
  __device__ void read(float (&x)[ROWS], const float* from) const {
#pragma unroll
    for (int i = 0; i < ROWS; i += 4) {
      const Quad quad = *reinterpret_cast<const Quad*>(from + row(i));
#pragma unroll
      for (int n = 0; n < 4; ++n) x[i + n] = quad.of[n];
    }
  }

  // From and to [K][V], zeros beyond; column: the lane's first. even: columns are COLUMNS at a time.
  __device__ void load(float (&S)[ROWS][COLUMNS], const float* from, int K, int V, int column, bool even) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float* const at = from + int64_t(row(i)) * V + column;
      Pack<float, COLUMNS> x{};
      if (even && row(i) < K && column < V) x = *reinterpret_cast<const Pack<float, COLUMNS>*>(at);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        if (!even && row(i) < K && column + c < V) x.of[c] = at[c];
        S[i][c] = x.of[c];
      }
    }
  }
  __device__ void store(const float (&S)[ROWS][COLUMNS], float* to, int K, int V, int column, bool even) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float* const at = to + int64_t(row(i)) * V + column;
      Pack<float, COLUMNS> x;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        x.of[c] = S[i][c];
        if (!even && row(i) < K && column + c < V) at[c] = x.of[c];
      }
      if (even && row(i) < K && column < V) *reinterpret_cast<Pack<float, COLUMNS>*>(at) = x;
    }
  }

  // Adds xᵀ S: the lane's part of the sum over rows.
  __device__ void add_products(float (&sums)[COLUMNS], const float (&x)[ROWS], const float (&S)[ROWS][COLUMNS]) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) sums[c] += x[i] * S[i][c];
  }

  // xᵀ S, in all lanes of a column.
  __device__ void products(float (&sums)[COLUMNS], const float (&x)[ROWS], const float (&S)[ROWS][COLUMNS]) const {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sums[c] = 0;
    add_products(sums, x, S);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sums[c] = sum_over<SHARES>(sums[c]);
  }

  // Adds up the lanes' parts: a lane is left with the sum of one column, the warp's `shared_column`; of the lanes that
  // have the same, one `tells` it.
  __device__ float share_columns(float (&parts)[COLUMNS]) const {
    share_sums<COLUMNS, SHARES, 1>(parts, share);
    return parts[0];
  }
  __device__ int shared_column() const { return first + share / ALIKE; }
  __device__ bool tells() const { return share % ALIKE == 0; }
};

// S ← diag(d) S + k vᵀ
template <int COLUMNS>
__device__ inline void advance(float (&S)[ROWS][COLUMNS], const float (&d)[ROWS], const float (&k)[ROWS],
                               const float (&v)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) S[i][c] = d[i] * S[i][c] + k[i] * v[c];
}

// S += x yᵀ
template <int COLUMNS>
__device__ inline void add(float (&S)[ROWS][COLUMNS], const float (&x)[ROWS], const float (&y)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) S[i][c] += x[i] * y[c];
}

// Rows of a step in shared memory, and the gradients of rows; RWKV-6 has neither a nor b.
enum Row { KEY, DECAY, FIRST, SECOND };
template <bool CORRECTED>
constexpr int READER = CORRECTED ? 4 : 2;
template <bool CORRECTED>
constexpr int COUNT = READER<CORRECTED> + 1;

// ---- entries -------------------------------------------------------------------------------------------------------

template <class Element>
Rows<Element> rows_of(const Tensor& t) {
  return {data<const Element>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// `instead` where there is none: nothing of it is read.
template <class Element>
Rows<Element> rows_of(const std::optional<Tensor>& t, const Tensor& instead) {
  Rows<Element> rows = rows_of<Element>(t ? *t : instead);
  rows.given = t.has_value();
  return rows;
}

struct Arguments {
  const Tensor &r, &w, &k, &v;
  const std::optional<Tensor> &u, &a, &b;
  int64_t B, T, H, K, V;
  ScalarType dtype;
  bool aligned;  // all rows

  Arguments(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const std::optional<Tensor>& u,
            const std::optional<Tensor>& a, const std::optional<Tensor>& b, const std::optional<Tensor>& grad_y)
      : r(r), w(w), k(k), v(v), u(u), a(a), b(b), B(0), T(0), H(0), K(0), V(0), dtype(r.scalar_type()) {
    check(r, {ANY_SIZE, ANY_SIZE, ANY_SIZE, ANY_SIZE}, dtype, "r", Layout::ROWS);
    check(v, {ANY_SIZE, ANY_SIZE, ANY_SIZE, ANY_SIZE}, dtype, "v", Layout::ROWS);
    B = r.size(0), T = r.size(1), H = r.size(2), K = r.size(3), V = v.size(3);
    check(w, {B, T, H, K}, ScalarType::Float, "w", Layout::ROWS);
    check(k, {B, T, H, K}, dtype, "k", Layout::ROWS);
    check(v, {B, T, H, V}, dtype, "v", Layout::ROWS);
    STD_TORCH_CHECK(a.has_value() == b.has_value() && a.has_value() != u.has_value(), "expected u, or a and b");
    check(u, {H, K}, ScalarType::Float, "u");
    check(a, {B, T, H, K}, dtype, "a", Layout::ROWS), check(b, {B, T, H, K}, dtype, "b", Layout::ROWS);
    check(grad_y, {B, T, H, V}, dtype, "grad_y", Layout::ROWS);
    constexpr int64_t MOST = INT32_MAX - 1024;
    STD_TORCH_CHECK(B <= MOST && T <= MOST && H <= MOST && V <= MOST, "expected sizes of at most ", MOST);
    STD_TORCH_CHECK(K <= LARGEST_K, "expected K of at most ", LARGEST_K, ", got ", K);
    aligned = is_aligned(r) && is_aligned(w) && is_aligned(k) && is_aligned(v) &&
              (!a || (is_aligned(*a) && is_aligned(*b))) && (!grad_y || is_aligned(*grad_y));
  }

  int64_t chunks() const { return ceil_div(T, SAVED); }

  // Whether matrices [K][V] can be moved that many columns at a time.
  bool even(int columns, std::initializer_list<const Tensor*> matrices) const {
    bool even = V % columns == 0;
    for (const Tensor* t : matrices)
      even = even && (!t || reinterpret_cast<uintptr_t>(t->data_ptr()) % (columns * sizeof(float)) == 0);
    return even;
  }

  // f(value of Storage, constants KB, CORRECTED)
  template <class F>
  void dispatch(const F& f) const {
    for_device_dtype(dtype, [&]<class Storage>(Storage value) {
      auto with = [&]<int KB>(std::integral_constant<int, KB> width) {
        if (a) f(value, width, std::true_type{});
        else f(value, width, std::false_type{});
      };
      if (K <= 64) with(std::integral_constant<int, 64>{});
      else with(std::integral_constant<int, 128>{});
    });
  }
};

inline const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

}  // namespace
