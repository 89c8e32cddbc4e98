// Gradients of exact attention on the CPU.
//
//   Δ = Σ do ∘ o − dlse;  P = exp(s − lse);  dP = do vᵀ;  dS = P ∘ (dP − Δ)
//   dv = Pᵀ do;  dq = scale · dS k;  dk = scale · dSᵀ q;  dbias = Σ dS;  dslope = −Σ dS · |p − j|
//
// With softcap dq and dk take dS · (1 − (c / softcap)²), c the capped score; with dropout dv takes the P that was used
// and dS the masked dP. P = 0 where a key is masked or lse is −inf, by selection: nothing infinite is multiplied by 0.
//
// A large lse is rounded so coarsely that it has lost the logarithm of a sum: n equal scores of −1e38 would get P = 1
// instead of 1/n. Tiles with such rows find the maximum and the sum anew, from the products that the gradients use.
//
// One pass, five products. A task owns a sequence, one of its key heads, and every splits-th block of ROWS of the
// G·N query rows of that head's group (strided, so that a causal mask leaves the splits equal work). It packs its
// rows of q and do once, then takes the keys block by block: K and V are packed, the block's dk and dv are summed in
// cache over the task's rows, and dq is summed over the key blocks in the task's own rows. S and dP of ROWS queries
// and KEYS keys, queries as rows, live in L1 and turn into P and dS in place; the products with their transposes
// (dv, dk) read them by columns, so that nothing is transposed. With bf16 pairs P and dS are interleaved along the
// queries for those, and dS along the keys for dq.
//
// With fewer heads than threads the rows are split; each split then leaves partial sums of dk and dv, [keys, D + Dv],
// and a last pass adds those in order. Every other sum too has an owner and an order (no atomics), so results repeat
// bit by bit for a given number of threads. Gradients of a bias that is broadcast over batch or heads: tasks that
// share its elements form a chain, which one thread runs in order.
//
// Reads everything that the forward read, out, lse and their gradients; writes every element of all gradients.

#include <array>
#include <map>
#include <tuple>

#include "attention.h"

namespace {

constexpr int64_t ROWS = 48;  // query rows in a block: an L1 holds their P and dS and one packed operand
constexpr int64_t TILES = ROWS / TILE_ROWS;
static_assert(ROWS % TILE_ROWS == 0 && ROWS % lanes<float> == 0 && TILE_ROWS % 2 == 0);
static_assert(KEYS % TILE_ROWS == 0 || KEYS % TILE_ROWS == 4);
constexpr int64_t SUM_DEPTH = 64;  // gemm's
constexpr double LARGEST_LSE = 1024;  // beyond, P would inherit an error of more than 2^-14 from lse's rounding
constexpr int64_t LEAST_BLOCKS = 4;  // row blocks that repay packing the keys for one more split

// lse or its gradient, [B, H, N].
template <class Acc>
struct Statistics {
  const Acc* data = nullptr;
  int64_t stride[3] = {};

  Statistics() = default;
  explicit Statistics(const Tensor& t) : data(::data<const Acc>(t)) {
    for (int d = 0; d < 3; ++d) stride[d] = t.stride(d);
  }
  Acc at(int64_t b, int64_t h, int64_t i) const { return data[b * stride[0] + h * stride[1] + i * stride[2]]; }
};

// What the backward reads besides the forward's inputs.
template <class Storage, class Acc>
struct Saved {
  View<const Storage> grad_out, out;
  Statistics<Acc> lse, grad_lse;  // no grad_lse.data: zero
};

// The results, uninitialised.
template <class Storage, class Acc>
struct Gradients {
  View<Storage> query, key, value;
  void* bias = nullptr;  // contiguous; null when nobody asks
  bool bias_in_storage = false;
  int64_t bias_size[4] = {};
  Acc* slopes = nullptr;  // [slope_batches, H] contiguous; null when nobody asks
  int64_t slope_batches = 0;
};

// The bias's gradient while it is summed, in the bias's own shape.
template <class Acc>
struct BiasSum {
  Acc* data = nullptr;
  int64_t count = 0, stride[4] = {};  // stride 0 where broadcast
  int64_t copies = 1;                 // one for each split, where splits share elements

