// A task of attention's backward: its rows, its memory, and what it prepares before it takes the keys block by block.
#pragma once

#include "attention.h"
#include "attention_score_gradients.h"

namespace {

constexpr int64_t BLOCK_ROWS = 48;  // query rows in a block: an L1 holds their P and dS and one packed operand
constexpr int64_t BLOCK_TILES = BLOCK_ROWS / TILE_ROWS;
static_assert(BLOCK_ROWS % TILE_ROWS == 0 && BLOCK_ROWS % lanes<float> == 0 && TILE_ROWS % 2 == 0);
static_assert(KEYS % TILE_ROWS == 0 || KEYS % TILE_ROWS == 4);
constexpr double LARGEST_LSE = 1024;  // beyond, P would inherit an error of more than 2^-14 from lse's rounding

// ---- heads and tasks ------------------------------------------------------------------------------------------------

struct BackwardHead : Head {
  int64_t rows, keys;
  int64_t chain;       // heads of one chain share elements of the bias's gradient
  int64_t round = 0;   // heads of one round run at once
  int64_t splits = 1;
  int64_t partial_at = 0;

  int64_t row_blocks() const { return ceil_div(rows, BLOCK_ROWS); }
  int64_t key_blocks() const { return ceil_div(keys, KEYS); }
};

// A split of a head: every splits-th of its blocks of rows.
struct BackwardTask {
  const BackwardHead& head;
  int64_t number, split;  // number: the head's

  int64_t blocks() const { return ceil_div(head.row_blocks() - split, head.splits); }
  // The rows of one of the task's blocks, in the head's list.
  Span rows(int64_t block) const {
    const int64_t first = (block * head.splits + split) * BLOCK_ROWS;
    return {first, std::min(first + BLOCK_ROWS, head.rows)};
  }
};

// ---- tensors and sizes ----------------------------------------------------------------------------------------------

// Read besides the forward's inputs.
template <class Storage>
struct Saved {
  View<const Storage, 4> grad_out, out;
  View<const AccOf<Storage>, 3> lse, grad_lse;  // [B, H, N]; no grad_lse.data: zero
};

template <class Storage>
struct BackwardProblem {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;

  const Inputs<Storage>& in;
  const Saved<Storage>& saved;
  const Gradients<Storage>& grad;

  int64_t D = in.query.size[3], Dv = in.value.size[3];
  int64_t q_width = round_up(D, W), v_width = round_up(Dv, W);
  int64_t block_size = KEYS * (q_width + v_width);  // dk: [KEYS][q_width], dv: [KEYS][v_width]

  static int64_t units(int64_t n) { return ceil_div(n, P::depth); }
  // A left operand's row; as wide as the right operand's where they are the same memory.
  static int64_t row_units(int64_t n) { return P::depth == 1 ? round_up(n, W) : units(n); }
};

// What the gradients need of a query row: P = 2^((s − top)·c − low). The differences are taken in two steps: so P = 1
// and dP = Δ exactly, to the last bit, where a row sees a single key.
template <class Acc>
struct RowTerms {
  Acc top = 0, low = -MINUS_INF<Acc>;  // lse in the scores' unit, and the rest of it in base 2; a row that sees nothing
                                       // has low = inf
  Acc delta = 0, grad_lse = 0;         // delta: Σ do ∘ o, without grad_lse

  void set_lse(Acc lse, double unit) {
    if (lse == MINUS_INF<Acc>) return;
    top = static_cast<Acc>(lse / unit);
    low = static_cast<Acc>(std::fma(-double(top), unit, double(lse)) * LOG2E);
  }
  bool sees_nothing() const { return low == -MINUS_INF<Acc>; }
};

// The memory that one thread works in. Row-wise arrays hold the task's row blocks one after the other.
template <class Storage>
struct BackwardScratch {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;

  Unit *q, *g;            // rows of query and grad_out, [rows][row_units]: left operands
  Unit *q_rows, *g_rows;  // the same, [rows / depth][width]: right operands (the same memory unless paired)
  Acc* dq;
  RowTerms<Acc>* terms;
  Acc *g_columns, *out_columns;       // [Dv][BLOCK_ROWS] of one block, for Δ
  Unit *k, *v, *k_rows;               // a key block: [q units][KEYS], [v units][KEYS], [KEYS / depth][q_width]
  Acc* dkv;                           // dk: [KEYS][q_width], dv: [KEYS][v_width]
  Acc *s, *dp;                        // [BLOCK_ROWS][KEYS]
  Unit *p_columns, *ds, *ds_columns;  // [ROWS / depth][KEYS], [ROWS][KEYS / depth], [ROWS / depth][KEYS] of a block
  Acc *keep, *derivative;
  Unit* stage;
  std::vector<TileSpans> tiles;
  std::vector<bool> large;  // by tile: some lse is beyond LARGEST_LSE

