// Top-k search of keys by inner product:  s[m] = scale q·K[m], the k largest in descending order.
//
// With many queries a task is a batch of them, and one thread streams all keys past it. With few, the keys are shared
// out among the threads, block by block; each keeps its own best, and these are merged. Either way the result is that
// of the order of (score, index) alone, whoever ran what.

#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "topk.h"

namespace {

template <class Storage>
struct TopK {
  using Finder = Search<Storage>;
  using Acc = typename Finder::Acc;
  using Entry = typename Finder::Entry;

  int64_t N, H, M, d, k;
  Acc scale;
  View<const Storage, 3> query, keys;  // [N, H, d], [H, M, d]
  Acc* scores;                         // [N][H][k]
  int64_t* indices;

  void run() const {
    if (N == 0) return;
    const double work = double(H) * M * d * (N * MULTIPLY_ADD + sizeof(Storage) * BYTE);
    const int64_t threads = threads_for(work), panels = H * ceil_div(N, Finder::PANEL);
    const bool alone = threads == 1 || panels >= 2 * threads;
    // Smaller batches share out better, larger ones read the keys less often.
    const int64_t batch = alone ? std::clamp<int64_t>(panels / (4 * threads), 1, 4) * Finder::PANEL : Finder::BATCH;
    const int64_t batches = ceil_div(N, batch);
    std::vector<std::unique_ptr<Finder>> finders(thread_count());
    auto start = [&](int64_t worker, int64_t task) -> Finder& {
      auto& own = finders[worker];
      if (!own) own = std::make_unique<Finder>(d, k, scale, std::min(batch, N));
      View<const Storage, 2> queries = query.select(1, task / batches);
      queries.data = queries.at(task % batches * batch);
      own->start(queries, queries_of(task, batch));
      return *own;
    };
    if (alone) {
      run_tasks(H * batches, work, [&](int64_t worker, int64_t task) {
        Finder& finder = start(worker, task);
        finder.scan(keys.select(0, task / batches), 0, M);
        for (int64_t q = 0; q < queries_of(task, batch); ++q) write(finder.finish(q), task, batch, q);
      });
      return;
    }
    const int64_t block = ceil_div(int64_t(1) << 18, d * int64_t(sizeof(Storage)));
    for (int64_t task = 0; task < H * batches; ++task) {
      std::vector<Finder*> used(finders.size());
      run_tasks(ceil_div(M, block), work / (H * batches), [&](int64_t worker, int64_t b) {
        if (!used[worker]) used[worker] = &start(worker, task);
        used[worker]->scan(keys.select(0, task / batches), b * block, std::min((b + 1) * block, M));
      });
      const double merging = 5.0 * threads * k * queries_of(task, batch);  // 5 ns a candidate
      run_tasks(queries_of(task, batch), merging, [&](int64_t, int64_t q) {
        std::vector<Entry> all;
        for (Finder* finder : used)
          if (finder) {
            const auto found = finder->found(q);
            all.insert(all.end(), found.begin(), found.end());
          }
        Buffer<Entry> scratch(all.size() + Finder::W);
        keep_largest(all.data(), std::ssize(all), k, scratch.get());
        sort_descending(all.data(), k, scratch.get());
        write(all.data(), task, batch, q);
      });
    }
  }

  int64_t queries_of(int64_t task, int64_t batch) const {
    return std::min(batch, N - task % ceil_div(N, batch) * batch);
  }

  // Query q of a task: head and place in the batch are the task's.
  void write(const Entry* best, int64_t task, int64_t batch, int64_t q) const {
    const int64_t batches = ceil_div(N, batch), to = ((task % batches * batch + q) * H + task / batches) * k;
    for (int64_t i = 0; i < k; ++i) {
      scores[to + i] = score_of<Acc>(best[i]);
      indices[to + i] = index_of<Acc>(best[i]);
    }
  }
};

std::tuple<Tensor, Tensor> topk_search(Tensor query, Tensor keys, int64_t k, double scale, int64_t /*backend*/) {
  const ScalarType dtype = query.scalar_type();
  check(query, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, dtype, "query", Layout::ANY);
  const int64_t N = query.size(0), H = query.size(1), d = query.size(2);
  check(keys, {H, ANY_SIZE, d}, dtype, "keys", Layout::ANY);
  const int64_t M = keys.size(1);
  STD_TORCH_CHECK(d >= 1, "query: expected elements");
  STD_TORCH_CHECK(k >= 1 && k <= M, "k: expected 1 to ", M, ", got ", k);
  STD_TORCH_CHECK(M < int64_t(1) << 32, "keys: expected fewer than 2^32 rows, got ", M);
  Tensor scores = empty({N, H, k}, accumulator_of(dtype)), indices = empty({N, H, k}, ScalarType::Long);
  for_dtype(dtype, [&]<class Storage>(Storage) {
    using Acc = typename TopK<Storage>::Acc;
    TopK<Storage>{N, H, M, d, k, Acc(scale), View<const Storage, 3>(query), View<const Storage, 3>(keys),
                  data<Acc>(scores), data<int64_t>(indices)}
        .run();
  });
  return {scores, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("topk_search", TORCH_BOX(&topk_search)); }
