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
// One pass, five products. A task owns a sequence, one of its key heads, and every splits-th block of
// BLOCK_ROWS of the G·N query rows of that head's group (strided, so that a causal mask leaves the splits equal work).
// It packs its rows of q and do once, then takes the keys block by block: K and V are packed, the block's dk and dv
// are summed in cache over the task's rows, and dq is summed over the key blocks in the task's own rows. S and dP of
// BLOCK_ROWS queries and KEYS keys, queries as rows, live in L1 and turn into P and dS in place; the products with
// their transposes (dv, dk) read them by columns, so that nothing is transposed. With bf16 pairs P and dS are
// interleaved along the queries for those, and dS along the keys for dq.
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

#include "attention_backward.h"

namespace {

constexpr int64_t LEAST_BLOCKS = 4;  // row blocks that repay packing the keys for one more split

// ---- a tile of P and dS ---------------------------------------------------------------------------------------------

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
PK_INLINE void differentiate_row(Acc c, const RowTerms<Acc>& row, const Acc* keep, Acc kept, Acc* s, Acc* dp) {
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

// Tile t of a block: s to p and dp to ds, in place. count: keys of the block that some row sees.
template <class Storage>
void differentiate_tile(const BackwardProblem<Storage>& problem, const BackwardTask& task,
                        const ScoreGradients<Storage>& scores, int64_t block, int64_t t, int64_t key0, int64_t count,
                        BackwardScratch<Storage>& w) {
  using Acc = typename BackwardProblem<Storage>::Acc;
  const Inputs<Storage>& in = problem.in;
  const int64_t batch = in.sequence_of(task.head).batch, at = block * BLOCK_ROWS;
  const Span rows = task.rows(block);
  const bool edits = in.rules.edits(), boundary = w.tiles[block * BLOCK_TILES + t].cuts(key0);
  const bool plain = !edits && !boundary && in.rules.dropout.p == 0, capped = in.rules.softcap > 0;
  const Acc c = in.rules.unit() * LOG2E, kept = 1 / (1 - in.rules.dropout.p);
  for (int64_t r = t * TILE_ROWS; r < (t + 1) * TILE_ROWS; ++r) {
    const RowTerms<Acc>& terms = w.terms[at + r];
    Acc *s = w.s + r * KEYS, *ds = w.dp + r * KEYS;
    if (plain || rows.first + r >= rows.last) {  // rows that pad have low = inf
      differentiate_row<Acc>(c, terms, nullptr, 1, s, ds);
      continue;
    }
    const Row row = in.row_at(task.head, rows.first + r);
    if (edits) edit_scores<Storage>(in.rules, batch, row, key0, count, s, capped ? w.derivative : nullptr);
    if (boundary) mask_scores(row.keys, key0, s);
    if (in.rules.dropout.p > 0) {
      dropout_row(in.rules.dropout, batch * in.query.size[1] + row.head, row.query, key0, w.keep);
      differentiate_row<Acc>(c, terms, w.keep, kept, s, ds);
    } else {
      differentiate_row<Acc>(c, terms, nullptr, 1, s, ds);
    }
    scores.add(task.number, task.split, batch, row, key0, count, ds);
    if (capped)  // where ds is 0 the derivative may be that of a masked NaN
      for (int64_t j = 0; j < KEYS; j += lanes<Acc>) {
        auto x = load<Vec<Acc>>(ds + j);
        store(ds + j, select<Acc>(x == Acc(0), x, x * load<Vec<Acc>>(w.derivative + j)));
      }
  }
}

// Tile t of p and ds as pairs of bf16: along the queries for dv and dk, along the keys for dq.
template <class Storage>
void pair_tile([[maybe_unused]] int64_t t, [[maybe_unused]] BackwardScratch<Storage>& w) {
#if defined(__AVX512BF16__)
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  constexpr int W = lanes<Acc>;
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

// ---- a block of rows against a block of keys ------------------------------------------------------------------------

// The tiles of a block from the first to the last that sees any of the keys.
inline Span tiles_seeing(Span keys, const TileSpans* of_tiles) {
  Span tiles = {0, BLOCK_TILES};
  while (tiles.first < tiles.last && !of_tiles[tiles.first].sees(keys)) ++tiles.first;
  while (tiles.first < tiles.last && !of_tiles[tiles.last - 1].sees(keys)) --tiles.last;
  return tiles;
}

// sum: [keys][width] += aᵀ · b with a: [BLOCK_ROWS / depth][KEYS], b: [BLOCK_ROWS / depth][width], from the rows that
// see them.
template <class P>
void add_columns(Span keys, const TileSpans* of_tiles, const typename P::Unit* a, const typename P::Unit* b,
                 int64_t width, typename P::Acc* sum) {
  for (int64_t k = 0; keys.first + k < keys.last; k += TILE_ROWS) {
    const Span tiles = tiles_seeing({keys.first + k, std::min(keys.first + k + TILE_ROWS, keys.last)}, of_tiles);
    const int64_t row = tiles.first * TILE_ROWS / P::depth, rows = tiles.last * TILE_ROWS / P::depth - row;
    if (rows > 0)
      gemm_columns<P>(std::min<int64_t>(TILE_ROWS, KEYS - k), width / lanes<typename P::Acc>, rows, a + row * KEYS + k,
                      KEYS, b + row * width, width, sum + k * width, width);
  }
}

// The five products of a block of rows and a block of keys.
template <class Storage, class Acc>
void differentiate_block(const BackwardProblem<Storage>& problem, const BackwardTask& task,
                         const ScoreGradients<Storage>& scores, int64_t block, Span keys, Span tiles,
                         BackwardScratch<Storage>& w, Acc* dk, Acc* dv) {
  using P = typename ComputeOf<Storage>::type;
  constexpr int W = lanes<Acc>;
  const int64_t row0 = block * BLOCK_ROWS, key0 = keys.first, q_width = problem.q_width, v_width = problem.v_width;
  const int64_t g_units = problem.units(problem.Dv), g_length = problem.row_units(problem.Dv);
  const TileSpans* of_tiles = w.tiles.data() + block * BLOCK_TILES;
  // Under a causal mask no row of a tile sees a key from here on, which halves the work on the diagonal.
  auto width = [&](int64_t t) { return std::min(keys.last, of_tiles[t].seen.last) - key0; };
  for (int64_t t = tiles.first; t < tiles.last; ++t)
    if (of_tiles[t].sees(keys)) score_tile(problem, row0 + t * TILE_ROWS, width(t), w, w.s + t * TILE_ROWS * KEYS);
  // dp: [6][KEYS] = do: [6][Dv] · vᵀ: [Dv][width]
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    if (of_tiles[t].sees(keys)) {
      gemm<P>(TILE_ROWS, ceil_div(width(t), W), g_units, w.g + (row0 + t * TILE_ROWS) * g_length, g_length, w.v, KEYS,
              w.dp + t * TILE_ROWS * KEYS, KEYS, false);
      differentiate_tile(problem, task, scores, block, t, key0, width(t), w);
    } else {
      std::fill_n(w.s + t * TILE_ROWS * KEYS, TILE_ROWS * KEYS, Acc(0));
      std::fill_n(w.dp + t * TILE_ROWS * KEYS, TILE_ROWS * KEYS, Acc(0));
    }
    pair_tile(t, w);
  }
  // dq: [6][D] += ds: [6][width] · k: [width][D]
  for (int64_t t = tiles.first; t < tiles.last; ++t)
    if (of_tiles[t].sees(keys))
      gemm<P>(TILE_ROWS, q_width / W, problem.units(width(t)), w.ds + t * TILE_ROWS * (KEYS / P::depth),
              KEYS / P::depth, w.k_rows, q_width, w.dq + (row0 + t * TILE_ROWS) * q_width, q_width, true);
  // dv: [keys][Dv] += pᵀ: [keys][rows] · do: [rows][Dv], dk: [keys][D] += dsᵀ: [keys][rows] · q: [rows][D]
  add_columns<P>(keys, of_tiles, w.p_columns, w.g_rows + row0 / P::depth * v_width, v_width, dv);
  add_columns<P>(keys, of_tiles, w.ds_columns, w.q_rows + row0 / P::depth * q_width, q_width, dk);
}

// ---- results of a task ----------------------------------------------------------------------------------------------

template <class Storage>
void store_queries(const BackwardProblem<Storage>& problem, const BackwardTask& task,
                   const BackwardScratch<Storage>& w) {
  const Sequence& s = problem.in.sequence_of(task.head);
  for (int64_t block = 0; block < task.blocks(); ++block) {
    const Span rows = task.rows(block);
    for (int64_t r = rows.first; r < rows.last; ++r) {
      const Row row = problem.in.row_at(task.head, r);
      store_row<AccOf<Storage>>(w.dq + (block * BLOCK_ROWS + r - rows.first) * problem.q_width, problem.in.rules.scale,
                                problem.D, problem.grad.query.at(s.batch, row.head, s.query_start + row.query));
    }
  }
}

// dkv: dk: [KEYS][q_width], dv: [KEYS][v_width]
template <class Storage, class Acc>
void store_keys(const BackwardProblem<Storage>& problem, const BackwardHead& head, int64_t key0, const Acc* dkv) {
  const Sequence& s = problem.in.sequence_of(head);
  const Acc* dv = dkv + KEYS * problem.q_width;
  for (int64_t j = 0; j < std::min(KEYS, s.keys - key0); ++j) {
    const int64_t row = s.key_start + key0 + j;
    store_row<Acc>(dkv + j * problem.q_width, problem.in.rules.scale, problem.D,
                   problem.grad.key.at(s.batch, head.key_head, row));
    store_row<Acc>(dv + j * problem.v_width, 1, problem.Dv, problem.grad.value.at(s.batch, head.key_head, row));
  }
}

// A whole task. partial: [splits][key blocks][dk, dv], for a head that is split.
template <class Storage, class Acc>
void differentiate(const BackwardProblem<Storage>& problem, const BackwardTask& task,
                   const ScoreGradients<Storage>& scores, BackwardScratch<Storage>& w, Acc* partial) {
  const BackwardHead& head = task.head;
  begin_rows(problem, task, scores, w);
  if (w.any_large()) repeat_sums(problem, task, w);
  for (int64_t key0 = 0; key0 < head.keys; key0 += KEYS) {
    const Span keys = {key0, std::min(key0 + KEYS, head.keys)};
    Acc* dkv = head.splits == 1 ? w.dkv
                                : partial + (task.split * head.key_blocks() + key0 / KEYS) * problem.block_size;
    std::fill_n(dkv, problem.block_size, Acc(0));
    bool packed = false;
    for (int64_t block = 0; block < task.blocks(); ++block) {
      const Span tiles = tiles_seeing(keys, w.tiles.data() + block * BLOCK_TILES);
      if (tiles.first == tiles.last) continue;
      if (!packed) pack_key_block(problem, head, keys, w);
      packed = true;
      differentiate_block(problem, task, scores, block, keys, tiles, w, dkv, dkv + KEYS * problem.q_width);
    }
    if (head.splits == 1) store_keys(problem, head, key0, dkv);
  }
  store_queries(problem, task, w);
}

// ---- who does what --------------------------------------------------------------------------------------------------

template <class Storage>
class AttentionBackward {
  using Acc = typename BackwardProblem<Storage>::Acc;

 public:
  explicit AttentionBackward(const BackwardProblem<Storage>& problem)
      : problem(problem), in(problem.in), heads(plan()), scores(in, problem.grad, heads.size(), most_splits()) {}

  void run() {
    int64_t blocks = 0, tasks = 0, rounds = 0;
    for (const BackwardHead& head : heads) {
      blocks = std::max(blocks, ceil_div(head.row_blocks(), head.splits));
      tasks += head.splits;
      rounds = std::max(rounds, head.round + 1);
    }
    Workspace<BackwardScratch<Storage>> scratch(std::min(tasks, thread_count()), problem, blocks);
    for (int64_t round = 0; round < rounds; ++round) run_round(round, scratch);
    scores.finish(heads);
  }

 private:
  const BackwardProblem<Storage>& problem;
  const Inputs<Storage>& in;
  std::vector<BackwardHead> heads;
  const ScoreGradients<Storage> scores;

  int64_t most_splits() const {
    int64_t most = 1;
    for (const BackwardHead& head : heads) most = std::max(most, head.splits);
    return most;
  }

  std::vector<BackwardHead> plan() const {
    const Gradients<Storage>& grad = problem.grad;
    std::vector<BackwardHead> heads;
    std::map<int64_t, int64_t> chain_heads;
    for (size_t s = 0; s < in.sequences.size(); ++s)
      for (int64_t h = 0; h < in.key.size[1]; ++h) {
        const Head head = {int64_t(s), h};
        if (in.rows_in(head) == 0) continue;
        int64_t chain = (grad.shares_bias(0) ? 0 : s) * in.key.size[1] + (grad.shares_bias(1) ? 0 : h);
        heads.push_back({head, in.rows_in(head), in.sequence_of(head).keys, chain, chain_heads[chain]++});
      }
    int64_t chains = chain_heads.size(), threads = thread_count(), most = 1;
    // A group's heads would meet in one bias row from different splits.
    bool splittable = threads > 1 && !(grad.shares_bias(1) && in.group() > 1 && !grad.shares_bias(2));
    if (splittable && chains < 2 * threads) {
      int64_t wanted = chains < threads ? threads : 2 * threads;
      for (BackwardHead& head : heads) {
        head.splits = std::clamp<int64_t>(head.row_blocks() / LEAST_BLOCKS, 1, ceil_div(wanted, chains));
        most = std::max(most, head.splits);
      }
    }
    if (most == 1)
      for (BackwardHead& head : heads) head.round = 0;
    return heads;
  }

  // Gives the split heads of a round their places among the partial sums, and returns the size of these.
  int64_t place_partials(int64_t round) {
    int64_t size = 0;
    for (BackwardHead& head : heads) {
      if (head.round != round) continue;
      head.partial_at = size;
      if (head.splits > 1) size += head.splits * head.key_blocks() * problem.block_size;
    }
    return size;
  }

  // The tasks of a round, by chain.
  std::vector<std::vector<BackwardTask>> chains_of(int64_t round) const {
    std::vector<std::vector<BackwardTask>> chains;
    std::map<std::pair<int64_t, int64_t>, size_t> chain_of;
    for (size_t h = 0; h < heads.size(); ++h) {
      if (heads[h].round != round) continue;
      for (int64_t split = 0; split < heads[h].splits; ++split) {
        auto [place, fresh] = chain_of.try_emplace({heads[h].chain, split}, chains.size());
        if (fresh) chains.emplace_back();
        chains[place->second].push_back({heads[h], int64_t(h), split});
      }
    }
    return chains;
  }

  void run_round(int64_t round, Workspace<BackwardScratch<Storage>>& scratch) {
    const int64_t size = place_partials(round);
    const std::vector<std::vector<BackwardTask>> chains = chains_of(round);
    Buffer<Acc> partials(size);
    double products = 0;
    for (const BackwardHead& head : heads) products += double(head.rows) * head.keys;
    const double work = products * (3 * problem.D + 2 * problem.Dv) * MULTIPLY_ADD / 2;
    run_tasks(chains.size(), work, [&](int64_t worker, int64_t i) {
      for (const BackwardTask& task : chains[i])
        differentiate(problem, task, scores, scratch[worker], partials.get() + task.head.partial_at);
    });
    std::vector<std::pair<const BackwardHead*, int64_t>> sums;  // of split heads: (head, key block)
    for (const BackwardHead& head : heads)
      for (int64_t b = 0; head.round == round && head.splits > 1 && b < head.key_blocks(); ++b)
        sums.push_back({&head, b});
    run_tasks(sums.size(), double(size) * sizeof(Acc) * BYTE, [&](int64_t, int64_t i) {
      add_splits(*sums[i].first, sums[i].second, partials.get() + sums[i].first->partial_at);
    });
  }

  // Adds what the splits of a head left of a key block, in order.
  void add_splits(const BackwardHead& head, int64_t key_block, Acc* partial) const {
    Acc* sum = partial + key_block * problem.block_size;
    for (int64_t split = 1; split < head.splits; ++split) {
      const Acc* more = sum + split * head.key_blocks() * problem.block_size;
      for (int64_t j = 0; j < problem.block_size; j += lanes<Acc>)
        store(sum + j, load<Vec<Acc>>(sum + j) + load<Vec<Acc>>(more + j));
    }
    store_keys(problem, head, key_block * KEYS, sum);
  }
};

// ---- the op ---------------------------------------------------------------------------------------------------------

void check_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                    const Tensor& value, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& alibi_slopes, bool needs_bias, bool needs_slopes) {
  constexpr Layout ANY = Layout::ANY;
  const ScalarType storage = query.scalar_type(), acc = accumulator_of(storage);
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2), Dv = value.size(3);
  check(grad_out, {B, H, N, Dv}, storage, "grad_out", ANY);
  check(out, {B, H, N, Dv}, storage, "out", ANY);
  check(lse, {B, H, N}, acc, "lse", ANY);
  check(grad_lse, {B, H, N}, acc, "grad_lse", ANY);
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
    using Acc = AccOf<Storage>;
    const Inputs<Storage> inputs{View<const Storage, 4>(query), View<const Storage, 4>(key),
                                 View<const Storage, 4>(value), clamp_window(window_left, window_right),
                                 make_rules(storage, bias, alibi_slopes, seed, scale, softcap, dropout_p),
                                 cu_seqlens_q ? packed_sequences(N, M, *cu_seqlens_q, *cu_seqlens_k)
                                              : batch_sequences(B, N, M, key_lengths, false),
                                 {}};
    const Saved<Storage> saved{View<const Storage, 4>(grad_out), View<const Storage, 4>(out),
                               View<const Acc, 3>(lse), View<const Acc, 3>(grad_lse)};
    Gradients<Storage> gradients{View<Storage, 4>(grad_query), View<Storage, 4>(grad_key),
                                 View<Storage, 4>(grad_value)};
    if (needs_bias) {
      gradients.bias = grad_bias.data_ptr();
      gradients.bias_in_storage = bias->scalar_type() == storage && !std::is_same_v<Storage, Acc>;
      std::copy(bias_sizes.begin(), bias_sizes.end(), gradients.bias_size);
    }
    if (needs_slopes) {
      gradients.slopes = data<Acc>(grad_slopes);
      gradients.slope_batches = slope_sizes[0];
    }
    const BackwardProblem<Storage> problem{inputs, saved, gradients};
    AttentionBackward<Storage>(problem).run();
  });
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention_backward", TORCH_BOX(&attention_backward)); }
