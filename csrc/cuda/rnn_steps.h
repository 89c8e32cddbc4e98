// The loop over the steps of csrc/cuda/rnn.cu: who takes part in a step, the exchange among blocks and the product of the
// weights with what is exchanged. The cells are forward's or backward's.
#pragma once

#include <algorithm>
#include <optional>

#include "mma.h"
#include "rnn_cells.h"
#include "rows.h"

namespace {

constexpr int MAX_WARPS = 8, MAX_THREADS = 32 * MAX_WARPS;
constexpr int BLOCK_K = 32;  // columns of weights that a lane takes 16 bytes of, or (fp32) twice as many

// ---- sequences -------------------------------------------------------------------------------------------------------

// Which sequences take which step. Steps are counted in running order, k = 0 .. T−1.
struct Steps {
  const int64_t *lengths, *offsets;  // [B]; [T + 1], of packed input: the first row of each step
  const bool* resets;                // [T, B]
  int64_t T, B;
  bool reverse;

  struct Place {
    int64_t row;
    bool present, active, reset;  // has a row; takes the step; with a state of zeros
  };

  __device__ Place at(int k, int b) const {
    if (k < 0 || k >= T || b >= B) return {0, false, false, false};
    const int64_t t = reverse ? T - 1 - k : k, first = offsets ? offsets[t] : t * B;
    const bool present = !offsets || first + b < offsets[t + 1];
    const bool active = present && (!lengths || t < lengths[b]);
    return {first + b, present, active, active && resets && resets[t * B + b]};
  }
};

// How the work is laid out. All sizes are of this launch; none is compiled in.
template <class S>
struct Plan {
  const S* weights;    // [groups of all blocks][ROWS][K]
  S* exchange;         // [2][sequences in tiles of 8][stride]
  unsigned* counters;  // one per team, a cache line apart
  int64_t stride, K;       // K: of warps · KB · BLOCK_K
  int columns;             // of the weights, without padding
  int groups, all_groups;  // of a block, in all
  int tiles, all_tiles;    // of eight sequences: of a team, in all
  int pass;                // tiles whose sums fit in shared memory at a time
  bool cluster;
};

template <class S_, int ROWS_, int KB_>
struct TileLayout {
  using S = S_;
  static constexpr int ROWS = ROWS_, KB = KB_;
  static constexpr bool HALF = sizeof(S) == 2;
  static constexpr int PIECES = ROWS * sizeof(S) / 16;  // 16-byte pieces of a group that a lane holds per k-block
  static constexpr int IN_REGISTERS = std::clamp(128 / (4 * PIECES * KB), 1, 4);  // groups
  static constexpr bool EARLY = PIECES * KB < 32;  // load what cells need before the wait; the others would spill
  static constexpr int PAD = 64 / sizeof(S);  // elements after a row in shared memory: rows on different banks
  static constexpr size_t group_bytes(int warps) { return size_t(warps) * KB * PIECES * 512; }
  static constexpr size_t sums_bytes(int warps) { return size_t(warps) * ROWS * 32; }  // of a group and tile
};

// Where the team's exchange is: in global memory, or at the same place in the shared memory of each of its blocks.
template <class L>
struct Exchange {
  using S = typename L::S;
  S *global, *shared;
  int64_t half;  // numbers from one step's to the next's
  int stride;
  bool cluster;

  __device__ int64_t offset(int step, int column, int k) const {
    return step % 2 * half + int64_t(column) * stride + k;
  }

  // Copy `copy` of `copies` lanes that have the same 16 bytes writes its share of them.
  __device__ void store(int step, int column, int k, uint4 value, unsigned copy, unsigned copies) const {
    const int64_t place = offset(step, column, k);
    if (cluster)
      for (unsigned rank = copy; rank < gridDim.x; rank += copies) store_to_cluster(shared + int(place), rank, value);
    else if (copy == 0)
      *reinterpret_cast<uint4*>(global + place) = value;
  }
};

template <class S>
__device__ inline unsigned bits_of(float x) {
  if constexpr (sizeof(S) == 4) return __float_as_uint(x);
  else return static_cast<S>(x).x;
}

// Lane 4·g + q has two words or more of unit g for columns 2q and 2q + 1 → those of column 2q + g % 2, of units
// g & ~1 and g | 1.
template <int WORDS>
__device__ inline void exchange_columns(const unsigned (&first)[WORDS], const unsigned (&second)[WORDS],
                                        unsigned (&out)[2 * WORDS]) {
  const bool odd = threadIdx.x & 4;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const unsigned mine = odd ? second[i] : first[i];
    const unsigned other = __shfl_xor_sync(~0u, odd ? first[i] : second[i], 4);
    out[i] = odd ? other : mine;
    out[WORDS + i] = odd ? mine : other;
  }
}

