// RWKV-4's WKV and its backward (equations: pykernels/ops/wkv4.py): a state (aa, bb, pp) per channel goes through T
// steps, its gradient back. A warp owns 32, 64 or 128 channels of one sequence through one segment of its time.
//
//   kernel     reads                                                writes
//   forward    k, v once; what the segments before it make of an    y, the state every 32 steps and after the last
//              empty state (FIND: k, v)                             (FIND: what a segment makes of an empty state)
//   local      k, v, gy; the saved state before the segment         (ga, gb) that its own y send to its start, the
//                                                                   factor on those from after it, whether r passes
//   backward   k, v, gy once; saved states; what `local` found      gk, gv, its sums of gw and gu, the first state's
//              of the segments after it                             gradient
//   total      all sums of gw and gu, in a fixed order              gw, gu
//
// Where sequences and channels alone fill a GPU there is one segment of all T; else segments run side by side, and each
// joins what the others found on its own: two launches, 5/3 of the traffic.
//
// What limits it is memory, with 6 or 7 KiB a warp in flight (12 for wide lanes): three warps on a multiprocessor pass
// 16 KiB. By instruction counts for sm_90, an H100's bandwidth is reached if all units overlap; if none did, 0.6 of it
// in fp32 and 0.4 in bf16 would be. Rows come by asynchronous copies of 16 bytes a lane, whatever a lane's share of a
// row is, into a ring in shared memory: loads into registers one step ahead would leave most cycles waiting. y, gk and
// gv leave by the same way, over the rows that they were computed from. Of each pair of exponentials one is e^0: with a
// reciprocal three special-function operations a step, four backward.
#include <limits>

#include "device.h"

