// Products of the forward pass of LSTM, GRU and RNN: a few rows with a weight, packed or where it lies.
#pragma once

#include "rnn.h"

namespace {

constexpr int64_t SUM_UNITS = 256;  // units of k summed in registers: 128 is 3 % slower, more is less accurate

// ---- products -------------------------------------------------------------------------------------------------------

// c[v][W] = a · b of one row, b: [depth][VECTORS * lanes]. Two sums for each column, since with one the additions'
// latency would show; each of at most 64 products.
template <class P, int VECTORS>
void row_product(int64_t depth, const typename P::Unit* a, const typename P::Unit* b, typename P::Acc* c) {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  constexpr int W = lanes<Acc>;
  Vec<Acc> total[VECTORS] = {};
  for (int64_t k = 0; k < depth;) {
    Vec<Acc> even[VECTORS] = {}, odd[VECTORS] = {};
    int64_t end = std::min(depth, k + 128);
    for (; k + 2 <= end; k += 2) {
      Vec<Unit> low = broadcast(a[k]), high = broadcast(a[k + 1]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        even[v] = P::multiply_add(low, load<Vec<Unit>>(b + (k * VECTORS + v) * W), even[v]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        odd[v] = P::multiply_add(high, load<Vec<Unit>>(b + ((k + 1) * VECTORS + v) * W), odd[v]);
    }
    if (k < end) {
      Vec<Unit> low = broadcast(a[k]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        even[v] = P::multiply_add(low, load<Vec<Unit>>(b + (k * VECTORS + v) * W), even[v]);
      ++k;
    }
    PK_UNROLL
    for (int v = 0; v < VECTORS; ++v) total[v] += even[v] + odd[v];
  }
  PK_UNROLL
  for (int v = 0; v < VECTORS; ++v) store(c + v * W, total[v]);
}

// s[j] = a · row[j] over n elements, for W rows in place, n at least a vector of them. The last vector ends with the
// row: it overlaps the one before, and what was seen is masked away in both operands. Four rows at a time: sixteen rows
// 4 KiB apart fall on the same set of L1 (84 GB/s of L3 against 58, one Zen 4 core).
template <class P, class Storage>
void dot_in_place(const typename P::Unit* a, const Storage* const (&row)[lanes<typename P::Acc>], int64_t n,
                  typename P::Acc* s) {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Mask = Vec<Bits<Acc>>;
  constexpr int W = lanes<Acc>, step = W * P::depth, ROWS = std::min(W, 4);
  auto* x = reinterpret_cast<const ElementOf<P, Storage>*>(a);
  auto units = [](const auto* p) {
    if constexpr (P::depth == 2) return load<Vec<Unit>>(p);
    else return load_as<Unit>(p);
  };
  alignas(64) uint8_t bytes[PK_VECTOR_BYTES];
  const int64_t rest = n % step, seen = (step - rest) * sizeof(Acc) / P::depth;
  std::memset(bytes, 0, seen), std::memset(bytes + seen, 255, sizeof bytes - seen);
  const auto unseen = load<Mask>(bytes);
  auto masked = [&](const auto* p) { return (Vec<Unit>)((Mask)units(p + n - step) & unseen); };
  Vec<Acc> sums[W];
  PK_UNROLL
  for (int j0 = 0; j0 < W; j0 += ROWS) {
    Vec<Acc> even[ROWS] = {}, odd[ROWS] = {};
    int64_t i = 0;
    for (; i + 2 * step <= n; i += 2 * step) {
      Vec<Unit> low = units(x + i), high = units(x + i + step);
      PK_UNROLL
      for (int j = 0; j < ROWS; ++j) {
        even[j] = P::multiply_add(low, units(row[j0 + j] + i), even[j]);
        odd[j] = P::multiply_add(high, units(row[j0 + j] + i + step), odd[j]);
      }
    }
    if (i + step <= n) {
      PK_UNROLL
      for (int j = 0; j < ROWS; ++j) even[j] = P::multiply_add(units(x + i), units(row[j0 + j] + i), even[j]);
    }
    if (rest > 0) {
      PK_UNROLL
      for (int j = 0; j < ROWS; ++j) odd[j] = P::multiply_add(masked(x), masked(row[j0 + j]), odd[j]);
    }
    PK_UNROLL
    for (int j = 0; j < ROWS; ++j) sums[j0 + j] = even[j] + odd[j];
  }
  store(s, row_sums<Acc>(sums));
}

// ---- weights --------------------------------------------------------------------------------------------------------

// A weight [gates · N, K] as the right operand of y = a · weightᵀ. Rows are taken by blocks of `group` times W of the
// N, all gates of these together: `vectors` vectors of columns, unit by unit, then gate by gate.
template <class P, class Storage>
struct RnnWeight {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;

  View<const Storage, 2> weight;
  int64_t gates, N, K, group;
  bool in_place = false;

  int64_t units() const { return ceil_div(K, P::depth); }
  int64_t vectors() const { return gates * group; }
  int64_t blocks() const { return ceil_div(N, W * group); }
  int64_t block_units() const { return in_place ? 0 : units() * vectors() * W; }

  // Whether a row can be read where it is: whole vectors of it.
  bool readable() const { return weight.stride[1] == 1 && K >= W * P::depth; }

  // Row j of vector v, or, past the last, the last one.
  const Storage* row(int64_t block, int64_t v, int64_t j) const {
    return weight.at(v % gates * N + std::min((block * group + v / gates) * W + j, N - 1));
  }
  int64_t count(int64_t block, int64_t v) const {
    return std::clamp<int64_t>(N - (block * group + v / gates) * W, 0, W);
  }

  void pack(int64_t block, Unit* to, Unit* stage) const {
    if (in_place || K == 0) return;
    for (int64_t v = 0; v < vectors(); ++v) {
      if (count(block, v) > 0) {
        pack_transposed<P>([&](int64_t j) { return row(block, v, j); }, weight.stride[1], count(block, v), K,
                           to + v * W, vectors() * W, stage);
      } else {
        for (int64_t k = 0; k < units(); ++k) store(to + (k * vectors() + v) * W, Vec<Unit>{});
      }
    }
  }

  // c: [rows][vectors * W] = a: [rows][K] · weightᵀ, at most TILE_ROWS rows, of which a and c have room for all.
  // b: what pack made of the block.
  void multiply(int64_t block, const Unit* b, int64_t rows, const Unit* a, int64_t lda, Acc* c) const {
    const int64_t ldc = vectors() * W;
    if (in_place) {
      for (int64_t v = 0; v < vectors(); ++v) {
        const Storage* columns[W];
        for (int64_t j = 0; j < W; ++j) columns[j] = row(block, v, j);
        for (int64_t r = 0; r < rows; ++r) dot_in_place<P>(a + r * lda, columns, K, c + r * ldc + v * W);
      }
      return;
    }
    if (rows > 1) {
      int64_t k = 0;
      do {
        gemm_strip<P>(rows, vectors(), std::min(SUM_UNITS, units() - k), {a + k, lda, 1}, b + k * ldc, ldc, c, ldc,
                      k > 0);
      } while ((k += SUM_UNITS) < units());
      return;
    }
    switch (vectors()) {
      case 1: return row_product<P, 1>(units(), a, b, c);
      case 2: return row_product<P, 2>(units(), a, b, c);
      case 3: return row_product<P, 3>(units(), a, b, c);
      default: return row_product<P, 4>(units(), a, b, c);
    }
  }

  // The same of any number of rows, tile by tile; c moves along if `keep`. body(first row, rows) is called after each.
  template <class Body>
  void multiply_all(int64_t block, const Unit* b, int64_t rows, const Unit* a, int64_t lda, Acc* c, bool keep,
                    const Body& body) const {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t tile = std::min<int64_t>(rows - r, TILE_ROWS);
      multiply(block, b, tile, a + r * lda, lda, c + (keep ? r * vectors() * W : 0));
      body(r, tile);
    }
  }
};

}  // namespace