  Acc* at(int64_t split, int64_t batch, const Row& row, int64_t key) const {
    return data + (copies > 1 ? split * count : 0) + batch * stride[0] + row.head * stride[1] + row.query * stride[2] +
           key * stride[3];
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Rows

// What the gradients need of a query row: P = 2^((s − top)·c − low). The differences are taken in two steps: so P = 1
// and dP = Δ exactly, to the last bit, where a row sees a single key.
template <class Acc>
struct RowSums {
  Acc top = 0, low = -MINUS_INF<Acc>;  // lse in the scores' unit, and in base 2 what that leaves; a row that sees
                                       // nothing has low = inf
  Acc delta = 0, grad_lse = 0;         // Σ do ∘ o without grad_lse, and that

  void set_lse(Acc lse, double unit) {
    if (lse == MINUS_INF<Acc>) return;
    top = static_cast<Acc>(lse / unit);
    low = static_cast<Acc>(std::fma(-double(top), unit, double(lse)) * LOG2E);
  }
};

template <class Acc, class Storage>
void store_row(const Acc* from, Acc factor, int64_t n, Storage* to) {
  constexpr int W = lanes<Acc>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_as<Acc>(to + i, load<Vec<Acc>>(from + i) * factor);
  for (; i < n; ++i) to[i] = static_cast<Storage>(from[i] * factor);
}

// One row, in place. s: [KEYS] scores, c to base 2, become P; dp: [KEYS] becomes dS.
// keep, if not null: [KEYS] 1 where dropout kept, and kept = 1 / (1 − p); s is then the P of dv.
template <class Acc>
PK_INLINE void differentiate_row(Acc c, const RowSums<Acc>& row, const Acc* keep, Acc kept, Acc* s, Acc* dp) {
  constexpr int W = lanes<Acc>;
  PK_UNROLL
  for (int64_t j = 0; j < KEYS; j += W) {
    Vec<Acc> p = exp2<Acc>((load<Vec<Acc>>(s + j) - row.top) * c - row.low), used = p;
    auto d = load<Vec<Acc>>(dp + j);
    if (keep) {
      Vec<Bits<Acc>> dropped = load<Vec<Acc>>(keep + j) == Acc(0);
      d = select<Acc>(dropped, Vec<Acc>{}, d * kept);
      used = select<Acc>(dropped, Vec<Acc>{}, p * kept);
    }
    // dp of a masked key may be anything.
    store(dp + j, select<Acc>(p == Acc(0), Vec<Acc>{}, p * (d - row.delta + row.grad_lse)));
    store(s + j, used);
  }
}

// The distance of a row to the nearest key that it may see.
inline int64_t nearest_distance(const Row& row) {
  return std::abs(row.position - std::clamp(row.position, row.keys.first, row.keys.last - 1));
}

// Σ dS · (|p − j| − nearest) of one row and keys key0 ..
template <class Acc>
Acc distance_sum(const Row& row, int64_t key0, const Acc* ds) {
  const Acc nearest = nearest_distance(row);
  Vec<Acc> sum = {}, distance = broadcast(static_cast<Acc>(row.position - key0)) - iota<Acc>();
  for (int64_t j = 0; j < KEYS; j += lanes<Acc>, distance -= static_cast<Acc>(lanes<Acc>))
    sum += load<Vec<Acc>>(ds + j) * (max<Acc>(distance, -distance) - nearest);
  return reduce_add<Acc>(sum);
}

#if defined(__AVX512BF16__)
// Lane i gets the pair (even[i], odd[i]): two rows of a tile, ready to be reduced over rows.
PK_INLINE Vec<uint32_t> interleave_bf16(Vec<float> even, Vec<float> odd) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint16_t, 32> lane{};
    for (int i = 0; i < 32; ++i) lane[i] = i / 2 + i % 2 * 16;
    return lane;
  }();
  auto pairs = (__m512i)to_bf16_pairs(even, odd);
  return (Vec<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(order.data()), pairs);
}
#endif

// ---------------------------------------------------------------------------------------------------------------
// The backward pass

template <class Storage>
class Backward {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;

 public:
  Backward(const Inputs<Storage>& inputs, const Saved<Storage, Acc>& saved, const Gradients<Storage, Acc>& gradients)
      : in(inputs), saved(saved), grad(gradients) {}

  void run() {
    plan();
    Buffer<double> slopes(grad.slopes ? heads.size() * splits * in.group() : 0);
    slope_sums = slopes.get();
    const bool bias_in_place = !grad.bias_in_storage && bias_sum.copies == 1;
    Buffer<Acc> bias(grad.bias && !bias_in_place ? bias_sum.copies * bias_sum.count : 0);
    if (grad.bias) {
      bias_sum.data = bias_in_place ? static_cast<Acc*>(grad.bias) : bias.get();
      std::fill_n(bias_sum.data, bias_sum.copies * bias_sum.count, Acc(0));
    }
    int64_t blocks = 0, count = 0, rounds = 0;
    for (const Head& head : heads) {
      blocks = std::max(blocks, ceil_div(row_blocks(head), head.splits));
      count += head.splits;
      rounds = std::max(rounds, head.round + 1);
    }
    int64_t workers = std::min(count, thread_count()), units = place_scratch(nullptr, blocks).second;
    Buffer<Unit> memory(workers * units);
    std::vector<Scratch> scratch;
    for (int64_t i = 0; i < workers; ++i) scratch.push_back(place_scratch(memory.get() + i * units, blocks).first);
    for (int64_t round = 0; round < rounds; ++round) run_round(round, scratch);
    if (grad.slopes) finish_slopes();
    if (grad.bias && !bias_in_place) finish_bias();
  }

 private:
  // A sequence and one of its key heads.
  struct Head {
    int64_t sequence, key_head;
    int64_t chain;       // heads of one chain share elements of the bias's gradient
    int64_t round = 0;   // heads of one round run at once
    int64_t splits = 1;
    int64_t partial_at = 0;
  };

  struct Task {
    int64_t head, split;
  };

  // What one thread works in. Row-wise arrays hold the task's row blocks one after the other.
  struct Scratch {
    Unit *q, *g;            // rows of query and grad_out, [rows][row_units]: left operands
    Unit *q_rows, *g_rows;  // the same, [rows / depth][width]: right operands (the same memory unless paired)
    Acc* dq;
    RowSums<Acc>* sums;
    Acc *g_columns, *out_columns;  // [Dv][ROWS] of one block, for Δ
    Unit *k, *v, *k_rows;  // a key block: [q_units][KEYS], [v_units][KEYS], [KEYS / depth][q_width]
    Acc* dkv;              // dk: [KEYS][q_width], dv: [KEYS][v_width]
    Acc *s, *dp;           // [ROWS][KEYS]
    Unit *p_columns, *ds, *ds_columns;  // [ROWS / depth][KEYS], [ROWS][KEYS / depth], [ROWS / depth][KEYS]
    Acc *keep, *derivative;
    Unit* stage;
    std::vector<Span> seen, full;  // by tile: keys that some of its rows see, that all see
    std::vector<bool> large;       // by tile: some lse is beyond LARGEST_LSE
  };