namespace {

constexpr int GROUP = 8;   // rows that are brought, and steps that are unrolled, at once
constexpr int JOIN = 4;    // segments whose states are loaded at once
constexpr float EMPTY = -1e38f;  // pp of a state that has seen nothing, as the caller sees it; inside it is the lowest
constexpr float LOWEST = -std::numeric_limits<float>::max();

// ---- one step -------------------------------------------------------------------------------------------------------

struct State {
  float aa, bb, pp;
};

__device__ inline State empty_state() { return {0, 0, LOWEST}; }

// From and to [3][C]; an empty one where bb is 0, whatever pp.
__device__ inline State load_state(const float* p, int64_t C) {
  const State s{p[0], p[C], p[2 * C]};
  return s.bb == 0 ? State{s.aa, s.bb, LOWEST} : s;
}

__device__ inline void store_state(float* p, int64_t C, const State& s) {
  p[0] = s.aa;
  p[C] = s.bb;
  p[2 * C] = s.bb == 0 ? EMPTY : s.pp;
}

// An exponent that overflowed downwards, or was −inf, as the lowest number: no difference is of two infinities then, and
// the empty state is no larger than anything. NaN stays NaN.
__device__ inline float finite(float exponent) { return exponent < LOWEST ? LOWEST : exponent; }

// The weights of the past and of the present in what follows: e^(before − max), e^(exponent − max). Not in base 2, in
// which a third of the range would overflow.
struct Weights {
  bool wins;  // whether the present is the maximum
  float past, present;
};

__device__ inline Weights weigh(float before, float exponent) {
  const bool wins = exponent > before;
  const float small = exp2_fast(fabsf(before - exponent) * -LOG2E);
  return {wins, wins ? small : 1.f, wins ? 1.f : small};
}

__device__ inline Weights advance(State& s, float w, float k, float v) {
  const float before = finite(s.pp + w);
  const Weights q = weigh(before, k);
  s = {q.past * s.aa + q.present * v, q.past * s.bb + q.present, q.wins ? k : before};
  return q;
}

// What follows from a state and what a segment, whose decay is `shift`, made of an empty one.
__device__ inline State join(const State& left, const State& right, float shift) {
  const float before = finite(left.pp + shift);
  const Weights q = weigh(before, right.pp);
  return {q.past * left.aa + q.present * right.aa, q.past * left.bb + q.present * right.bb,
          q.wins ? right.pp : before};
}

// What the gradient of pp holds beyond that of the numerator aa e^pp and the denominator bb e^pp; nothing of a state
// that has seen nothing, whose pp is constant.
__device__ inline float beyond(float grad_aa, float grad_bb, float grad_pp, const State& s) {
  return s.bb == 0 ? 0 : grad_pp - (grad_aa * s.aa + grad_bb * s.bb);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class Storage>
struct Strided {  // [B, T, C], channels side by side
  const Storage* first;
  int64_t batch, step;
  bool given = true;  // else zeros
};

template <int SIZE>
struct alignas(SIZE) Bytes {
  using Word = std::conditional_t<SIZE % 4 == 0, uint32_t, uint16_t>;
  Word words[SIZE / sizeof(Word)];
};

// The warp's rows: N channels a lane, moved in pieces of PIECE bytes, several rows at once.
template <class Storage, int N, int PIECE>
struct Rows {
  static constexpr int BYTES = LANES * N * sizeof(Storage), TILE = GROUP * BYTES;  // of a row, of a group of rows
  static constexpr int PIECES = BYTES / PIECE, AT_ONCE = LANES / PIECES;
  // Groups on their way or in use: 4 KiB of each tensor, or four groups.
  static constexpr int RING = std::max(4, 4096 / TILE);

  int lane, row, b;
  int64_t column, C;  // of the lane's pieces
  int64_t channel;    // the lane's first

  __device__ Rows(int block, int b, int64_t C)
      : lane(threadIdx.x), row(lane / PIECES), b(b),
        column(int64_t(block) * LANES * N + lane % PIECES * (PIECE / int(sizeof(Storage)))), C(C),
        channel((int64_t(block) * LANES + lane) * N) {}

  __device__ bool exists() const { return channel < C; }

  // Rows t to t + GROUP − 1, zeros from `stop` on.
  __device__ void fetch(unsigned char* tile, const Strided<Storage>& from, int t, int stop) const {
    const Storage* at = from.first + b * from.batch + (t + row) * from.step + column;
#pragma unroll
    for (int i = 0; i < GROUP; i += AT_ONCE) {
      const bool inside = column < C && t + row + i < stop && from.given;
      unsigned char* to = tile + i * BYTES + lane * PIECE;
      if constexpr (PIECE >= 4) copy_async<PIECE>(to, at, inside);
      else *reinterpret_cast<Bytes<PIECE>*>(to) = inside ? *reinterpret_cast<const Bytes<PIECE>*>(at) : Bytes<PIECE>{};
      at += AT_ONCE * from.step;
    }
  }

  // Writes a group of rows to a tensor [B, T, C].
  __device__ void store(const unsigned char* tile, Storage* to, int64_t T, int t, int stop) const {
    Storage* at = to + (b * T + t + row) * C + column;
#pragma unroll
    for (int i = 0; i < GROUP; i += AT_ONCE) {
      if (column < C && t + row + i < stop)
        *reinterpret_cast<Bytes<PIECE>*>(at) = *reinterpret_cast<const Bytes<PIECE>*>(tile + i * BYTES + lane * PIECE);
      at += AT_ONCE * C;
    }
  }

  // The lane's channels of a row.
  __device__ Pack<Storage, N>& at(unsigned char* tile, int i) const {
    return reinterpret_cast<Pack<Storage, N>*>(tile + i * BYTES)[lane];
  }

  // Brings steps start to stop − 1 of the tensors through the ring: f(tiles of a group, its first step, steps in it).
  template <int TENSORS, class F>
  __device__ void stream(const Strided<Storage> (&from)[TENSORS], int start, int stop, const F& f) const {
    unsigned char* const ring = dynamic_shared();
    auto fetch_group = [&](int group) {
      const int t = start + group * GROUP;
      if (t < stop)
#pragma unroll
        for (int i = 0; i < TENSORS; ++i)
          fetch(ring + (group % RING * TENSORS + i) * TILE, from[i], t, stop);
      commit_copies();
    };
    for (int group = 0; group < RING - 1; ++group) fetch_group(group);
    for (int group = 0, t = start; t < stop; ++group, t += GROUP) {
      wait_copies<RING - 2>();
      __syncwarp();  // this group has come, and all lanes are done with the one before, whose place the next takes
      fetch_group(group + RING - 1);
      f(ring + group % RING * TENSORS * TILE, t, min(GROUP, stop - t));
    }
  }

  static constexpr size_t shared(int tensors) { return size_t(RING) * tensors * TILE; }
};

// step(load(i), i) for i < count, or from the last to the first. Of a whole group all loads come first, for the steps
// may store where a later one loads.
template <bool REVERSE = false, class Load, class Step>
__device__ inline void for_steps(int count, const Load& load, const Step& step) {
  if (count == GROUP) {
    decltype(load(0)) loaded[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) loaded[i] = load(i);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) step(loaded[REVERSE ? GROUP - 1 - i : i], REVERSE ? GROUP - 1 - i : i);
  } else {
#pragma unroll 1
    for (int i = 0; i < count; ++i) step(load(REVERSE ? count - 1 - i : i), REVERSE ? count - 1 - i : i);
  }
}

// A warp's place: block x is block + blocks · (b + B · segment).
struct Place {
  int block, b, segment, start, stop;

