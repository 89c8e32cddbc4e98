// Weighted sums of a table's rows chosen by index, and their gradients (equations: pykernels/ops/weighted_gather.py).
//
// All is bound by memory. Rows are read whole, four side by side, while those after them are asked for: the indices
// say which. A task takes some bags, or some columns of them where bags are few.
//
// A row's gradient is a sum over its hits. (row, position) of all indices are sorted by radix, which keeps positions
// in order, and then every row of the result is written once. A row with more than SEGMENT hits is summed in segments
// of that many, side by side, and then these: no bit depends on how many threads there are.
#include <algorithm>
#include <bit>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tasks.h"
#include "vec.h"
#include "view.h"

namespace {

constexpr int64_t SEGMENT = 256;          // hits of a row that are summed one after the other
constexpr int64_t LEAST_BYTES = 1 << 16;  // of rows that a task reads: less costs more to hand out than it gains
constexpr int64_t MOST_BYTES = 1 << 20;
constexpr int64_t AHEAD_BYTES = 1 << 12;  // of rows asked for before they are read
constexpr int ROWS_AT_ONCE = 4;           // read side by side

template <class Storage>
constexpr int64_t LINE = 64 / sizeof(Storage);  // elements of a cache line

// f(c, count) for each vector of columns from c on, while the same columns of the rows `next` are asked for: into the
// second cache, since the first takes few at once. (Gather of 1 KiB rows by one core of a Xeon, against the first
// cache: 15 % faster.)
template <int R, class Storage, class F>
PK_INLINE void for_columns(int64_t width, const Storage* const (&next)[R], const F& f) {
  constexpr int64_t W = lanes<AccOf<Storage>>;
  int64_t c = 0;
  auto ask = [&] {
    PK_UNROLL
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c, 0, 2);
  };
  for (; c + LINE<Storage> <= width; c += LINE<Storage>) {
    ask();
    PK_UNROLL
    for (int64_t v = 0; v < LINE<Storage>; v += W) f(c + v, W);
  }
  if (c < width) ask();
  for (; c < width; c += W) f(c, width - c);
}

// Where rows are: row(i) for i < last. While i is read, i + ahead is asked for.
template <class Storage, class Row>
struct Source {
  const Row& row;
  int64_t width, last, ahead;

  Source(const Storage*, const Row& row, int64_t width, int64_t last)
      : row(row), width(width), last(last),
        ahead(std::clamp<int64_t>(AHEAD_BYTES / std::max<int64_t>(width * sizeof(Storage), 64), ROWS_AT_ONCE, 32)) {}

  // f(i, R rows from i on, R rows to ask for) for begin <= i < end, R = ROWS_AT_ONCE and at last 1.
  template <class F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    auto take = [&]<int R>(int64_t i, std::integral_constant<int, R>) {
      const Storage *now[R], *next[R];
      for (int r = 0; r < R; ++r) {
        now[r] = row(i + r);
        next[r] = row(std::min(i + r + ahead, last - 1));
      }
      f(i, now, next);
    };
    int64_t i = begin;
    for (; i + ROWS_AT_ONCE <= end; i += ROWS_AT_ONCE) take(i, std::integral_constant<int, ROWS_AT_ONCE>{});
    for (; i < end; ++i) take(i, std::integral_constant<int, 1>{});
  }
};

// to = sum of weight(i) row(i), begin <= i < end, in order, rounded once. acc: scratch of whole vectors.
template <class Acc, class Storage, class Row, class Weight, class Result>
void sum_rows(const Source<Storage, Row>& rows, const Weight& weight, int64_t begin, int64_t end, Acc* acc,
              Result* to) {
  if (begin == end) std::fill_n(to, rows.width, Result(0));
  rows.for_rows(begin, end, [&]<int R>(int64_t i, const Storage* const (&row)[R], const Storage* const (&next)[R]) {
    Acc w[R];
    for (int r = 0; r < R; ++r) w[r] = weight(i + r);
    const bool first = i == begin, last = i + R == end;
    for_columns<R>(rows.width, next, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Vec<Acc> sum = first ? Vec<Acc>{} : load<Vec<Acc>>(acc + c);
      PK_UNROLL
      for (int r = 0; r < R; ++r) sum = load_some<Acc>(row[r] + c, count) * w[r] + sum;
      if (last) store_some<Acc>(to + c, sum, count);
      else store(acc + c, sum);
    });
  });
}

