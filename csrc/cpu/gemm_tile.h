// Register-blocked products of small matrices that are already in cache.
//
//   C[m][n] (+)= sum_k A[m][k] B[k][n]
//
// A Compute policy says what one step along k is. A Unit is what one 32- or 64-bit lane of an operand holds: a number,
// or a pair of bf16 numbers that are neighbours along k. A is row-major in units (a row is broadcast a unit at a
// time), B is packed so that a vector is consecutive columns n of one k, C is row-major in the accumulator type.
//
// pack_transposed makes B from rows that run along k (keys, for q kᵀ); pack_rows makes it from rows that run along n
// (values, for p v). Both take any storage type and element stride, convert, and pad with zeros.
#pragma once

#include "vec.h"

namespace {

template <class T>
struct Plain {
  using Acc = T;
  using Unit = T;
  static constexpr int depth = 1;  // elements of k in a unit
  PK_INLINE Vec<Acc> multiply_add(Vec<Unit> a, Vec<Unit> b, Vec<Acc> c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int depth = 2;
  PK_INLINE Vec<Acc> multiply_add(Vec<Unit> a, Vec<Unit> b, Vec<Acc> c) { return dot_pairs(c, a, b); }
};
#endif

// How a storage type is computed with: bf16 by the dot-product instruction where there is one, else in fp32.
template <class Storage>
struct ComputeOf {
  using type = Plain<float>;
};
template <>
struct ComputeOf<double> {
  using type = Plain<double>;
};
#if defined(__AVX512BF16__)
template <>
struct ComputeOf<BFloat16> {
  using type = Bf16Pairs;
};
#endif

// What an element of memory is as part of a unit; two bf16 elements in order are one unit.
template <class P, class Storage>
using ElementOf = std::conditional_t<P::depth == 2, Storage, typename P::Unit>;

// A tile of C is TILE_ROWS x TILE_VECTORS accumulators: 24 of 32 registers (6 x 4), or 12 of 16 (6 x 2). Each step
// along k then costs 10 loads for 24 multiply-adds (8 for 12), below the two loads a cycle that the cores have.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = PK_VECTOR_REGISTERS == 32 ? 4 : 2;

// The left operand: unit (r, k) is at[r * row + k * column]. A row-major A has column = 1, a transpose has row = 1.
template <class Unit>
struct Left {
  const Unit* at;
  int64_t row, column;
};

// c: [ROWS][VECTORS * lanes], a: [ROWS][depth], b: [depth][VECTORS * lanes]
template <class P, int ROWS, int VECTORS>
void gemm_tile(int64_t depth, Left<typename P::Unit> a, const typename P::Unit* b, int64_t ldb, typename P::Acc* c,
               int64_t ldc, bool accumulate) {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  constexpr int W = lanes<Acc>;
  Vec<Acc> acc[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Unit> bk[VECTORS];
    PK_UNROLL
    for (int v = 0; v < VECTORS; ++v) bk[v] = load<Vec<Unit>>(b + k * ldb + v * W);
    PK_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      Vec<Unit> ak = broadcast(a.at[r * a.row + k * a.column]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = P::multiply_add(ak, bk[v], acc[r][v]);
    }
  }
  // Old values are added last, so that a long sum over many calls is one of short sums.
  PK_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    PK_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      Acc* to = c + r * ldc + v * W;
      store(to, accumulate ? load<Vec<Acc>>(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class P, int ROWS>
void gemm_rows(int64_t vectors, int64_t depth, Left<typename P::Unit> a, const typename P::Unit* b, int64_t ldb,
               typename P::Acc* c, int64_t ldc, bool accumulate) {
  constexpr int W = lanes<typename P::Acc>;
  // Even shares: 5 vectors are 3 + 2, since a tile one vector wide has too few accumulators to hide the latency.
  for (int64_t tiles = ceil_div(vectors, TILE_VECTORS); tiles > 0; --tiles) {
    int64_t width = ceil_div(vectors, tiles);
    if constexpr (TILE_VECTORS == 4) {
      if (width == 4) gemm_tile<P, ROWS, 4>(depth, a, b, ldb, c, ldc, accumulate);
      if (width == 3) gemm_tile<P, ROWS, 3>(depth, a, b, ldb, c, ldc, accumulate);
    }
    if (width == 2) gemm_tile<P, ROWS, 2>(depth, a, b, ldb, c, ldc, accumulate);
    if (width == 1) gemm_tile<P, ROWS, 1>(depth, a, b, ldb, c, ldc, accumulate);
    vectors -= width, b += width * W, c += width * W;
  }
}

// c: [rows][vectors * lanes] (+)= a: [rows][depth] · b: [depth][vectors * lanes], 1 to TILE_ROWS rows; each element is
// one running sum.
template <class P>
void gemm_strip(int64_t rows, int64_t vectors, int64_t depth, Left<typename P::Unit> a, const typename P::Unit* b,
                int64_t ldb, typename P::Acc* c, int64_t ldc, bool accumulate) {
  auto tile = [&](auto height) { gemm_rows<P, height>(vectors, depth, a, b, ldb, c, ldc, accumulate); };
  if (rows == 6) tile(std::integral_constant<int, 6>{});
  else if (rows == 5) tile(std::integral_constant<int, 5>{});
  else if (rows == 4) tile(std::integral_constant<int, 4>{});
  else if (rows == 3) tile(std::integral_constant<int, 3>{});
  else if (rows == 2) tile(std::integral_constant<int, 2>{});
  else tile(std::integral_constant<int, 1>{});
}

// The same for any depth and a row-major a, in sums of at most 64 products, for accuracy: a running sum of 256 has
// twice the rounding error.
template <class P>
void gemm(int64_t rows, int64_t vectors, int64_t depth, const typename P::Unit* a, int64_t lda,
          const typename P::Unit* b, int64_t ldb, typename P::Acc* c, int64_t ldc, bool accumulate) {
  for (; depth > 64; depth -= 64, a += 64, b += 64 * ldb, accumulate = true)
    gemm_strip<P>(rows, vectors, 64, {a, lda, 1}, b, ldb, c, ldc, accumulate);
  gemm_strip<P>(rows, vectors, depth, {a, lda, 1}, b, ldb, c, ldc, accumulate);
}

// c: [rows][vectors * lanes] += aᵀ · b with a: [depth][rows]: the product with the transpose of a tile, which
// stays as it was made.
template <class P>
void gemm_columns(int64_t rows, int64_t vectors, int64_t depth, const typename P::Unit* a, int64_t lda,
                  const typename P::Unit* b, int64_t ldb, typename P::Acc* c, int64_t ldc) {
  gemm_strip<P>(rows, vectors, depth, {a, 1, lda}, b, ldb, c, ldc, true);
}

// Memory latency is hidden by asking for rows this far ahead of the one being read: the hardware's prefetcher alone
// loses a stream at every change between keys, values and arithmetic. One Zen 5 core packing from memory: 20 GB/s,
// against 10 without and 16 with 2 or 32 KiB.
constexpr int64_t PREFETCH_BYTES = 8192;

template <class Storage>
PK_INLINE void prefetch_row(const Storage* row, int64_t n) {
  for (int64_t byte = 0; byte < n * int64_t(sizeof(Storage)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

template <class Rows>
PK_INLINE int64_t rows_ahead(const Rows& row, int64_t n) {
  return ceil_div(PREFETCH_BYTES, n * int64_t(sizeof(*row(0))));
}

// n elements of a row to units, in order, then zeros up to `width` units.
template <class P, class Storage>
void copy_row(const Storage* row, int64_t stride, int64_t n, typename P::Unit* out, int64_t width) {
  using Element = ElementOf<P, Storage>;
  constexpr bool as_is = std::is_same_v<Element, Storage>;
  constexpr int step = as_is ? PK_VECTOR_BYTES / sizeof(Element) : lanes<typename P::Acc>;
  auto* to = reinterpret_cast<Element*>(out);
  int64_t i = 0;
  if (stride == 1) {
    for (; i + step <= n; i += step) {
      if constexpr (as_is) store(to + i, load<Vec<uint8_t>>(row + i));
      else store(to + i, load_as<Element>(row + i));
    }
  }
  for (; i < n; ++i) to[i] = static_cast<Element>(row[i * stride]);
  for (; i < width * P::depth; ++i) to[i] = static_cast<Element>(0);
}

// Units of scratch that the two packers need for rows of n elements.
template <class P>
constexpr int64_t stage_units(int64_t n) {
  return lanes<typename P::Acc> * round_up(n, lanes<typename P::Acc>);
}

// Whether memory of the storage type is units as it stands.
template <class P, class Storage>
constexpr bool holds_units(const Storage*) {
  return std::is_same_v<Storage, typename P::Unit> || P::depth > 1;
}

// out: [ceil(n / depth)][columns] from rows 0 .. count-1 of n elements each; column j is row(j). Columns past count are
// zero up to a whole vector, then left alone.
// columns: a multiple of the lanes. stage: scratch of stage_units(n), 64-byte aligned.
template <class P, class Rows>
void pack_transposed(const Rows& row, int64_t stride, int64_t count, int64_t n, typename P::Unit* out,
                     int64_t columns, typename P::Unit* stage) {
  using Unit = typename P::Unit;
  constexpr int W = lanes<Unit>;
  int64_t units = ceil_div(n, P::depth), width = round_up(units, W);
  int64_t ahead = rows_ahead(row, n);
  // Rows that already are whole vectors of units are read in place.
  bool in_place = holds_units<P>(row(0)) && stride == 1 && n % (W * P::depth) == 0;
  for (int64_t j0 = 0; j0 < count; j0 += W) {
    const void* source[W];
    for (int64_t j = 0; j < W; ++j) {
      Unit* staged = stage + j * width;
      source[j] = staged;
      if (j0 + j >= count) {
        std::memset(staged, 0, width * sizeof(Unit));
        continue;
      }
      if (stride == 1) prefetch_row(row(j0 + j + ahead), n);
      if (in_place) source[j] = row(j0 + j);
      else copy_row<P>(row(j0 + j), stride, n, staged, width);
    }
    for (int64_t k0 = 0; k0 < units; k0 += W) {
      Vec<Unit> square[W];
      PK_UNROLL
      for (int j = 0; j < W; ++j) square[j] = load<Vec<Unit>>(static_cast<const Unit*>(source[j]) + k0);
      transpose<Unit>(square);
      PK_UNROLL
      for (int k = 0; k < W; ++k)
        if (k0 + k < units) store(out + (k0 + k) * columns + j0, square[k]);
    }
  }
}

// out: [ceil(count / depth)][width] from rows 0 .. count-1 of n elements each, zero beyond n.
// width: a multiple of the lanes, at least n. stage: scratch of stage_units(n).
template <class P, class Rows>
void pack_rows(const Rows& row, int64_t stride, int64_t count, int64_t n, typename P::Unit* out, int64_t width,
               typename P::Unit* stage) {
  int64_t ahead = rows_ahead(row, n);
  for (int64_t j = 0; j < count; j += P::depth) {
    if (stride == 1)
      for (int i = 0; i < P::depth; ++i) prefetch_row(row(j + i + ahead), n);
    if constexpr (P::depth == 1) {
      copy_row<P>(row(j), stride, n, out + j * width, width);
    } else {
      // Two rows as bf16, interleaved: a unit holds one column of both.
      auto* even = reinterpret_cast<const uint16_t*>(row(j));
      auto* odd = reinterpret_cast<const uint16_t*>(row(j + 1));
      if (stride != 1 || n != width || j + 1 == count) {
        even = reinterpret_cast<uint16_t*>(stage), odd = even + width;
        copy_row<P>(row(j), stride, n, stage, width / 2);
        if (j + 1 < count) copy_row<P>(row(j + 1), stride, n, stage + width / 2, width / 2);
        else std::memset(stage + width / 2, 0, width * sizeof(uint16_t));
      }
      constexpr int W = lanes<uint32_t>;
      for (int64_t c = 0; c < width; c += W) {
        auto low = __builtin_convertvector((load<Vec<uint16_t, W>>(even + c)), Vec<uint32_t>);
        auto high = __builtin_convertvector((load<Vec<uint16_t, W>>(odd + c)), Vec<uint32_t>);
        store(out + (j / 2) * width + c, low | high << 16);
      }
    }
  }
}

// s[j] = q · key[j] for W = lanes keys that are read in place: for so few rows of q that packing would cost more.
// q, key[j]: [units], a multiple of W.
template <class P>
void dot_rows(const typename P::Unit* q, const void* const (&key)[lanes<typename P::Acc>], int64_t units,
              typename P::Acc* s) {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  constexpr int W = lanes<Acc>;
  Vec<Acc> sums[W] = {};
  for (int64_t u = 0; u < units; u += W) {
    auto qu = load<Vec<Unit>>(q + u);
    PK_UNROLL
    for (int j = 0; j < W; ++j)
      sums[j] = P::multiply_add(qu, load<Vec<Unit>>(static_cast<const Unit*>(key[j]) + u), sums[j]);
  }
  store(s, row_sums<Acc>(sums));
}

}  // namespace