  __device__ Place(int first, int blocks, int B, int T, int steps)
      : block(blockIdx.x % blocks), b(blockIdx.x / blocks % B), segment(first + blockIdx.x / blocks / B),
        start(segment * steps), stop(min(start + steps, T)) {}
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Storage>
struct Forward {
  Strided<Storage> k, v;
  const float *w, *u, *state;  // [C], [C], [B, 3, C] or null
  float* found;                // [segments − 1, B, 3, C], what all but the last make of an empty state
  Storage* y;                  // [B, T, C]
  float *final, *checkpoints;  // [B, 3, C], [⌈T/32⌉, B, 3, C] or null
  int64_t C;
  int B, T, steps, blocks;
};

// audit: forward where N=1: dynamic shared 2 * 4096: the ring
// audit: forward where N=2 N=4: dynamic shared 2 * 8192: the ring
// audit: forward where FIND=false: allow narrow load: a state is one fp32 number of each a channel, once a segment
// audit: forward where FIND=true PIECE=2 PIECE=4: allow narrow load: rows begin anywhere
template <class Storage, int N, int PIECE, bool FIND>
__global__ void __launch_bounds__(LANES) forward(const Forward<Storage> a) {
  const Place here(0, a.blocks, a.B, a.T, a.steps);
  const Rows<Storage, N, PIECE> rows(here.block, here.b, a.C);
  const int64_t c = rows.channel, C = a.C;
  auto state_of = [&](float* p, int64_t of) { return p + (of * a.B + here.b) * 3 * C + c; };
  float w[N], u[N];
  State s[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    w[n] = u[n] = 0;
    s[n] = empty_state();
    if (!rows.exists()) continue;
    w[n] = a.w[c + n];
    u[n] = a.u[c + n];
    if (FIND) continue;
    if (a.state) s[n] = load_state(a.state + here.b * 3 * C + c + n, C);
#pragma unroll JOIN
    for (int before = 0; before < here.segment; ++before)
      s[n] = join(s[n], load_state(state_of(a.found, before) + n, C), w[n] * a.steps);
  }

  rows.template stream<2>({a.k, a.v}, here.start, here.stop, [&](unsigned char* tile, int t, int count) {
    if (!FIND && a.checkpoints && t % SAVED == 0 && rows.exists())
#pragma unroll
      for (int n = 0; n < N; ++n) store_state(state_of(a.checkpoints, t / SAVED) + n, C, s[n]);
    unsigned char* const values = tile + rows.TILE;
    struct Row {
      Pack<Storage, N> k, v;
    };
    auto load = [&](int i) { return Row{rows.at(tile, i), rows.at(values, i)}; };
    for_steps(count, load, [&](Row row, int i) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float k = static_cast<float>(row.k.of[n]), v = static_cast<float>(row.v.of[n]);
        if (!FIND) {
          const Weights q = weigh(s[n].pp, finite(k + u[n]));
          const float y = (q.past * s[n].aa + q.present * v) * reciprocal_fast(q.past * s[n].bb + q.present);
          row.v.of[n] = static_cast<Storage>(y);
        }
        advance(s[n], w[n], k, v);
      }
      if (!FIND) rows.at(values, i) = row.v;
    });
    if (!FIND) {
      __syncwarp();
      rows.store(values, a.y, a.T, t, here.stop);
    }
  });

