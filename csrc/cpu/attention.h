// What forward and backward attention share: which keys a query sees, the tensors as the kernels see them, what
// happens to a score between q·k and the softmax, and the arguments of the two ops.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "gemm_tile.h"
#include "tasks.h"
#include "view.h"

namespace {

constexpr int64_t KEYS = 64;  // keys in a block
constexpr double LOG2E = 1.4426950408889634074;

template <class T>
constexpr T MINUS_INF = -std::numeric_limits<T>::infinity();

// ---- which keys a query sees ----------------------------------------------------------------------------------------

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

// ---- rows -----------------------------------------------------------------------------------------------------------

// A sequence and one of its key heads. The queries of the G = H / Hk heads that share the keys are its G·N rows.
struct Head {
  int64_t sequence, key_head;
};

// One of a head's rows.
struct Row {
  int64_t head, query;
  int64_t position;
  Span keys;
};

// Of a tile of rows: the keys that some of them see, and the keys that all of them see.
struct TileSpans {
  Span seen = {0, 0}, full = {0, 0};

  void start(Span keys) { seen = full = keys; }
  void add(Span keys) {
    seen = {std::min(seen.first, keys.first), std::max(seen.last, keys.last)};
    full = {std::max(full.first, keys.first), std::min(full.last, keys.last)};
  }
  bool sees(Span keys) const { return seen.first < keys.last && keys.first < seen.last; }
  // Whether some row does not see all of a block's keys.
  bool cuts(int64_t key0) const { return full.first > key0 || full.last < key0 + KEYS; }
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

// ---- what happens to scores and probabilities between the two products ----------------------------------------------

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

