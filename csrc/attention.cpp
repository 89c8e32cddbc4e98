// Exact attention on the CPU.
//
//   s = scale · q kᵀ;  s = softcap · tanh(s / softcap);  s += bias;  s −= slope · |p − j|;  masked: s = −inf
//   o = softmax(s) v;  lse = log Σ exp s          (a fully masked row: o = 0, lse = −inf)
//
// The queries of the G = H / Hk heads that share a key head are one list of G·N rows. A task owns a block of these
// rows and a range of keys. It reads K and V in blocks of KEYS, six rows at a time, with the online softmax: running
// maximum m, sum l and unnormalised output o, rescaled only when m has grown well. Everything between the two products happens
// on a [6][KEYS] tile that stays in L1. Scores are in base 2 (m in units of log2): p = 2^(c·s − m) is one FMA and one
// polynomial.
//
// K and V are packed for the microkernel (gemm_tile.h): once, ahead, in parallel, when several tasks share them; by
// the task itself, block by block, when it alone needs them (decode: the cache is read once, nothing is written back).
// When there are fewer tasks than cores, tasks split the keys, leave (m, l, o) behind, and a last pass merges those
// in order. No atomics on floats, so results repeat bit by bit for a given number of threads.
//
// Reads query, key, value, bias, slopes, lengths; writes out and lse, every element of both.

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "gemm_tile.h"
#include "tasks.h"

namespace {

constexpr int64_t KEYS = 64;         // keys in a block
#ifndef BR
#define BR 96
#endif
constexpr int64_t BLOCK_ROWS = BR;  // query rows in a task, a multiple of TILE_ROWS
constexpr int64_t PACKED_BYTES = 32 << 20;  // packed K and V held at once; more only to occupy every thread
constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.69314718055994530942;

template <class T>
constexpr T MINUS_INF = -std::numeric_limits<T>::infinity();

// ---------------------------------------------------------------------------------------------------------------
// Which keys a query sees

struct Span {
  int64_t first, last;  // [first, last)
};

// One batch entry, or one sequence of a packed batch.
struct Sequence {
  int64_t batch;
  int64_t query_start, queries;  // rows of query, in memory
  int64_t key_start, keys;       // rows of key and value, in memory; none beyond `keys` is read
  int64_t offset;                // query i has position i + offset
};

struct Window {
  int64_t left, right;  // negative: unbounded

