// Exact top-k search:  s_m = scale q·K_m, the k largest in the order of (score descending, index ascending), NaN first.
//
//   kernel           a block owns                              reads                        writes
//   search_few       up to 4 queries of a head and a share     its share of the keys, once  for each query the k best
//                    of the keys                                                            of the share, in order
//   search_tile      16 or 64 queries of a head and a share    the same, by tiles of 128    the same; or all scores
//                    of the keys                               keys
//   merge_lists      a query of a head                         the lists of all shares      scores, indices
//   count_digits     PART scores of a query and head           these                        a histogram of 11 bits
//   collect          a warp: SECTION scores of a query and     these                        how many are above, and at,
//                    head                                                                   the k-th; those chosen
//
// A score and its key's index are one integer, an entry; entries are distinct and larger ones come first, so neither
// shares nor threads show in the result. Up to k = 256 the scores are never in memory: for each query there is a list
// of the k best so far, a queue of 32 or 64 entries in shared memory, and in registers the bar, the k-th best score.
// Those that pass it enter the queue, and a full queue is sorted by a bitonic network across a warp's lanes and joined
// with the list, which raises the bar. Beyond, scores of a few queries at a time are written, the k-th is found by its
// digits in three passes, and what is above it is collected in the order of the keys.
//
// What should limit search_few is memory: 128 bytes of 32 keys are 234 instructions in its loop (sm_90a), 15 a key of
// 128 bf16 numbers, of 68 that a multiprocessor of an H100 issues while that key is on its way. What should limit
// search_tile is the tensor core (FP32 units in fp32): its warps read operands 16 bytes a lane, 24 loads for 64
// products of 16×8×16, since the products' inner index may be permuted: a lane's 16 bytes of a row are the slots that
// it holds of two products. Where shares are short beside k it is the queues: nearly every score enters one.

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

// ---- few queries: every key is read once, by the lanes that need its numbers ----------------------------------------

constexpr int FEW_WARPS = 8, FEW_LANES = 8, FEW_KEYS = 8;  // lanes to a key; keys that a lane reads at once
constexpr int FEW_QUEUE = 64;                              // a pass of 32 keys always fits

