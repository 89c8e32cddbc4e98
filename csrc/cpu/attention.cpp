// Exact attention on the CPU.
//
//   s = scale · q kᵀ;  s = softcap · tanh(s / softcap);  s += bias;  s −= slope · |p − j|;  masked: s = −inf
//   o = softmax(s) v;  lse = log Σ exp s          (a fully masked row: o = 0, lse = −inf)
//
// The queries of the G = H / Hk heads that share a key head are one list of G·N rows. A task owns a block of these
// rows and a range of keys. It reads K and V in blocks of KEYS, six rows at a time, with the online softmax: running
// maximum m, sum l and unnormalised output o, rescaled only when m has grown well. Everything between the two products
// happens on a [6][KEYS] tile that stays in L1. p = 2^((s − m)·c): the difference comes first, and is exact near the
// maximum whatever the scores' size; m·c, rounded, would be off by more than an exponent holds from scores of 1e9 on.
//
// K and V are packed for the microkernel (gemm_tile.h). With many heads each is one thread's, which packs it and runs
// all its row blocks; with few, all threads pack, then share the row blocks. A task that alone reads its keys packs
// them block by block, and with at most six rows (decode) reads them in place: the cache is read once, nothing is
// written back. When there are fewer tasks than cores, tasks split the keys, leave (m, l, o) behind, and a last pass
// merges those in order. No atomics on floats, so results repeat bit by bit for a given number of threads.
//
// Reads query, key, value, bias, slopes, lengths; writes out and lse, every element of both.

#include <tuple>

#include "attention.h"

namespace {

constexpr int64_t BLOCK_ROWS = 96;          // query rows in a task, a multiple of TILE_ROWS
constexpr int64_t PACKED_BYTES = 32 << 20;  // packed K and V held at once; more only to occupy every thread

// ---- online softmax -------------------------------------------------------------------------------------------------

// The running state of one row: m, l as one partial sum per lane, o: [width].
template <class Acc>
struct Running {
  Acc *m, *l, *o;
};

// The maximum has grown to m: what was summed against the old one shrinks. c: scores to base 2.
template <class Acc>
void raise_maximum(Running<Acc> row, Acc m, Acc c, int64_t width) {
  constexpr int W = lanes<Acc>;
  Vec<Acc> alpha = exp2<Acc>(broadcast((*row.m - m) * c));  // 0 when the old maximum was −inf
  *row.m = m;
  store(row.l, load<Vec<Acc>>(row.l) * alpha);
  for (int64_t d = 0; d < width; d += W) store(row.o + d, load<Vec<Acc>>(row.o + d) * alpha);
}

// m follows the maximum only when that has outgrown it by this much, in log2: exact all the same, since o and l share
// the factor, and few blocks after the first then rescale. p stays below 2^8.
constexpr int MAXIMUM_SLACK = 8;

// s: [KEYS] scores of one row, c > 0 to base 2. p: [KEYS / depth] gets 2^((s − m)·c), times keep if there is one.
// A NaN score never raises m, but its p is NaN, and so the row's l and o.
template <class P>
PK_INLINE void softmax_row(const typename P::Acc* s, typename P::Acc c, const typename P::Acc* keep,
                           Running<typename P::Acc> row, int64_t width, typename P::Unit* p) {
  using Acc = typename P::Acc;
  constexpr int W = lanes<Acc>, VECTORS = KEYS / W;
  auto top = load<Vec<Acc>>(s);
  PK_UNROLL
  for (int v = 1; v < VECTORS; ++v) top = max<Acc>(top, load<Vec<Acc>>(s + v * W));
  if (any_greater<Acc>(top, broadcast(*row.m + MAXIMUM_SLACK / c))) raise_maximum(row, reduce_max<Acc>(top), c, width);
  const Acc m = *row.m == MINUS_INF<Acc> ? 0 : *row.m;  // nothing seen yet: −inf − −inf would be NaN
  auto sum = load<Vec<Acc>>(row.l);
  auto probability = [&](int v) {
    auto x = exp2<Acc>((load<Vec<Acc>>(s + v * W) - m) * c);
    sum += x;
    return keep ? x * load<Vec<Acc>>(keep + v * W) : x;
  };
  if constexpr (P::depth == 1) {
    PK_UNROLL
    for (int v = 0; v < VECTORS; ++v) store(p + v * W, probability(v));
  } else {
#if defined(__AVX512BF16__)
    PK_UNROLL
    for (int v = 0; v < VECTORS; v += 2) {
      auto low = probability(v), high = probability(v + 1);
      store(p + v / 2 * W, to_bf16_pairs(low, high));
    }
#endif
  }
  store(row.l, sum);
}

// ---- heads, tasks and scratch ---------------------------------------------------------------------------------------

// A head and how its work is cut.
struct PlannedHead : Head {
  int64_t row_blocks, splits = 1;
  int64_t packed_blocks;  // key blocks packed ahead; 0 when the one task that reads them packs them itself
  int64_t packed_at = 0;
};

// A block of a head's rows and a range of its keys.
struct RowTask {
  int64_t head, row0, rows;
  Span keys;
  int64_t partial;  // where (m, l, o) go when the keys are split, else −1