  const Inputs<Storage>& in;
  const Saved<Storage, Acc>& saved;
  const Gradients<Storage, Acc>& grad;
  std::vector<Head> heads;
  int64_t splits = 1;  // the most that a head is split into
  BiasSum<Acc> bias_sum;
  double* slope_sums = nullptr;  // [heads][splits][G]

  int64_t D() const { return in.query.size[3]; }
  int64_t Dv() const { return in.value.size[3]; }
  int64_t q_width() const { return round_up(D(), W); }
  int64_t v_width() const { return round_up(Dv(), W); }
  int64_t block_size() const { return KEYS * (q_width() + v_width()); }
  int64_t rows_in(const Head& head) const { return in.group() * in.sequences[head.sequence].queries; }
  int64_t row_blocks(const Head& head) const { return ceil_div(rows_in(head), ROWS); }
  int64_t key_blocks(const Head& head) const { return ceil_div(in.sequences[head.sequence].keys, KEYS); }

  static int64_t units(int64_t n) { return ceil_div(n, P::depth); }
  // A left operand's row; as wide as the right operand's where they are the same memory.
  static int64_t row_units(int64_t n) { return P::depth == 1 ? round_up(n, W) : units(n); }

  bool shares_bias(int dim) const { return grad.bias && grad.bias_size[dim] == 1; }

  void plan() {
    std::map<int64_t, int64_t> chain_heads;
    for (size_t s = 0; s < in.sequences.size(); ++s)
      for (int64_t h = 0; h < in.key.size[1]; ++h) {
        if (in.sequences[s].queries == 0) continue;
        int64_t chain = (shares_bias(0) ? 0 : s) * in.key.size[1] + (shares_bias(1) ? 0 : h);
        heads.push_back({int64_t(s), h, chain, chain_heads[chain]++});
      }
    int64_t chains = chain_heads.size(), threads = thread_count();
    // A group's heads would meet in one bias row from different splits.
    bool splittable = threads > 1 && !(shares_bias(1) && in.group() > 1 && !shares_bias(2));
    if (splittable && chains < 2 * threads) {
      int64_t wanted = chains < threads ? threads : 2 * threads;
      for (Head& head : heads) {
        head.splits = std::clamp<int64_t>(row_blocks(head) / LEAST_BLOCKS, 1, ceil_div(wanted, chains));
        splits = std::max(splits, head.splits);
      }
    }
    if (splits == 1)
      for (Head& head : heads) head.round = 0;
    bias_sum.count = 1;
    for (int d = 3; d >= 0; --d) {
      bias_sum.stride[d] = shares_bias(d) ? 0 : bias_sum.count;
      bias_sum.count *= grad.bias_size[d];
    }
    if (shares_bias(2)) bias_sum.copies = splits;
  }

  void run_round(int64_t round, std::vector<Scratch>& scratch) {
    std::vector<std::vector<Task>> chains;
    std::vector<Task> sums;  // of a split head: (head, key block)
    std::map<std::pair<int64_t, int64_t>, size_t> chain_of;
    int64_t partial = 0;
    for (size_t h = 0; h < heads.size(); ++h) {
      Head& head = heads[h];
      if (head.round != round) continue;
      for (int64_t split = 0; split < head.splits; ++split) {
        auto [place, fresh] = chain_of.try_emplace({head.chain, split}, chains.size());
        if (fresh) chains.emplace_back();
        chains[place->second].push_back({int64_t(h), split});
      }
      head.partial_at = partial;
      if (head.splits == 1) continue;
      for (int64_t b = 0; b < key_blocks(head); ++b) sums.push_back({int64_t(h), b});
      partial += head.splits * key_blocks(head) * block_size();
    }
    Buffer<Acc> partials(partial);
    double products = 0;
    for (const Head& head : heads) products += double(rows_in(head)) * in.sequences[head.sequence].keys;
    run_tasks(chains.size(), products * (3 * D() + 2 * Dv()) * MULTIPLY_ADD / 2, [&](int64_t worker, int64_t i) {
      for (const Task& task : chains[i])
        differentiate(task, scratch[worker], partials.get() + heads[task.head].partial_at);
    });
    run_tasks(sums.size(), double(partial) * sizeof(Acc) * BYTE, [&](int64_t, int64_t i) {
      const Head& head = heads[sums[i].head];
      Acc* sum = partials.get() + head.partial_at + sums[i].split * block_size();
      for (int64_t split = 1; split < head.splits; ++split) {
        const Acc* more = sum + split * key_blocks(head) * block_size();
        for (int64_t j = 0; j < block_size(); j += W)
          store(sum + j, load<Vec<Acc>>(sum + j) + load<Vec<Acc>>(more + j));
      }
      store_keys(head, sums[i].split * KEYS, sum);
    });
  }

