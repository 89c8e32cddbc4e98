// What the searches of csrc/cuda/topk.cu and topk_large.cu share: entries, a warp's lists and the problem.
#pragma once

#include "mma.h"
#include "rows.h"

namespace {

// ---- entries --------------------------------------------------------------------------------------------------------

using Entry = uint64_t;  // the score's order, then the index, inverted; 0: none

// Ascending integers for ascending scores: −0 is 0, NaN the top; never 0.
__device__ inline unsigned order(float score) {
  const unsigned bits = __float_as_uint(score + 0.f);
  return score != score ? ~0u : bits ^ (unsigned(int(bits) >> 31) | 1u << 31);
}
__device__ inline float score_of(unsigned order) {
  return order == ~0u ? __uint_as_float(0x7fc00000) : __uint_as_float(order >> 31 ? order ^ 1u << 31 : ~order);
}
__device__ inline Entry entry_of(float score, unsigned index) { return Entry(order(score)) << 32 | unsigned(~index); }
__device__ inline float score_of(Entry entry) { return score_of(unsigned(entry >> 32)); }
__device__ inline int64_t index_of(Entry entry) { return unsigned(~entry); }

// What a score must not be below or at to come before the k-th best, if all keys of lower indices were seen. Nothing is
// below NaN, and only NaN is not below infinity.
__device__ inline float bar_of(Entry last) {
  if (last == 0) return __uint_as_float(0x7fc00000);
  const unsigned found = unsigned(last >> 32);
  return found == ~0u ? __uint_as_float(0x7f800000) : score_of(found);
}

// ---- a warp's lists -------------------------------------------------------------------------------------------------

__device__ inline int lane_of() { return threadIdx.x % 32; }

// The lanes' entries, descending.
__device__ inline Entry sort_warp(Entry x) {
  const int lane = lane_of();
#pragma unroll
  for (int run = 2; run <= 32; run *= 2)
#pragma unroll
    for (int step = run / 2; step > 0; step /= 2) {
      const Entry other = __shfl_xor_sync(~0u, x, step);
      const bool larger = ((lane & step) == 0) == ((lane & run) == 0);
      x = (other > x) == larger ? other : x;
    }
  return x;
}

// Of a list, [k] in descending order, and the lanes' entries, descending too, the k best into the list. No entry is in
// both; the list is the warp's own.
__device__ void join(Entry* list, int k, Entry x) {
  const int lane = lane_of();
  if (__shfl_sync(~0u, x, 0) <= list[k - 1]) return;
  int place = lane;  // of x: after the entries of the list that are larger
  for (int low = 0, high = k;;) {
    if (low == high) {
      place += low;
      break;
    }
    const int middle = (low + high) / 2;
    if (list[middle] > x) low = middle + 1;
    else high = middle;
  }
  __syncwarp();
  for (int first = (k - 1) / 32 * 32; first >= 0; first -= 32) {  // from the end: nothing is overwritten unread
    const int i = first + lane;
    const Entry entry = i < k ? list[i] : 0;
    int shift = 0;  // how many of the lanes' entries are larger
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      if (__shfl_sync(~0u, x, shift + step - 1) > entry) shift += step;
    shift += __shfl_sync(~0u, x, shift) > entry;  // after which all have read theirs
    if (entry != 0 && i + shift < k) list[i + shift] = entry;
    if (__shfl_sync(~0u, shift, 0) == 0) break;  // neither do those before it move
  }
  __syncwarp();
  if (x != 0 && place < k) list[place] = x;
  __syncwarp();
}

// The k best of two lists into the first.
__device__ void join_list(Entry* list, int k, const Entry* other) {
  for (int first = 0; first < k; first += 32) {
    const int i = first + lane_of();
    const Entry x = i < k ? other[i] : 0;
    if (__shfl_sync(~0u, x, 0) <= list[k - 1]) return;
    join(list, k, x);
  }
}

// ---- arguments ------------------------------------------------------------------------------------------------------

template <class T>
struct Problem {
  const T* query;  // [N, H, d]
  const T* keys;   // [H, M, d]
  int64_t query_stride, query_head, keys_head, keys_stride;
  int64_t N, H, M, d;
  float scale;
  int k;
  int64_t share, splits;  // keys of a block; blocks that share the keys
  Entry* lists;           // [splits, N, H, k]
  float* scores;          // [N, H, M], rows `ld` apart: where all are asked for
  int64_t ld;
};

// Arguments that all searches share; the tensors' memory is typed by the caller.
template <class T>
Problem<T> problem_of(const Tensor& query, const Tensor& keys, double scale) {
  Problem<T> p{};
  p.query = data<const T>(query), p.keys = data<const T>(keys);
  p.query_stride = query.stride(0), p.query_head = query.stride(1);
  p.keys_head = keys.stride(0), p.keys_stride = keys.stride(1);
  p.N = query.size(0), p.H = query.size(1), p.M = keys.size(1), p.d = query.size(2);
  p.scale = float(scale), p.share = p.M, p.splits = 1;
  return p;
}

template <class T>
bool is_aligned(const Problem<T>& p) {
  const int64_t numbers = p.d | p.query_stride | p.query_head | p.keys_head | p.keys_stride;
  const auto addresses = reinterpret_cast<uintptr_t>(p.query) | reinterpret_cast<uintptr_t>(p.keys);
  return numbers % PART_NUMBERS<T> == 0 && addresses % 16 == 0;
}

inline void check_search(const Tensor& query, const Tensor& keys) {
  check(query, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, query.scalar_type(), "query", Layout::ROWS);
  check(keys, {query.size(1), ANY_SIZE, query.size(2)}, query.scalar_type(), "keys", Layout::ROWS);
  STD_TORCH_CHECK(query.size(2) >= 1 && query.size(2) < int64_t(1) << 24,
                  "query: expected 1 to 2^24 - 1 numbers a row");
  STD_TORCH_CHECK(keys.size(1) < int64_t(1) << 32, "keys: expected fewer than 2^32 rows, got ", keys.size(1));
}

}  // namespace
