// The k largest of the scores  s[m] = scale q·K[m]  for a batch of queries, by streaming the keys.
//
// Scores are made a small tile at a time, in registers and the nearest cache, and compared as vectors with a threshold
// for each query: the k-th best score at some moment before. The few that pass are appended to the query's buffer; a
// full buffer is cut down to its k best, which raises the threshold. The matrix of scores is never in memory.
//
// Many queries are the columns of a tile (packed once), so that a vector of scores is of one key and meets a vector of
// thresholds; keys are the tile's rows and are read where they lie. With few queries a vector of scores is of
// neighbouring keys. Keys must come in ascending order: one that ties with the threshold has lost to a lower index.
#pragma once

#include <functional>
#include <span>

#include "gemm_tile.h"
#include "tasks.h"
#include "view.h"

namespace {

// A score and its key's index as one integer, in the order of the search: by score, NaN above all and -0 equal to 0;
// of equal scores the lower index is the larger integer.
template <class Acc>
struct RankedType {
  using Score = uint32_t;
  using type = uint64_t;
};
template <>
struct RankedType<double> {
  using Score = uint64_t;
  using type = unsigned __int128;
};
template <class Acc>
using Ranked = typename RankedType<Acc>::type;

template <class Acc>
PK_INLINE Ranked<Acc> rank(Acc score, uint64_t index) {
  using Score = typename RankedType<Acc>::Score;
  constexpr int bits = 8 * sizeof(Score);
  const Score u = std::bit_cast<Score>(score + Acc(0)), sign = Score(1) << (bits - 1);
  const Score ordered = score != score ? ~Score(0) : u ^ (-(u >> (bits - 1)) | sign);
  return Ranked<Acc>(ordered) << bits | Score(~index);
}

// The same with nothing done yet: what a pass that is in a hurry notes, for `rank_notes` later.
template <class Acc>
PK_INLINE Ranked<Acc> note(Acc score, uint64_t index) {
  using Score = typename RankedType<Acc>::Score;
  return Ranked<Acc>(std::bit_cast<Score>(score)) << 8 * sizeof(Score) | Score(index);
}
template <class Acc>
void rank_notes(Ranked<Acc>* notes, int64_t count) {
  using Score = typename RankedType<Acc>::Score;
  for (int64_t i = 0; i < count; ++i)
    notes[i] = rank<Acc>(std::bit_cast<Acc>(Score(notes[i] >> 8 * sizeof(Score))), Score(notes[i]));
}

template <class Acc>
PK_INLINE Acc score_of(Ranked<Acc> ranked) {
  using Score = typename RankedType<Acc>::Score;
  constexpr int bits = 8 * sizeof(Score);
  const Score ordered = ranked >> bits, sign = Score(1) << (bits - 1);
  if (ordered == ~Score(0)) return std::numeric_limits<Acc>::quiet_NaN();
  return std::bit_cast<Acc>(ordered & sign ? ordered & ~sign : ~ordered);
}

template <class Acc>
PK_INLINE int64_t index_of(Ranked<Acc> ranked) {
  return typename RankedType<Acc>::Score(~ranked);
}

// Moves the k largest of `count` distinct numbers to the front, in no order; scratch has room for as many and a vector.
// Partitions without branches: nth_element mispredicts every other comparison.
template <class T>
void keep_largest(T* data, int64_t count, int64_t k, T* scratch) {
  while (k > 0 && count > k) {
    const T a = data[0], b = data[count / 2], c = data[count - 1];
    const T pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t larger = 0, others = 0, i = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 8)
      for (; i + 8 <= count; i += 8) {
        const __m512i x = _mm512_loadu_si512(data + i);
        const __mmask8 first = _mm512_cmpgt_epu64_mask(x, _mm512_set1_epi64(pivot));
        _mm512_storeu_si512(data + larger, _mm512_maskz_compress_epi64(first, x));
        _mm512_storeu_si512(scratch + others, _mm512_maskz_compress_epi64(~first, x));
        larger += std::popcount(first);
        others += 8 - std::popcount(first);
      }
#endif
    for (; i < count; ++i) {
      const T x = data[i];
      const bool first = x > pivot;
      data[larger] = x;
      scratch[others] = x;
      larger += first;
      others += !first;
    }
    if (larger >= k) {
      count = larger;
      continue;
    }
    // All the larger ones stay, with the best of the others; the pivot is one of these, so that both parts shrink.
    std::copy_n(scratch, others, data + larger);
    if (larger == 0) {
      std::swap(*data, *std::find(data, data + count, pivot));
      larger = 1;
    }
    data += larger, count -= larger, k -= larger;
  }
}