// Eight lanes read a key, 128 bytes at a time, and a lane eight keys side by side, of one of which it ends with the
// scores.
// audit: search_few: dynamic shared 24576 * QUERIES: the most that is served; of k = 32 and 128 numbers 6656 a query
// audit: search_few where ALIGNED=false: allow narrow load: rows begin anywhere
template <class T, int QUERIES, bool ALIGNED>
__global__ void __launch_bounds__(32 * FEW_WARPS, QUERIES == 1 ? 2 : 1) search_few(const Problem<T> p) {
  constexpr int E = PART_NUMBERS<T>;
  const int lane = lane_of(), warp = threadIdx.x / 32, own = lane % FEW_LANES, group = lane / FEW_LANES, k = p.k;
  const int64_t split = blockIdx.x % p.splits, task = blockIdx.x / p.splits;
  const int64_t h = task % p.H, n = task / p.H * QUERIES;
  const int parts = int(ceil_div(ceil_div(p.d, E), FEW_LANES) * FEW_LANES);
  const int64_t start = split * p.share, end = min(start + p.share, p.M);
  Entry* lists = reinterpret_cast<Entry*>(dynamic_shared());  // [FEW_WARPS, QUERIES, k]
  Entry* queues = lists + FEW_WARPS * QUERIES * k + warp * QUERIES * FEW_QUEUE;
  // [QUERIES, E / 4, parts]
  float4* queries = reinterpret_cast<float4*>(lists + FEW_WARPS * QUERIES * (k + FEW_QUEUE));
  lists += warp * QUERIES * k;
  for (int i = threadIdx.x; i < QUERIES * parts; i += blockDim.x) {
    const int q = i / parts, part = i % parts;
    const T* row = p.query + min(n + q, p.N - 1) * p.query_stride + h * p.query_head;
    const Numbers<T> numbers = std::bit_cast<Numbers<T>>(load_part<ALIGNED>(row, int64_t(part) * E, p.d));
#pragma unroll
    for (int e = 0; e < E; e += 4)
      queries[(q * (E / 4) + e / 4) * parts + part] = {float(numbers.at[e]), float(numbers.at[e + 1]),
                                                       float(numbers.at[e + 2]), float(numbers.at[e + 3])};
  }
  for (int i = lane; i < QUERIES * k; i += 32) lists[i] = 0;
  __syncthreads();

  float bars[QUERIES];
  int counts[QUERIES];
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) bars[q] = bar_of(0), counts[q] = 0;
  // The first `count` entries of a queue, at most 32, join the list.
  auto drain = [&](int q, int count) {
    Entry* queue = queues + q * FEW_QUEUE;
    join(lists + q * k, k, sort_warp(lane < count ? queue[lane] : 0));
    bars[q] = bar_of(lists[q * k + k - 1]);
  };
  const T* keys = p.keys + h * p.keys_head;
  for (int64_t first = start + warp * 32; first < end; first += FEW_WARPS * 32) {
    const T* rows[FEW_KEYS];
#pragma unroll
    for (int u = 0; u < FEW_KEYS; ++u) rows[u] = keys + min(first + 4 * u + group, end - 1) * p.keys_stride;
    float sums[QUERIES][FEW_KEYS] = {};
    for (int part = own; part < parts; part += FEW_LANES) {
      uint4 key[FEW_KEYS];
#pragma unroll
      for (int u = 0; u < FEW_KEYS; ++u) key[u] = load_part<ALIGNED>(rows[u], int64_t(part) * E, p.d);
      float4 query[QUERIES][E / 4];
#pragma unroll
      for (int q = 0; q < QUERIES; ++q)
#pragma unroll
        for (int e = 0; e < E / 4; ++e) query[q][e] = queries[(q * (E / 4) + e) * parts + part];
#pragma unroll
      for (int u = 0; u < FEW_KEYS; ++u) {
        const Numbers<T> numbers = std::bit_cast<Numbers<T>>(key[u]);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const float x = float(numbers.at[e]);
#pragma unroll
          for (int q = 0; q < QUERIES; ++q) {
            const float4 y = query[q][e / 4];
            sums[q][u] = fmaf(x, e % 4 == 0 ? y.x : e % 4 == 1 ? y.y : e % 4 == 2 ? y.z : y.w, sums[q][u]);
          }
        }
      }
    }
    const int64_t m = first + 4 * own + group;
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
      const float score = p.scale * sum_across(sums[q]);
      const bool passes = m < end && !(score <= bars[q]);
      const unsigned all = __ballot_sync(~0u, passes);
      if (all == 0) continue;
      Entry* queue = queues + q * FEW_QUEUE;
      if (passes) queue[counts[q] + __popc(all & ((1u << lane) - 1))] = entry_of(score, unsigned(m));
      counts[q] += __popc(all);
      __syncwarp();
      if (counts[q] < 32) continue;
      drain(q, 32);
      counts[q] -= 32;
      if (lane < counts[q]) queue[lane] = queue[32 + lane];
      __syncwarp();
    }
  }
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) drain(q, counts[q]);
  for (int half = FEW_WARPS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp < half)
      for (int q = 0; q < QUERIES; ++q) join_list(lists + q * k, k, lists + (half * QUERIES + q) * k);
  }
  if (warp == 0)
    for (int q = 0; q < QUERIES && n + q < p.N; ++q)
      for (int i = lane; i < k; i += 32) p.lists[((split * p.N + n + q) * p.H + h) * k + i] = lists[q * k + i];
}

// ---- tiles of scores ------------------------------------------------------------------------------------------------

constexpr int TILE_WARPS = 4, TILE_KEYS = 32 * TILE_WARPS, STAGES = 3;
constexpr int ROW_BYTES = 128;            // of a row at a time: a slice
constexpr int RESIDENT_BYTES = 32 << 10;  // queries that stay; of more, slices come along with those of the keys
constexpr int TILE_QUEUE = 32;

// Where a row's part of 16 bytes lies in its 128: eight neighbouring lanes meet eight different groups of banks, if
// they read 4 parts of 2 rows or 1 part of 4 even or odd rows.
__device__ inline int place_of(int row, int part) {
  return row * ROW_BYTES + (part ^ ((row & 1) << 2 | (row >> 1 & 3))) * 16;
}