  std::pair<Scratch, int64_t> place_scratch(Unit* memory, int64_t blocks) const {
    static_assert(sizeof(Unit) == sizeof(Acc));
    constexpr bool paired = P::depth > 1;
    const int64_t rows = blocks * ROWS;
    Scratch w;
    int64_t used = 0;
    auto place = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += round_up(count, 64 / sizeof(Unit));
    };
    auto alias = [](auto* array) { return reinterpret_cast<Unit*>(array); };
    place(w.s, ROWS * KEYS);
    place(w.dp, ROWS * KEYS);
    w.p_columns = alias(w.s), w.ds = w.ds_columns = alias(w.dp);
    if (paired) {
      place(w.p_columns, ROWS / P::depth * KEYS);
      place(w.ds, ROWS * KEYS / P::depth);
      place(w.ds_columns, ROWS / P::depth * KEYS);
    }
    place(w.k, units(D()) * KEYS);
    place(w.v, units(Dv()) * KEYS);
    place(w.k_rows, KEYS / P::depth * q_width());
    place(w.dkv, block_size());
    place(w.keep, KEYS);
    place(w.derivative, KEYS);
    place(w.stage, stage_units<P>(std::max(D(), Dv())));
    place(w.q, rows * row_units(D()));
    place(w.g, rows * row_units(Dv()));
    w.q_rows = w.q, w.g_rows = w.g;
    if (paired) {
      place(w.q_rows, rows / P::depth * q_width());
      place(w.g_rows, rows / P::depth * v_width());
    }
    place(w.dq, rows * q_width());
    place(w.sums, rows * sizeof(RowSums<Acc>) / sizeof(Acc));
    place(w.g_columns, Dv() * ROWS);
    place(w.out_columns, Dv() * ROWS);
    if (memory) w.seen.resize(blocks * TILES), w.full.resize(blocks * TILES), w.large.resize(blocks * TILES);
    return {std::move(w), used};
  }

  // Row `index` of a head's G·N.
  Row row_at(const Head& head, int64_t index) const {
    const Sequence& s = in.sequences[head.sequence];
    int64_t i = index % s.queries;
    return {head.key_head * in.group() + index / s.queries, i, i + s.offset, in.window.visible(s, i)};
  }

  // The rows of the task's block: first index in the head's list, and how many.
  Span rows_of(const Task& task, int64_t block) const {
    const Head& head = heads[task.head];
    int64_t first = (block * head.splits + task.split) * ROWS;
    return {first, std::min(first + ROWS, rows_in(head))};
  }
  int64_t blocks_of(const Task& task) const {
    const Head& head = heads[task.head];
    return ceil_div(row_blocks(head) - task.split, head.splits);
  }

  // rows: [count] pointers to n elements each. left: [ROWS][row_units], right: [ROWS / depth][width], zero past count.
  void pack_block(const Storage* const* rows, int64_t stride, int64_t count, int64_t n, Unit* left, Unit* right,
                  Unit* stage) const {
    const int64_t length = row_units(n);
    for (int64_t r = 0; r < count; ++r) copy_row<P>(rows[r], stride, n, left + r * length, length);
    std::fill_n(left + count * length, (ROWS - count) * length, Unit(0));
    if constexpr (P::depth > 1) {
      const int64_t width = round_up(n, W), used = ceil_div(count, P::depth);
      pack_rows<P>([&](int64_t r) { return rows[std::min(r, count - 1)]; }, stride, count, n, right, width, stage);
      std::fill_n(right + used * width, (ROWS / P::depth - used) * width, Unit(0));
    }
  }

  // Δ of a block's rows, added in the order in which gemm adds dP.
  void sum_deltas(const Storage* const* g, const Storage* const* out, int64_t count, Scratch& w,
                  RowSums<Acc>* sums) const {
    auto pack = [&](const Storage* const* rows, int64_t stride, Acc* columns) {
      pack_transposed<Plain<Acc>>([&](int64_t r) { return rows[std::min(r, count - 1)]; }, stride, count, Dv(), columns,
                                  ROWS, reinterpret_cast<Acc*>(w.stage));
    };
    pack(g, saved.grad_out.stride[3], w.g_columns);
    pack(out, saved.out.stride[3], w.out_columns);
    for (int64_t r = 0; r < count; r += W) {
      Vec<Acc> delta = {};
      for (int64_t d0 = 0; d0 < Dv(); d0 += SUM_DEPTH) {
        Vec<Acc> sum = {};
        for (int64_t d = d0; d < std::min(Dv(), d0 + SUM_DEPTH); ++d)
          sum = load<Vec<Acc>>(w.g_columns + d * ROWS + r) * load<Vec<Acc>>(w.out_columns + d * ROWS + r) + sum;
        delta += sum;
      }
      for (int64_t i = 0; i < W && r + i < count; ++i) sums[r + i].delta = delta[i];
    }
  }

  void begin_rows(const Task& task, Scratch& w) const {
    const Head& head = heads[task.head];
    const Sequence& s = in.sequences[head.sequence];
    const Storage *q[ROWS], *g[ROWS], *out[ROWS];
    std::fill(w.seen.begin(), w.seen.end(), Span{0, 0});
    std::fill(w.full.begin(), w.full.end(), Span{0, 0});
    std::fill(w.large.begin(), w.large.end(), false);
    for (int64_t block = 0; block < blocks_of(task); ++block) {
      const Span rows = rows_of(task, block);
      const int64_t count = rows.last - rows.first, at = block * ROWS;
      std::fill_n(w.sums + at, ROWS, RowSums<Acc>());
      for (int64_t r = 0; r < count; ++r) {
        const Row row = row_at(head, rows.first + r);
        const int64_t i = s.query_start + row.query;
        q[r] = in.query.at(s.batch, row.head, i), g[r] = saved.grad_out.at(s.batch, row.head, i);
        out[r] = saved.out.at(s.batch, row.head, i);
        const Acc lse = saved.lse.at(s.batch, row.head, i);
        const bool large = std::abs(lse) > LARGEST_LSE && lse != MINUS_INF<Acc>;
        w.sums[at + r].set_lse(large ? 0 : lse, in.rules.unit());
        if (large) w.large[(at + r) / TILE_ROWS] = true;
        if (saved.grad_lse.data) w.sums[at + r].grad_lse = saved.grad_lse.at(s.batch, row.head, i);
        Span &seen = w.seen[(at + r) / TILE_ROWS], &full = w.full[(at + r) / TILE_ROWS];
        if (r % TILE_ROWS == 0) seen = full = row.keys;
        seen = {std::min(seen.first, row.keys.first), std::max(seen.last, row.keys.last)};
        full = {std::max(full.first, row.keys.first), std::min(full.last, row.keys.last)};
      }
      pack_block(q, in.query.stride[3], count, D(), w.q + at * row_units(D()), w.q_rows + at / P::depth * q_width(),
                 w.stage);
      pack_block(g, saved.grad_out.stride[3], count, Dv(), w.g + at * row_units(Dv()),
                 w.g_rows + at / P::depth * v_width(), w.stage);
      sum_deltas(g, out, count, w, w.sums + at);
      if (grad.bias || grad.slopes)
        for (int64_t r = 0; r < count; ++r) add_shared_gradients(task, row_at(head, rows.first + r), w.sums[at + r]);
    }
    std::fill_n(w.dq, blocks_of(task) * ROWS * q_width(), Acc(0));
  }