  // blocks: the most that a task has.
  BackwardScratch(Arena& arena, const BackwardProblem<Storage>& problem, int64_t blocks)
      : tiles(blocks * BLOCK_TILES), large(blocks * BLOCK_TILES) {
    constexpr bool paired = P::depth > 1;
    const int64_t rows = blocks * BLOCK_ROWS, D = problem.D, Dv = problem.Dv;
    arena.place(s, BLOCK_ROWS * KEYS);
    arena.place(dp, BLOCK_ROWS * KEYS);
    p_columns = reinterpret_cast<Unit*>(s), ds = ds_columns = reinterpret_cast<Unit*>(dp);
    if (paired) {
      arena.place(p_columns, BLOCK_ROWS / P::depth * KEYS);
      arena.place(ds, BLOCK_ROWS * KEYS / P::depth);
      arena.place(ds_columns, BLOCK_ROWS / P::depth * KEYS);
    }
    arena.place(k, problem.units(D) * KEYS);
    arena.place(v, problem.units(Dv) * KEYS);
    arena.place(k_rows, KEYS / P::depth * problem.q_width);
    arena.place(dkv, problem.block_size);
    arena.place(keep, KEYS);
    arena.place(derivative, KEYS);
    arena.place(stage, stage_units<P>(std::max(D, Dv)));
    arena.place(q, rows * problem.row_units(D));
    arena.place(g, rows * problem.row_units(Dv));
    q_rows = q, g_rows = g;
    if (paired) {
      arena.place(q_rows, rows / P::depth * problem.q_width);
      arena.place(g_rows, rows / P::depth * problem.v_width);
    }
    arena.place(dq, rows * problem.q_width);
    arena.place(terms, rows);
    arena.place(g_columns, Dv * BLOCK_ROWS);
    arena.place(out_columns, Dv * BLOCK_ROWS);
  }