  int64_t tiles() const { return ceil_div(rows, TILE_ROWS); }
};

// The tensors of the op, and the sizes that packing, tiles and partial results agree on.
template <class Storage>
struct Problem {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;

  const Inputs<Storage>& in;
  View<Storage, 4> out;
  Acc* lse;  // [B][H][N]

  int64_t D = in.query.size[3], Dv = in.value.size[3];
  int64_t q_units = ceil_div(D, P::depth), v_width = round_up(Dv, W);
  int64_t k_block_units = q_units * KEYS, block_units = k_block_units + KEYS / P::depth * v_width;
  int64_t partial_size = BLOCK_ROWS * (2 + v_width);  // m: [BLOCK_ROWS], l: [BLOCK_ROWS], o: [BLOCK_ROWS][v_width]
};

// The memory that one thread works in.
template <class Storage>
struct RowScratch {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;

  Unit *q, *p, *k, *v, *stage;
  Acc *s, *m, *l, *o, *keep;
  int64_t v_width;
  std::vector<Row> rows;
  std::vector<TileSpans> tiles;

  RowScratch(Arena& arena, const Problem<Storage>& problem)
      : v_width(problem.v_width), rows(BLOCK_ROWS), tiles(BLOCK_ROWS / TILE_ROWS) {
    arena.place(q, BLOCK_ROWS * problem.q_units);
    arena.place(p, TILE_ROWS * KEYS);
    arena.place(k, problem.k_block_units);
    arena.place(v, problem.block_units - problem.k_block_units);
    arena.place(stage, stage_units<P>(std::max(problem.D, problem.Dv)));
    arena.place(s, TILE_ROWS * KEYS);
    arena.place(m, BLOCK_ROWS);
    arena.place(l, BLOCK_ROWS * lanes<Acc>);
    arena.place(o, BLOCK_ROWS * v_width);
    arena.place(keep, KEYS);
    if (!arena.measures()) std::memset(p, 0, TILE_ROWS * KEYS * sizeof(Unit));  // rows that pad a tile
  }

  Running<Acc> running(int64_t r) const { return {m + r, l + r * lanes<Acc>, o + r * v_width}; }

  // Probabilities replace the scores where they have the same size.
  Unit* probabilities() const {
    if constexpr (P::depth == 1) return s;
    else return p;
  }
};

// ---- blocks of keys -------------------------------------------------------------------------------------------------

// KEYS keys and their values as the microkernel wants them.
template <class Unit>
struct KeyBlock {
  const Unit *k, *v;  // k: [q_units][KEYS], null if the keys are read in place; v: [KEYS / depth][v_stride]
  int64_t v_stride;
};

// The keys and values of a head.
template <class Storage>
struct HeadKeys {
  using P = typename ComputeOf<Storage>::type;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<typename P::Acc>;

  const Problem<Storage>& problem;
  const Inputs<Storage>& in;
  const Head& head;

  HeadKeys(const Problem<Storage>& problem, const Head& head) : problem(problem), in(problem.in), head(head) {}

  int64_t count(int64_t key0) const { return std::min(KEYS, in.sequence_of(head).keys - key0); }