// to[i] = x · row(i), begin <= i < end.
template <class Acc, class Storage, class Row>
void dot_rows(const Source<Storage, Row>& rows, const Storage* x, int64_t begin, int64_t end, Acc* to) {
  rows.for_rows(begin, end, [&]<int R>(int64_t i, const Storage* const (&row)[R], const Storage* const (&next)[R]) {
    Vec<Acc> sums[R] = {};
    for_columns<R>(rows.width, next, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const Vec<Acc> xc = load_some<Acc>(x + c, count);
      PK_UNROLL
      for (int r = 0; r < R; ++r) sums[r] = load_some<Acc>(row[r] + c, count) * xc + sums[r];
    });
    for (int r = 0; r < R; ++r) to[i + r] = reduce_add<Acc>(sums[r]);
  });
}

// How many of `count` things, each with so many bytes to read, a task takes.
inline int64_t count_per_task(int64_t count, int64_t bytes) {
  const int64_t all = count * std::max<int64_t>(bytes, 1);
  const int64_t wanted = std::clamp(all / (16 * thread_count()), LEAST_BYTES, MOST_BYTES);
  return std::max<int64_t>(wanted / std::max<int64_t>(bytes, 1), 1);
}

// ---- reading a table ------------------------------------------------------------------------------------------------

template <class Storage>
struct Table {
  using Acc = AccOf<Storage>;

  int64_t G, k, dv;
  View<const Storage, 3> values;  // [G, M, dv]
  const int64_t* indices;         // [N][G][k]

  // f(rows of a bag from column c on, as a Source, the first of its entries)
  template <class F>
  void with_bag(int64_t bag, int64_t c, int64_t width, int64_t last, const F& f) const {
    const int64_t begin = bag * k, end = begin + k;
    const Storage *own = values.at(bag % G) + c, *after = values.at((bag + 1) % G) + c;
    auto at = [&](int64_t i) { return (i < end ? own : after) + indices[i] * values.stride[1]; };
    f(Source(own, at, width, last), begin, end);
  }

  void forward(int64_t bags, const Acc* weights, Storage* y) const {
    const int64_t bytes = k * dv * int64_t(sizeof(Storage)), taken = count_per_task(bags, bytes);
    // Columns are shared out, too, where whole bags would leave threads without work.
    const int64_t wanted = bytes < LEAST_BYTES ? 1 : ceil_div(4 * thread_count(), bags);
    const int64_t width = std::max(round_up(ceil_div(dv, wanted), LINE<Storage>), 4 * LINE<Storage>);
    const int64_t blocks = ceil_div(dv, width);
    run_tasks(ceil_div(bags, taken) * blocks, double(bags) * bytes * BYTE, [&](int64_t, int64_t task) {
      const int64_t c = task % blocks * width, count = std::min(width, dv - c);
      const int64_t first = task / blocks * taken, last = std::min(bags, first + taken);
      Buffer<Acc> acc(round_up(count, lanes<Acc>));
      for (int64_t bag = first; bag < last; ++bag) {
        with_bag(bag, c, count, last * k, [&](const auto& rows, int64_t begin, int64_t end) {
          sum_rows<Acc>(rows, [&](int64_t i) { return weights[i]; }, begin, end, acc.get(),
                        y + bag * dv + c);
        });
      }
    });
  }

  // grad_weights [bags][k]
  void grad_weights(int64_t bags, const Storage* grad, Acc* grad_weights) const {
    const int64_t entries = bags * k, taken = count_per_task(entries, dv * sizeof(Storage));
    run_tasks(ceil_div(entries, taken), double(entries) * dv * sizeof(Storage) * BYTE, [&](int64_t, int64_t task) {
      const int64_t first = task * taken, last = std::min(entries, first + taken);
      for (int64_t bag = first / k; bag * k < last; ++bag)
        with_bag(bag, 0, dv, last, [&](const auto& rows, int64_t begin, int64_t end) {
          dot_rows<Acc>(rows, grad + bag * dv, std::max(begin, first), std::min(end, last), grad_weights);
        });
    });
  }
};

// ---- the table's gradient -------------------------------------------------------------------------------------------