// A slice of ROWS rows, `stride` apart, the last of `count` repeated.
template <class T, int ROWS, bool ALIGNED>
__device__ void load_slice(unsigned char* to, const T* rows, int64_t stride, int64_t count, int64_t column, int64_t d) {
  constexpr int PARTS = ROW_BYTES / 16, STEP = 32 * TILE_WARPS / PARTS;
  const int part = threadIdx.x % PARTS;
  column += part * PART_NUMBERS<T>;
#pragma unroll
  for (int first = 0; first < ROWS; first += STEP) {
    const int row = first + threadIdx.x / PARTS;
    const T* from = rows + min(int64_t(row), count - 1) * stride;
    if constexpr (ALIGNED) copy_async<16>(to + place_of(row, part), column < d ? from + column : rows, column < d);
    else *reinterpret_cast<uint4*>(to + place_of(row, part)) = load_part<false>(from, column, d);
  }
}

// A slice's products, added to a thread's scores: of rows 8 i + lane / 4 and, in its warp's 32 keys,
// 8 (j / 2) + 2 (lane % 4) + j % 2, in every dtype.
template <class T, int ROWS>
__device__ void multiply(float (&scores)[ROWS / 8][8], const unsigned char* queries, const unsigned char* keys) {
  const int g = lane_of() / 4, t = lane_of() % 4;
  keys += threadIdx.x / 32 * 32 * ROW_BYTES;
  auto part_of = [](const unsigned char* rows, int row, int part) {
    return *reinterpret_cast<const uint4*>(rows + place_of(row, part));
  };
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int first = 0; first < ROW_BYTES / 16; first += 4) {
      uint4 b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = part_of(keys, 8 * j + g, first + t);
#pragma unroll
      for (int i = 0; i < ROWS / 8; i += 2) {
        const uint4 low = part_of(queries, 8 * i + g, first + t), high = part_of(queries, 8 * i + 8 + g, first + t);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float *c = &scores[i][2 * j], *d = &scores[i + 1][2 * j];
          mma_16x8x16<T>(c[0], c[1], d[0], d[1], {low.x, high.x, low.y, high.y}, {b[j].x, b[j].y});
          mma_16x8x16<T>(c[0], c[1], d[0], d[1], {low.z, high.z, low.w, high.w}, {b[j].z, b[j].w});
        }
      }
    }
  } else {
#pragma unroll 2
    for (int part = 0; part < ROW_BYTES / 16; ++part) {
      float4 q[ROWS / 8];
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i) q[i] = std::bit_cast<float4>(part_of(queries, 8 * i + g, part));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 key = std::bit_cast<float4>(part_of(keys, 8 * (j / 2) + 2 * t + j % 2, part));
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
          float& sum = scores[i][j];
          sum = fmaf(q[i].x, key.x, sum), sum = fmaf(q[i].y, key.y, sum);
          sum = fmaf(q[i].z, key.z, sum), sum = fmaf(q[i].w, key.w, sum);
        }
      }
    }
  }
}

// A warp's queues and lists are those of the rows w, w + TILE_WARPS, …
template <int ROWS>
struct Queues {
  Entry entries[ROWS][TILE_QUEUE];
  Entry last[ROWS];   // the k-th best, of those that were joined
  unsigned counts[ROWS];  // as many as asked for room
};