  void pack_keys(int64_t key0, Unit* k, Unit* stage) const {
    pack_transposed<P>(in.rows_from(in.key, head, key0), in.key.stride[3], count(key0), problem.D, k, KEYS, stage);
  }

  void pack_values(int64_t key0, Unit* v, Unit* stage) const {
    pack_rows<P>(in.rows_from(in.value, head, key0), in.value.stride[3], count(key0), problem.Dv, v, problem.v_width,
                 stage);
  }

  // packed: all blocks of the head.
  void pack_block(int64_t block, Unit* packed, Unit* stage) const {
    Unit* k = packed + block * problem.block_units;
    pack_keys(block * KEYS, k, stage);
    pack_values(block * KEYS, k + problem.k_block_units, stage);
  }

  KeyBlock<Unit> packed_block(const Unit* packed, int64_t block) const {
    const Unit* k = packed + block * problem.block_units;
    return {k, k + problem.k_block_units, problem.v_width};
  }

  // A block for one task alone. Units that only one tile reads are read in place.
  KeyBlock<Unit> own_block(int64_t rows, int64_t key0, RowScratch<Storage>& w) const {
    KeyBlock<Unit> block = {nullptr, w.v, problem.v_width};
    if (!keys_in_place(rows)) {
      pack_keys(key0, w.k, w.stage);
      block.k = w.k;
    }
    if constexpr (std::is_same_v<Storage, Unit>) {
      if (values_in_place(rows)) return {block.k, in.rows_from(in.value, head, key0)(0), in.value.stride[2]};
    }
    pack_values(key0, w.v, w.stage);
    return block;
  }

  bool keys_in_place(int64_t rows) const {
    return rows <= TILE_ROWS && holds_units<P>(in.key.data) && in.key.stride[3] == 1 &&
           problem.D % (W * P::depth) == 0;
  }
  bool values_in_place(int64_t rows) const {
    return rows <= TILE_ROWS && std::is_same_v<Storage, Unit> && in.value.stride[3] == 1 && problem.Dv % W == 0 &&
           in.pages.empty();
  }

