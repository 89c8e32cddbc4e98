// Products of matrices in memory, of any size and storage type, by all threads.
//
//   C[m][n] = Σ_k A[m][k] B[k][n]
//
// A task owns a block of C and sums it over all k in memory of its own, so the result does not depend on the number
// of threads. It takes k in chunks of CHUNK units: packs its columns of B into panels (they stay in L2), then takes A
// a strip of rows at a time, packed as well (a tile of it stays in L1), and adds the strip's product to the block.
// Packing per task reads an operand once for each row or column of blocks, which blocks this large repay.
//
// An operand is given as rows in memory that a function finds, so that they may be gathered from several tensors; a
// sink takes finished rows of C, to convert, place or add to.
#pragma once

#include "gemm_tile.h"
#include "tasks.h"

namespace {

// What a product reads: row(i) is a pointer to elements `stride` apart. Row i is one k and runs along m (or n), unless
// ALONG_K: then it is one m (or n) and runs along k.
template <bool ALONG_K, class Rows>
struct Operand {
  static constexpr bool along_k = ALONG_K;
  Rows row;
  int64_t stride;
};

template <class Rows>
Operand<false, Rows> rows_of_k(Rows row, int64_t stride = 1) { return {row, stride}; }
template <class Rows>
Operand<true, Rows> rows_along_k(Rows row, int64_t stride = 1) { return {row, stride}; }

// Columns of a right operand, packed: one panel after the other, each [units][width], width even shares of at most
// TILE_VECTORS vectors.
template <class P>
struct Panels {
  static constexpr int W = lanes<typename P::Acc>;
  // Units of k that are summed in registers. 256 would be up to 3 % faster, with 1.15 times MKL's error, not 0.9 times.
  static constexpr int64_t SUM_UNITS = 128;

  int64_t vectors, units;

  Panels(int64_t columns, int64_t depth) : vectors(ceil_div(columns, W)), units(ceil_div(depth, P::depth)) {}
  int64_t size() const { return vectors * W * units; }

  // f(first column, vectors in the panel) for every panel; the panel is at first column · units.
  template <class F>
  void each(const F& f) const {
    int64_t at = 0;
    for (int64_t panels = ceil_div(vectors, TILE_VECTORS); panels > 0; --panels) {
      int64_t width = ceil_div(vectors - at, panels);
      f(at * W, width);
      at += width;
    }
  }

  // Columns n0 .. n1-1 and k0 .. k1-1 of b, zero beyond. stage: stage_units of the longer of a panel's row and a chunk.
  template <class B>
  void pack(const B& b, int64_t n0, int64_t n1, int64_t k0, int64_t k1, typename P::Unit* out,
            typename P::Unit* stage) const {
    each([&](int64_t column, int64_t width) {
      // The packers prefetch rows ahead of those they read; beyond the last there is none.
      const int64_t first = n0 + column, count = std::min(n1 - first, width * W);
      if constexpr (B::along_k) {
        auto row = [&](int64_t j) { return b.row(std::min(first + j, n1 - 1)) + k0 * b.stride; };
        pack_transposed<P>(row, b.stride, count, k1 - k0, out + column * units, width * W, stage);
      } else {
        auto row = [&](int64_t k) { return b.row(std::min(k0 + k, k1 - 1)) + first * b.stride; };
        pack_rows<P>(row, b.stride, k1 - k0, count, out + column * units, width * W, stage);
      }
    });
  }

  // c: [rows][vectors * lanes] (+)= a: [rows][units] · the panels.
  void multiply(int64_t rows, Left<typename P::Unit> a, const typename P::Unit* packed, typename P::Acc* c, int64_t ldc,
                bool accumulate) const {
    each([&](int64_t column, int64_t width) {
      const typename P::Unit* panel = packed + column * units;
      for (int64_t k = 0; k < units; k += SUM_UNITS)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
          gemm_strip<P>(std::min<int64_t>(TILE_ROWS, rows - r), width, std::min(SUM_UNITS, units - k),
                        {a.at + r * a.row + k * a.column, a.row, a.column}, panel + k * width * W, width * W,
                        c + r * ldc + column, ldc, accumulate || k > 0);
    });
  }
};

template <class P>
class Product {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t CHUNK = Panels<P>::SUM_UNITS;  // units of k
  static constexpr int64_t STRIP = 16 * TILE_ROWS;         // rows of A packed at a time
  static constexpr int64_t MOST_ROWS = 10 * STRIP, MOST_COLUMNS = 8 * TILE_VECTORS * W;  // of a block