// audit: search_tile where SCORES=false: dynamic shared 81920 + 268 * ROWS: stages, the most queries that stay, queues
// audit: search_tile where SCORES=true: dynamic shared 81920: stages, the most queries that stay
// audit: search_tile where ALIGNED=false: allow narrow load: rows begin anywhere
// audit: search_tile where ALIGNED=false T=BFloat16 T=Half: allow async copy: no copy takes two bytes
template <class T, int ROWS, bool ALIGNED, bool SCORES>
__global__ void __launch_bounds__(32 * TILE_WARPS, 2) search_tile(const Problem<T> p) {
  constexpr int SLICE = ROW_BYTES / sizeof(T);
  const int lane = lane_of(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, k = p.k;
  const int64_t split = blockIdx.x % p.splits, task = blockIdx.x / p.splits;
  const int64_t h = task % p.H, n = task / p.H * ROWS, valid = min(p.N - n, int64_t(ROWS));
  const int64_t start = split * p.share, end = min(start + p.share, p.M);
  const int slices = int(ceil_div(p.d, SLICE));
  const bool resident = slices * ROWS * ROW_BYTES <= RESIDENT_BYTES;
  const int stage_bytes = (TILE_KEYS + (resident ? 0 : ROWS)) * ROW_BYTES;
  Queues<ROWS>& queues = *reinterpret_cast<Queues<ROWS>*>(dynamic_shared());
  unsigned char* stages = dynamic_shared() + (SCORES ? 0 : sizeof(queues));
  unsigned char* queries = stages + STAGES * stage_bytes;
  const T* query = p.query + n * p.query_stride + h * p.query_head;
  const T* keys = p.keys + h * p.keys_head + start * p.keys_stride;
  auto list_of = [&](int row) { return p.lists + ((split * p.N + n + row) * p.H + h) * k; };

  const int64_t tiles = ceil_div(max(end - start, int64_t(0)), TILE_KEYS);
  int64_t tile = 0, next_tile = 0;
  int next_slice = 0, next_stage = 0;
  auto fetch = [&] {  // the next slice, if there is one
    if (next_tile < tiles) {
      unsigned char* to = stages + next_stage * stage_bytes;
      const int64_t first = next_tile * TILE_KEYS, column = int64_t(next_slice) * SLICE;
      load_slice<T, TILE_KEYS, ALIGNED>(to, keys + first * p.keys_stride, p.keys_stride, end - start - first, column,
                                        p.d);
      if (!resident)
        load_slice<T, ROWS, ALIGNED>(to + TILE_KEYS * ROW_BYTES, query, p.query_stride, valid, column, p.d);
      next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
      if (++next_slice == slices) next_slice = 0, ++next_tile;
    }
    commit_copies();
  };
  if (resident)
    for (int slice = 0; slice < slices; ++slice)
      load_slice<T, ROWS, ALIGNED>(queries + slice * ROWS * ROW_BYTES, query, p.query_stride, valid,
                                   int64_t(slice) * SLICE, p.d);
  for (int stage = 0; stage < STAGES; ++stage) fetch();

  float bars[ROWS / 8];
  // Of each of the warp's rows that has more than `least` in its queue: sort this and join it with the list.
  auto flush = [&](unsigned least) {
    for (int row = warp; row < valid; row += TILE_WARPS) {
      const unsigned count = queues.counts[row];
      if (count <= least) continue;
      Entry* list = list_of(row);
      join(list, k, sort_warp(lane < count ? queues.entries[row][lane] : 0));
      if (lane == 0) queues.last[row] = list[k - 1], queues.counts[row] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) bars[i] = bar_of(queues.last[8 * i + g]);
  };
  if constexpr (!SCORES) {
    for (int row = threadIdx.x; row < ROWS; row += blockDim.x)
      queues.last[row] = row < valid ? 0 : ~Entry(0), queues.counts[row] = 0;
    for (int row = warp; row < valid; row += TILE_WARPS)
      for (int i = lane; i < k; i += 32) list_of(row)[i] = 0;
    __syncthreads();
    flush(TILE_QUEUE);  // nothing: the bars alone
  }

  wait_copies<STAGES - 1>();
  __syncthreads();
  int stage = 0;
  for (; tile < tiles; ++tile) {
    float scores[ROWS / 8][8] = {};
    for (int slice = 0; slice < slices; ++slice) {
      const unsigned char* from = stages + stage * stage_bytes;
      multiply<T, ROWS>(scores, resident ? queries + slice * ROWS * ROW_BYTES : from + TILE_KEYS * ROW_BYTES, from);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if (slice + 1 == slices) break;
      wait_copies<STAGES - 2>();
      __syncthreads();  // the next slice is there for all, and all have read this one
      fetch();
    }
    wait_copies<STAGES - 2>();

    const int64_t first = start + tile * TILE_KEYS + warp * 32 + 2 * t;  // key j is 8 (j / 2) + j % 2 from it
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) scores[i][j] *= p.scale;
    if constexpr (SCORES) {
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i) {
        if (8 * i + g >= valid) continue;
        float* to = p.scores + ((n + 8 * i + g) * p.H + h) * p.ld;
#pragma unroll
        for (int j = 0; j < 8; j += 2)  // rows are padded to pairs
          if (first + 4 * j < end) *reinterpret_cast<float2*>(to + first + 4 * j) = {scores[i][j], scores[i][j + 1]};
      }
      __syncthreads();
    } else {
      bool any = false;
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) any |= !(scores[i][j] <= bars[i]);
      unsigned waiting[ROWS / 8] = {};  // bit j: that score has to enter its row's queue
      if (any) {
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (!(scores[i][j] <= bars[i]) && first + 8 * (j / 2) + j % 2 < end) waiting[i] |= 1u << j;
      }
      for (;;) {
        if (any) {
          any = false;
#pragma unroll
          for (int i = 0; i < ROWS / 8; ++i) {
            if (waiting[i] == 0) continue;
            const int row = 8 * i + g;
            const Entry last = queues.last[row];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              if (!(waiting[i] >> j & 1)) continue;
              // Other scores of this tile may be in the list by now: the bar, for which these have lost ties, is no
              // longer enough.
              const Entry entry = entry_of(scores[i][j], unsigned(first + 8 * (j / 2) + j % 2));
              unsigned place = 0;
              if (entry > last && (place = atomicAdd(&queues.counts[row], 1u)) < TILE_QUEUE)
                queues.entries[row][place] = entry;
              if (place < TILE_QUEUE) waiting[i] ^= 1u << j;
            }
            any |= waiting[i] != 0;
          }
        }
        if (!__syncthreads_or(any)) break;
        flush(TILE_QUEUE / 2);
      }
    }
    fetch();
  }
  if constexpr (!SCORES) flush(0);
}