  if (rows.exists() && (FIND || here.stop == a.T))
#pragma unroll
    for (int n = 0; n < N; ++n)
      store_state((FIND ? state_of(a.found, here.segment) : state_of(a.final, 0)) + n, C, s[n]);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class Storage>
struct Backward {
  Strided<Storage> k, v, grad_y;
  const float *w, *u, *state, *checkpoints, *grad_state;  // state, grad_state: [B, 3, C] or null
  float* local;                     // [segments − 1, B, 4, C], see `local`
  float* sums;                      // [segments, B, 2, C]
  Storage *grad_k, *grad_v;         // [B, T, C]
  float *grad_w, *grad_u;           // [C]
  float* grad_initial;              // [B, 3, C] or null
  int64_t C;
  int B, T, steps, blocks;
};

struct Mean {
  float y, past, present;  // the weights of the state and of v in y
};

__device__ inline Mean mean(const State& s, float exponent, float v) {
  const Weights q = weigh(s.pp, finite(exponent));
  const float inverse = reciprocal_fast(q.past * s.bb + q.present);
  const float past = q.past * inverse, present = q.present * inverse;
  return {past * s.aa + present * v, past, present};
}

// Of every segment but the first: ga, gb, the factor, and 1 where r passes through all steps, else 0; of the last, the
// r that comes out of it. The steps run forward: with F = Π f over the segment's steps before t, ga = Σ F z and
// gb = −Σ F z y. F is the product of what the steps rounded, not a power of the whole segment's decay.
// audit: local: dynamic shared 3 * 4096: the ring
// audit: local where PIECE=2 PIECE=4: allow narrow load: rows begin anywhere
template <class Storage, int PIECE>
__global__ void __launch_bounds__(LANES) local(const Backward<Storage> a) {
  const Place here(1, a.blocks, a.B, a.T, a.steps);
  const Rows<Storage, 1, PIECE> rows(here.block, here.b, a.C);
  const int64_t c = rows.channel, C = a.C;
  float w = 0, u = 0, ga = 0, gb = 0, factor = 1;
  bool passes = true;
  State s = empty_state();
  if (rows.exists()) {
    w = a.w[c];
    u = a.u[c];
    s = load_state(a.checkpoints + (int64_t(here.start / SAVED) * a.B + here.b) * 3 * C + c, C);
  }

  rows.template stream<3>({a.k, a.v, a.grad_y}, here.start, here.stop, [&](unsigned char* tile, int, int count) {
    struct Row {
      float k, v, gy;
    };
    auto load = [&](int i) {
      auto of = [&](int n) { return static_cast<float>(rows.at(tile + n * rows.TILE, i).of[0]); };
      return Row{of(0), of(1), of(2)};
    };
    for_steps(count, load, [&](const Row& row, int) {
      const Mean m = mean(s, row.k + u, row.v);
      const float z = factor * (row.gy * m.past);
      ga += z;
      gb -= z * m.y;
      const Weights q = advance(s, w, row.k, row.v);
      factor *= q.past;
      passes = passes && !q.wins;
    });
  });

  if (!rows.exists()) return;
  float rest = passes;
  if (here.stop == a.T) {
    const float* given = a.grad_state ? a.grad_state + here.b * 3 * C + c : nullptr;
    rest = passes && given ? beyond(given[0], given[C], given[2 * C], s) : 0;
  }
  float* out = a.local + (int64_t(here.segment - 1) * a.B + here.b) * 4 * C + c;
  out[0] = ga;
  out[C] = gb;
  out[2 * C] = factor;
  out[3 * C] = rest;
}

// Through 32 steps at a time, last to first: forward again from their saved state, leaving the state before each step
// in shared memory, then back. As a group of rows is done with, the rows that forward will want first of the 32 steps
// before take its place: they are on their way while all others are gone through.
// audit: backward: dynamic shared 32 * 3 * 32 * (size + 4): 32 steps of rows and of states
// audit: backward: allow narrow load: a state is one fp32 number of each a channel, once in 32 steps
template <class Storage, int PIECE>
__global__ void __launch_bounds__(LANES) backward(const Backward<Storage> a) {
  constexpr int GROUPS = SAVED / GROUP;
  const Place here(0, a.blocks, a.B, a.T, a.steps);
  const Rows<Storage, 1, PIECE> rows(here.block, here.b, a.C);
  constexpr int TILE = Rows<Storage, 1, PIECE>::TILE;
  const int64_t c = rows.channel, C = a.C;
  const int pieces = (here.stop - here.start + SAVED - 1) / SAVED;
  unsigned char* const tiles = dynamic_shared();  // [GROUPS][k, v, gy][GROUP][channels]
  float* const states = reinterpret_cast<float*>(tiles + GROUPS * 3 * TILE) + rows.lane;  // [SAVED][3][LANES]

  auto tile_of = [&](int piece, int group) {
    return tiles + ((pieces - piece) % 2 ? group : GROUPS - 1 - group) * (3 * TILE);
  };
  auto fetch = [&](int piece, int group) {
    const int t = here.start + piece * SAVED + group * GROUP;
    if (piece >= 0 && t < here.stop) {
      unsigned char* tile = tile_of(piece, group);
      rows.fetch(tile, a.k, t, here.stop);
      rows.fetch(tile + TILE, a.v, t, here.stop);
      rows.fetch(tile + 2 * TILE, a.grad_y, t, here.stop);
    }
    commit_copies();
  };
  for (int group = 0; group < GROUPS; ++group) fetch(pieces - 1, group);

  float w = 0, u = 0, ga = 0, gb = 0, rest = 0, gw = 0, gu = 0;
  if (rows.exists()) {
    w = a.w[c];
    u = a.u[c];
    if (a.grad_state) {
      const float* given = a.grad_state + here.b * 3 * C + c;
      ga = given[0], gb = given[C], rest = given[2 * C];
    }
    const int last = a.T > 0 ? (a.T - 1) / a.steps : 0;
#pragma unroll JOIN
    for (int after = last; after > here.segment; --after) {
      const float* found = a.local + (int64_t(after - 1) * a.B + here.b) * 4 * C + c;
      const float factor = found[2 * C], through = found[3 * C];
      ga = found[0] + factor * ga;
      gb = found[C] + factor * gb;
      rest = after == last ? through : through > 0 ? rest : 0;
    }
  }

  for (int piece = pieces - 1; piece >= 0; --piece) {
    const int first = here.start + piece * SAVED;
    State s = empty_state();
    if (rows.exists()) s = load_state(a.checkpoints + (int64_t(first / SAVED) * a.B + here.b) * 3 * C + c, C);
    for (int group = 0; group < GROUPS; ++group) {
      wait_copies<GROUPS - 1>();
      commit_copies();  // an empty group: at the next turn the group after this is the oldest that may be under way
      __syncwarp();
      unsigned char* const tile = tile_of(piece, group);
      struct Row {
        float k, v;
      };
      auto load = [&](int i) {
        return Row{static_cast<float>(rows.at(tile, i).of[0]), static_cast<float>(rows.at(tile + TILE, i).of[0])};
      };
      for_steps(min(GROUP, here.stop - first - group * GROUP), load, [&](const Row& row, int i) {
        float* const saved = states + (group * GROUP + i) * 3 * LANES;
        saved[0] = s.aa, saved[LANES] = s.bb, saved[2 * LANES] = s.pp;
        advance(s, w, row.k, row.v);
      });
    }
    if (a.grad_state && here.stop == a.T && piece == pieces - 1) rest = beyond(ga, gb, rest, s);

    for (int group = GROUPS - 1; group >= 0; --group) {
      unsigned char* const tile = tile_of(piece, group);
      struct Row {
        float k, v, gy;
        State s;
      };
      auto load = [&](int i) {
        auto of = [&](int n) { return static_cast<float>(rows.at(tile + n * TILE, i).of[0]); };
        const float* const saved = states + (group * GROUP + i) * 3 * LANES;
        return Row{of(0), of(1), of(2), {saved[0], saved[LANES], saved[2 * LANES]}};
      };
      for_steps<true>(min(GROUP, here.stop - first - group * GROUP), load, [&](Row row, int i) {
        const Mean m = mean(row.s, row.k + u, row.v);
        const float z = row.gy * m.past, share = row.gy * m.present, x = share * (row.v - m.y);
        const float aa = row.s.aa, bb = row.s.bb;
        const Weights q = advance(row.s, w, row.k, row.v);
        const float grad_v = share + q.present * ga;
        const float grad_k = x + q.present * (ga * row.v + gb) + (q.wins ? rest : 0);
        rest = q.wins ? 0 : rest;
        gw += q.past * (ga * aa + gb * bb) + rest;
        gu += x;
        ga = z + q.past * ga;
        gb = q.past * gb - z * m.y;
        rows.at(tile, i).of[0] = static_cast<Storage>(grad_k);
        rows.at(tile + TILE, i).of[0] = static_cast<Storage>(grad_v);
      });
      __syncwarp();
      rows.store(tile, a.grad_k, a.T, first + group * GROUP, here.stop);
      rows.store(tile + TILE, a.grad_v, a.T, first + group * GROUP, here.stop);
      __syncwarp();
      fetch(piece - 1, GROUPS - 1 - group);
    }
  }

  if (!rows.exists()) return;
  float* const sum = a.sums + (int64_t(here.segment) * a.B + here.b) * 2 * C + c;
  sum[0] = gw;
  sum[C] = gu;
  if (a.grad_initial && here.segment == 0) {
    const float* given = a.state + here.b * 3 * C + c;
    const float aa = given[0], bb = given[C];
    float* out = a.grad_initial + here.b * 3 * C + c;
    out[0] = ga;
    out[C] = gb;
    out[2 * C] = bb == 0 ? 0 : a.T > 0 ? ga * aa + gb * bb + rest : rest;
  }
}

// sums: [parts, 2, C] -> the totals of LANES channels, always added in the same order.
constexpr int PARTS = 8;

// audit: total: allow narrow load: a warp reads neighbouring channels, one fp32 number of each a lane, of few sums
__global__ void __launch_bounds__(LANES * PARTS) total(const float* sums, float* grad_w, float* grad_u, int64_t parts,
                                                       int64_t C) {
  __shared__ float shared[PARTS][2][LANES];
  const int lane = threadIdx.x, own = threadIdx.y;
  const int64_t c = int64_t(blockIdx.x) * LANES + lane;
  float gw = 0, gu = 0;
  if (c < C)
#pragma unroll 4
    for (int64_t part = own; part < parts; part += PARTS) {
      gw += sums[part * 2 * C + c];
      gu += sums[(part * 2 + 1) * C + c];
    }
  shared[own][0][lane] = gw;
  shared[own][1][lane] = gu;
  __syncthreads();
  if (own > 1 || c >= C) return;
  float sum = 0;
  for (int i = 0; i < PARTS; ++i) sum += shared[i][own][lane];
  (own ? grad_u : grad_w)[c] = sum;
}

// ---- entries --------------------------------------------------------------------------------------------------------

template <class Storage>
Strided<Storage> strided(const Tensor& t) { return {data<const Storage>(t), t.stride(0), t.stride(1)}; }

struct Sizes {
  int64_t B, T, C, steps, segments;