  // Both ends grow with i.
  Span visible(const Sequence& s, int64_t i) const {
    int64_t p = i + s.offset;
    int64_t last = right < 0 ? s.keys : std::clamp<int64_t>(p + right + 1, 0, s.keys);
    int64_t first = left < 0 ? 0 : std::clamp<int64_t>(p - left, 0, last);
    return {first, last};
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Tensors as the kernel sees them: typed, four strides in elements

template <class T>
struct View {
  T* data = nullptr;
  int64_t size[4] = {}, stride[4] = {};

  explicit View(const Tensor& t) : data(static_cast<T*>(t.data_ptr())) {
    for (int d = 0; d < 4; ++d) size[d] = t.size(d), stride[d] = t.stride(d);
  }
  T* at(int64_t i, int64_t j, int64_t k) const { return data + i * stride[0] + j * stride[1] + k * stride[2]; }
};

// The keys (or values) of one sequence and head: row j, in place or through the block table.
template <class Storage>
struct KeyRows {
  const Storage* base;
  int64_t row_stride, stride;
  const int64_t* pages = nullptr;
  int64_t page_rows = 1, page_count = 0, page_stride = 0;

  const Storage* operator()(int64_t j) const {
    if (!pages) return base + j * row_stride;
    int64_t page = std::clamp<int64_t>(pages[j / page_rows], 0, page_count - 1);
    return base + page * page_stride + (j % page_rows) * row_stride;
  }
};

// ---------------------------------------------------------------------------------------------------------------
// What happens to scores and probabilities between the two products

struct Bias {
  enum Kind { NONE, BOOL, STORAGE, ACCUMULATOR } kind = NONE;
  const void* data = nullptr;
  int64_t stride[4] = {};  // 0 where broadcast
};

struct Dropout {
  double p = 0;
  uint32_t threshold = 0, key[2] = {};  // keep where the random word >= threshold
};

struct ScoreRules {
  double scale = 1, softcap = 0;
  Bias bias;
  const void* slopes = nullptr;  // [B or 1, H] in the accumulator type
  int64_t slope_stride[2] = {};
  Dropout dropout;

  // Without these a score is only multiplied, which the exponential's FMA does; but the running maximum of unscaled
  // products is the scores' only if the scale is positive.
  bool edits() const { return softcap > 0 || bias.kind != Bias::NONE || slopes || !(scale > 0); }
};

// One query row of a task.
struct Row {
  int64_t head, query;
  int64_t position;
  Span keys;
};

// bias[j] for keys key0 .. key0+count-1 of one row, as numbers to add; zero beyond.
template <class Storage, class Acc>
void load_bias(const Bias& bias, int64_t batch, const Row& row, int64_t key0, int64_t count, Acc* out) {
  int64_t step = bias.stride[3];
  int64_t at = batch * bias.stride[0] + row.head * bias.stride[1] + row.query * bias.stride[2] + key0 * step;
  auto fill = [&](auto* from, auto convert) {
    if (step == 1) for (int64_t j = 0; j < count; ++j) out[j] = convert(from[j]);
    else for (int64_t j = 0; j < count; ++j) out[j] = convert(from[j * step]);
    for (int64_t j = count; j < KEYS; ++j) out[j] = 0;
  };
  auto number = [](auto x) { return static_cast<Acc>(x); };
  switch (bias.kind) {
    case Bias::BOOL:
      return fill(static_cast<const uint8_t*>(bias.data) + at, [](uint8_t x) { return x ? Acc(0) : MINUS_INF<Acc>; });
    case Bias::STORAGE: return fill(static_cast<const Storage*>(bias.data) + at, number);
    case Bias::ACCUMULATOR: return fill(static_cast<const Acc*>(bias.data) + at, number);
    case Bias::NONE: return;
  }
}

// s: [KEYS] products q·k of one row and keys key0 .. key0+count-1, to scores in natural units.
template <class Storage, class Acc>
void edit_scores(const ScoreRules& rules, int64_t batch, const Row& row, int64_t key0, int64_t count, Acc* s) {
  constexpr int W = lanes<Acc>;
  alignas(64) Acc bias[KEYS];
  if (rules.bias.kind != Bias::NONE) load_bias<Storage>(rules.bias, batch, row, key0, count, bias);
  const Acc scale = rules.scale, cap = rules.softcap, per_cap = rules.scale / rules.softcap;
  Acc slope = 0;
  if (rules.slopes)
    slope = static_cast<const Acc*>(rules.slopes)[batch * rules.slope_stride[0] + row.head * rules.slope_stride[1]];
  Vec<Acc> distance = broadcast(static_cast<Acc>(row.position - key0)) - iota<Acc>();
  for (int64_t j = 0; j < KEYS; j += W) {
    auto x = load<Vec<Acc>>(s + j);
    x = rules.softcap > 0 ? cap * tanh<Acc>(x * per_cap) : x * scale;
    if (rules.bias.kind != Bias::NONE) {
      auto b = load<Vec<Acc>>(bias + j);
      x = select<Acc>(b == MINUS_INF<Acc>, b, x + b);  // masks a NaN or infinite score too
    }
    if (rules.slopes) {
      x -= slope * max<Acc>(distance, -distance);
      distance -= static_cast<Acc>(W);
    }
    store(s + j, x);
  }
}

// s: [KEYS] scores of keys key0 ..; −inf outside the span.
template <class Acc>
void mask_scores(Span keys, int64_t key0, Acc* s) {
  constexpr int W = lanes<Acc>;
  const auto first = broadcast(static_cast<Acc>(std::clamp<int64_t>(keys.first - key0, 0, KEYS)));
  const auto last = broadcast(static_cast<Acc>(std::clamp<int64_t>(keys.last - key0, 0, KEYS)));
  Vec<Acc> j = iota<Acc>();
  for (int64_t v = 0; v < KEYS; v += W, j += static_cast<Acc>(W))
    store(s + v, select<Acc>((j >= first) & (j < last), load<Vec<Acc>>(s + v), broadcast(MINUS_INF<Acc>)));
}

// keep[j] = 1 where key key0 + j is kept, else 0. Philox4x32-10 (Salmon et al. 2011) with counter
// (j/4, query, batch·H + head, 0): every backend draws the same mask. key0 is a multiple of 4.
template <class Acc>
void dropout_row(const Dropout& dropout, int64_t batch_head, int64_t query, int64_t key0, Acc* keep) {
  constexpr int N = KEYS / 4;
  uint32_t c0[N], c1[N], c2[N], c3[N], k0 = dropout.key[0], k1 = dropout.key[1];
  for (int n = 0; n < N; ++n) {
    c0[n] = static_cast<uint32_t>(key0 / 4 + n), c1[n] = static_cast<uint32_t>(query);
    c2[n] = static_cast<uint32_t>(batch_head), c3[n] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < N; ++n) {
      uint64_t a = uint64_t(0xD2511F53u) * c0[n], b = uint64_t(0xCD9E8D57u) * c2[n];
      c0[n] = static_cast<uint32_t>(b >> 32) ^ c1[n] ^ k0, c1[n] = static_cast<uint32_t>(b);
      c2[n] = static_cast<uint32_t>(a >> 32) ^ c3[n] ^ k1, c3[n] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  for (int n = 0; n < N; ++n) {
    keep[4 * n] = c0[n] >= dropout.threshold, keep[4 * n + 1] = c1[n] >= dropout.threshold;
    keep[4 * n + 2] = c2[n] >= dropout.threshold, keep[4 * n + 3] = c3[n] >= dropout.threshold;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Online softmax

// The running state of one row: m, l as one partial sum per lane, o: [width].
template <class Acc>
struct Running {
  Acc *m, *l, *o;
};

// The maximum has grown to m: what was summed against the old one shrinks.
template <class Acc>
void raise_maximum(Running<Acc> row, Acc m, int64_t width) {
  constexpr int W = lanes<Acc>;
  Vec<Acc> alpha = exp2<Acc>(broadcast(*row.m - m));  // 0 when the old maximum was −inf
  *row.m = m;
  store(row.l, load<Vec<Acc>>(row.l) * alpha);
  for (int64_t d = 0; d < width; d += W) store(row.o + d, load<Vec<Acc>>(row.o + d) * alpha);
}

// m follows the maximum only when that has outgrown it by this much, in log2: exact all the same, since o and l share
// the factor, and few blocks after the first then rescale. p stays below 2^8.
constexpr int SLACK = 8;

// s: [KEYS] scores of one row, c > 0 to base 2. p: [KEYS / depth] gets 2^(c·s − m), times keep if there is one.
// A NaN score never raises m, but its p is NaN, and so the row's l and o.
template <class P>
PK_INLINE void softmax_row(const typename P::Acc* s, typename P::Acc c, const typename P::Acc* keep,
                           Running<typename P::Acc> row, int64_t width, typename P::Unit* p) {
  using Acc = typename P::Acc;
  constexpr int W = lanes<Acc>, VECTORS = KEYS / W;
  auto top = load<Vec<Acc>>(s);
  PK_UNROLL
  for (int v = 1; v < VECTORS; ++v) top = max<Acc>(top, load<Vec<Acc>>(s + v * W));
  if (any_greater<Acc>(top * c, broadcast(*row.m + SLACK))) raise_maximum(row, reduce_max<Acc>(top) * c, width);
  const Acc m = *row.m == MINUS_INF<Acc> ? 0 : *row.m;  // nothing seen yet: −inf − −inf would be NaN
  auto sum = load<Vec<Acc>>(row.l);
  auto probability = [&](int v) {
    auto x = exp2<Acc>(load<Vec<Acc>>(s + v * W) * c - m);
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

// Everything that forward and backward read alike.
template <class Storage>
struct Inputs {
  View<const Storage> query, key, value;
  Window window;
  ScoreRules rules;
  std::vector<Sequence> sequences;
  std::vector<int64_t> pages;  // [B][pages], empty when the keys are in place

  int64_t group() const { return query.size[1] / key.size[1]; }

  KeyRows<Storage> rows_of(const View<const Storage>& t, const Sequence& s, int64_t key_head) const {
    if (pages.empty()) return {t.at(s.batch, key_head, s.key_start), t.stride[2], t.stride[3]};
    int64_t per_sequence = pages.size() / query.size[0];
    return {t.at(0, key_head, 0), t.stride[2],  t.stride[3],  pages.data() + s.batch * per_sequence,
            t.size[2],            t.size[0],    t.stride[0]};
  }
};

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
      run_heads(begin, end, units);
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
      int64_t rows = in.group() * in.sequences[s].queries, row_blocks = ceil_div(rows, BLOCK_ROWS);
      if (rows == 0) continue;
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

  // Keys key0 .. of a head as the microkernel wants them. k: [q_units][KEYS], v: [KEYS / depth][v_width].
  void pack_block(const Head& head, int64_t key0, Unit* k, Unit* v, Unit* stage) const {
    const Sequence& s = in.sequences[head.sequence];
    int64_t count = std::min(KEYS, s.keys - key0);
    auto k_rows = in.rows_of(in.key, s, head.key_head), v_rows = in.rows_of(in.value, s, head.key_head);
    // The packers prefetch rows beyond this block; beyond the last key there is none.
    auto row_of = [&](const KeyRows<Storage>& rows) {
      return [&rows, key0, last = s.keys - 1](int64_t j) { return rows(std::min(key0 + j, last)); };
    };
    pack_transposed<P>(row_of(k_rows), k_rows.stride, count, D(), k, KEYS, stage);
    pack_rows<P>(row_of(v_rows), v_rows.stride, count, Dv(), v, v_width(), stage);
  }

  void run_heads(size_t begin, size_t end, int64_t packed_units) {
    std::vector<std::pair<int64_t, int64_t>> blocks;  // head, key block
    std::vector<Task> tasks;
    int64_t partials = 0;
    for (size_t h = begin; h < end; ++h) {
      const Head& head = heads[h];
      for (int64_t b = 0; b < head.packed_blocks; ++b) blocks.push_back({h, b});
      const Sequence& s = in.sequences[head.sequence];
      int64_t rows = in.group() * s.queries, per_split = round_up(ceil_div(s.keys, head.splits), KEYS);
      // The last rows see the most keys under a causal mask: they go first, so that no thread ends alone with one.
      for (int64_t b = head.row_blocks - 1; b >= 0; --b)
        for (int64_t split = 0; split < head.splits; ++split) {
          Span keys = {std::min(s.keys, split * per_split), std::min(s.keys, (split + 1) * per_split)};
          tasks.push_back({int64_t(h), b * BLOCK_ROWS, std::min(BLOCK_ROWS, rows - b * BLOCK_ROWS), keys,
                           head.splits > 1 ? partials++ : -1});
        }
    }
    Buffer<Unit> packed(packed_units);
    Buffer<Acc> partial(partials * partial_size());
    int64_t workers = std::min<int64_t>(std::max(tasks.size(), blocks.size()), thread_count());
    Buffer<Unit> memory(workers * scratch_units());
    std::vector<Scratch> scratch;
    for (int64_t i = 0; i < workers; ++i) scratch.push_back(make_scratch(memory.get() + i * scratch_units()));

    run_tasks(blocks.size(), [&](int64_t worker, int64_t i) {
      const Head& head = heads[blocks[i].first];
      Unit* k = packed.get() + head.packed_at + blocks[i].second * block_units();
      pack_block(head, blocks[i].second * KEYS, k, k + k_block_units(), scratch[worker].stage);
    });
    run_tasks(tasks.size(), [&](int64_t worker, int64_t i) {
      const Task& task = tasks[i];
      attend(task, scratch[worker], packed.get() + heads[task.head].packed_at);
      if (task.partial < 0) finish(task, scratch[worker]);
      else save_partial(task, scratch[worker], partial.get() + task.partial * partial_size());
    });
    if (partials > 0)
      run_tasks(tasks.size(), [&](int64_t worker, int64_t i) {
        const Task& task = tasks[i];
        if (task.partial < 0 || task.keys.first > 0) return;
        merge(task, scratch[worker], partial.get() + task.partial * partial_size());
        finish(task, scratch[worker]);
      });
  }

  // Sizes of the scratch arrays in units, each rounded so that all are aligned.
  int64_t scratch_units() const { return place_scratch(nullptr).second; }
  Scratch make_scratch(Unit* memory) const { return place_scratch(memory).first; }

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
      const Unit *k = w.k, *v = w.v;
      if (head.packed_blocks > 0) {
        k = packed + key0 / KEYS * block_units();
        v = k + k_block_units();
      } else {
        pack_block(head, key0, w.k, w.v, w.stage);
      }
      for (int64_t t = 0; t < tiles; ++t)
        if (w.seen[t].first < key0 + KEYS && key0 < w.seen[t].last) attend_tile(task, t, key0, k, v, w);
    }
  }

  // Six rows against one block: s = q kᵀ, to probabilities, o += p v.
  void attend_tile(const Task& task, int64_t t, int64_t key0, const Unit* k, const Unit* v, Scratch& w) const {
    const int64_t batch = in.sequences[heads[task.head].sequence].batch;
    int64_t row0 = t * TILE_ROWS, rows = std::min<int64_t>(TILE_ROWS, task.rows - row0);
    // No row sees a key past count: under a causal mask that halves the work on the diagonal.
    int64_t count = std::min(KEYS, w.seen[t].last - key0);
    // s: [rows][KEYS] = q: [rows][D] · kᵀ: [D][count]; columns past count are left to the mask.
    gemm<P>(rows, ceil_div(count, W), q_units(), w.q + row0 * q_units(), q_units(), k, KEYS, w.s, KEYS, false);
    const bool edits = in.rules.edits();
    const bool boundary = w.full[t].first > key0 || w.full[t].last < key0 + KEYS;
    const Acc c = edits ? LOG2E : in.rules.scale * LOG2E;
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
    gemm<P>(rows, v_width() / W, ceil_div(count, P::depth), p, KEYS / P::depth, v, v_width(),
            w.o + row0 * v_width(), v_width(), true);
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
    begin_rows(task, w);
    for (int64_t split = 0; split < head.splits; ++split, partial += partial_size())
      for (int64_t r = 0; r < task.rows; ++r) {
        Running<Acc> row = {w.m + r, w.l + r * W, w.o + r * v_width()};
        if (partial[r] > *row.m) raise_maximum(row, partial[r], v_width());
        const Acc m = *row.m == MINUS_INF<Acc> ? 0 : *row.m;
        Vec<Acc> weight = exp2<Acc>(broadcast(partial[r] - m));
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
      row_lse = static_cast<Acc>(w.m[r] * LN2 + std::log(static_cast<double>(l)));
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

std::vector<int64_t> to_vector(const Tensor& t) {
  std::vector<int64_t> v;
  const auto* data = static_cast<const int64_t*>(t.data_ptr());
  int64_t columns = t.dim() == 2 ? t.size(1) : 1, step = t.dim() == 2 ? t.stride(1) : 0;
  for (int64_t i = 0; i < t.size(0); ++i)
    for (int64_t j = 0; j < columns; ++j) v.push_back(data[i * t.stride(0) + j * step]);
  return v;
}

// Uninitialised [B, H, N, D], laid out as `like` is: heads outside positions, or inside when it was transposed.
Tensor empty_in_layout(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D) {
  if (like.stride(1) >= like.stride(2)) return torch::stable::new_empty(like, {B, H, N, D});
  return torch::stable::transpose(torch::stable::new_empty(like, {B, N, H, D}), 1, 2);
}

constexpr int64_t LONGEST = int64_t(1) << 40;  // a window beyond any length, still safe to add

Window clamp_window(int64_t left, int64_t right) { return {std::min(left, LONGEST), std::min(right, LONGEST)}; }

std::vector<Sequence> batch_sequences(int64_t B, int64_t N, int64_t M, const std::optional<Tensor>& key_lengths,
                                      bool align_lengths) {
  std::vector<int64_t> lengths = key_lengths ? to_vector(*key_lengths) : std::vector<int64_t>(B, M);
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < B; ++b) {
    int64_t keys = std::clamp<int64_t>(lengths[b], 0, M);
    sequences.push_back({b, 0, N, 0, keys, (align_lengths ? keys : M) - N});
  }
  return sequences;
}

// Bounds are clamped, and a sequence never starts before the last one's end, so that no two own the same row.
std::vector<Sequence> packed_sequences(int64_t total_q, int64_t total_k, const Tensor& cu_q, const Tensor& cu_k) {
  std::vector<int64_t> q = to_vector(cu_q), k = to_vector(cu_k);
  auto make_monotonic = [](std::vector<int64_t>& cu, int64_t total) {
    int64_t last = 0;
    for (int64_t& x : cu) last = x = std::clamp<int64_t>(x, last, total);
  };
  make_monotonic(q, total_q), make_monotonic(k, total_k);
  std::vector<Sequence> sequences;
  for (size_t s = 0; s + 1 < q.size(); ++s) {
    int64_t N = q[s + 1] - q[s], M = k[s + 1] - k[s];
    sequences.push_back({0, q[s], N, k[s], M, M - N});
  }
  return sequences;
}

// Rows before the first and after the last sequence.
std::vector<Span> uncovered_rows(const std::vector<Sequence>& sequences, int64_t total) {
  if (sequences.empty()) return {{0, total}};
  return {{0, sequences.front().query_start}, {sequences.back().query_start + sequences.back().queries, total}};
}

Bias make_bias(const Tensor& t, ScalarType storage) {
  ScalarType dtype = t.scalar_type();
  Bias bias{dtype == ScalarType::Bool ? Bias::BOOL : dtype == storage ? Bias::STORAGE : Bias::ACCUMULATOR,
            t.data_ptr()};
  for (int d = 0; d < 4; ++d) bias.stride[d] = t.size(d) == 1 ? 0 : t.stride(d);
  return bias;
}

Dropout make_dropout(double p, const Tensor& seed) {
  auto bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
  auto threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  return {p, threshold, {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}};
}

ScalarType accumulator_of(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& key_lengths,
                     const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                     const std::optional<Tensor>& block_table, const std::optional<Tensor>& seed, double dropout_p) {
  const ScalarType storage = query.scalar_type(), acc = accumulator_of(storage);
  check_cpu_tensor(query, 4, storage, "query");
  check_cpu_tensor(key, 4, storage, "key");
  check_cpu_tensor(value, 4, storage, "value");
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2);
  const int64_t Hk = key.size(1), M = block_table ? block_table->size(1) * key.size(2) : key.size(2);
  if (!block_table) check_size(key, 0, B, "key");
  STD_TORCH_CHECK(Hk > 0 ? H % Hk == 0 : H == 0, "key: expected heads that divide query's ", H, ", got ", Hk);
  check_size(key, 3, query.size(3), "key");
  for (int d = 0; d < 3; ++d) check_size(value, d, key.size(d), "value");
  if (bias) {
    ScalarType dtype = bias->scalar_type();
    check_cpu_tensor(*bias, 4, dtype == ScalarType::Bool || dtype == acc ? dtype : storage, "bias");
    const int64_t full[] = {B, H, N, M};
    for (int d = 0; d < 4; ++d) check_size_or_one(*bias, d, full[d], "bias");
  }
  if (alibi_slopes) {
    check_cpu_tensor(*alibi_slopes, 2, acc, "alibi_slopes");
    check_size_or_one(*alibi_slopes, 0, B, "alibi_slopes");
    check_size(*alibi_slopes, 1, H, "alibi_slopes");
  }
  if (key_lengths) {
    check_cpu_tensor(*key_lengths, 1, ScalarType::Long, "key_lengths");
    check_size(*key_lengths, 0, B, "key_lengths");
  }
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                  "cu_seqlens_k: expected together with cu_seqlens_q");
  if (cu_seqlens_q) {
    check_cpu_tensor(*cu_seqlens_q, 1, ScalarType::Long, "cu_seqlens_q");
    check_cpu_tensor(*cu_seqlens_k, 1, ScalarType::Long, "cu_seqlens_k");
    check_size(*cu_seqlens_k, 0, cu_seqlens_q->size(0), "cu_seqlens_k");
    check_size(query, 0, 1, "query");
    STD_TORCH_CHECK(!bias && !alibi_slopes && !key_lengths && !block_table && dropout_p == 0,
                    "cu_seqlens_q: expected no bias, slopes, lengths, block table or dropout beside it");
  }
  if (block_table) {
    check_cpu_tensor(*block_table, 2, ScalarType::Long, "block_table");
    check_size(*block_table, 0, B, "block_table");
  }
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "seed: expected a tensor with dropout_p > 0");
    check_cpu_tensor(*seed, 0, ScalarType::Long, "seed");
  }
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> key_lengths,
                                     std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                     std::optional<Tensor> block_table, std::optional<Tensor> seed,
                                     int64_t window_left, int64_t window_right, bool align_lengths, double scale,
                                     double softcap, double dropout_p, int64_t /*backend*/) {
  check_attention(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table, seed,
                  dropout_p);
  const ScalarType storage = query.scalar_type(), acc = accumulator_of(storage);
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2), Dv = value.size(3);
  int64_t M = key.size(2);
  if (block_table) M = key.size(0) == 0 ? 0 : M * block_table->size(1);

  Tensor out = empty_in_layout(query, B, H, N, Dv);
  Tensor lse = torch::stable::new_empty(query, {B, H, N}, acc);
  if (B * H * N == 0) return {out, lse};

  ScoreRules rules;
  rules.scale = scale, rules.softcap = softcap;
  if (bias) rules.bias = make_bias(*bias, storage);
  if (alibi_slopes) {
    rules.slopes = alibi_slopes->data_ptr();
    rules.slope_stride[0] = alibi_slopes->size(0) == 1 ? 0 : alibi_slopes->stride(0);
    rules.slope_stride[1] = alibi_slopes->stride(1);
  }
  if (dropout_p > 0) rules.dropout = make_dropout(dropout_p, *seed);
  auto sequences = cu_seqlens_q ? packed_sequences(N, M, *cu_seqlens_q, *cu_seqlens_k)
                                : batch_sequences(B, N, M, key_lengths, align_lengths);
  if (cu_seqlens_q)
    for (Span rows : uncovered_rows(sequences, N)) {
      Tensor o = torch::stable::narrow(out, 2, rows.first, rows.last - rows.first);
      Tensor l = torch::stable::narrow(lse, 2, rows.first, rows.last - rows.first);
      torch::stable::fill_(o, 0);
      torch::stable::fill_(l, MINUS_INF<double>);
    }

  auto run = [&]<class Storage>(Storage) {
    using Acc = typename ComputeOf<Storage>::type::Acc;
    Inputs<Storage> inputs{View<const Storage>(query), View<const Storage>(key), View<const Storage>(value),
                           clamp_window(window_left, window_right), rules, std::move(sequences), {}};
    if (block_table) inputs.pages = to_vector(*block_table);
    Forward<Storage>(inputs, View<Storage>(out), static_cast<Acc*>(lse.data_ptr())).run();
  };
  switch (storage) {
    case ScalarType::Float: run(float{}); break;
    case ScalarType::Double: run(double{}); break;
    case ScalarType::BFloat16: run(BFloat16{}); break;
    case ScalarType::Half: run(Half{}); break;
    default: STD_TORCH_CHECK(false, "query: expected a floating dtype, got ", torch::headeronly::toString(storage));
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