// ---- the lists of all shares ----------------------------------------------------------------------------------------

constexpr int MERGE_WARPS = 32;

// audit: merge_lists: dynamic shared 32768: no more than 4096 entries
__global__ void __launch_bounds__(32 * MERGE_WARPS)
merge_lists(const Entry* lists, float* scores, int64_t* indices, int64_t splits, int64_t rows, int k) {
  const int64_t row = blockIdx.x;
  const int lane = lane_of(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Entry* all = reinterpret_cast<Entry*>(dynamic_shared());  // [warps, k]
  Entry* own = all + warp * k;
  for (int i = lane; i < k; i += 32) own[i] = lists[(warp * rows + row) * k + i];
  __syncwarp();
  for (int64_t split = warp + warps; split < splits; split += warps)
    join_list(own, k, lists + (split * rows + row) * k);
  for (int half = warps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp < half) join_list(own, k, own + half * k);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    scores[row * k + i] = score_of(all[i]);
    indices[row * k + i] = index_of(all[i]);
  }
}

// ---- large k: the k-th score by its digits --------------------------------------------------------------------------

constexpr int DIGIT_THREADS = 256;
constexpr int64_t PART = 16384;  // scores that a block counts

__device__ inline int shift_of(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// The k-th largest number's digits so far, and how many of those with the same digits there are from it on.
struct Found {
  unsigned digits;
  int64_t rank;
};

// The first `count` digits of the k-th largest number, from the histograms of each, [DIGITS, BINS], by a block of
// DIGIT_THREADS.
__device__ Found find_digits(const unsigned* histograms, int count, int64_t k) {
  constexpr int EACH = BINS / DIGIT_THREADS, WARPS = DIGIT_THREADS / 32;
  struct alignas(16) Bins {
    unsigned of[EACH];
  };
  __shared__ int64_t totals[WARPS];
  __shared__ Found found;
  if (threadIdx.x == 0) found = {0, k};
  __syncthreads();
  for (int digit = 0; digit < count; ++digit) {
    const int lowest = BINS - (int(threadIdx.x) + 1) * EACH;  // of this thread's bins
    const Bins bins = *reinterpret_cast<const Bins*>(histograms + digit * BINS + lowest);
    int64_t own = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) own += bins.of[i];
    int64_t above = own;  // numbers in this thread's bins and larger ones
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(~0u, above, step);
      if (lane_of() >= step) above += other;
    }
    if (lane_of() == 31) totals[threadIdx.x / 32] = above;
    const Found before = found;
    __syncthreads();
    for (int warp = 0; warp < int(threadIdx.x) / 32; ++warp) above += totals[warp];
    above -= own;
#pragma unroll
    for (int i = EACH - 1; i >= 0; --i) {
      if (above < before.rank && before.rank <= above + bins.of[i])  // in one bin of all
        found = {before.digits | unsigned(lowest + i) << shift_of(digit), before.rank - above};
      above += bins.of[i];
    }
    __syncthreads();
  }
  return found;
}