// Distinct numbers in descending order: each goes to the place that is the number of larger ones.
template <class T>
void sort_descending(T* data, int64_t count, T* scratch) {
  if (count > 256) return std::sort(data, data + count, std::greater<T>());
  std::copy_n(data, count, scratch);
  for (int64_t i = 0; i < count; ++i) {
    const T x = scratch[i];
    int64_t place = 0;
    for (int64_t j = 0; j < count; ++j) place += scratch[j] > x;
    data[place] = x;
  }
}

// Bit i is set where not a[i] <= b[i].
template <class T>
PK_INLINE uint32_t not_below(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLE_UQ);
#else
  const auto above = ~(a <= b);
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)above);
  else return _mm256_movemask_pd((__m256d)above);
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps((__m128)above);
  else return _mm_movemask_pd((__m128d)above);
#else
  uint32_t mask = 0;
  for (int i = 0; i < lanes<T>; ++i) mask |= uint32_t(above[i] & 1) << i;
  return mask;
#endif
#endif
}

// One worker's search: pack queries, scan keys in ascending order (all of them, or the share that falls to it), then
// take what was found.
template <class Storage>
class Search {
 public:
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Entry = Ranked<Acc>;
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t PANEL = TILE_VECTORS * W;  // queries of a tile
  static constexpr int64_t BATCH = 4 * PANEL;         // whose panels stay in the second cache beside a block of keys
  static constexpr int64_t FEW_QUERIES = 6;  // queries to which vectors of keys are faster than a tile's unused columns
  static constexpr int64_t SUM_UNITS = 128;  // products in one running sum, for accuracy: as in gemm.h

  // queries: room for so many. FEW_QUERIES or fewer never change the way they are scored, so that a remainder of many is
  // summed as the others are.
  Search(int64_t d, int64_t k, Acc scale, int64_t queries)
      : d_(d), k_(k), few_(queries <= FEW_QUERIES), scale_(scale), units_(ceil_div(d, P::depth)),
        padded_(round_up(units_, W)), capacity_(k + std::max<int64_t>(k, 16)),
        block_(round_up(std::clamp<int64_t>(65536 / (d * sizeof(Storage)), 12, 480), 12)),
        queries_(round_up(queries, W) * padded_), stage_(stage_units<P>(d)), staged_(block_ * padded_),
        thresholds_(round_up(queries, W)), next_(queries), ranked_(queries), entries_(queries * capacity_),
        scratch_(capacity_ + W) {}

  // Up to as many queries as there is room for.
  void start(const View<const Storage, 2>& queries, int64_t count) {
    count_ = count;
    for (int64_t q = 0; q < count; ++q) next_[q] = ranked_[q] = &entries_[q * capacity_];
    std::fill_n(thresholds_.get(), round_up(count, W), std::numeric_limits<Acc>::quiet_NaN());  // all pass
    auto row = [&](int64_t i) { return queries.at(i); };
    if (few_) {
      for (int64_t q = 0; q < count; ++q) copy_row<P>(row(q), queries.stride[1], d_, &queries_[q * padded_], padded_);
      return;
    }
    for (int64_t q = 0; q < count; q += PANEL) {
      const int64_t some = std::min(PANEL, count - q);
      auto own = [&](int64_t i) { return row(q + std::min(i, some - 1)); };
      pack_transposed<P>(own, queries.stride[1], some, d_, &queries_[q * units_], round_up(some, W), stage_.get());
    }
  }

  // Keys first .. last-1.
  void scan(const View<const Storage, 2>& keys, int64_t first, int64_t last) {
    const bool in_place = holds_units<P>(keys.data) && keys.stride[1] == 1 && d_ % P::depth == 0 &&
                          keys.stride[0] % P::depth == 0 && (!few_ || units_ == padded_);
    for (; first < last; first += block_) {
      const int64_t count = std::min(block_, last - first);
      const Storage* from = keys.at(first);
      const Unit* rows = staged_.get();
      if (in_place) rows = reinterpret_cast<const Unit*>(from);
      else
        for (int64_t i = 0; i < count; ++i)
          copy_row<P>(from + i * keys.stride[0], keys.stride[1], d_, &staged_[i * padded_], padded_);
      const int64_t stride = in_place ? keys.stride[0] / P::depth : padded_;
      if (few_) score_few(rows, stride, first, count);
      else score_many(rows, stride, first, count);
    }
  }

  // What was found for a query: at least the k best of the keys seen, in no order.
  std::span<const Entry> found(int64_t q) {
    rank_new(q);
    return {&entries_[q * capacity_], next_[q]};
  }

  // The k best in order.
  const Entry* finish(int64_t q) {
    rank_new(q);
    Entry* own = &entries_[q * capacity_];
    keep_largest(own, next_[q] - own, k_, scratch_.get());
    sort_descending(own, k_, scratch_.get());
    return own;
  }