// Words of lanes that differ in one bit, one after the other.
template <int WORDS>
__device__ inline void join_lanes(const unsigned (&mine)[WORDS], unsigned bit, unsigned (&out)[2 * WORDS]) {
  const bool upper = threadIdx.x & bit;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const unsigned other = __shfl_xor_sync(~0u, mine[i], bit);
    out[i] = upper ? other : mine[i];
    out[WORDS + i] = upper ? mine[i] : other;
  }
}

// ---- the product -----------------------------------------------------------------------------------------------------

template <class L>
class Product {
  using S = typename L::S;

 public:
  // spilled: where the weights of the groups past IN_REGISTERS lie.
  __device__ void load(const Plan<S>& plan, int first_group, uint4* spilled) {
    spilled_ = spilled + threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < L::IN_REGISTERS; ++u)
      load_group(plan, first_group + u, [&](int kb, int p) -> uint4& { return weights_[u][kb][p]; });
    for (int u = L::IN_REGISTERS; u < plan.groups; ++u)
      load_group(plan, first_group + u, [&](int kb, int p) -> uint4& { return spilled_[place(u, kb, p)]; });
  }

  // sums: [groups][warps][ROWS][8] of this tile, of which the warp writes its own.
  __device__ void multiply(const Plan<S>& plan, const Exchange<L>& exchange, int step, int tile, float* sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first = warp * (L::KB * BLOCK_K), next = warps * L::ROWS * 8;
    sums += warp * (L::ROWS * 8);
    if constexpr (L::HALF) {
      uint4 h[L::KB];
      const int64_t from = exchange.offset(step, tile * 8 + lane / 4, first + lane % 4 * 8);
#pragma unroll
      for (int kb = 0; kb < L::KB; ++kb)
        h[kb] = exchange.cluster ? reinterpret_cast<const uint4*>(exchange.shared + int(from))[kb * 4]
                                 : __ldcg(reinterpret_cast<const uint4*>(exchange.global + from) + kb * 4);
#pragma unroll
      for (int u = 0; u < L::IN_REGISTERS; ++u)
        if (u < plan.groups) multiply_half(h, [&](int kb, int p) { return weights_[u][kb][p]; }, sums + u * next);
      for (int u = L::IN_REGISTERS; u < plan.groups; ++u)
        multiply_half(h, [&](int kb, int p) { return spilled_[place(u, kb, p)]; }, sums + u * next);
    } else {
      constexpr int WIDTH = L::KB * BLOCK_K;
      const int64_t from = exchange.offset(step, tile * 8, first);
      float* h = exchange.shared + (exchange.cluster ? int(from) : warp * (8 * WIDTH));
      if (!exchange.cluster) {  // the warp's part comes to shared memory first
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < 2 * WIDTH; i += 32)
          copy_async<16>(h + i * 4, exchange.global + from + i / (WIDTH / 4) * exchange.stride + i % (WIDTH / 4) * 4);
        commit_copies();
        wait_copies<0>();
        __syncwarp();
      }
      const int stride = exchange.cluster ? exchange.stride : WIDTH, columns = plan.columns - first;
      multiply_exact<L::IN_REGISTERS>(h, stride, columns, [&](int u, int kb, int p) { return weights_[u][kb][p]; },
                                      sums, next, plan.groups);
      for (int u = L::IN_REGISTERS; u < plan.groups; ++u)
        multiply_exact<1>(h, stride, columns, [&](int, int kb, int p) { return spilled_[place(u, kb, p)]; },
                          sums + u * next, next, 1);
    }
  }

 private:
  uint4 weights_[L::IN_REGISTERS][L::KB][L::PIECES];
  uint4* spilled_;

  template <class F>
  __device__ static void each_piece(const F& f) {
#pragma unroll
    for (int kb = 0; kb < L::KB; ++kb)
#pragma unroll
      for (int p = 0; p < L::PIECES; ++p) f(kb, p);
  }

  __device__ static int place(int u, int kb, int p) {
    return ((((u - L::IN_REGISTERS) * int(blockDim.x / 32) + int(threadIdx.x / 32)) * L::KB + kb) * L::PIECES + p) * 32;
  }

  // Half precision: lane 4·g + q holds columns 8q .. 8q + 7 of rows g, g + 8, …: two k-tiles of the tensor core, whose
  // columns may be named in any order that h's are too. fp32: a lane has one row, of which 32 / ROWS lanes share a k-block.
  // Of a group past the last the sums are not used.
  template <class To>
  __device__ static void load_group(const Plan<S>& plan, int group, const To& to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = L::HALF ? lane / 4 : lane % L::ROWS, k = L::HALF ? lane % 4 * 8 : lane / L::ROWS * L::ROWS;
    const S* from = plan.weights + (int64_t(min(group, plan.all_groups - 1)) * L::ROWS + row) * plan.stride +
                    warp * (L::KB * BLOCK_K) + k;
    each_piece([&](int kb, int p) {
      const int64_t piece = kb * BLOCK_K + (L::HALF ? p * 8 * plan.stride : p * 4);
      to(kb, p) = *reinterpret_cast<const uint4*>(from + piece);
    });
  }

  template <class Weights>
  __device__ static void multiply_half(const uint4 (&h)[L::KB], const Weights& weights, float* sums) {
    const int lane = threadIdx.x % 32;
    float c[L::ROWS / 16][4] = {};  // two sequences of rows g and g + 8
#pragma unroll
    for (int kb = 0; kb < L::KB; ++kb)
#pragma unroll
      for (int m = 0; m < L::ROWS / 16; ++m) {
        const uint4 low = weights(kb, 2 * m), high = weights(kb, 2 * m + 1);
        mma_16x8x16<S>(c[m][0], c[m][1], c[m][2], c[m][3], {low.x, high.x, low.y, high.y}, {h[kb].x, h[kb].y});
        mma_16x8x16<S>(c[m][0], c[m][1], c[m][2], c[m][3], {low.z, high.z, low.w, high.w}, {h[kb].z, h[kb].w});
      }
#pragma unroll
    for (int m = 0; m < L::ROWS / 16; ++m) {
      auto* to = reinterpret_cast<float2*>(sums + m * 128 + lane * 2);
      to[0] = make_float2(c[m][0], c[m][1]);
      to[32] = make_float2(c[m][2], c[m][3]);
    }
  }

  // h: [8][stride], of which columns count.
  template <int GROUPS, class Weights>
  __device__ static void multiply_exact(const float* h, int stride, int columns, const Weights& weights, float* sums,
                                        int next, int groups) {
    const int lane = threadIdx.x % 32;
    h += lane / L::ROWS * L::ROWS;
    float c[GROUPS][8] = {};
    each_piece([&](int kb, int p) {
      if (kb * BLOCK_K + p * 4 >= columns) return;  // and, since it is a branch, ptxas loads no further ahead: it spilled
      uint4 w[GROUPS];
#pragma unroll
      for (int u = 0; u < GROUPS; ++u) w[u] = weights(u, kb, p);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 x = *reinterpret_cast<const float4*>(h + n * stride + kb * BLOCK_K + p * 4);
#pragma unroll
        for (int u = 0; u < GROUPS; ++u) {
          c[u][n] = fmaf(__uint_as_float(w[u].x), x.x, c[u][n]);
          c[u][n] = fmaf(__uint_as_float(w[u].y), x.y, c[u][n]);
          c[u][n] = fmaf(__uint_as_float(w[u].z), x.z, c[u][n]);
          c[u][n] = fmaf(__uint_as_float(w[u].w), x.w, c[u][n]);
        }
      }
    });