  bool any_large() const { return std::find(large.begin(), large.end(), true) != large.end(); }
};

// ---- packing --------------------------------------------------------------------------------------------------------

// rows: [count] pointers to n elements each. left: [BLOCK_ROWS][row_units], right: [BLOCK_ROWS / depth][width], zero
// past count.
template <class Storage>
void pack_row_block(const Storage* const* rows, int64_t stride, int64_t count, int64_t n,
                    typename BackwardProblem<Storage>::Unit* left, typename BackwardProblem<Storage>::Unit* right,
                    typename BackwardProblem<Storage>::Unit* stage) {
  using P = typename ComputeOf<Storage>::type;
  using Unit = typename P::Unit;
  const int64_t length = BackwardProblem<Storage>::row_units(n);
  for (int64_t r = 0; r < count; ++r) copy_row<P>(rows[r], stride, n, left + r * length, length);
  std::fill_n(left + count * length, (BLOCK_ROWS - count) * length, Unit(0));
  if constexpr (P::depth > 1) {
    const int64_t width = round_up(n, lanes<typename P::Acc>), used = ceil_div(count, P::depth);
    pack_rows<P>([&](int64_t r) { return rows[std::min(r, count - 1)]; }, stride, count, n, right, width, stage);
    std::fill_n(right + used * width, (BLOCK_ROWS / P::depth - used) * width, Unit(0));
  }
}

template <class Storage>
void pack_key_block(const BackwardProblem<Storage>& problem, const BackwardHead& head, Span keys,
                    BackwardScratch<Storage>& w) {
  using P = typename ComputeOf<Storage>::type;
  const Inputs<Storage>& in = problem.in;
  const int64_t count = keys.last - keys.first;
  auto k = in.rows_from(in.key, head, keys.first), v = in.rows_from(in.value, head, keys.first);
  pack_transposed<P>(k, in.key.stride[3], count, problem.D, w.k, KEYS, w.stage);
  pack_transposed<P>(v, in.value.stride[3], count, problem.Dv, w.v, KEYS, w.stage);
  pack_rows<P>(k, in.key.stride[3], count, problem.D, w.k_rows, problem.q_width, w.stage);
}

// s: [TILE_ROWS][KEYS] = q: [TILE_ROWS][D] · kᵀ: [D][width] of rows row0 ..; columns past the width are left to the
// mask.
template <class Storage>
void score_tile(const BackwardProblem<Storage>& problem, int64_t row0, int64_t width,
                const BackwardScratch<Storage>& w, typename BackwardProblem<Storage>::Acc* s) {
  using P = typename ComputeOf<Storage>::type;
  const int64_t length = problem.row_units(problem.D);
  gemm<P>(TILE_ROWS, ceil_div(width, problem.W), problem.units(problem.D), w.q + row0 * length, length, w.k, KEYS, s,
          KEYS, false);
}

// ---- a task's rows --------------------------------------------------------------------------------------------------

// Δ of a block's rows, added in the order in which gemm adds dP.
template <class Storage, class Acc>
void sum_deltas(const BackwardProblem<Storage>& problem, const Storage* const* g, const Storage* const* out,
                int64_t count, BackwardScratch<Storage>& w, RowTerms<Acc>* terms) {
  constexpr int64_t SUM_DEPTH = 64;  // gemm's
  const int64_t Dv = problem.Dv;
  auto pack = [&](const Storage* const* rows, int64_t stride, Acc* columns) {
    pack_transposed<Plain<Acc>>([&](int64_t r) { return rows[std::min(r, count - 1)]; }, stride, count, Dv, columns,
                                BLOCK_ROWS, reinterpret_cast<Acc*>(w.stage));
  };
  pack(g, problem.saved.grad_out.stride[3], w.g_columns);
  pack(out, problem.saved.out.stride[3], w.out_columns);
  for (int64_t r = 0; r < count; r += lanes<Acc>) {
    Vec<Acc> delta = {};
    for (int64_t d0 = 0; d0 < Dv; d0 += SUM_DEPTH) {
      Vec<Acc> sum = {};
      for (int64_t d = d0; d < std::min(Dv, d0 + SUM_DEPTH); ++d)
        sum = load<Vec<Acc>>(w.g_columns + d * BLOCK_ROWS + r) * load<Vec<Acc>>(w.out_columns + d * BLOCK_ROWS + r) +
              sum;
      delta += sum;
    }
    for (int64_t i = 0; i < lanes<Acc> && r + i < count; ++i) terms[r + i].delta = delta[i];
  }
}

// Packs one of the task's row blocks, and fills its terms and spans.
template <class Storage>
void begin_block(const BackwardProblem<Storage>& problem, const BackwardTask& task, int64_t block,
                 BackwardScratch<Storage>& w) {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  const Inputs<Storage>& in = problem.in;
  const Saved<Storage>& saved = problem.saved;
  const Sequence& s = in.sequence_of(task.head);
  const Storage *q[BLOCK_ROWS], *g[BLOCK_ROWS], *out[BLOCK_ROWS];
  const Span rows = task.rows(block);
  const int64_t count = rows.last - rows.first, at = block * BLOCK_ROWS;
  RowTerms<Acc>* terms = w.terms + at;
  std::fill_n(terms, BLOCK_ROWS, RowTerms<Acc>());
  for (int64_t r = 0; r < count; ++r) {
    const Row row = in.row_at(task.head, rows.first + r);
    const int64_t i = s.query_start + row.query;
    q[r] = in.query.at(s.batch, row.head, i), g[r] = saved.grad_out.at(s.batch, row.head, i);
    out[r] = saved.out.at(s.batch, row.head, i);
    const Acc lse = *saved.lse.at(s.batch, row.head, i);
    const bool large = std::abs(lse) > LARGEST_LSE && lse != MINUS_INF<Acc>;
    terms[r].set_lse(large ? 0 : lse, in.rules.unit());
    if (large) w.large[(at + r) / TILE_ROWS] = true;
    if (saved.grad_lse) terms[r].grad_lse = *saved.grad_lse.at(s.batch, row.head, i);
    TileSpans& tile = w.tiles[(at + r) / TILE_ROWS];
    if (r % TILE_ROWS == 0) tile.start(row.keys);
    tile.add(row.keys);
  }
  pack_row_block(q, in.query.stride[3], count, problem.D, w.q + at * problem.row_units(problem.D),
                 w.q_rows + at / P::depth * problem.q_width, w.stage);
  pack_row_block(g, saved.grad_out.stride[3], count, problem.Dv, w.g + at * problem.row_units(problem.Dv),
                 w.g_rows + at / P::depth * problem.v_width, w.stage);
  sum_deltas(problem, g, out, count, w, terms);
}

// All of the task's row blocks; dq becomes zero.
template <class Storage>
void begin_rows(const BackwardProblem<Storage>& problem, const BackwardTask& task,
                const ScoreGradients<Storage>& scores, BackwardScratch<Storage>& w) {
  using Acc = AccOf<Storage>;
  std::fill(w.tiles.begin(), w.tiles.end(), TileSpans());
  std::fill(w.large.begin(), w.large.end(), false);
  scores.begin(task.number, task.split);
  for (int64_t block = 0; block < task.blocks(); ++block) {
    begin_block(problem, task, block, w);
    const Span rows = task.rows(block);
    if (!scores.wanted()) continue;
    for (int64_t r = 0; r < rows.last - rows.first; ++r) {
      const RowTerms<Acc>& terms = w.terms[block * BLOCK_ROWS + r];
      if (terms.sees_nothing()) continue;
      const Acc total = terms.grad_lse + 0 * terms.top + 0 * terms.delta;  // NaN travels
      scores.add_total(task.number, task.split, problem.in.sequence_of(task.head).batch,
                       problem.in.row_at(task.head, rows.first + r), total);
    }
  }
  std::fill_n(w.dq, task.blocks() * BLOCK_ROWS * problem.q_width, Acc(0));
}

// ---- rows whose lse is large ----------------------------------------------------------------------------------------

// visit(terms, index in the head's list, place in the tile) for the rows of the task's tile t.
template <class Storage, class Visit>
void for_tile_rows(const BackwardTask& task, int64_t t, BackwardScratch<Storage>& w, const Visit& visit) {
  const Span rows = task.rows(t / BLOCK_TILES);
  for (int64_t r = 0; r < TILE_ROWS; ++r)
    if (int64_t index = rows.first + t % BLOCK_TILES * TILE_ROWS + r; index < rows.last)
      visit(w.terms[t * TILE_ROWS + r], index, r);
}

// One row's maximum (top) and sum (low) after the keys that s: [KEYS] has scores of. c: scores to base 2.
template <class Acc>
void add_to_sum(RowTerms<Acc>& terms, Acc c, const Acc* s) {
  Vec<Acc> top = broadcast(terms.top), sum = {};
  for (int64_t j = 0; j < KEYS; j += lanes<Acc>) top = max<Acc>(top, load<Vec<Acc>>(s + j));
  const Acc m = reduce_max<Acc>(top), finite = m == MINUS_INF<Acc> ? 0 : m;
  for (int64_t j = 0; j < KEYS; j += lanes<Acc>) sum += exp2<Acc>((load<Vec<Acc>>(s + j) - finite) * c);
  terms.low = terms.low * exp2<Acc>(broadcast((terms.top - finite) * c))[0] + reduce_add<Acc>(sum);
  terms.top = m;
}

// The maximum and the sum of every row of a tile with a large lse, by the online softmax.
template <class Storage>
void repeat_sums(const BackwardProblem<Storage>& problem, const BackwardTask& task, BackwardScratch<Storage>& w) {
  using Acc = AccOf<Storage>;
  const Inputs<Storage>& in = problem.in;
  const Acc c = in.rules.unit() * LOG2E;
  const int64_t batch = in.sequence_of(task.head).batch;
  auto for_large = [&](auto visit) {
    for (int64_t t = 0; t < std::ssize(w.large); ++t)
      if (w.large[t]) visit(t);
  };
  for_large([&](int64_t t) {
    for_tile_rows(task, t, w, [](RowTerms<Acc>& terms, int64_t, int64_t) {
      terms.top = MINUS_INF<Acc>, terms.low = 0;
    });
  });
  for (int64_t key0 = 0; key0 < task.head.keys; key0 += KEYS) {
    const Span keys = {key0, std::min(key0 + KEYS, task.head.keys)};
    bool packed = false;
    for_large([&](int64_t t) {
      if (!w.tiles[t].sees(keys)) return;
      if (!packed) pack_key_block(problem, task.head, keys, w);
      packed = true;
      const int64_t width = std::min(keys.last, w.tiles[t].seen.last) - key0;
      score_tile(problem, t * TILE_ROWS, width, w, w.s);
      for_tile_rows(task, t, w, [&](RowTerms<Acc>& terms, int64_t index, int64_t r) {
        const Row row = in.row_at(task.head, index);
        Acc* s = w.s + r * KEYS;
        if (in.rules.edits()) edit_scores<Storage>(in.rules, batch, row, key0, width, s);
        mask_scores(row.keys, key0, s);
        add_to_sum(terms, c, s);
      });
    });
  }
  for_large([&](int64_t t) {
    for_tile_rows(task, t, w, [](RowTerms<Acc>& terms, int64_t, int64_t) {
      if (terms.low == 0) terms = {0, -MINUS_INF<Acc>, terms.delta, terms.grad_lse};
      else terms.low = std::log2(terms.low);
    });
  });
}

}  // namespace