  void pack_keys(const Head& head, int64_t key0, int64_t count, Scratch& w) const {
    const Sequence& s = in.sequences[head.sequence];
    auto k = in.rows_of(in.key, s, head.key_head), v = in.rows_of(in.value, s, head.key_head);
    // The packers prefetch rows beyond this block; beyond the last key there is none.
    auto row_of = [&](const KeyRows<Storage>& rows) {
      return [&rows, key0, last = s.keys - 1](int64_t j) { return rows(std::min(key0 + j, last)); };
    };
    pack_transposed<P>(row_of(k), k.stride, count, D(), w.k, KEYS, w.stage);
    pack_transposed<P>(row_of(v), v.stride, count, Dv(), w.v, KEYS, w.stage);
    pack_rows<P>(row_of(k), k.stride, count, D(), w.k_rows, q_width(), w.stage);
  }

  // The sums of every row of a tile with a large lse, by the online softmax.
  void repeat_sums(const Task& task, Scratch& w) const {
    const Head& head = heads[task.head];
    const Acc c = in.rules.unit() * LOG2E;
    const int64_t batch = in.sequences[head.sequence].batch, keys = in.sequences[head.sequence].keys;
    auto each_row = [&](int64_t t, auto visit) {
      const Span rows = rows_of(task, t / TILES);
      for (int64_t r = 0; r < TILE_ROWS; ++r)
        if (int64_t index = rows.first + t % TILES * TILE_ROWS + r; index < rows.last)
          visit(w.sums[t * TILE_ROWS + r], index, w.s + r * KEYS);
    };
    for (size_t t = 0; t < w.large.size(); ++t)
      if (w.large[t]) each_row(t, [](RowSums<Acc>& sums, int64_t, Acc*) { sums.top = MINUS_INF<Acc>, sums.low = 0; });
    for (int64_t key0 = 0; key0 < keys; key0 += KEYS) {
      const Span block_keys = {key0, std::min(key0 + KEYS, keys)};
      bool packed = false;
      for (size_t t = 0; t < w.large.size(); ++t) {
        if (!w.large[t] || !sees(w.seen[t], block_keys)) continue;
        if (!packed) pack_keys(head, key0, block_keys.last - key0, w);
        packed = true;
        const int64_t width = std::min(block_keys.last, w.seen[t].last) - key0;
        gemm<P>(TILE_ROWS, ceil_div(width, W), units(D()), w.q + int64_t(t) * TILE_ROWS * row_units(D()),
                row_units(D()), w.k, KEYS, w.s, KEYS, false);
        each_row(t, [&](RowSums<Acc>& sums, int64_t index, Acc* s) {
          const Row row = row_at(head, index);
          if (in.rules.edits()) edit_scores<Storage>(in.rules, batch, row, key0, width, s);
          mask_scores(row.keys, key0, s);
          Vec<Acc> top = broadcast(sums.top), sum = {};
          for (int64_t j = 0; j < KEYS; j += W) top = max<Acc>(top, load<Vec<Acc>>(s + j));
          const Acc m = reduce_max<Acc>(top), finite = m == MINUS_INF<Acc> ? 0 : m;
          for (int64_t j = 0; j < KEYS; j += W) sum += exp2<Acc>((load<Vec<Acc>>(s + j) - finite) * c);
          sums.low = sums.low * exp2<Acc>(broadcast((sums.top - finite) * c))[0] + reduce_add<Acc>(sum);
          sums.top = m;
        });
      }
    }
    for (size_t t = 0; t < w.large.size(); ++t)
      if (w.large[t])
        each_row(t, [](RowSums<Acc>& sums, int64_t, Acc*) {
          if (sums.low == 0) sums = {0, -MINUS_INF<Acc>, sums.delta, sums.grad_lse};
          else sums.low = std::log2(sums.low);
        });
  }

  // partial: [splits][key blocks][dk, dv], for a head that is split.
  void differentiate(const Task& task, Scratch& w, Acc* partial) const {
    const Head& head = heads[task.head];
    const int64_t keys = in.sequences[head.sequence].keys, blocks = blocks_of(task);
    if (grad.slopes) std::fill_n(slopes_of(task), in.group(), 0.0);
    begin_rows(task, w);
    if (std::find(w.large.begin(), w.large.end(), true) != w.large.end()) repeat_sums(task, w);
    for (int64_t key0 = 0; key0 < keys; key0 += KEYS) {
      const Span block_keys = {key0, std::min(key0 + KEYS, keys)};
      Acc* dkv = head.splits == 1 ? w.dkv
                                  : partial + (task.split * key_blocks(head) + key0 / KEYS) * block_size();
      std::fill_n(dkv, block_size(), Acc(0));
      bool packed = false;
      for (int64_t block = 0; block < blocks; ++block) {
        const Span tiles = tiles_seeing(block_keys, w.seen.data() + block * TILES);
        if (tiles.first == tiles.last) continue;
        if (!packed) pack_keys(head, key0, block_keys.last - key0, w);
        packed = true;
        differentiate_block(task, block, block_keys, tiles, w, dkv, dkv + KEYS * q_width());
      }
      if (head.splits == 1) store_keys(head, key0, dkv);
    }
    store_queries(task, w);
  }