// scores: [rows, M], `ld` apart; histograms: [rows, DIGITS, BINS]
__global__ void __launch_bounds__(DIGIT_THREADS)
count_digits(const float* scores, unsigned* histograms, int64_t M, int64_t ld, int64_t k, int digit) {
  __shared__ unsigned bins[BINS];
  const int64_t parts = ceil_div(M, PART), row = blockIdx.x / parts, start = blockIdx.x % parts * PART;
  for (int i = threadIdx.x; i < BINS; i += DIGIT_THREADS) bins[i] = 0;
  histograms += row * DIGITS * BINS;
  const unsigned found = find_digits(histograms, digit, k).digits;  // after a barrier
  const int shift = shift_of(digit), before = digit == 0 ? 32 : shift_of(digit - 1);
  const unsigned mask = (1u << (before - shift)) - 1;
  const int64_t end = min(start + PART, M);
  auto count = [&](float score) {
    const unsigned number = order(score);
    if (digit == 0 || (number ^ found) >> before == 0) atomicAdd(&bins[number >> shift & mask], 1u);
  };
  for (int64_t i = start + 2 * threadIdx.x; i < end; i += 2 * DIGIT_THREADS) {
    const float2 pair = *reinterpret_cast<const float2*>(scores + row * ld + i);  // rows are padded to pairs
    count(pair.x);
    if (i + 1 < end) count(pair.y);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += DIGIT_THREADS)
    if (bins[i] != 0) atomicAdd(&histograms[digit * BINS + i], bins[i]);
}

// Of each section of SECTION scores, counts: [rows, sections, 2], how many come before the k-th and how many are equal.
// COLLECT: those are the sums over the sections before, and the chosen go to best, indices: [rows, k], in the order of
// the keys.
template <bool COLLECT>
__global__ void __launch_bounds__(DIGIT_THREADS)
collect(const float* scores, const unsigned* histograms, int64_t* counts, float* best, int64_t* indices, int64_t M,
        int64_t ld, int64_t k) {
  constexpr int WARPS = DIGIT_THREADS / 32;
  const int64_t sections = ceil_div(M, SECTION), blocks = ceil_div(sections, WARPS);
  const int64_t row = blockIdx.x / blocks, section = blockIdx.x % blocks * WARPS + threadIdx.x / 32;
  const Found last = find_digits(histograms + row * DIGITS * BINS, DIGITS, k);
  if (section >= sections) return;
  counts += (row * sections + section) * 2;
  int64_t above = COLLECT ? counts[0] : 0, equal = COLLECT ? counts[1] : 0;
  const int64_t start = section * SECTION, end = min(start + SECTION, M);
  for (int64_t first = start; first < end; first += 64) {
    const int64_t m = first + 2 * lane_of();
    const float2 pair = m < end ? *reinterpret_cast<const float2*>(scores + row * ld + m) : float2{};
    const unsigned numbers[2] = {m < end ? order(pair.x) : 0, m + 1 < end ? order(pair.y) : 0};
    unsigned is_above[2], is_equal[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      is_above[i] = __ballot_sync(~0u, numbers[i] > last.digits);
      is_equal[i] = __ballot_sync(~0u, numbers[i] == last.digits);
    }
    if constexpr (COLLECT) {
      const unsigned lower = (1u << lane_of()) - 1;
      int64_t above_before = above + __popc(is_above[0] & lower) + __popc(is_above[1] & lower);
      int64_t equal_before = equal + __popc(is_equal[0] & lower) + __popc(is_equal[1] & lower);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool exceeds = numbers[i] > last.digits, equals = numbers[i] == last.digits;
        if (exceeds || (equals && equal_before < last.rank)) {
          const int64_t to = row * k + above_before + min(equal_before, last.rank);
          best[to] = score_of(numbers[i]);
          indices[to] = m + i;
        }
        above_before += exceeds, equal_before += equals;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) above += __popc(is_above[i]), equal += __popc(is_equal[i]);
  }
  if (!COLLECT && lane_of() == 0) counts[0] = above, counts[1] = equal;
}

// ---- entries --------------------------------------------------------------------------------------------------------

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

template <class T>
size_t few_bytes(const Problem<T>& p, int queries) {
  const int64_t numbers = ceil_div(p.d, FEW_LANES * PART_NUMBERS<T>) * FEW_LANES * PART_NUMBERS<T>;
  return queries * (FEW_WARPS * (p.k + FEW_QUEUE) * sizeof(Entry) + numbers * sizeof(float));
}