  // Without these a score is only multiplied, which the exponential does; but the running maximum of unscaled products
  // is the scores' only if the scale is positive, and it must leave room for a factor log2(e) and its inverse.
  bool edits() const {
    return softcap > 0 || bias.kind != Bias::NONE || slopes || !(scale > 0x1p-100 && scale < 0x1p100);
  }
  double unit() const { return edits() ? 1 : scale; }  // what a score of 1 stands for: products are not yet scaled
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
// derivative: [KEYS], if not null, gets the softcap's, 1 − (capped / softcap)².
template <class Storage, class Acc>
void edit_scores(const ScoreRules& rules, int64_t batch, const Row& row, int64_t key0, int64_t count, Acc* s,
                 Acc* derivative = nullptr) {
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
    if (rules.softcap > 0) {
      x = tanh<Acc>(x * per_cap);
      if (derivative) store(derivative + j, Acc(1) - x * x);
      x *= cap;
    } else {
      x *= scale;
    }
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

// Everything that forward and backward read alike.
template <class Storage>
struct Inputs {
  View<const Storage, 4> query, key, value;
  Window window;
  ScoreRules rules;
  std::vector<Sequence> sequences;
  std::vector<int64_t> pages;  // [B][pages], empty when the keys are in place

  int64_t group() const { return query.size[1] / key.size[1]; }

  const Sequence& sequence_of(const Head& head) const { return sequences[head.sequence]; }
  int64_t rows_in(const Head& head) const { return group() * sequence_of(head).queries; }

  // Row `index` of a head's G·N.
  Row row_at(const Head& head, int64_t index) const {
    const Sequence& s = sequence_of(head);
    const int64_t i = index % s.queries;
    return {head.key_head * group() + index / s.queries, i, i + s.offset, window.visible(s, i)};
  }

  KeyRows<Storage> key_rows(const View<const Storage, 4>& t, const Head& head) const {
    const Sequence& s = sequence_of(head);
    if (pages.empty()) return {t.at(s.batch, head.key_head, s.key_start), t.stride[2], t.stride[3]};
    const int64_t per_sequence = pages.size() / query.size[0];
    return {t.at(0, head.key_head), t.stride[2], t.stride[3], pages.data() + s.batch * per_sequence,
            t.size[2],              t.size[0],   t.stride[0]};
  }

  // The rows of t, the keys or the values, from key0 on. The packers also prefetch rows beyond a block: beyond the last
  // key there is none, and the last key's row stands in.
  auto rows_from(const View<const Storage, 4>& t, const Head& head, int64_t key0) const {
    return [rows = key_rows(t, head), key0, last = sequence_of(head).keys - 1](int64_t j) {
      return rows(std::min(key0 + j, last));
    };
  }
};

// ---- the arguments of the ops ---------------------------------------------------------------------------------------

inline std::vector<int64_t> to_vector(const Tensor& t) {
  std::vector<int64_t> v;
  const auto* data = ::data<const int64_t>(t);
  int64_t columns = t.dim() == 2 ? t.size(1) : 1, step = t.dim() == 2 ? t.stride(1) : 0;
  for (int64_t i = 0; i < t.size(0); ++i)
    for (int64_t j = 0; j < columns; ++j) v.push_back(data[i * t.stride(0) + j * step]);
  return v;
}

// Uninitialised [B, H, N, D], laid out as `like` is: heads outside positions, or inside when it was transposed.
inline Tensor empty_in_layout(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D) {
  if (like.stride(1) >= like.stride(2)) return torch::stable::new_empty(like, {B, H, N, D});
  return torch::stable::transpose(torch::stable::new_empty(like, {B, N, H, D}), 1, 2);
}

constexpr int64_t LONGEST_WINDOW = int64_t(1) << 40;  // a window beyond any length, still safe to add

inline Window clamp_window(int64_t left, int64_t right) {
  return {std::min(left, LONGEST_WINDOW), std::min(right, LONGEST_WINDOW)};
}

inline std::vector<Sequence> batch_sequences(int64_t B, int64_t N, int64_t M, const std::optional<Tensor>& key_lengths,
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
inline std::vector<Sequence> packed_sequences(int64_t total_q, int64_t total_k, const Tensor& cu_q,
                                              const Tensor& cu_k) {
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
inline std::vector<Span> uncovered_rows(const std::vector<Sequence>& sequences, int64_t total) {
  if (sequences.empty()) return {{0, total}};
  return {{0, sequences.front().query_start}, {sequences.back().query_start + sequences.back().queries, total}};
}

inline Bias make_bias(const Tensor& t, ScalarType storage) {
  ScalarType dtype = t.scalar_type();
  Bias bias{dtype == ScalarType::Bool ? Bias::BOOL : dtype == storage ? Bias::STORAGE : Bias::ACCUMULATOR,
            t.data_ptr()};
  for (int d = 0; d < 4; ++d) bias.stride[d] = t.size(d) == 1 ? 0 : t.stride(d);
  return bias;
}

inline Dropout make_dropout(double p, const Tensor& seed) {
  auto bits = static_cast<uint64_t>(*data<const int64_t>(seed));
  auto threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  return {p, threshold, {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}};
}

inline ScoreRules make_rules(ScalarType storage, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, double scale,
                             double softcap, double dropout_p) {
  ScoreRules rules;
  rules.scale = scale, rules.softcap = softcap;
  if (bias) rules.bias = make_bias(*bias, storage);
  if (alibi_slopes) {
    rules.slopes = alibi_slopes->data_ptr();
    rules.slope_stride[0] = alibi_slopes->size(0) == 1 ? 0 : alibi_slopes->stride(0);
    rules.slope_stride[1] = alibi_slopes->stride(1);
  }
  if (dropout_p > 0) rules.dropout = make_dropout(dropout_p, *seed);
  return rules;
}

inline void check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                            const std::optional<Tensor>& bias, const std::optional<Tensor>& alibi_slopes,
                            const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& cu_seqlens_q,
                            const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& block_table,
                            const std::optional<Tensor>& seed, double dropout_p) {
  constexpr Layout ANY = Layout::ANY;
  const ScalarType storage = query.scalar_type(), acc = accumulator_of(storage);
  check(query, {ANY_SIZE, ANY_SIZE, ANY_SIZE, ANY_SIZE}, storage, "query", ANY);
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2), D = query.size(3);
  check(block_table, {B, ANY_SIZE}, ScalarType::Long, "block_table", ANY);
  check(key, {block_table ? ANY_SIZE : B, ANY_SIZE, ANY_SIZE, D}, storage, "key", ANY);
  const int64_t Hk = key.size(1), M = block_table ? block_table->size(1) * key.size(2) : key.size(2);
  STD_TORCH_CHECK(Hk > 0 ? H % Hk == 0 : H == 0, "key: expected heads that divide query's ", H, ", got ", Hk);
  check(value, {key.size(0), Hk, key.size(2), ANY_SIZE}, storage, "value", ANY);
  if (bias) {
    const ScalarType dtype = bias->scalar_type();
    check(*bias, {or_one(B), or_one(H), or_one(N), or_one(M)},
          dtype == ScalarType::Bool || dtype == acc ? dtype : storage, "bias", ANY);
  }
  check(alibi_slopes, {or_one(B), H}, acc, "alibi_slopes", ANY);
  check(key_lengths, {B}, ScalarType::Long, "key_lengths", ANY);
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                  "cu_seqlens_k: expected together with cu_seqlens_q");
  if (cu_seqlens_q) {
    check(cu_seqlens_q, {ANY_SIZE}, ScalarType::Long, "cu_seqlens_q", ANY);
    check(cu_seqlens_k, {cu_seqlens_q->size(0)}, ScalarType::Long, "cu_seqlens_k", ANY);
    check(query, {1, H, N, D}, storage, "query", ANY);
    STD_TORCH_CHECK(!bias && !alibi_slopes && !key_lengths && !block_table && dropout_p == 0,
                    "cu_seqlens_q: expected no bias, slopes, lengths, block table or dropout beside it");
  }
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "seed: expected a tensor with dropout_p > 0");
    check(seed, {}, ScalarType::Long, "seed", ANY);
  }
}

}  // namespace