  static bool sees(Span seen, Span keys) { return seen.first < keys.last && keys.first < seen.last; }

  // The tiles of a block from the first to the last that sees any of the keys.
  static Span tiles_seeing(Span keys, const Span* seen) {
    Span tiles = {0, TILES};
    while (tiles.first < tiles.last && !sees(seen[tiles.first], keys)) ++tiles.first;
    while (tiles.first < tiles.last && !sees(seen[tiles.last - 1], keys)) --tiles.last;
    return tiles;
  }

  // The five products of a block of rows and a block of keys.
  void differentiate_block(const Task& task, int64_t block, Span keys, Span tiles, Scratch& w, Acc* dk, Acc* dv) const {
    const int64_t row0 = block * ROWS, key0 = keys.first;
    const Span* seen = w.seen.data() + block * TILES;
    // Under a causal mask no row of a tile sees a key from here on, which halves the work on the diagonal.
    auto width = [&](int64_t t) { return std::min(keys.last, seen[t].last) - key0; };
    // s: [6][KEYS] = q: [6][D] · kᵀ: [D][width]; columns past the width are left to the mask.
    for (int64_t t = tiles.first; t < tiles.last; ++t)
      if (sees(seen[t], keys))
        gemm<P>(TILE_ROWS, ceil_div(width(t), W), units(D()), w.q + (row0 + t * TILE_ROWS) * row_units(D()),
                row_units(D()), w.k, KEYS, w.s + t * TILE_ROWS * KEYS, KEYS, false);
    // dp: [6][KEYS] = do: [6][Dv] · vᵀ: [Dv][width]
    for (int64_t t = tiles.first; t < tiles.last; ++t) {
      if (sees(seen[t], keys)) {
        gemm<P>(TILE_ROWS, ceil_div(width(t), W), units(Dv()), w.g + (row0 + t * TILE_ROWS) * row_units(Dv()),
                row_units(Dv()), w.v, KEYS, w.dp + t * TILE_ROWS * KEYS, KEYS, false);
        differentiate_tile(task, block, t, key0, width(t), w);
      } else {
        std::fill_n(w.s + t * TILE_ROWS * KEYS, TILE_ROWS * KEYS, Acc(0));
        std::fill_n(w.dp + t * TILE_ROWS * KEYS, TILE_ROWS * KEYS, Acc(0));
      }
      pair_tile(t, w);
    }
    // dq: [6][D] += ds: [6][width] · k: [width][D]
    for (int64_t t = tiles.first; t < tiles.last; ++t)
      if (sees(seen[t], keys))
        gemm<P>(TILE_ROWS, q_width() / W, units(width(t)), w.ds + t * TILE_ROWS * (KEYS / P::depth), KEYS / P::depth,
                w.k_rows, q_width(), w.dq + (row0 + t * TILE_ROWS) * q_width(), q_width(), true);
    // dv: [keys][Dv] += pᵀ: [keys][rows] · do: [rows][Dv], dk: [keys][D] += dsᵀ: [keys][rows] · q: [rows][D]
    add_columns(keys, seen, w.p_columns, w.g_rows + row0 / P::depth * v_width(), v_width(), dv);
    add_columns(keys, seen, w.ds_columns, w.q_rows + row0 / P::depth * q_width(), q_width(), dk);
  }

  // sum: [keys][width] += aᵀ · b with a: [ROWS / depth][KEYS], b: [ROWS / depth][width], from the rows that see them.
  void add_columns(Span keys, const Span* seen, const Unit* a, const Unit* b, int64_t width, Acc* sum) const {
    for (int64_t k = 0; keys.first + k < keys.last; k += TILE_ROWS) {
      const Span tiles = tiles_seeing({keys.first + k, std::min(keys.first + k + TILE_ROWS, keys.last)}, seen);
      const int64_t row = tiles.first * TILE_ROWS / P::depth, rows = tiles.last * TILE_ROWS / P::depth - row;
      if (rows > 0)
        gemm_columns<P>(std::min<int64_t>(TILE_ROWS, KEYS - k), width / W, rows, a + row * KEYS + k, KEYS,
                        b + row * width, width, sum + k * width, width);
    }
  }