template <class T, int ROWS, bool SCORES>
void run_tile(const Problem<T>& p, int64_t stream) {
  const int64_t queries = ceil_div(p.d * int64_t(sizeof(T)), ROW_BYTES) * ROWS * ROW_BYTES;
  const int64_t shared = (SCORES ? 0 : sizeof(Queues<ROWS>)) + STAGES * TILE_KEYS * ROW_BYTES +
                         (queries <= RESIDENT_BYTES ? queries : STAGES * ROWS * ROW_BYTES);
  const Launch how{.grid = unsigned(p.splits * p.H * ceil_div(p.N, ROWS)), .block = 32 * TILE_WARPS, .stream = stream,
                   .shared = size_t(shared)};
  launch(how, is_aligned(p) ? search_tile<T, ROWS, true, SCORES> : search_tile<T, ROWS, false, SCORES>, p);
}

template <class T>
void run_few(const Problem<T>& p, int64_t stream) {
  const int queries = p.N == 1 ? 1 : 4;
  const Launch how{.grid = unsigned(p.splits * p.H * ceil_div(p.N, queries)), .block = 32 * FEW_WARPS, .stream = stream,
                   .shared = few_bytes(p, queries)};
  const bool aligned = is_aligned(p);
  if (queries == 1) launch(how, aligned ? search_few<T, 1, true> : search_few<T, 1, false>, p);
  else launch(how, aligned ? search_few<T, 4, true> : search_few<T, 4, false>, p);
}

void check_search(const Tensor& query, const Tensor& keys) {
  check(query, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, query.scalar_type(), "query", Layout::ROWS);
  check(keys, {query.size(1), ANY_SIZE, query.size(2)}, query.scalar_type(), "keys", Layout::ROWS);
  STD_TORCH_CHECK(query.size(2) >= 1 && query.size(2) < int64_t(1) << 24,
                  "query: expected 1 to 2^24 - 1 numbers a row");
  STD_TORCH_CHECK(keys.size(1) < int64_t(1) << 32, "keys: expected fewer than 2^32 rows, got ", keys.size(1));
}

void check_aligned(const Tensor& t, uintptr_t bytes, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0, name, ": expected an address that ", bytes,
                  " divides");
}

// query: [N, H, d], keys: [H, M, d] -> scores, indices: [N, H, k]. lists: [splits, N, H, k], memory to work in.
void topk_search(Tensor query, Tensor keys, Tensor lists, Tensor scores, Tensor indices, double scale, int64_t stream) {
  check_search(query, keys);
  const int64_t N = query.size(0), H = query.size(1), M = keys.size(1), k = scores.size(2), splits = lists.size(0);
  STD_TORCH_CHECK(k >= 1 && k <= std::min<int64_t>(M, LARGEST_LIST), "k: expected 1 to ", LARGEST_LIST, ", got ", k);
  check(lists, {splits, N, H, k}, ScalarType::Long, "lists");
  check(scores, {N, H, k}, ScalarType::Float, "scores");
  check(indices, {N, H, k}, ScalarType::Long, "indices");
  STD_TORCH_CHECK(splits >= 1 && splits * N * H < int64_t(1) << 31, "query: expected fewer rows");
  DeviceGuard guard(query);
  Entry* entries = data<Entry>(lists);
  for_device_dtype(query.scalar_type(), [&]<class T>(T) {
    Problem<T> p = problem_of<T>(query, keys, scale);
    p.k = int(k), p.lists = entries, p.splits = splits;
    p.share = ceil_div(ceil_div(M, splits), TILE_KEYS) * TILE_KEYS;
    if (N <= 4 && few_bytes(p, 4) <= 96 << 10) run_few(p, stream);
    else if (N <= 16) run_tile<T, 16, false>(p, stream);
    else run_tile<T, 64, false>(p, stream);
  });
  unsigned warps = 1;
  while (2 * warps <= std::min<int64_t>(splits, MERGE_WARPS) && 2 * warps * k <= 4096) warps *= 2;
  launch({.grid = unsigned(N * H), .block = 32 * warps, .stream = stream, .shared = warps * k * sizeof(Entry)},
         merge_lists, entries, data<float>(scores), data<int64_t>(indices),
         splits, N * H, int(k));
}

