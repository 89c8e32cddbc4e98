// Exact top-k search of large k: all scores of a few queries at a time, the k-th of them by its digits, and what comes
// before it collected in the order of the keys.
//
//   kernel           a block owns                              reads                        writes
//   search_tile      16 or 64 queries of a head                the keys, by tiles of 128    all scores
//   count_digits     PART scores of a query and head           these                        a histogram of 11 bits
//   collect          a warp: SECTION scores of a query and     these                        how many are above, and at,
//                    head                                                                   the k-th; those chosen
//
// Three passes of count_digits find the k-th score, collect counts each section, and once Python has summed the counts
// collects the chosen; Python sorts them. What should limit all but search_tile is memory: each pass reads the scores.
#include "topk_tile.h"

namespace {

// ---- the tiles -----------------------------------------------------------------------------------------------------

// audit: search_tile where SCORES=true: dynamic shared 81920: stages, the most queries that stay
// audit: search_tile where ALIGNED=false: allow narrow load: rows begin anywhere
// audit: search_tile where ALIGNED=false T=BFloat16 T=Half: allow async copy: no copy takes two bytes

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

// ---- entries -------------------------------------------------------------------------------------------------------

void check_aligned(const Tensor& t, uintptr_t bytes, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0, name, ": expected an address that ", bytes,
                  " divides");
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
  m.def("topk_count(Tensor query, Tensor keys, Tensor(a!) scores, Tensor(b!) histograms, Tensor(c!) counts, "
        "float scale, int k, int stream) -> ()");
  m.def("topk_collect(Tensor scores, Tensor histograms, Tensor before, Tensor(a!) best, Tensor(b!) indices, int M, "
        "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) {
  m.impl("topk_count", TORCH_BOX(&topk_count));
  m.impl("topk_collect", TORCH_BOX(&topk_collect));
}