  // s: [rows][count] = q: [rows][D] · kᵀ: [D][count], the keys in place. Also asks for the values, which come next.
  void score_in_place(int64_t rows, int64_t key0, int64_t count, RowScratch<Storage>& w) const {
    const int64_t D = problem.D, q_units = problem.q_units;
    auto key = in.rows_from(in.key, head, key0), value = in.rows_from(in.value, head, key0);
    int64_t ahead = rows_ahead(key, D);
    for (int64_t j0 = 0; j0 < count; j0 += W) {
      const void* keys[W];
      for (int64_t j = 0; j < W; ++j) {
        keys[j] = key(j0 + j);  // past the last key: that key again, masked later
        prefetch_row(key(j0 + j + ahead), D);
        if (values_in_place(rows)) prefetch_row(value(j0 + j), problem.Dv);
      }
      for (int64_t r = 0; r < rows; ++r) dot_rows<P>(w.q + r * q_units, keys, q_units, w.s + r * KEYS + j0);
    }
  }
};

// ---- a task ---------------------------------------------------------------------------------------------------------

// q: [rows][q_units] packed, the running state emptied, and the keys that each row sees.
template <class Storage>
void begin_rows(const Problem<Storage>& problem, const Head& head, const RowTask& task, RowScratch<Storage>& w) {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  const Inputs<Storage>& in = problem.in;
  const Sequence& s = in.sequence_of(head);
  const int64_t padded = round_up(task.rows, TILE_ROWS), q_units = problem.q_units;
  for (int64_t r = 0; r < task.rows; ++r) {
    const Row& row = w.rows[r] = in.row_at(head, task.row0 + r);
    copy_row<P>(in.query.at(s.batch, row.head, s.query_start + row.query), in.query.stride[3], problem.D,
                w.q + r * q_units, q_units);
    TileSpans& tile = w.tiles[r / TILE_ROWS];
    if (r % TILE_ROWS == 0) tile.start(row.keys);
    tile.add(row.keys);
  }
  std::memset(w.q + task.rows * q_units, 0, (padded - task.rows) * q_units * sizeof(typename P::Unit));
  std::fill_n(w.m, padded, MINUS_INF<Acc>);
  std::fill_n(w.l, padded * lanes<Acc>, Acc(0));
  std::fill_n(w.o, padded * problem.v_width, Acc(0));
}

// Scores of a tile's rows to probabilities. count: keys of the block that some row sees.
template <class Storage>
void weigh_tile(const Problem<Storage>& problem, int64_t batch, int64_t row0, int64_t rows, int64_t key0,
                int64_t count, bool boundary, RowScratch<Storage>& w) {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  const Inputs<Storage>& in = problem.in;
  const bool edits = in.rules.edits();
  const Acc c = in.rules.unit() * LOG2E;
  typename P::Unit* p = w.probabilities();
  for (int64_t r = 0; r < rows; ++r) {
    const Row& row = w.rows[row0 + r];
    Acc* s = w.s + r * KEYS;
    if (edits) edit_scores<Storage>(in.rules, batch, row, key0, count, s);
    if (boundary) mask_scores(row.keys, key0, s);
    const Running<Acc> running = w.running(row0 + r);
    if (in.rules.dropout.p > 0) {
      dropout_row(in.rules.dropout, batch * in.query.size[1] + row.head, row.query, key0, w.keep);
      softmax_row<P>(s, c, w.keep, running, problem.v_width, p + r * (KEYS / P::depth));
    } else {
      softmax_row<P>(s, c, nullptr, running, problem.v_width, p + r * (KEYS / P::depth));
    }
  }
}

// Six rows against one block: s = q kᵀ, to probabilities, o += p v.
template <class Storage>
void attend_tile(const HeadKeys<Storage>& keys, const RowTask& task, int64_t t, int64_t key0,
                 KeyBlock<typename HeadKeys<Storage>::Unit> block, RowScratch<Storage>& w) {
  using P = typename ComputeOf<Storage>::type;
  constexpr int W = lanes<typename P::Acc>;
  const Problem<Storage>& problem = keys.problem;
  const int64_t row0 = t * TILE_ROWS, rows = std::min<int64_t>(TILE_ROWS, task.rows - row0);
  const int64_t q_units = problem.q_units, v_width = problem.v_width;
  // No row sees a key past count: under a causal mask that halves the work on the diagonal.
  const int64_t count = std::min(KEYS, w.tiles[t].seen.last - key0);
  // s: [rows][KEYS] = q: [rows][D] · kᵀ: [D][count]; columns past count are left to the mask.
  if (block.k)
    gemm<P>(rows, ceil_div(count, W), q_units, w.q + row0 * q_units, q_units, block.k, KEYS, w.s, KEYS, false);
  else
    keys.score_in_place(rows, key0, count, w);
  weigh_tile(problem, problem.in.sequence_of(keys.head).batch, row0, rows, key0, count, w.tiles[t].cuts(key0), w);
  // o: [rows][Dv] += p: [rows][count] · v: [count][Dv]
  gemm<P>(rows, v_width / W, ceil_div(count, P::depth), w.probabilities(), KEYS / P::depth, block.v, block.v_stride,
          w.o + row0 * v_width, v_width, true);
}

// All of a task's rows against all of its keys. packed: the head's blocks, if they were packed ahead.
template <class Storage, class Unit>
void attend(const Problem<Storage>& problem, const PlannedHead& head, const RowTask& task, const Unit* packed,
            RowScratch<Storage>& w) {
  begin_rows(problem, head, task, w);
  const HeadKeys<Storage> keys(problem, head);
  Span seen = {task.keys.last, task.keys.first};
  for (int64_t t = 0; t < task.tiles(); ++t)
    if (const Span tile = w.tiles[t].seen; tile.first < tile.last)
      seen = {std::min(seen.first, tile.first), std::max(seen.last, tile.last)};
  seen = {std::max(seen.first, task.keys.first) / KEYS * KEYS, std::min(seen.last, task.keys.last)};
  for (int64_t key0 = seen.first; key0 < seen.last; key0 += KEYS) {
    const auto block = head.packed_blocks > 0 ? keys.packed_block(packed, key0 / KEYS)
                                              : keys.own_block(task.rows, key0, w);
    for (int64_t t = 0; t < task.tiles(); ++t)
      if (w.tiles[t].sees({key0, key0 + KEYS})) attend_tile(keys, task, t, key0, block, w);
  }
}

template <class Storage, class Acc>
void save_partial(const RowTask& task, const RowScratch<Storage>& w, Acc* partial) {
  for (int64_t r = 0; r < task.rows; ++r) {
    partial[r] = w.m[r];
    partial[BLOCK_ROWS + r] = reduce_add<Acc>(load<Vec<Acc>>(w.l + r * lanes<Acc>));
  }
  std::memcpy(partial + 2 * BLOCK_ROWS, w.o, task.rows * w.v_width * sizeof(Acc));
}

// The running state of all splits of a row block, from the first split's partial result and those behind it.
template <class Storage, class Acc>
void merge_partials(const Problem<Storage>& problem, const PlannedHead& head, const RowTask& task, const Acc* partial,
                    RowScratch<Storage>& w) {
  const Acc c = problem.in.rules.unit() * LOG2E;
  begin_rows(problem, head, task, w);
  for (int64_t split = 0; split < head.splits; ++split, partial += problem.partial_size)
    for (int64_t r = 0; r < task.rows; ++r) {
      const Running<Acc> row = w.running(r);
      if (partial[r] > *row.m) raise_maximum(row, partial[r], c, w.v_width);
      const Acc m = *row.m == MINUS_INF<Acc> ? 0 : *row.m;
      Vec<Acc> weight = exp2<Acc>(broadcast((partial[r] - m) * c));
      row.l[0] += weight[0] * partial[BLOCK_ROWS + r];
      const Acc* o = partial + 2 * BLOCK_ROWS + r * w.v_width;
      for (int64_t d = 0; d < w.v_width; d += lanes<Acc>)
        store(row.o + d, load<Vec<Acc>>(row.o + d) + weight * load<Vec<Acc>>(o + d));
    }
}

// out and lse of a task's rows.
template <class Storage>
void finish_rows(const Problem<Storage>& problem, const Head& head, const RowTask& task, const RowScratch<Storage>& w) {
  using Acc = typename Problem<Storage>::Acc;
  constexpr int W = lanes<Acc>;
  const Inputs<Storage>& in = problem.in;
  const Sequence& s = in.sequence_of(head);
  const int64_t Dv = problem.Dv;
  const double kept = in.rules.dropout.p < 1 ? 1 / (1 - in.rules.dropout.p) : 0;
  for (int64_t r = 0; r < task.rows; ++r) {
    const Row& row = w.rows[r];
    const Running<Acc> running = w.running(r);
    const Acc l = reduce_add<Acc>(load<Vec<Acc>>(running.l));
    const int64_t i = s.query_start + row.query;
    Acc& row_lse = problem.lse[(s.batch * in.query.size[1] + row.head) * in.query.size[2] + i];
    Storage* to = problem.out.at(s.batch, row.head, i);
    if (l == 0) {  // every key masked: else m is at most the largest score, which contributes 1 or more
      row_lse = MINUS_INF<Acc>;
      std::fill_n(to, Dv, Storage(0));
      continue;
    }
    row_lse = static_cast<Acc>(*running.m * in.rules.unit() + std::log(static_cast<double>(l)));
    const Acc factor = static_cast<Acc>(kept / l);
    int64_t d = 0;
    for (; d + W <= Dv; d += W) store_as<Acc>(to + d, load<Vec<Acc>>(running.o + d) * factor);
    for (; d < Dv; ++d) to[d] = static_cast<Storage>(running.o[d] * factor);
  }
}

// ---- who does what --------------------------------------------------------------------------------------------------

template <class Storage>
class AttentionForward {
  using Acc = typename Problem<Storage>::Acc;
  using Unit = typename Problem<Storage>::Unit;