  // Tile t of a block: s to p and dp to ds, in place.
  void differentiate_tile(const Task& task, int64_t block, int64_t t, int64_t key0, int64_t count, Scratch& w) const {
    const Head& head = heads[task.head];
    const int64_t batch = in.sequences[head.sequence].batch, at = block * ROWS;
    const Span rows = rows_of(task, block), full = w.full[block * TILES + t];
    const bool edits = in.rules.edits(), boundary = full.first > key0 || full.last < key0 + KEYS;
    const bool plain = !edits && !boundary && in.rules.dropout.p == 0;
    const Acc c = in.rules.unit() * LOG2E, kept = 1 / (1 - in.rules.dropout.p);
    for (int64_t r = t * TILE_ROWS; r < (t + 1) * TILE_ROWS; ++r) {
      const RowSums<Acc>& sums = w.sums[at + r];
      Acc *s = w.s + r * KEYS, *ds = w.dp + r * KEYS;
      if (plain || rows.first + r >= rows.last) {  // rows that pad have low = inf
        differentiate_row<Acc>(c, sums, nullptr, 1, s, ds);
        continue;
      }
      const Row row = row_at(head, rows.first + r);
      const bool capped = in.rules.softcap > 0;
      if (edits) edit_scores<Storage>(in.rules, batch, row, key0, count, s, capped ? w.derivative : nullptr);
      if (boundary) mask_scores(row.keys, key0, s);
      if (in.rules.dropout.p > 0) {
        dropout_row(in.rules.dropout, batch * in.query.size[1] + row.head, row.query, key0, w.keep);
        differentiate_row<Acc>(c, sums, w.keep, kept, s, ds);
      } else {
        differentiate_row<Acc>(c, sums, nullptr, 1, s, ds);
      }
      if (grad.bias && !shares_bias(3)) {
        Acc* sum = bias_sum.at(task.split, batch, row, key0);
        for (int64_t j = 0; j < count; ++j) sum[j] += ds[j];
      }
      if (grad.slopes) slope_of(task, row) += distance_sum(row, key0, ds);
      if (capped)  // where ds is 0 the derivative may be that of a masked NaN
        for (int64_t j = 0; j < KEYS; j += W) {
          auto x = load<Vec<Acc>>(ds + j);
          store(ds + j, select<Acc>(x == Acc(0), x, x * load<Vec<Acc>>(w.derivative + j)));
        }
    }
  }

  // Tile t of p and ds as pairs of bf16: along the queries for dv and dk, along the keys for dq.
  void pair_tile(int64_t t, Scratch& w) const {
#if defined(__AVX512BF16__)
    if constexpr (P::depth == 2) {
      for (int64_t r = t * TILE_ROWS; r < (t + 1) * TILE_ROWS; r += 2) {
        const Acc *p = w.s + r * KEYS, *ds = w.dp + r * KEYS;
        Unit *p_columns = w.p_columns + r / 2 * KEYS, *ds_columns = w.ds_columns + r / 2 * KEYS;
        Unit* pairs = w.ds + r * (KEYS / 2);
        PK_UNROLL
        for (int64_t j = 0; j < KEYS; j += W) {
          auto even = load<Vec<Acc>>(ds + j), odd = load<Vec<Acc>>(ds + KEYS + j);
          store(ds_columns + j, interleave_bf16(even, odd));
          store(p_columns + j, interleave_bf16(load<Vec<Acc>>(p + j), load<Vec<Acc>>(p + KEYS + j)));
        }
        PK_UNROLL
        for (int64_t j = 0; j < 2 * KEYS; j += 2 * W)
          store(pairs + j / 2, to_bf16_pairs(load<Vec<Acc>>(ds + j), load<Vec<Acc>>(ds + j + W)));
      }
    }
#endif
  }

  double* slopes_of(const Task& task) const { return slope_sums + (task.head * splits + task.split) * in.group(); }
  double& slope_of(const Task& task, const Row& row) const { return slopes_of(task)[row.head % in.group()]; }

  // A number added to all scores of a row moves lse alone, so Σ dS is grad_lse: exactly, where a sum of dS would have
  // the rounding of out in it. That is the gradient of a bias that is broadcast over the keys, and what the nearest
  // key's distance contributes to a slope's.
  void add_shared_gradients(const Task& task, const Row& row, const RowSums<Acc>& sums) const {
    if (sums.low == -MINUS_INF<Acc>) return;  // sees nothing
    const Acc total = sums.grad_lse + 0 * sums.top + 0 * sums.delta;  // NaN travels
    const int64_t batch = in.sequences[heads[task.head].sequence].batch;
    if (grad.bias && shares_bias(3)) *bias_sum.at(task.split, batch, row, 0) += total;
    if (grad.slopes) slope_of(task, row) += static_cast<double>(nearest_distance(row)) * total;
  }

  void store_queries(const Task& task, const Scratch& w) const {
    const Head& head = heads[task.head];
    const Sequence& s = in.sequences[head.sequence];
    for (int64_t block = 0; block < blocks_of(task); ++block) {
      const Span rows = rows_of(task, block);
      for (int64_t r = rows.first; r < rows.last; ++r) {
        const Row row = row_at(head, r);
        store_row<Acc>(w.dq + (block * ROWS + r - rows.first) * q_width(), in.rules.scale, D(),
                       grad.query.at(s.batch, row.head, s.query_start + row.query));
      }
    }
  }

  // dkv: dk: [KEYS][q_width], dv: [KEYS][v_width]
  void store_keys(const Head& head, int64_t key0, const Acc* dkv) const {
    const Sequence& s = in.sequences[head.sequence];
    const Acc* dv = dkv + KEYS * q_width();
    for (int64_t j = 0; j < std::min(KEYS, s.keys - key0); ++j) {
      const int64_t row = s.key_start + key0 + j;
      store_row<Acc>(dkv + j * q_width(), in.rules.scale, D(), grad.key.at(s.batch, head.key_head, row));
      store_row<Acc>(dv + j * v_width(), 1, Dv(), grad.value.at(s.batch, head.key_head, row));
    }
  }

  void finish_slopes() const {
    const int64_t H = in.query.size[1];
    std::vector<double> sums(grad.slope_batches * H, 0.0);
    for (size_t h = 0; h < heads.size(); ++h) {
      const int64_t batch = grad.slope_batches == 1 ? 0 : in.sequences[heads[h].sequence].batch;
      for (int64_t split = 0; split < heads[h].splits; ++split)
        for (int64_t g = 0; g < in.group(); ++g)
          sums[batch * H + heads[h].key_head * in.group() + g] -= slopes_of({int64_t(h), split})[g];
    }
    std::copy(sums.begin(), sums.end(), grad.slopes);
  }