 public:
  // sink(m, n, count, c): c[0 .. count) is C[m][n ..]; called once for every element, by many threads.
  template <class A, class B, class Sink>
  static void run(int64_t M, int64_t N, int64_t K, const A& a, const B& b, const Sink& sink) {
    if (M <= 0 || N <= 0) return;
    const double work = double(M) * N * K * MULTIPLY_ADD;
    const int64_t threads = threads_for(work);
    int64_t rows = std::min(M, MOST_ROWS), columns = std::min(N, MOST_COLUMNS);
    auto tasks = [&] { return ceil_div(M, rows) * ceil_div(N, columns); };
    // Even shares, at least one and where they are few a whole number for every thread.
    while (tasks() < threads || (tasks() < 4 * threads && tasks() % threads != 0)) {
      if (rows <= TILE_ROWS && columns <= W) break;
      // One more share may be as large as before, rounded up: a block shrinks by at least 1, or this would not end.
      if (rows * 2 > columns || columns <= W) rows = std::min(rows - 1, ceil_div(M, ceil_div(M, rows) + 1));
      else columns = std::min(columns - 1, ceil_div(N, ceil_div(N, columns) + 1));
    }
    rows = round_up(ceil_div(M, ceil_div(M, rows)), TILE_ROWS);
    columns = round_up(ceil_div(N, ceil_div(N, columns)), W);
    const int64_t across = ceil_div(N, columns), count = ceil_div(M, rows) * across;
    const int64_t depth = CHUNK * P::depth, strip = round_up(STRIP, W);
    const int64_t stage = stage_units<P>(std::max(depth, std::max<int64_t>(strip, TILE_VECTORS * W)));
    const int64_t used = rows * columns + CHUNK * columns + CHUNK * strip + stage;
    Buffer<Unit> memory(std::min(count, thread_count()) * used);  // as run_tasks numbers workers
    auto block = [&](int64_t worker, int64_t task) {
      const int64_t m0 = task / across * rows, m1 = std::min(M, m0 + rows);
      const int64_t n0 = task % across * columns, n1 = std::min(N, n0 + columns);
      Unit* packed = memory.get() + worker * used;
      Unit *left = packed + CHUNK * columns, *scratch = left + CHUNK * strip;
      Acc* c = reinterpret_cast<Acc*>(scratch + stage);
      if (K == 0) std::fill_n(c, rows * columns, Acc(0));
      for (int64_t k0 = 0; k0 < K; k0 += depth) {
        const int64_t k1 = std::min(K, k0 + depth);
        const Panels<P> panels(n1 - n0, k1 - k0);
        panels.pack(b, n0, n1, k0, k1, packed, scratch);
        for (int64_t m = m0; m < m1; m += STRIP) {
          const int64_t height = std::min(STRIP, m1 - m);
          panels.multiply(height, pack_left(a, m, height, k0, k1, left, scratch), packed, c + (m - m0) * columns,
                          columns, k0 > 0);
        }
      }
      for (int64_t m = m0; m < m1; ++m) sink(m, n0, n1 - n0, c + (m - m0) * columns);
    };
    run_tasks(count, work, block);
  }

 private:
  // Rows m .. m + height - 1 and k0 .. k1 - 1 of a.
  template <class A>
  static Left<Unit> pack_left(const A& a, int64_t m, int64_t height, int64_t k0, int64_t k1, Unit* out, Unit* stage) {
    if constexpr (A::along_k) {
      const int64_t units = ceil_div(k1 - k0, P::depth);
      for (int64_t r = 0; r < height; ++r)
        copy_row<P>(a.row(m + r) + k0 * a.stride, a.stride, k1 - k0, out + r * units, units);
      return {out, units, 1};
    } else {
      const int64_t width = round_up(height, W);
      auto row = [&](int64_t k) { return a.row(std::min(k0 + k, k1 - 1)) + m * a.stride; };
      pack_rows<P>(row, a.stride, k1 - k0, height, out, width, stage);
      return {out, 1, width};
    }
  }
};

// Puts finished rows into a row-major matrix, in its storage type.
template <class Acc, class Storage>
auto store_to(Storage* matrix, int64_t width) {
  return [=](int64_t m, int64_t n, int64_t count, const Acc* c) {
    Storage* to = matrix + m * width + n;
    int64_t i = 0;
    for (; i + lanes<Acc> <= count; i += lanes<Acc>) store_as<Acc>(to + i, load<Vec<Acc>>(c + i));
    for (; i < count; ++i) to[i] = static_cast<Storage>(c[i]);
  };
}

}  // namespace
