// Product keys: for each head, the k best of n² sums of two scores.
//
//   s1 = K1 q1, s2 = K2 q2, the k best of each, descending;  candidates s1[a] + s2[b], (a+1)(b+1) <= k;  the k best
//
// A task is one head of a batch of queries. Of equal sums the lower rank a comes first, then the lower b: the order of
// the numbers (a, b) that the search's ranking takes for indices.

#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "topk.h"

namespace {

template <class Storage>
struct ProductKeys {
  using Finder = Search<Storage>;
  using Acc = typename Finder::Acc;
  using Entry = typename Finder::Entry;

  int64_t N, H, n, half, k;
  View<const Storage, 3> query;  // [N, H, d]
  View<const Storage, 4> keys;   // [H, 2, n, d / 2]
  Acc* scores;                   // [N][H][k]
  int64_t* ids;

  struct Worker {
    Finder finder;
    Buffer<Entry> first, pairs, scratch;  // the best of the first halves; of one query
    Buffer<Acc> sums;                     // [2][k]
  };

  void run() const {
    if (N == 0) return;
    std::vector<int64_t> widths(k);  // candidates (a, b) of each a
    for (int64_t a = 0; a < k; ++a) widths[a] = k / (a + 1);
    const int64_t candidates = std::accumulate(widths.begin(), widths.end(), int64_t{0});
    const double search = 2.0 * half * n * (N * MULTIPLY_ADD + sizeof(Storage) * BYTE);
    const double work = H * (search + 5.0 * N * candidates);  // 5 ns a candidate
    const int64_t threads = threads_for(work), panels = H * ceil_div(N, Finder::PANEL);
    const int64_t batch = std::clamp<int64_t>(panels / (4 * threads), 1, 4) * Finder::PANEL;
    const int64_t batches = ceil_div(N, batch);
    std::vector<std::unique_ptr<Worker>> workers(thread_count());
    run_tasks(H * batches, work, [&](int64_t worker, int64_t task) {
      auto& own = workers[worker];
      if (!own) {
        const int64_t most = std::min(batch, N);
        own.reset(new Worker{Finder(half, k, Acc(1), most), Buffer<Entry>(most * k), Buffer<Entry>(candidates),
                             Buffer<Entry>(candidates + Finder::W), Buffer<Acc>(2 * k)});
      }
      const int64_t h = task / batches, from = task % batches * batch, count = std::min(batch, N - from);
      View<const Storage, 2> queries = query.select(1, h);
      queries.data = queries.at(from);
      const View<const Storage, 3> tables = keys.select(0, h);
      own->finder.start(queries, count);
      own->finder.scan(tables.select(0, 0), 0, n);
      for (int64_t i = 0; i < count; ++i) std::copy_n(own->finder.finish(i), k, &own->first[i * k]);
      queries.data = queries.at(0, half);
      own->finder.start(queries, count);
      own->finder.scan(tables.select(0, 1), 0, n);
      for (int64_t i = 0; i < count; ++i)
        join(&own->first[i * k], own->finder.finish(i), widths, *own, ((from + i) * H + h) * k);
    });
  }

  void join(const Entry* first, const Entry* second, const std::vector<int64_t>& widths, const Worker& own,
            int64_t to) const {
    Acc *s1 = own.sums.get(), *s2 = s1 + k;
    for (int64_t i = 0; i < k; ++i) s1[i] = score_of<Acc>(first[i]), s2[i] = score_of<Acc>(second[i]);
    // Of the (a+1)(b+1) >= k pairs up to ranks a and b none is below the last (NaN is above all, and no bound): nor is
    // the k-th best of all.
    Acc bound = -std::numeric_limits<Acc>::infinity();
    for (int64_t a = 0; a < k; ++a) bound = std::max(bound, s1[a] + s2[std::min(widths[a], k - 1)]);
    int64_t count = 0;
    for (int64_t a = 0; a < k; ++a)
      for (int64_t b = 0; b < widths[a]; ++b) {
        const Acc sum = s1[a] + s2[b];
        own.pairs[count] = rank<Acc>(sum, a << 16 | b);
        count += !(sum < bound);
      }
    keep_largest(own.pairs.get(), count, k, own.scratch.get());
    sort_descending(own.pairs.get(), k, own.scratch.get());
    for (int64_t i = 0; i < k; ++i) {
      const int64_t pair = index_of<Acc>(own.pairs[i]);
      scores[to + i] = score_of<Acc>(own.pairs[i]);
      ids[to + i] = index_of<Acc>(first[pair >> 16]) * n + index_of<Acc>(second[pair & 0xFFFF]);
    }
  }
};

std::tuple<Tensor, Tensor> product_key_search(Tensor query, Tensor sub_keys, int64_t k, int64_t /*backend*/) {
  const ScalarType dtype = query.scalar_type();
  check(sub_keys, {ANY_SIZE, 2, ANY_SIZE, ANY_SIZE}, dtype, "sub_keys", Layout::ANY);
  const int64_t H = sub_keys.size(0), n = sub_keys.size(2), half = sub_keys.size(3);
  check(query, {ANY_SIZE, H, 2 * half}, dtype, "query", Layout::ANY);
  const int64_t N = query.size(0);
  STD_TORCH_CHECK(half >= 1, "query: expected elements");
  STD_TORCH_CHECK(k >= 1 && k <= n, "k: expected 1 to ", n, ", got ", k);
  STD_TORCH_CHECK(n < int64_t(1) << 31 && k < int64_t(1) << 16, "k: expected fewer than 2^16, got ", k);
  Tensor scores = empty({N, H, k}, accumulator_of(dtype)), ids = empty({N, H, k}, ScalarType::Long);
  for_dtype(dtype, [&]<class Storage>(Storage) {
    using Acc = typename ProductKeys<Storage>::Acc;
    ProductKeys<Storage>{N, H, n, half, k, View<const Storage, 3>(query), View<const Storage, 4>(sub_keys),
                         data<Acc>(scores), data<int64_t>(ids)}
        .run();
  });
  return {scores, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("product_key_search", TORCH_BOX(&product_key_search)); }