  void finish_bias() const {
    constexpr int64_t PIECE = 1 << 14;
    run_tasks(ceil_div(bias_sum.count, PIECE), double(bias_sum.count) * bias_sum.copies, [&](int64_t, int64_t i) {
      for (int64_t j = i * PIECE; j < std::min(bias_sum.count, (i + 1) * PIECE); ++j) {
        Acc sum = bias_sum.data[j];
        for (int64_t copy = 1; copy < bias_sum.copies; ++copy) sum += bias_sum.data[copy * bias_sum.count + j];
        if (grad.bias_in_storage) static_cast<Storage*>(grad.bias)[j] = static_cast<Storage>(sum);
        else static_cast<Acc*>(grad.bias)[j] = sum;
      }
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------
// The op

void check_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                    const Tensor& value, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& alibi_slopes, bool needs_bias, bool needs_slopes) {
  const ScalarType storage = query.scalar_type(), acc = accumulator_of(storage);
  check_cpu_tensor(grad_out, 4, storage, "grad_out");
  check_cpu_tensor(out, 4, storage, "out");
  check_cpu_tensor(lse, 3, acc, "lse");
  if (grad_lse) check_cpu_tensor(*grad_lse, 3, acc, "grad_lse");
  for (int d = 0; d < 3; ++d) {
    check_size(grad_out, d, query.size(d), "grad_out");
    check_size(out, d, query.size(d), "out");
    check_size(lse, d, query.size(d), "lse");
    if (grad_lse) check_size(*grad_lse, d, query.size(d), "grad_lse");
  }
  check_size(grad_out, 3, value.size(3), "grad_out");
  check_size(out, 3, value.size(3), "out");
  STD_TORCH_CHECK(!needs_bias || (bias && bias->scalar_type() != ScalarType::Bool),
                  "needs_bias: expected a bias of a floating dtype");
  STD_TORCH_CHECK(!needs_slopes || alibi_slopes, "needs_slopes: expected alibi_slopes");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    std::optional<Tensor> bias, std::optional<Tensor> alibi_slopes, std::optional<Tensor> key_lengths,
    std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seed,
    int64_t window_left, int64_t window_right, double scale, double softcap, double dropout_p, bool needs_bias,
    bool needs_slopes, int64_t /*backend*/) {
  check_attention(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, std::nullopt, seed,
                  dropout_p);
  check_backward(grad_out, grad_lse, query, value, out, lse, bias, alibi_slopes, needs_bias, needs_slopes);
  const ScalarType storage = query.scalar_type();
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2), D = query.size(3);
  const int64_t Hk = key.size(1), M = key.size(2), Dv = value.size(3);

  Tensor grad_query = empty_in_layout(query, B, H, N, D);
  Tensor grad_key = empty_in_layout(key, B, Hk, M, D), grad_value = empty_in_layout(value, B, Hk, M, Dv);
  std::vector<int64_t> bias_sizes = {0}, slope_sizes = {0};
  if (needs_bias) bias_sizes = {bias->size(0), bias->size(1), bias->size(2), bias->size(3)};
  if (needs_slopes) slope_sizes = {alibi_slopes->size(0), alibi_slopes->size(1)};
  Tensor grad_bias = torch::stable::new_empty(query, bias_sizes, needs_bias ? bias->scalar_type() : storage);
  Tensor grad_slopes = torch::stable::new_empty(query, slope_sizes, accumulator_of(storage));
  auto results = [&] { return std::make_tuple(grad_query, grad_key, grad_value, grad_bias, grad_slopes); };
  const bool nothing = B * H * N * M == 0;
  // Rows that belong to no sequence, and keys past their sequence's length.
  if (nothing || cu_seqlens_q) torch::stable::zero_(grad_query);
  if (nothing || cu_seqlens_q || key_lengths) torch::stable::zero_(grad_key), torch::stable::zero_(grad_value);
  if (nothing) {
    torch::stable::zero_(grad_bias), torch::stable::zero_(grad_slopes);
    return results();
  }

  for_dtype(storage, [&]<class Storage>(Storage) {
    using Acc = typename ComputeOf<Storage>::type::Acc;
    Inputs<Storage> inputs{View<const Storage>(query), View<const Storage>(key), View<const Storage>(value),
                           clamp_window(window_left, window_right),
                           make_rules(storage, bias, alibi_slopes, seed, scale, softcap, dropout_p),
                           cu_seqlens_q ? packed_sequences(N, M, *cu_seqlens_q, *cu_seqlens_k)
                                        : batch_sequences(B, N, M, key_lengths, false),
                           {}};
    Saved<Storage, Acc> saved{View<const Storage>(grad_out), View<const Storage>(out), Statistics<Acc>(lse),
                              grad_lse ? Statistics<Acc>(*grad_lse) : Statistics<Acc>()};
    Gradients<Storage, Acc> gradients{View<Storage>(grad_query), View<Storage>(grad_key), View<Storage>(grad_value)};
    if (needs_bias) {
      gradients.bias = grad_bias.data_ptr();
      gradients.bias_in_storage = bias->scalar_type() == storage && !std::is_same_v<Storage, Acc>;
      std::copy(bias_sizes.begin(), bias_sizes.end(), gradients.bias_size);
    }
    if (needs_slopes) {
      gradients.slopes = data<Acc>(grad_slopes);
      gradients.slope_batches = slope_sizes[0];
    }
    Backward<Storage>(inputs, saved, gradients).run();
  });
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention_backward", TORCH_BOX(&attention_backward)); }