 private:
  void score_many(const Unit* rows, int64_t stride, int64_t first, int64_t count) {
    for (int64_t q = 0; q < count_; q += PANEL) {
      const int64_t some = std::min(PANEL, count_ - q), vectors = ceil_div(some, W);
      const Unit* panel = &queries_[q * units_];
      // A tile of one vector needs more rows to hide the latency of its additions.
      const int64_t height = vectors == 1 ? 2 * TILE_ROWS : TILE_ROWS;
      for (int64_t i = 0; i < count; i += height) {
        const int64_t now = std::min(height, count - i);
        alignas(64) Acc tile[TILE_ROWS * PANEL];
        if (q == 0)
          for (int64_t r = 0; r < now; ++r)
            prefetch_row(rows + (i + r) * stride + PREFETCH_BYTES / sizeof(Unit), units_);
        const int64_t width = vectors * W;
        for (int64_t u = 0; u < units_; u += SUM_UNITS) {
          const Left<Unit> a = {rows + i * stride + u, stride, 1};
          const int64_t depth = std::min(SUM_UNITS, units_ - u);
          const Unit* b = panel + u * width;
          if (now == 2 * TILE_ROWS) gemm_tile<P, 2 * TILE_ROWS, 1>(depth, a, b, width, tile, width, u > 0);
          else
            for (int64_t r = 0; r < now; r += TILE_ROWS)
              gemm_strip<P>(std::min<int64_t>(TILE_ROWS, now - r), vectors, depth, {a.at + r * stride, stride, 1}, b,
                            width, tile + r * width, width, u > 0);
        }
        for (int64_t r = 0; r < now; ++r) {
          const Acc* scores = tile + r * width;
          uint64_t mask = 0;  // of the row's queries
          PK_UNROLL
          for (int v = 0; v < TILE_VECTORS; ++v)
            if (v < vectors)
              mask |= uint64_t(not_below<Acc>(load<Vec<Acc>>(scores + v * W) * scale_,
                                              load<Vec<Acc>>(&thresholds_[q + v * W]))) << v * W;
          for (mask &= lanes_below(some); mask; mask &= mask - 1) {
            const int lane = std::countr_zero(mask);
            append(q + lane, scores[lane] * scale_, first + i + r);
          }
        }
      }
    }
  }

  void score_few(const Unit* rows, int64_t stride, int64_t first, int64_t count) {
    const int64_t ahead = ceil_div(PREFETCH_BYTES, stride * int64_t(sizeof(Unit)));
    for (int64_t i = 0; i < count; i += W) {
      const void* key[W];
      for (int64_t j = 0; j < W; ++j) {
        key[j] = rows + std::min(i + j, count - 1) * stride;
        prefetch_row(rows + (i + j + ahead) * stride, units_);
      }
      for (int64_t q = 0; q < count_; ++q) {
        alignas(64) Acc scores[W];
        dot_rows<P>(&queries_[q * padded_], key, padded_, scores);
        uint64_t mask = not_below<Acc>(load<Vec<Acc>>(scores) * scale_, broadcast(thresholds_[q]));
        for (mask &= lanes_below(count - i); mask; mask &= mask - 1) {
          const int lane = std::countr_zero(mask);
          append(q, scores[lane] * scale_, first + i + lane);
        }
      }
    }
  }

  static uint64_t lanes_below(int64_t n) { return n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

  __attribute__((always_inline)) void append(int64_t q, Acc score, int64_t index) {
    Entry* to = next_[q]++;
    *to = note<Acc>(score, index);
    if (to + 1 == &entries_[(q + 1) * capacity_]) [[unlikely]] cut(q);
  }

  void cut(int64_t q) {
    rank_new(q);
    Entry* own = &entries_[q * capacity_];
    keep_largest(own, capacity_, k_, scratch_.get());
    next_[q] = ranked_[q] = own + k_;
    const Acc least = score_of<Acc>(*std::min_element(own, own + k_));
    // Where the k best are NaN, only NaN compares as not below infinity.
    thresholds_[q] = least != least ? std::numeric_limits<Acc>::infinity() : least;
  }

  void rank_new(int64_t q) {
    rank_notes<Acc>(ranked_[q], next_[q] - ranked_[q]);
    ranked_[q] = next_[q];
  }

  int64_t d_, k_;
  bool few_;
  Acc scale_;
  int64_t units_, padded_, capacity_, block_, count_ = 0;
  Buffer<Unit> queries_, stage_, staged_;
  Buffer<Acc> thresholds_;
  Buffer<Entry*> next_, ranked_;  // a query's entries end there; those before were cut or ranked
  Buffer<Entry> entries_, scratch_;
};

}  // namespace