// All (row, position), ascending: row g M + m of all tables' rows, and the place in [N][G][k] of an index m.
struct Hits {
  int64_t count;
  int bits;  // of a position
  Buffer<uint64_t> sorted;

  int64_t row(int64_t i) const { return sorted[i] >> bits; }
  int64_t position(int64_t i) const { return sorted[i] & ((uint64_t(1) << bits) - 1); }

  // The first hit of this row or a later one.
  int64_t find(int64_t row) const {
    return std::lower_bound(sorted.get(), sorted.get() + count, uint64_t(row) << bits) - sorted.get();
  }

  Hits(const int64_t* indices, int64_t bags, int64_t G, int64_t k, int64_t M)
      : count(bags * k), bits(std::bit_width(uint64_t(count))), sorted(count) {
    const int width = std::bit_width(uint64_t(G * M));  // of a row, and of G M, where find() gives the end
    STD_TORCH_CHECK(bits + width <= 64, "indices: expected fewer of them, or fewer rows");
    const int passes = ceil_div(width, 11), digit = ceil_div(width, std::max(passes, 1));
    const int64_t chunk_size = 1 << 14, chunks = ceil_div(count, chunk_size), buckets = int64_t(1) << digit;
    Buffer<uint64_t> other(count);
    Buffer<int64_t> places(chunks * buckets);
    auto for_chunks = [&](const auto& f) {
      run_tasks(chunks, 2.0 * count, [&](int64_t, int64_t chunk) {  // 2 ns a hit
        f(&places[chunk * buckets], chunk * chunk_size, std::min(count, (chunk + 1) * chunk_size));
      });
    };
    for_chunks([&](int64_t*, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        sorted[i] = uint64_t((G == 1 ? 0 : i / k % G * M) + indices[i]) << bits | uint64_t(i);
    });
    for (int pass = 0; pass < passes; ++pass) {
      auto bucket = [&](int64_t i) { return sorted[i] >> (bits + pass * digit) & (buckets - 1); };
      for_chunks([&](int64_t* own, int64_t begin, int64_t end) {
        std::fill_n(own, buckets, 0);
        for (int64_t i = begin; i < end; ++i) ++own[bucket(i)];
      });
      int64_t before = 0;
      for (int64_t b = 0; b < buckets; ++b)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          before += std::exchange(places[chunk * buckets + b], before);
      for_chunks([&](int64_t* own, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) other[own[bucket(i)]++] = sorted[i];
      });
      std::swap(sorted, other);
    }
  }
};

template <class Storage>
struct TableGradient {
  using Acc = AccOf<Storage>;

  struct Long {  // a row of more than SEGMENT hits, and its first segment
    int64_t begin, end, first;
    int64_t after() const { return first + ceil_div(end - begin, SEGMENT); }
  };

  int64_t k, dv, padded;
  const Storage* grad;  // [bags][dv]
  const Acc* weights;   // [bags][k]
  Hits hits;
  std::vector<Long> longs;
  Buffer<Acc> partials;  // [segments][padded], their sums

  TableGradient(const int64_t* indices, int64_t bags, int64_t G, int64_t k, int64_t M, int64_t dv, const Storage* grad,
          const Acc* weights)
      : k(k), dv(dv), padded(round_up(dv, lanes<Acc>)), grad(grad), weights(weights), hits(indices, bags, G, k, M),
        longs(find_longs()), partials(segments() * padded) {
    run_tasks(segments(), double(segments()) * SEGMENT * dv * sizeof(Storage) * BYTE, [&](int64_t, int64_t segment) {
      auto own = std::ranges::upper_bound(longs, segment, {}, &Long::first) - 1;
      const int64_t begin = own->begin + (segment - own->first) * SEGMENT;
      Acc* to = &partials[segment * padded];
      sum_hits(begin, std::min(own->end, begin + SEGMENT), to, to);
    });
  }

  int64_t segments() const { return longs.empty() ? 0 : longs.back().after(); }

  // A row of so many hits has one at a multiple of SEGMENT.
  std::vector<Long> find_longs() const {
    std::vector<Long> found;
    for (int64_t i = 0; i < hits.count; i += SEGMENT) {
      const int64_t begin = hits.find(hits.row(i)), end = hits.find(hits.row(i) + 1);
      if (end - begin <= SEGMENT || (!found.empty() && begin == found.back().begin)) continue;
      found.push_back({begin, end, found.empty() ? 0 : found.back().after()});
    }
    return found;
  }