 public:
  explicit AttentionForward(const Problem<Storage>& problem) : problem(problem), in(problem.in) {}

  void run() {
    plan();
    if (int64_t(heads.size()) >= 8 * thread_count()) return run_whole_heads();
    size_t end = 0;
    for (size_t begin = 0; begin < heads.size(); begin = end) {
      end = begin;
      int64_t units = 0, tasks = 0;
      while (end < heads.size() && (end == begin || units * int64_t(sizeof(Unit)) < PACKED_BYTES ||
                                    tasks < 4 * thread_count())) {
        heads[end].packed_at = units;
        units += heads[end].packed_blocks * problem.block_units;
        tasks += heads[end].row_blocks * heads[end].splits;
        ++end;
      }
      run_shared_heads(begin, end, units);
    }
  }

 private:
  const Problem<Storage>& problem;
  const Inputs<Storage>& in;
  std::vector<PlannedHead> heads;

  void plan() {
    int64_t tasks = 0;
    for (size_t s = 0; s < in.sequences.size(); ++s) {
      int64_t row_blocks = ceil_div(in.group() * in.sequences[s].queries, BLOCK_ROWS);
      if (row_blocks == 0) continue;
      for (int64_t h = 0; h < in.key.size[1]; ++h) {
        heads.push_back({{int64_t(s), h}, row_blocks, 1, row_blocks > 1 ? ceil_div(in.sequences[s].keys, KEYS) : 0});
        tasks += row_blocks;
      }
    }
    // Split the keys, into ranges of at least four blocks, when the rows alone would leave cores idle.
    if (thread_count() > 1 && tasks < 2 * thread_count())
      for (PlannedHead& head : heads) {
        int64_t blocks = ceil_div(in.sequence_of(head).keys, KEYS);
        head.splits = std::clamp<int64_t>(blocks / 4, 1, ceil_div(4 * thread_count(), tasks));
      }
  }