#pragma unroll
    for (int u = 0; u < GROUPS; ++u) {
#pragma unroll
      for (int part = L::ROWS; part < 32; part *= 2)
#pragma unroll
        for (int n = 0; n < 8; ++n) c[u][n] += __shfl_xor_sync(~0u, c[u][n], part);
      if (u < groups && lane < L::ROWS) {
        auto* to = reinterpret_cast<float4*>(sums + u * next + lane * 8);
        to[0] = make_float4(c[u][0], c[u][1], c[u][2], c[u][3]);
        to[1] = make_float4(c[u][4], c[u][5], c[u][6], c[u][7]);
      }
    }
  }
};

// ---- the loop --------------------------------------------------------------------------------------------------------

// A warp's share of a step: eight units of eight sequences, two of them to a lane.
struct Job {
  int unit;    // of this lane
  int b;       // the first of its two sequences
  int column;  // the first of the tile's eight, in the exchange
  int lane;
  __device__ int first() const { return lane % 4 * 2; }  // of its two, among these
};

// body.begin(exchange, columns, first sequence): what step 0 reads; body.load(job, k): all that does not depend on the
// exchange; body.finish(job, k, inputs, sums, exchange): the cells.
template <class L, class Body>
__device__ inline void run_steps(const Plan<typename L::S>& plan, const Body& body, int count) {
  constexpr int OCTETS = Body::SUMS == 1 ? L::ROWS / 8 : 1;  // of a group
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int first_group = blockIdx.x * plan.groups, first_tile = blockIdx.y * plan.tiles;
  const int tiles = min(plan.tiles, plan.all_tiles - first_tile);
  const int octets = max(0, min(plan.groups, plan.all_groups - first_group)) * OCTETS;

  auto* shared = dynamic_shared();
  auto* spilled = reinterpret_cast<uint4*>(shared);
  shared += max(0, plan.groups - L::IN_REGISTERS) * L::group_bytes(warps);
  auto* sums = reinterpret_cast<float*>(shared);  // [pass][groups][warps][ROWS][8]
  const int tile_sums = plan.groups * warps * L::ROWS * 8;
  shared += plan.pass * plan.groups * L::sums_bytes(warps);
  const int64_t stride = plan.cluster ? plan.K + L::PAD : plan.stride;
  const Exchange<L> exchange{plan.exchange + first_tile * 8 * plan.stride, reinterpret_cast<typename L::S*>(shared),
                             (plan.cluster ? plan.tiles : plan.all_tiles) * 8 * stride, int(stride), plan.cluster};
  if (plan.cluster) {
    for (int i = threadIdx.x; i < 2 * int(exchange.half) / (16 / int(sizeof(typename L::S))); i += blockDim.x)
      reinterpret_cast<uint4*>(shared)[i] = {0, 0, 0, 0};
    __syncthreads();
  }
  unsigned* counter = plan.counters + blockIdx.y * 32;

  auto arrive = [&] {
    if (plan.cluster) {
      cluster_arrive();
    } else {
      __syncthreads();
      if (threadIdx.x == 0) signal(counter);
    }
  };
  auto wait = [&](int k) {
    if (plan.cluster) {
      cluster_wait();
    } else {
      if (lane == 0) wait_for(counter, unsigned(gridDim.x * (k + 1)));
      __syncwarp();
    }
  };
  auto job_at = [&](int job, int first) {
    const int column = (first + job / octets) * 8;
    return Job{(first_group * OCTETS + job % octets) * 8 + lane / 4, first_tile * 8 + column + lane % 4 * 2, column, lane};
  };

  body.begin(exchange, tiles * 8, first_tile * 8, first_group * OCTETS * 8, octets * 8);
  Product<L> product;
  product.load(plan, first_group, spilled);
  arrive();
  typename Body::Inputs inputs;
  for (int k = 0; k < count; ++k) {
    for (int first = 0; first < tiles; first += plan.pass) {
      const int here = min(plan.pass, tiles - first), jobs = here * octets;
      if (L::EARLY && warp < jobs) inputs = body.load(job_at(warp, first), k);
      if (first == 0) wait(k);
      for (int n = 0; n < here; ++n)
        product.multiply(plan, exchange, k, first + n, sums + n * tile_sums);
      __syncthreads();
      for (int i = warp; i < jobs; i += warps) {
        const Job job = job_at(i, first);
        if (!L::EARLY || i != warp) inputs = body.load(job, k);
        const int octet = i % octets;
        const float* from = sums + i / octets * tile_sums + octet / OCTETS * (warps * L::ROWS * 8) +
                            octet % OCTETS * 64 + lane * 2;
        float2 sum[Body::SUMS] = {};
        for (int w = 0; w < warps; ++w)
#pragma unroll
          for (int s = 0; s < Body::SUMS; ++s) {
            const float2 part = *reinterpret_cast<const float2*>(from + (w * L::ROWS + s * 8) * 8);
            sum[s].x += part.x, sum[s].y += part.y;
          }
        body.finish(job, k, inputs, sum, exchange);
      }
      if (first + plan.pass < tiles) __syncthreads();
    }
    if (k + 1 < count) arrive();
  }
}

}  // namespace
