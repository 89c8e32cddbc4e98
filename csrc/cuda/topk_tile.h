// Scores of a tile of queries and keys: what is best of them goes to lists, or all are written.
#pragma once

#include "topk.h"

namespace {

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

// Writes a lane's scores, of rows n + 8 i + g from column `first` on, up to `end`.
template <class T, int ROWS>
__device__ inline void write_scores(const Problem<T>& p, const float (&scores)[ROWS / 8][8], int64_t n, int64_t h,
                                    int64_t valid, int64_t first, int64_t end) {
  const int g = lane_of() / 4;
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    if (8 * i + g >= valid) continue;
    float* to = p.scores + ((n + 8 * i + g) * p.H + h) * p.ld;
#pragma unroll
    for (int j = 0; j < 8; j += 2)  // rows are padded to pairs
      if (first + 4 * j < end) *reinterpret_cast<float2*>(to + first + 4 * j) = {scores[i][j], scores[i][j + 1]};
  }
}

// Puts a lane's waiting scores (bit j: that of a row) into its rows' queues; whether some found no room.
template <int ROWS>
__device__ inline bool enter_queues(Queues<ROWS>& queues, const float (&scores)[ROWS / 8][8],
                                    unsigned (&waiting)[ROWS / 8], int64_t first) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    if (waiting[i] == 0) continue;
    const int row = 8 * i + lane_of() / 4;
    const Entry last = queues.last[row];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!(waiting[i] >> j & 1)) continue;
      // Other scores of this tile may be in the list by now: the bar, for which these have lost ties, is no longer
      // enough.
      const Entry entry = entry_of(scores[i][j], unsigned(first + 8 * (j / 2) + j % 2));
      unsigned place = 0;
      if (entry > last && (place = atomicAdd(&queues.counts[row], 1u)) < TILE_QUEUE) queues.entries[row][place] = entry;
      if (place < TILE_QUEUE) waiting[i] ^= 1u << j;
    }
    any |= waiting[i] != 0;
  }
  return any;
}

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
      write_scores<T, ROWS>(p, scores, n, h, valid, first, end);
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
        if (any) any = enter_queues<ROWS>(queues, scores, waiting, first);
        if (!__syncthreads_or(any)) break;
        flush(TILE_QUEUE / 2);
      }
    }
    fetch();
  }
  if constexpr (!SCORES) flush(0);
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

}  // namespace