// scores: [N, H, ld], ld even: the first M of each row are written (and, of M odd, one more).
// histograms: [N, H, DIGITS, BINS], zeros. counts: [N, H, M / SECTION rounded up, 2].
void topk_count(Tensor query, Tensor keys, Tensor scores, Tensor histograms, Tensor counts, double scale, int64_t k,
                int64_t stream) {
  check_search(query, keys);
  const int64_t N = query.size(0), H = query.size(1), M = keys.size(1), ld = scores.size(2), rows = N * H;
  STD_TORCH_CHECK(k >= 1 && k <= M, "k: expected 1 to ", M, ", got ", k);
  STD_TORCH_CHECK(ld >= M && ld % 2 == 0, "scores: expected an even size of ", M, " or more in dimension 2, got ", ld);
  check(scores, {N, H, ld}, ScalarType::Float, "scores");
  check(histograms, {N, H, DIGITS, BINS}, ScalarType::Int, "histograms");
  check(counts, {N, H, ceil_div(M, SECTION), 2}, ScalarType::Long, "counts");
  check_aligned(scores, 8, "scores");
  check_aligned(histograms, 16, "histograms");
  const int64_t parts = ceil_div(M, PART), blocks = ceil_div(ceil_div(M, SECTION), DIGIT_THREADS / 32);
  STD_TORCH_CHECK(rows * std::max(parts, blocks) < int64_t(1) << 31, "query: expected fewer rows");
  DeviceGuard guard(query);
  float* all = data<float>(scores);
  for_device_dtype(query.scalar_type(), [&]<class T>(T) {
    Problem<T> p = problem_of<T>(query, keys, scale);
    p.scores = all, p.ld = ld;
    if (N <= 16) run_tile<T, 16, true>(p, stream);
    else run_tile<T, 64, true>(p, stream);
  });
  unsigned* bins = data<unsigned>(histograms);
  for (int digit = 0; digit < DIGITS; ++digit)
    launch({.grid = unsigned(rows * parts), .block = DIGIT_THREADS, .stream = stream}, count_digits, all, bins, M, ld,
           k, digit);
  launch({.grid = unsigned(rows * blocks), .block = DIGIT_THREADS, .stream = stream}, collect<false>, all, bins,
         data<int64_t>(counts), nullptr, nullptr, M, ld, k);
}

// After topk_count; before: what sections before have of its counts. best, indices: [N, H, k], in the keys' order.
void topk_collect(Tensor scores, Tensor histograms, Tensor before, Tensor best, Tensor indices, int64_t M,
                  int64_t stream) {
  check(scores, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, ScalarType::Float, "scores");
  check(best, {scores.size(0), scores.size(1), ANY_SIZE}, ScalarType::Float, "best");
  const int64_t N = scores.size(0), H = scores.size(1), ld = scores.size(2), k = best.size(2);
  STD_TORCH_CHECK(k >= 1 && k <= M && M <= ld && ld % 2 == 0, "M: expected ", k, " to ", ld, ", even, got ", M);
  check(histograms, {N, H, DIGITS, BINS}, ScalarType::Int, "histograms");
  check(before, {N, H, ceil_div(M, SECTION), 2}, ScalarType::Long, "before");
  check(indices, {N, H, k}, ScalarType::Long, "indices");
  check_aligned(scores, 8, "scores");
  check_aligned(histograms, 16, "histograms");
  const int64_t blocks = ceil_div(ceil_div(M, SECTION), DIGIT_THREADS / 32);
  STD_TORCH_CHECK(N * H * blocks < int64_t(1) << 31, "scores: expected fewer rows");
  DeviceGuard guard(scores);
  launch({.grid = unsigned(N * H * blocks), .block = DIGIT_THREADS, .stream = stream}, collect<true>,
         data<const float>(scores), data<const unsigned>(histograms),
         data<int64_t>(before), data<float>(best),
         data<int64_t>(indices), M, ld, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("topk_search(Tensor query, Tensor keys, Tensor(a!) lists, Tensor(b!) scores, Tensor(c!) indices, float scale, "
        "int stream) -> ()");
  m.def("topk_count(Tensor query, Tensor keys, Tensor(a!) scores, Tensor(b!) histograms, Tensor(c!) counts, "
        "float scale, int k, int stream) -> ()");
  m.def("topk_collect(Tensor scores, Tensor histograms, Tensor before, Tensor(a!) best, Tensor(b!) indices, int M, "
        "int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) {
  m.impl("topk_search", TORCH_BOX(&topk_search));
  m.impl("topk_count", TORCH_BOX(&topk_count));
  m.impl("topk_collect", TORCH_BOX(&topk_collect));
}