  Sizes(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const std::optional<Tensor>& state,
        int64_t steps)
      : B(0), T(0), C(0), steps(steps), segments(1) {
    check(k, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, k.scalar_type(), "k", Layout::ROWS);
    B = k.size(0), T = k.size(1), C = k.size(2);
    check(v, {B, T, C}, k.scalar_type(), "v", Layout::ROWS);
    check(w, {C}, ScalarType::Float, "w");
    check(u, {C}, ScalarType::Float, "u");
    check(state, {B, 3, C}, ScalarType::Float, "state");
    constexpr int64_t MOST = INT32_MAX - 1024;
    STD_TORCH_CHECK(B <= MOST && T <= MOST && steps <= MOST, "expected at most ", MOST, " sequences and steps");
    STD_TORCH_CHECK(steps > 0 && steps % SAVED == 0, "steps: expected a multiple of ", SAVED, ", got ", steps);
    segments = std::max<int64_t>(ceil_div(T, steps), 1);
  }

  int64_t chunks() const { return ceil_div(T, SAVED); }
  int blocks(int channels) const { return int(ceil_div(C, channels)); }

  // Warps for that many segments.
  unsigned grid(int channels, int64_t segments) const {
    const int64_t warps = blocks(channels) * B * segments;
    STD_TORCH_CHECK(warps <= INT32_MAX, "expected at most ", INT32_MAX, " warps, got ", warps);
    return unsigned(warps);
  }
};

template <class Storage, int N, int PIECE>
void run_forward(Forward<Storage> a, const Sizes& sizes, int64_t stream) {
  using Moved = Rows<Storage, N, PIECE>;
  a.blocks = sizes.blocks(LANES * N);
  const auto how = [&](int64_t segments) {
    const unsigned grid = sizes.grid(LANES * N, segments);
    return Launch{.grid = grid, .block = LANES, .stream = stream, .shared = Moved::shared(2)};
  };
  launch(how(sizes.segments - 1), forward<Storage, N, PIECE, true>, a);
  launch(how(sizes.segments), forward<Storage, N, PIECE, false>, a);
}

// found: [segments − 1, B, 3, C], scratch; a segment has `steps` steps, a multiple of 32. wide: lanes take several
// channels if rows are aligned.
void wkv4(Tensor w, Tensor u, Tensor k, Tensor v, std::optional<Tensor> state, Tensor y, Tensor final,
          Tensor checkpoints, Tensor found, int64_t steps, bool wide, int64_t stream) {
  const Sizes sizes(w, u, k, v, state, steps);
  const auto [B, T, C, _, segments] = sizes;
  check(y, {B, T, C}, k.scalar_type(), "y");
  check(final, {B, 3, C}, ScalarType::Float, "final");
  const bool training = checkpoints.size(0) > 0;
  check(checkpoints, {training ? sizes.chunks() : 0, B, 3, C}, ScalarType::Float, "checkpoints");
  check(found, {segments - 1, B, 3, C}, ScalarType::Float, "found");
  if (B * C == 0) return;
  const DeviceGuard guard(k);
  const bool aligned = is_aligned(k) && is_aligned(v) && is_aligned(y);
  for_device_dtype(k.scalar_type(), [&]<class Storage>(Storage) {
    constexpr int SIZE = sizeof(Storage);
    const Forward<Storage> a{strided<Storage>(k),
                             strided<Storage>(v),
                             data<const float>(w),
                             data<const float>(u),
                             data<const float>(state),
                             data<float>(found),
                             data<Storage>(y),
                             data<float>(final),
                             training ? data<float>(checkpoints) : nullptr,
                             C,
                             int(B),
                             int(T),
                             int(steps),
                             0};
    if (!aligned) run_forward<Storage, 1, SIZE>(a, sizes, stream);
    else if (wide) run_forward<Storage, 8 / SIZE, 16>(a, sizes, stream);
    else run_forward<Storage, 1, 16>(a, sizes, stream);
  });
}

template <class Storage, int PIECE>
void run_backward(const Backward<Storage>& a, const Sizes& sizes, int64_t stream) {
  using Moved = Rows<Storage, 1, PIECE>;
  const auto how = [&](int64_t segments, size_t shared) {
    return Launch{.grid = sizes.grid(LANES, segments), .block = LANES, .stream = stream, .shared = shared};
  };
  launch(how(sizes.segments - 1, Moved::shared(3)), local<Storage, PIECE>, a);
  const size_t shared = SAVED * 3 * (Moved::BYTES + LANES * sizeof(float));
  launch(how(sizes.segments, shared), backward<Storage, PIECE>, a);
}

// local: [segments − 1, B, 4, C] and sums: [segments, B, 2, C], scratch.
void wkv4_backward(std::optional<Tensor> grad_y, std::optional<Tensor> grad_state, Tensor w, Tensor u, Tensor k,
                   Tensor v, std::optional<Tensor> state, Tensor checkpoints, Tensor grad_w, Tensor grad_u,
                   Tensor grad_k, Tensor grad_v, std::optional<Tensor> grad_initial, Tensor local, Tensor sums,
                   int64_t steps, int64_t stream) {
  const Sizes sizes(w, u, k, v, state, steps);
  const auto [B, T, C, _, segments] = sizes;
  check(grad_y, {B, T, C}, k.scalar_type(), "grad_y", Layout::ROWS);
  check(grad_state, {B, 3, C}, ScalarType::Float, "grad_state");
  check(checkpoints, {sizes.chunks(), B, 3, C}, ScalarType::Float, "checkpoints");
  check(grad_w, {C}, ScalarType::Float, "grad_w");
  check(grad_u, {C}, ScalarType::Float, "grad_u");
  check(grad_k, {B, T, C}, k.scalar_type(), "grad_k");
  check(grad_v, {B, T, C}, k.scalar_type(), "grad_v");
  STD_TORCH_CHECK(state.has_value() == grad_initial.has_value(), "grad_initial: expected where there is a state");
  check(grad_initial, {B, 3, C}, ScalarType::Float, "grad_initial");
  check(local, {segments - 1, B, 4, C}, ScalarType::Float, "local");
  check(sums, {segments, B, 2, C}, ScalarType::Float, "sums");
  if (C == 0) return;
  const DeviceGuard guard(k);
  const bool aligned = is_aligned(k) && is_aligned(v) && (!grad_y || is_aligned(*grad_y)) && is_aligned(grad_k) &&
                       is_aligned(grad_v);
  for_device_dtype(k.scalar_type(), [&]<class Storage>(Storage) {
    auto seen = grad_y ? strided<Storage>(*grad_y) : strided<Storage>(k);
    seen.given = grad_y.has_value();
    const Backward<Storage> a{strided<Storage>(k),
                              strided<Storage>(v),
                              seen,
                              data<const float>(w),
                              data<const float>(u),
                              data<const float>(state),
                              data<const float>(checkpoints),
                              data<const float>(grad_state),
                              data<float>(local),
                              data<float>(sums),
                              data<Storage>(grad_k),
                              data<Storage>(grad_v),
                              data<float>(grad_w),
                              data<float>(grad_u),
                              data<float>(grad_initial),
                              C,
                              int(B),
                              int(T),
                              int(steps),
                              sizes.blocks(LANES)};
    if (aligned) run_backward<Storage, 16>(a, sizes, stream);
    else run_backward<Storage, sizeof(Storage)>(a, sizes, stream);
  });
  launch({.grid = unsigned(sizes.blocks(LANES)), .block = dim3(LANES, PARTS), .stream = stream}, total,
         data<const float>(sums), data<float>(grad_w), data<float>(grad_u), segments * B, C);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("wkv4(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor(a!) y, Tensor(b!) final, "
        "Tensor(c!) checkpoints, Tensor(d!) found, int steps, bool wide, int stream) -> ()");
  m.def("wkv4_backward(Tensor? grad_y, Tensor? grad_state, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, "
        "Tensor checkpoints, Tensor(a!) grad_w, Tensor(b!) grad_u, Tensor(c!) grad_k, Tensor(d!) grad_v, "
        "Tensor(e!)? grad_initial, Tensor(f!) local, Tensor(g!) sums, int steps, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) {
  m.impl("wkv4", TORCH_BOX(&wkv4));
  m.impl("wkv4_backward", TORCH_BOX(&wkv4_backward));
}