  template <class Result>
  void sum_hits(int64_t begin, int64_t end, Acc* acc, Result* to) const {
    auto at = [&](int64_t i) { return grad + hits.position(i) / k * dv; };
    auto weight = [&](int64_t i) { return weights[hits.position(i)]; };
    sum_rows<Acc>(Source(grad, at, dv, hits.count), weight, begin, end, acc, to);
  }

  // The sum of the row whose first hit is `begin`; returns its end.
  int64_t write(int64_t begin, Acc* acc, Storage* to) const {
    int64_t end = begin + 1;
    while (end < hits.count && end - begin <= SEGMENT && hits.row(end) == hits.row(begin)) ++end;
    if (end - begin <= SEGMENT) {
      sum_hits(begin, end, acc, to);
    } else {
      auto own = std::ranges::lower_bound(longs, begin, {}, &Long::begin);
      auto at = [&](int64_t segment) { return partials.get() + segment * padded; };
      const Source segments(at(0), at, dv, own->after());
      sum_rows<Acc>(segments, [](int64_t) { return Acc(1); }, own->first, own->after(), acc, to);
      end = own->end;
    }
    return end;
  }

  // to: [rows][dv], every row of all tables.
  void write_all(int64_t rows, Storage* to) const {
    const int64_t taken = count_per_task(rows, dv * sizeof(Storage));
    const double work = double(rows + hits.count) * dv * sizeof(Storage) * BYTE;
    run_tasks(ceil_div(rows, taken), work, [&](int64_t, int64_t task) {
      const int64_t last = std::min(rows, (task + 1) * taken);
      Buffer<Acc> acc(padded);
      int64_t row = task * taken, hit = hits.find(row);
      while (row < last) {
        const int64_t used = hit < hits.count ? std::min(hits.row(hit), last) : last;
        std::fill_n(to + row * dv, (used - row) * dv, Storage(0));
        if (used < last) hit = write(hit, acc.get(), to + used * dv);
        row = used + 1;
      }
    });
  }

  // (the rows that are used, ascending, their sums)
  std::pair<Tensor, Tensor> write_used(ScalarType dtype) const {
    const int64_t taken = count_per_task(hits.count, dv * sizeof(Storage)), tasks = ceil_div(hits.count, taken);
    auto first = [&](int64_t i) { return i == 0 || hits.row(i) != hits.row(i - 1); };
    std::vector<int64_t> before(tasks + 1);
    run_tasks(tasks, 1.0 * hits.count, [&](int64_t, int64_t task) {
      for (int64_t i = task * taken; i < std::min(hits.count, (task + 1) * taken); ++i) before[task + 1] += first(i);
    });
    for (int64_t task = 0; task < tasks; ++task) before[task + 1] += before[task];
    Tensor rows = empty({before[tasks]}, ScalarType::Long), sums = empty({before[tasks], dv}, dtype);
    auto* row = data<int64_t>(rows);
    auto* sum = data<Storage>(sums);
    run_tasks(tasks, double(hits.count) * dv * sizeof(Storage) * BYTE, [&](int64_t, int64_t task) {
      Buffer<Acc> acc(padded);
      int64_t i = task * taken, to = before[task];
      while (i < hits.count && !first(i)) ++i;
      for (; to < before[task + 1]; ++to) {
        row[to] = hits.row(i);
        i = write(i, acc.get(), sum + to * dv);
      }
    });
    return {rows, sums};
  }
};

// ---- the ops --------------------------------------------------------------------------------------------------------

// Of bags' tensors; indices must be contiguous.
void check_bags(const Tensor& indices, const Tensor& weights, int64_t M, ScalarType dtype) {
  check(weights, {indices.size(0), indices.size(1), indices.size(2)}, accumulator_of(dtype), "weights", Layout::ANY);
  const auto* index = data<const int64_t>(indices);
  uint64_t wrong = 0;  // the sign bit, of m or of M - 1 - m
  for (int64_t i = 0; i < indices.numel(); ++i) wrong |= uint64_t(index[i]) | (uint64_t(M - 1) - uint64_t(index[i]));
  STD_TORCH_CHECK(wrong >> 63 == 0, "indices: expected 0 to ", M - 1);
}

