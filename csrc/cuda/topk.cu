// Exact top-k search:  s_m = scale q·K_m, the k largest in the order of (score descending, index ascending), NaN first.
//
//   kernel           a block owns                              reads                        writes
//   search_few       up to 4 queries of a head and a share     its share of the keys, once  for each query the k best
//                    of the keys                                                            of the share, in order
//   search_tile      16 or 64 queries of a head and a share    the same, by tiles of 128    the same
//                    of the keys                               keys
//   merge_lists      a query of a head                         the lists of all shares      scores, indices
//
// A score and its key's index are one integer, an entry; entries are distinct and larger ones come first, so neither
// shares nor threads show in the result. Up to k = 256 the scores are never in memory: for each query there is a list
// of the k best so far, a queue of 32 or 64 entries in shared memory, and in registers the bar, the k-th best score.
// Those that pass it enter the queue, and a full queue is sorted by a bitonic network across a warp's lanes and joined
// with the list, which raises the bar. Larger k are csrc/cuda/topk_large.cu's.
//
// What should limit search_few is memory: 128 bytes of 32 keys are 234 instructions in its loop (sm_90a), 15 a key of
// 128 bf16 numbers, of 68 that a multiprocessor of an H100 issues while that key is on its way. What should limit
// search_tile is the tensor core (FP32 units in fp32): its warps read operands 16 bytes a lane, 24 loads for 64
// products of 16×8×16, since the products' inner index may be permuted: a lane's 16 bytes of a row are the slots that
// it holds of two products. Where shares are short beside k it is the queues: nearly every score enters one.

#include "topk_tile.h"

namespace {

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

// ---- the tiles -----------------------------------------------------------------------------------------------------

// audit: search_tile where SCORES=false: dynamic shared 81920 + 268 * ROWS: stages, the most queries that stay, queues
// audit: search_tile where ALIGNED=false T=BFloat16 T=Half: allow async copy: no copy takes two bytes

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

// ---- the entry -----------------------------------------------------------------------------------------------------

template <class T>
size_t few_bytes(const Problem<T>& p, int queries) {
  const int64_t numbers = ceil_div(p.d, FEW_LANES * PART_NUMBERS<T>) * FEW_LANES * PART_NUMBERS<T>;
  return queries * (FEW_WARPS * (p.k + FEW_QUEUE) * sizeof(Entry) + numbers * sizeof(float));
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("topk_search(Tensor query, Tensor keys, Tensor(a!) lists, Tensor(b!) scores, Tensor(c!) indices, float scale, "
        "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) { m.impl("topk_search", TORCH_BOX(&topk_search)); }