  // Of heads begin .. end-1, in nanoseconds.
  double work(size_t begin, size_t end) const {
    double sum = 0;
    for (size_t h = begin; h < end; ++h)
      sum += double(in.sequence_of(heads[h]).keys) *
             (in.rows_in(heads[h]) * MULTIPLY_ADD / 2 + sizeof(Storage) * BYTE);  // tiles of two multiply-adds a cycle
    return sum * (problem.D + problem.Dv);
  }

  RowTask row_block(int64_t h, int64_t block, Span keys) const {
    int64_t row0 = block * BLOCK_ROWS;
    return {h, row0, std::min(BLOCK_ROWS, in.rows_in(heads[h]) - row0), keys, -1};
  }

  // Many heads: each is one thread's, from packing to the last row. No thread waits for another's packing, and what
  // it packed is still in its cache.
  void run_whole_heads() {
    int64_t workers = std::min<int64_t>(heads.size(), thread_count()), units = 0;
    for (const PlannedHead& head : heads) units = std::max(units, head.packed_blocks * problem.block_units);
    Buffer<Unit> packed(workers * units);
    Workspace<RowScratch<Storage>> scratch(workers, problem);
    run_tasks(heads.size(), work(0, heads.size()), [&](int64_t worker, int64_t h) {
      const PlannedHead& head = heads[h];
      const HeadKeys<Storage> keys(problem, head);
      RowScratch<Storage>& w = scratch[worker];
      Unit* own = packed.get() + worker * units;
      for (int64_t b = 0; b < head.packed_blocks; ++b) keys.pack_block(b, own, w.stage);
      for (int64_t b = 0; b < head.row_blocks; ++b) {
        const RowTask task = row_block(h, b, {0, in.sequence_of(head).keys});
        attend(problem, head, task, own, w);
        finish_rows(problem, head, task, w);
      }
    });
  }

  // The tasks of heads begin .. end-1. partials: how many of them leave partial results.
  std::vector<RowTask> split_heads(size_t begin, size_t end, int64_t& partials) const {
    std::vector<RowTask> tasks;
    for (size_t h = begin; h < end; ++h) {
      const PlannedHead& head = heads[h];
      int64_t keys = in.sequence_of(head).keys, per_split = round_up(ceil_div(keys, head.splits), KEYS);
      // The last rows see the most keys under a causal mask: they go first, so that no thread ends alone with one.
      for (int64_t b = head.row_blocks - 1; b >= 0; --b)
        for (int64_t split = 0; split < head.splits; ++split) {
          Span range = {std::min(keys, split * per_split), std::min(keys, (split + 1) * per_split)};
          tasks.push_back(row_block(h, b, range));
          if (head.splits > 1) tasks.back().partial = partials++;
        }
    }
    return tasks;
  }