template <class Storage>
Table<Storage> table_of(const Tensor& values, const Tensor& indices) {
  return {indices.size(1), indices.size(2), values.size(2), View<const Storage, 3>(values),
          data<const int64_t>(indices)};
}

void check_table(const Tensor& values, const Tensor& indices) {
  check(values, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, values.scalar_type(), "values", Layout::ANY);
  check(indices, {ANY_SIZE, values.size(0), ANY_SIZE}, ScalarType::Long, "indices", Layout::ANY);
}

Tensor weighted_gather(Tensor values, Tensor indices, Tensor weights, int64_t /*backend*/) {
  check_table(values, indices);
  values = dense_rows(values), indices = dense(indices), weights = dense(weights);
  check_bags(indices, weights, values.size(1), values.scalar_type());
  const int64_t N = indices.size(0), G = indices.size(1), dv = values.size(2);
  Tensor y = empty({N, G, dv}, values.scalar_type());
  if (y.numel() == 0) return y;
  for_dtype(values.scalar_type(), [&]<class Storage>(Storage) {
    table_of<Storage>(values, indices)
        .forward(N * G, data<const AccOf<Storage>>(weights), data<Storage>(y));
  });
  return y;
}

template <class Storage>
TableGradient<Storage> table_gradient_of(const Tensor& grad, const Tensor& indices, const Tensor& weights, int64_t M) {
  return {data<const int64_t>(indices),
          indices.size(0) * indices.size(1),
          indices.size(1),
          indices.size(2),
          M,
          grad.size(2),
          data<const Storage>(grad),
          data<const AccOf<Storage>>(weights)};
}

std::tuple<Tensor, Tensor> weighted_gather_backward(Tensor grad, Tensor values, Tensor indices, Tensor weights,
                                                    bool for_values, bool for_weights, int64_t /*backend*/) {
  check_table(values, indices);
  const ScalarType dtype = values.scalar_type();
  const int64_t N = indices.size(0), G = values.size(0), M = values.size(1), k = indices.size(2), dv = values.size(2);
  check(grad, {N, G, dv}, dtype, "grad", Layout::ANY);
  grad = dense(grad), values = dense_rows(values), indices = dense(indices), weights = dense(weights);
  check_bags(indices, weights, M, dtype);
  using Sizes = std::vector<int64_t>;
  Tensor grad_values = empty(for_values ? Sizes{G, M, dv} : Sizes{0}, dtype);
  Tensor grad_weights = empty(for_weights ? Sizes{N, G, k} : Sizes{0}, accumulator_of(dtype));
  for_dtype(dtype, [&]<class Storage>(Storage) {
    if (grad_values.numel() > 0)
      table_gradient_of<Storage>(grad, indices, weights, M).write_all(G * M, data<Storage>(grad_values));
    if (grad_weights.numel() > 0)
      table_of<Storage>(values, indices)
          .grad_weights(N * G, data<const Storage>(grad),
                        data<AccOf<Storage>>(grad_weights));
  });
  return {grad_values, grad_weights};
}

std::tuple<Tensor, Tensor> weighted_gather_rows(Tensor grad, Tensor indices, Tensor weights, int64_t table_rows,
                                                int64_t /*backend*/) {
  check(indices, {ANY_SIZE, 1, ANY_SIZE}, ScalarType::Long, "indices", Layout::ANY);
  check(grad, {indices.size(0), 1, ANY_SIZE}, grad.scalar_type(), "grad", Layout::ANY);
  grad = dense(grad), indices = dense(indices), weights = dense(weights);
  check_bags(indices, weights, table_rows, grad.scalar_type());
  std::pair<Tensor, Tensor> result;
  for_dtype(grad.scalar_type(), [&]<class Storage>(Storage) {
    result = table_gradient_of<Storage>(grad, indices, weights, table_rows).write_used(grad.scalar_type());
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("weighted_gather", TORCH_BOX(&weighted_gather));
  m.impl("weighted_gather_backward", TORCH_BOX(&weighted_gather_backward));
  m.impl("weighted_gather_rows", TORCH_BOX(&weighted_gather_rows));
}
