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

// ---------------------------------------------------------------------------------------------------------------
// Online softmax

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
constexpr int SLACK = 8;

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
  if (any_greater<Acc>(top, broadcast(*row.m + SLACK / c))) raise_maximum(row, reduce_max<Acc>(top), c, width);
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

// ---------------------------------------------------------------------------------------------------------------
// The forward pass

template <class Storage>
class Forward {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;

 public:
  Forward(const Inputs<Storage>& inputs, View<Storage> out, Acc* lse) : in(inputs), out(out), lse(lse) {}

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
        units += heads[end].packed_blocks * block_units();
        tasks += heads[end].row_blocks * heads[end].splits;
        ++end;
      }
      run_shared_heads(begin, end, units);
    }
  }

 private:
  // A sequence and one of its key heads: G·N rows against its keys.
  struct Head {
    int64_t sequence, key_head;
    int64_t row_blocks, splits;
    int64_t packed_blocks;  // key blocks packed ahead; 0 when the one task that reads them packs them itself
    int64_t packed_at = 0;
  };

  struct Task {
    int64_t head, row0, rows;
    Span keys;
    int64_t partial;  // where (m, l, o) go when the keys are split, else −1
  };

  // What one thread works in.
  struct Scratch {
    Unit *q, *p, *k, *v, *stage;
    Acc *s, *m, *l, *o, *keep;
    std::vector<Row> rows;
    Span seen[BLOCK_ROWS / TILE_ROWS];  // keys that some row of a tile sees
    Span full[BLOCK_ROWS / TILE_ROWS];  // keys that all its rows see
  };

  const Inputs<Storage>& in;
  const View<Storage> out;
  Acc* const lse;
  std::vector<Head> heads;

  int64_t D() const { return in.query.size[3]; }
  int64_t Dv() const { return in.value.size[3]; }
  int64_t q_units() const { return ceil_div(D(), P::depth); }
  int64_t v_width() const { return round_up(Dv(), W); }
  int64_t k_block_units() const { return q_units() * KEYS; }
  int64_t v_block_units() const { return KEYS / P::depth * v_width(); }
  int64_t block_units() const { return k_block_units() + v_block_units(); }
  int64_t partial_size() const { return BLOCK_ROWS * (2 + v_width()); }

  void plan() {
    int64_t tasks = 0;
    for (size_t s = 0; s < in.sequences.size(); ++s) {
      int64_t row_blocks = ceil_div(in.group() * in.sequences[s].queries, BLOCK_ROWS);
      if (row_blocks == 0) continue;
      for (int64_t h = 0; h < in.key.size[1]; ++h) {
        heads.push_back({int64_t(s), h, row_blocks, 1, row_blocks > 1 ? ceil_div(in.sequences[s].keys, KEYS) : 0});
        tasks += row_blocks;
      }
    }
    // Split the keys, into ranges of at least four blocks, when the rows alone would leave cores idle.
    if (thread_count() > 1 && tasks < 2 * thread_count())
      for (Head& head : heads) {
        int64_t blocks = ceil_div(in.sequences[head.sequence].keys, KEYS);
        head.splits = std::clamp<int64_t>(blocks / 4, 1, ceil_div(4 * thread_count(), tasks));
      }
  }

  // KEYS keys and their values as the microkernel wants them.
  struct Block {
    const Unit *k, *v;  // k: [q_units][KEYS], null if the keys are read in place; v: [KEYS / depth][v_stride]
    int64_t v_stride;
  };

  // row j of t from key0 on. The packers also prefetch beyond the block; beyond the last key there is nothing.
  auto rows_from(const View<const Storage>& t, const Head& head, int64_t key0) const {
    const Sequence& s = in.sequences[head.sequence];
    return [rows = in.rows_of(t, s, head.key_head), key0, last = s.keys - 1](int64_t j) {
      return rows(std::min(key0 + j, last));
    };
  }

  void pack_keys(const Head& head, int64_t key0, Unit* k, Unit* stage) const {
    int64_t count = std::min(KEYS, in.sequences[head.sequence].keys - key0);
    pack_transposed<P>(rows_from(in.key, head, key0), in.key.stride[3], count, D(), k, KEYS, stage);
  }

  void pack_values(const Head& head, int64_t key0, Unit* v, Unit* stage) const {
    int64_t count = std::min(KEYS, in.sequences[head.sequence].keys - key0);
    pack_rows<P>(rows_from(in.value, head, key0), in.value.stride[3], count, Dv(), v, v_width(), stage);
  }

  Block packed_block(const Unit* packed, int64_t block) const {
    const Unit* k = packed + block * block_units();
    return {k, k + k_block_units(), v_width()};
  }

  void pack_head_block(const Head& head, int64_t block, Unit* packed, Unit* stage) const {
    Unit* k = packed + block * block_units();
    pack_keys(head, block * KEYS, k, stage);
    pack_values(head, block * KEYS, k + k_block_units(), stage);
  }

  // A block for one task alone. What only one tile reads, and is units already, is read in place.
  Block own_block(const Task& task, int64_t key0, Scratch& w) const {
    const Head& head = heads[task.head];
    Block block = {nullptr, w.v, v_width()};
    if (!keys_in_place(task)) {
      pack_keys(head, key0, w.k, w.stage);
      block.k = w.k;
    }
    if constexpr (std::is_same_v<Storage, Unit>) {
      if (values_in_place(task)) return {block.k, rows_from(in.value, head, key0)(0), in.value.stride[2]};
    }
    pack_values(head, key0, w.v, w.stage);
    return block;
  }

  bool keys_in_place(const Task& task) const {
    return task.rows <= TILE_ROWS && holds_units<P>(in.key.data) && in.key.stride[3] == 1 && D() % (W * P::depth) == 0;
  }
  bool values_in_place(const Task& task) const {
    return task.rows <= TILE_ROWS && std::is_same_v<Storage, Unit> && in.value.stride[3] == 1 && Dv() % W == 0 &&
           in.pages.empty();
  }

  // s: [rows][count] = q: [rows][D] · kᵀ: [D][count], the keys in place. Also asks for the values, which come next.
  void score_in_place(const Task& task, int64_t key0, int64_t count, Scratch& w) const {
    auto key = rows_from(in.key, heads[task.head], key0), value = rows_from(in.value, heads[task.head], key0);
    int64_t ahead = rows_ahead(key, D());
    for (int64_t j0 = 0; j0 < count; j0 += W) {
      const void* keys[W];
      for (int64_t j = 0; j < W; ++j) {
        keys[j] = key(j0 + j);  // past the last key: that key again, masked later
        prefetch_row(key(j0 + j + ahead), D());
        if (values_in_place(task)) prefetch_row(value(j0 + j), Dv());
      }
      for (int64_t r = 0; r < task.rows; ++r) dot_rows<P>(w.q + r * q_units(), keys, q_units(), w.s + r * KEYS + j0);
    }
  }

  int64_t rows_in(const Head& head) const { return in.group() * in.sequences[head.sequence].queries; }

  // Of heads begin .. end-1, in nanoseconds.
  double work(size_t begin, size_t end) const {
    double sum = 0;
    for (size_t h = begin; h < end; ++h)
      sum += double(in.sequences[heads[h].sequence].keys) *
             (rows_in(heads[h]) * MULTIPLY_ADD / 2 + sizeof(Storage) * BYTE);  // tiles of two multiply-adds a cycle
    return sum * (in.key.size[3] + in.value.size[3]);
  }

  Task row_block(int64_t h, int64_t block, Span keys) const {
    int64_t row0 = block * BLOCK_ROWS;
    return {h, row0, std::min(BLOCK_ROWS, rows_in(heads[h]) - row0), keys, -1};
  }

  // Many heads: each is one thread's, from packing to the last row. No thread waits for another's packing, and what
  // it packed is still in its cache.
  void run_whole_heads() {
    int64_t workers = std::min<int64_t>(heads.size(), thread_count()), units = 0;
    for (const Head& head : heads) units = std::max(units, head.packed_blocks * block_units());
    Buffer<Unit> packed(workers * units);
    Workspace scratch(*this, workers);
    run_tasks(heads.size(), work(0, heads.size()), [&](int64_t worker, int64_t h) {
      const Head& head = heads[h];
      Unit* mine = packed.get() + worker * units;
      for (int64_t b = 0; b < head.packed_blocks; ++b) pack_head_block(head, b, mine, scratch[worker].stage);
      for (int64_t b = 0; b < head.row_blocks; ++b) {
        Task task = row_block(h, b, {0, in.sequences[head.sequence].keys});
        attend(task, scratch[worker], mine);
        finish(task, scratch[worker]);
      }
    });
  }

  // Few heads: all threads pack them, then share out their row blocks and key ranges.
  void run_shared_heads(size_t begin, size_t end, int64_t packed_units) {
    std::vector<std::pair<int64_t, int64_t>> blocks;  // head, key block
    std::vector<Task> tasks;
    int64_t partials = 0;
    for (size_t h = begin; h < end; ++h) {
      const Head& head = heads[h];
      for (int64_t b = 0; b < head.packed_blocks; ++b) blocks.push_back({h, b});
      int64_t keys = in.sequences[head.sequence].keys, per_split = round_up(ceil_div(keys, head.splits), KEYS);
      // The last rows see the most keys under a causal mask: they go first, so that no thread ends alone with one.
      for (int64_t b = head.row_blocks - 1; b >= 0; --b)
        for (int64_t split = 0; split < head.splits; ++split) {
          Span range = {std::min(keys, split * per_split), std::min(keys, (split + 1) * per_split)};
          tasks.push_back(row_block(h, b, range));
          if (head.splits > 1) tasks.back().partial = partials++;
        }
    }
    Buffer<Unit> packed(packed_units);
    Buffer<Acc> partial(partials * partial_size());
    Workspace scratch(*this, std::min<int64_t>(std::max(tasks.size(), blocks.size()), thread_count()));
    const double packing = double(packed_units) * sizeof(Unit) * BYTE;
    run_tasks(blocks.size(), packing, [&](int64_t worker, int64_t i) {
      const Head& head = heads[blocks[i].first];
      pack_head_block(head, blocks[i].second, packed.get() + head.packed_at, scratch[worker].stage);
    });
    run_tasks(tasks.size(), work(begin, end), [&](int64_t worker, int64_t i) {
      const Task& task = tasks[i];
      attend(task, scratch[worker], packed.get() + heads[task.head].packed_at);
      if (task.partial < 0) finish(task, scratch[worker]);
      else save_partial(task, scratch[worker], partial.get() + task.partial * partial_size());
    });
    if (partials > 0)
      run_tasks(tasks.size(), double(partials) * partial_size() * sizeof(Acc) * BYTE, [&](int64_t worker, int64_t i) {
        const Task& task = tasks[i];
        if (task.partial < 0 || task.keys.first > 0) return;
        merge(task, scratch[worker], partial.get() + task.partial * partial_size());
        finish(task, scratch[worker]);
      });
  }

  // One Scratch for each thread.
  class Workspace {
   public:
    Workspace(const Forward& forward, int64_t workers) : memory_(workers * forward.scratch_units()) {
      for (int64_t i = 0; i < workers; ++i)
        scratch_.push_back(forward.place_scratch(memory_.get() + i * forward.scratch_units()).first);
    }
    Scratch& operator[](int64_t worker) { return scratch_[worker]; }

   private:
    Buffer<Unit> memory_;
    std::vector<Scratch> scratch_;
  };

  // Sizes of the scratch arrays in units, each rounded so that all are aligned.
  int64_t scratch_units() const { return place_scratch(nullptr).second; }

  std::pair<Scratch, int64_t> place_scratch(Unit* memory) const {
    static_assert(sizeof(Unit) == sizeof(Acc));
    Scratch w;
    int64_t used = 0;
    auto place = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += round_up(count, 64 / sizeof(Unit));
    };
    place(w.q, BLOCK_ROWS * q_units());
    place(w.p, TILE_ROWS * KEYS);
    place(w.k, k_block_units());
    place(w.v, v_block_units());
    place(w.stage, stage_units<P>(std::max(D(), Dv())));
    place(w.s, TILE_ROWS * KEYS);
    place(w.m, BLOCK_ROWS);
    place(w.l, BLOCK_ROWS * W);
    place(w.o, BLOCK_ROWS * v_width());
    place(w.keep, KEYS);
    if (memory) {
      w.rows.resize(BLOCK_ROWS);
      std::memset(w.p, 0, TILE_ROWS * KEYS * sizeof(Unit));  // rows that pad a tile
    }
    return {std::move(w), used};
  }

  // q: [rows][q_units] packed, the running state emptied, and what each row sees.
  void begin_rows(const Task& task, Scratch& w) const {
    const Head& head = heads[task.head];
    const Sequence& s = in.sequences[head.sequence];
    int64_t padded = round_up(task.rows, TILE_ROWS);
    for (int64_t r = 0; r < task.rows; ++r) {
      int64_t index = task.row0 + r, i = index % s.queries;
      Row& row = w.rows[r];
      row = {head.key_head * in.group() + index / s.queries, i, i + s.offset, in.window.visible(s, i)};
      copy_row<P>(in.query.at(s.batch, row.head, s.query_start + i), in.query.stride[3], D(), w.q + r * q_units(),
                  q_units());
      if (r % TILE_ROWS == 0) w.seen[r / TILE_ROWS] = w.full[r / TILE_ROWS] = row.keys;
      Span &seen = w.seen[r / TILE_ROWS], &full = w.full[r / TILE_ROWS];
      seen = {std::min(seen.first, row.keys.first), std::max(seen.last, row.keys.last)};
      full = {std::max(full.first, row.keys.first), std::min(full.last, row.keys.last)};
    }
    std::memset(w.q + task.rows * q_units(), 0, (padded - task.rows) * q_units() * sizeof(Unit));
    std::fill_n(w.m, padded, MINUS_INF<Acc>);
    std::fill_n(w.l, padded * W, Acc(0));
    std::fill_n(w.o, padded * v_width(), Acc(0));
  }

  void attend(const Task& task, Scratch& w, const Unit* packed) const {
    const Head& head = heads[task.head];
    begin_rows(task, w);
    int64_t tiles = ceil_div(task.rows, TILE_ROWS);
    Span seen = {task.keys.last, task.keys.first};
    for (int64_t t = 0; t < tiles; ++t)
      if (w.seen[t].first < w.seen[t].last)
        seen = {std::min(seen.first, w.seen[t].first), std::max(seen.last, w.seen[t].last)};
    seen = {std::max(seen.first, task.keys.first) / KEYS * KEYS, std::min(seen.last, task.keys.last)};
    for (int64_t key0 = seen.first; key0 < seen.last; key0 += KEYS) {
      Block block = head.packed_blocks > 0 ? packed_block(packed, key0 / KEYS) : own_block(task, key0, w);
      for (int64_t t = 0; t < tiles; ++t)
        if (w.seen[t].first < key0 + KEYS && key0 < w.seen[t].last) attend_tile(task, t, key0, block, w);
    }
  }

  // Six rows against one block: s = q kᵀ, to probabilities, o += p v.
  void attend_tile(const Task& task, int64_t t, int64_t key0, Block block, Scratch& w) const {
    const int64_t batch = in.sequences[heads[task.head].sequence].batch;
    int64_t row0 = t * TILE_ROWS, rows = std::min<int64_t>(TILE_ROWS, task.rows - row0);
    // No row sees a key past count: under a causal mask that halves the work on the diagonal.
    int64_t count = std::min(KEYS, w.seen[t].last - key0);
    // s: [rows][KEYS] = q: [rows][D] · kᵀ: [D][count]; columns past count are left to the mask.
    if (block.k)
      gemm<P>(rows, ceil_div(count, W), q_units(), w.q + row0 * q_units(), q_units(), block.k, KEYS, w.s, KEYS, false);
    else
      score_in_place(task, key0, count, w);
    const bool edits = in.rules.edits();
    const bool boundary = w.full[t].first > key0 || w.full[t].last < key0 + KEYS;
    const Acc c = in.rules.unit() * LOG2E;
    Unit* p = probabilities(w);
    for (int64_t r = 0; r < rows; ++r) {
      const Row& row = w.rows[row0 + r];
      Acc* s = w.s + r * KEYS;
      if (edits) edit_scores<Storage>(in.rules, batch, row, key0, count, s);
      if (boundary) mask_scores(row.keys, key0, s);
      Running<Acc> running = {w.m + row0 + r, w.l + (row0 + r) * W, w.o + (row0 + r) * v_width()};
      if (in.rules.dropout.p > 0) {
        dropout_row(in.rules.dropout, batch * in.query.size[1] + row.head, row.query, key0, w.keep);
        softmax_row<P>(s, c, w.keep, running, v_width(), p + r * (KEYS / P::depth));
      } else {
        softmax_row<P>(s, c, nullptr, running, v_width(), p + r * (KEYS / P::depth));
      }
    }
    // o: [rows][Dv] += p: [rows][count] · v: [count][Dv]
    gemm<P>(rows, v_width() / W, ceil_div(count, P::depth), p, KEYS / P::depth, block.v,
            block.v_stride, w.o + row0 * v_width(), v_width(), true);
  }

  // Probabilities replace the scores where they have the same size.
  Unit* probabilities(Scratch& w) const {
    if constexpr (P::depth == 1) return w.s;
    else return w.p;
  }

  // partial: m: [BLOCK_ROWS], l: [BLOCK_ROWS], o: [BLOCK_ROWS][v_width]
  void save_partial(const Task& task, const Scratch& w, Acc* partial) const {
    for (int64_t r = 0; r < task.rows; ++r) {
      partial[r] = w.m[r];
      partial[BLOCK_ROWS + r] = reduce_add<Acc>(load<Vec<Acc>>(w.l + r * W));
    }
    std::memcpy(partial + 2 * BLOCK_ROWS, w.o, task.rows * v_width() * sizeof(Acc));
  }

  // The running state of all splits of a row block, from the first split's partial and those behind it.
  void merge(const Task& task, Scratch& w, const Acc* partial) const {
    const Head& head = heads[task.head];
    const Acc c = in.rules.unit() * LOG2E;
    begin_rows(task, w);
    for (int64_t split = 0; split < head.splits; ++split, partial += partial_size())
      for (int64_t r = 0; r < task.rows; ++r) {
        Running<Acc> row = {w.m + r, w.l + r * W, w.o + r * v_width()};
        if (partial[r] > *row.m) raise_maximum(row, partial[r], c, v_width());
        const Acc m = *row.m == MINUS_INF<Acc> ? 0 : *row.m;
        Vec<Acc> weight = exp2<Acc>(broadcast((partial[r] - m) * c));
        row.l[0] += weight[0] * partial[BLOCK_ROWS + r];
        const Acc* o = partial + 2 * BLOCK_ROWS + r * v_width();
        for (int64_t d = 0; d < v_width(); d += W)
          store(row.o + d, load<Vec<Acc>>(row.o + d) + weight * load<Vec<Acc>>(o + d));
      }
  }

  void finish(const Task& task, const Scratch& w) const {
    const Sequence& s = in.sequences[heads[task.head].sequence];
    const double kept = in.rules.dropout.p < 1 ? 1 / (1 - in.rules.dropout.p) : 0;
    for (int64_t r = 0; r < task.rows; ++r) {
      const Row& row = w.rows[r];
      const Acc l = reduce_add<Acc>(load<Vec<Acc>>(w.l + r * W));
      int64_t i = s.query_start + row.query;
      Acc& row_lse = lse[(s.batch * in.query.size[1] + row.head) * in.query.size[2] + i];
      Storage* to = out.at(s.batch, row.head, i);
      if (l == 0) {  // every key masked: else m is at most the largest score, which contributes 1 or more
        row_lse = MINUS_INF<Acc>;
        std::fill_n(to, Dv(), Storage(0));
        continue;
      }
      row_lse = static_cast<Acc>(w.m[r] * in.rules.unit() + std::log(static_cast<double>(l)));
      const Acc factor = static_cast<Acc>(kept / l);
      const Acc* o = w.o + r * v_width();
      int64_t d = 0;
      for (; d + W <= Dv(); d += W) store_as<Acc>(to + d, load<Vec<Acc>>(o + d) * factor);
      for (; d < Dv(); ++d) to[d] = static_cast<Storage>(o[d] * factor);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------
// The op

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
    using Acc = typename ComputeOf<Storage>::type::Acc;
    Inputs<Storage> inputs{View<const Storage>(query), View<const Storage>(key), View<const Storage>(value),
                           clamp_window(window_left, window_right),
                           make_rules(storage, bias, alibi_slopes, seed, scale, softcap, dropout_p),
                           std::move(sequences), {}};
    if (block_table) inputs.pages = to_vector(*block_table);
    Forward<Storage>(inputs, View<Storage>(out), data<Acc>(lse)).run();
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