  // Few heads: all threads pack them, then share out their row blocks and key ranges.
  void run_shared_heads(size_t begin, size_t end, int64_t packed_units) {
    std::vector<std::pair<int64_t, int64_t>> blocks;  // head, key block
    for (size_t h = begin; h < end; ++h)
      for (int64_t b = 0; b < heads[h].packed_blocks; ++b) blocks.push_back({h, b});
    int64_t partials = 0;
    const std::vector<RowTask> tasks = split_heads(begin, end, partials);
    Buffer<Unit> packed(packed_units);
    Buffer<Acc> partial(partials * problem.partial_size);
    Workspace<RowScratch<Storage>> scratch(std::min<int64_t>(std::max(tasks.size(), blocks.size()), thread_count()),
                                           problem);
    const double packing = double(packed_units) * sizeof(Unit) * BYTE;
    run_tasks(blocks.size(), packing, [&](int64_t worker, int64_t i) {
      const PlannedHead& head = heads[blocks[i].first];
      HeadKeys<Storage>(problem, head)
          .pack_block(blocks[i].second, packed.get() + head.packed_at, scratch[worker].stage);
    });
    auto partial_of = [&](const RowTask& task) { return partial.get() + task.partial * problem.partial_size; };
    run_tasks(tasks.size(), work(begin, end), [&](int64_t worker, int64_t i) {
      const RowTask& task = tasks[i];
      const PlannedHead& head = heads[task.head];
      attend(problem, head, task, packed.get() + head.packed_at, scratch[worker]);
      if (task.partial < 0) finish_rows(problem, head, task, scratch[worker]);
      else save_partial(task, scratch[worker], partial_of(task));
    });
    const double merging = double(partials) * problem.partial_size * sizeof(Acc) * BYTE;
    run_tasks(partials > 0 ? tasks.size() : 0, merging, [&](int64_t worker, int64_t i) {
      const RowTask& task = tasks[i];
      if (task.partial < 0 || task.keys.first > 0) return;
      merge_partials(problem, heads[task.head], task, partial_of(task), scratch[worker]);
      finish_rows(problem, heads[task.head], task, scratch[worker]);
    });
  }
};

// ---- the op ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> key_lengths,
                                     std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                     std::optional<Tensor> block_table, std::optional<Tensor> seed,
                                     int64_t window_left, int64_t window_right, bool align_lengths, double scale,
                                     double softcap, double dropout_p, int64_t /*backend*/) {
  check_attention(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table, seed,
                  dropout_p);
  const ScalarType storage = query.scalar_type();
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2), Dv = value.size(3);
  int64_t M = key.size(2);
  if (block_table) M = key.size(0) == 0 ? 0 : M * block_table->size(1);

  Tensor out = empty_in_layout(query, B, H, N, Dv);
  Tensor lse = torch::stable::new_empty(query, {B, H, N}, accumulator_of(storage));
  if (B * H * N == 0) return {out, lse};

  auto sequences = cu_seqlens_q ? packed_sequences(N, M, *cu_seqlens_q, *cu_seqlens_k)
                                : batch_sequences(B, N, M, key_lengths, align_lengths);
  if (cu_seqlens_q)
    for (Span rows : uncovered_rows(sequences, N)) {
      Tensor o = torch::stable::narrow(out, 2, rows.first, rows.last - rows.first);
      Tensor l = torch::stable::narrow(lse, 2, rows.first, rows.last - rows.first);
      torch::stable::fill_(o, 0);
      torch::stable::fill_(l, MINUS_INF<double>);
    }

  for_dtype(storage, [&]<class Storage>(Storage) {
    Inputs<Storage> inputs{View<const Storage, 4>(query), View<const Storage, 4>(key), View<const Storage, 4>(value),
                           clamp_window(window_left, window_right),
                           make_rules(storage, bias, alibi_slopes, seed, scale, softcap, dropout_p),
                           std::move(sequences), {}};
    if (block_table) inputs.pages = to_vector(*block_table);
    const Problem<Storage> problem{inputs, View<Storage, 4>(out), data<typename Problem<Storage>::Acc>(lse)};
    AttentionForward<Storage>(problem).run();
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
