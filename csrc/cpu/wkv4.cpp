// RWKV-4's WKV and its backward (equations: pykernels/ops/wkv4.py), a vector of channels at a time.
//
// A task owns a block of channels of one sequence and, where those are too few for the threads, one segment of its
// time. It goes through time in tiles and through its channels within a tile, so that a state stays in registers
// for some steps and rows are still read nearly in order. Of the two exponentials whose larger
// exponent is taken out, one is e^0: a step takes two, not four.
//
// Segments run side by side: each first finds its state from an empty one (half the work of a step), these are joined
// in order, and each runs again from where it then begins. Backward likewise, from the last to the first.
#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tasks.h"
#include "vec.h"
#include "view.h"

namespace {

constexpr int64_t SAVED = 32;  // steps from one saved state to the next, as in pykernels/ops/wkv4.py
constexpr double STEP_TIME = 0.35;  // ns of a step of a channel, forward
constexpr int64_t TILE_STEPS = 8;  // steps that forward takes a few channels through before the next channels
// pp of a state that has seen nothing, as the caller sees it. Inside it is the lowest number.
constexpr double EMPTY_EXPONENT = -1e38;

template <class T>
constexpr T LOWEST = std::numeric_limits<T>::lowest();

// An exponent that overflowed downwards, or was -inf, as the lowest number: no difference is of two infinities then,
// and the empty state is no larger than anything. NaN stays NaN.
template <class T>
PK_INLINE Vec<T> finite(Vec<T> exponent) { return max<T>(broadcast(LOWEST<T>), exponent); }

// e^-|d|
template <class T>
PK_INLINE Vec<T> decayed(Vec<T> d) { return exp2<T>(absolute<T>(d) * T(-1.4426950408889634074)); }

template <class T>
struct State {
  Vec<T> aa, bb, pp;

  // From [3][C] in memory, `count` channels.
  PK_INLINE State read(const T* p, int64_t C, int64_t count) {
    return {load_some<T>(p, count), load_some<T>(p + C, count), load_some<T>(p + 2 * C, count)};
  }
  inline void write(T* p, int64_t C, int64_t count) const {
    store_some<T>(p, aa, count);
    store_some<T>(p + C, bb, count);
    store_some<T>(p + 2 * C, pp, count);
  }
  PK_INLINE State empty() { return {Vec<T>{}, Vec<T>{}, broadcast(LOWEST<T>)}; }
  // With another pp where nothing was seen.
  PK_INLINE State with_empty(State s, T pp) { return {s.aa, s.bb, select<T>(s.bb == T(0), broadcast(pp), s.pp)}; }
};

// The weights of the past and of the present in a step's new state.
template <class T>
struct Weights {
  Vec<Bits<T>> wins;  // whether the present is the maximum
  Vec<T> past, present;
};

template <class T>
PK_INLINE Weights<T> weigh(Vec<T> before, Vec<T> exponent) {
  Vec<T> d = before - exponent, e = decayed<T>(d);
  Vec<Bits<T>> wins = d < T(0);
  return {wins, select<T>(wins, e, broadcast(T(1))), select<T>(wins, broadcast(T(1)), e)};
}

template <class T>
PK_INLINE Weights<T> advance(State<T>& s, Vec<T> w, Vec<T> k, Vec<T> v) {
  Vec<T> before = finite<T>(s.pp + w);
  Weights<T> q = weigh<T>(before, k);
  s = {q.past * s.aa + q.present * v, q.past * s.bb + q.present, select<T>(q.wins, k, before)};
  return q;
}

// A state of `steps` later, and what those steps made of an empty state.
template <class T>
PK_INLINE State<T> join(State<T> left, State<T> right, Vec<T> w, int64_t steps) {
  Vec<T> before = finite<T>(left.pp + w * T(steps));
  Weights<T> q = weigh<T>(before, right.pp);
  return {q.past * left.aa + q.present * right.aa, q.past * left.bb + q.present * right.bb,
          select<T>(q.wins, right.pp, before)};
}

// How the work is shared out: blocks of channels, and segments of time when there are not enough of those.
struct Shares {
  int64_t blocks, width, segments, steps;

  Shares(int64_t B, int64_t T, int64_t C, int64_t W) {
    const int64_t threads = threads_for(STEP_TIME * B * T * C), wanted = threads == 1 ? 1 : 4 * threads;
    blocks = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(B, 1)), 1, std::max<int64_t>(C / (4 * W), 1));
    width = round_up(ceil_div(C, blocks), W);
    blocks = ceil_div(C, width);
    // Three passes' work instead of two: worth it where at least half of the threads would idle.
    const int64_t idle = threads / std::max<int64_t>(B * blocks, 1);
    segments = idle >= 2 ? std::clamp<int64_t>(T / (2 * SAVED), 1, 2 * idle) : 1;
    steps = std::max<int64_t>(round_up(ceil_div(T, segments), SAVED), SAVED);
    segments = std::max<int64_t>(ceil_div(T, steps), 1);
  }
};

template <class Storage>
struct Wkv4 {
  using Acc = AccOf<Storage>;
  static constexpr int64_t W = lanes<Acc>;

  int64_t B, T, C;
  const Acc *w, *u;
  const Storage *k, *v;
  const Acc* initial;  // [B][3][C] or null
  Shares shares;
  Buffer<Acc> starts;  // [segments][B][3][C]: the state before each segment

  Wkv4(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const std::optional<Tensor>& state)
      : B(k.size(0)), T(k.size(1)), C(k.size(2)), w(data<const Acc>(w)), u(data<const Acc>(u)),
        k(data<const Storage>(k)), v(data<const Storage>(v)), initial(data<const Acc>(state)), shares(B, T, C, W),
        starts(shares.segments > 1 ? shares.segments * B * 3 * C : 0) {}

  Acc* start_of(int64_t segment, int64_t b) const { return starts.get() + (segment * B + b) * 3 * C; }

  State<Acc> initial_state(int64_t b, int64_t c) const {
    if (!initial) return State<Acc>::empty();
    return State<Acc>::with_empty(State<Acc>::read(initial + b * 3 * C + c, C, C - c), LOWEST<Acc>);
  }

  // f(b, first channel, last, segment) for all. passes: times forward's work.
  template <class F>
  void for_blocks(double passes, const F& f) const {
    run_tasks(shares.segments * B * shares.blocks, passes * STEP_TIME * B * T * C, [&](int64_t, int64_t task) {
      const int64_t block = task % shares.blocks, rest = task / shares.blocks, first = block * shares.width;
      f(rest % B, first, std::min(C, first + shares.width), rest / B);
    });
  }

  // f(first step, last) for the tiles of a segment, backwards if asked.
  template <class F>
  void for_tiles(int64_t segment, bool reverse, const F& f, int64_t size = SAVED) const {
    const int64_t begin = segment * shares.steps, end = std::min(T, begin + shares.steps);
    const int64_t tiles = ceil_div(end - begin, size);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t = begin + (reverse ? tiles - 1 - i : i) * size;
      f(t, std::min(end, t + size));
    }
  }

  // Fills `starts`.
  void join_segments() const {
    if (shares.segments == 1) return;
    for_blocks(0.5, [&](int64_t b, int64_t first, int64_t last, int64_t segment) {
      if (segment + 1 == shares.segments) return;
      for (int64_t c = first; c < last; c += W) State<Acc>::empty().write(start_of(segment + 1, b) + c, C, C - c);
      for_tiles(segment, false, [&](int64_t begin, int64_t end) {
        for (int64_t c = first; c < last; c += W) {
          const int64_t count = C - c;
          auto s = State<Acc>::read(start_of(segment + 1, b) + c, C, count);
          const Vec<Acc> decay = load_some<Acc>(w + c, count);
          for (int64_t t = begin; t < end; ++t) {
            const int64_t at = (b * T + t) * C + c;
            advance<Acc>(s, decay, load_some<Acc>(k + at, count), load_some<Acc>(v + at, count));
          }
          s.write(start_of(segment + 1, b) + c, C, count);
        }
      });
    });
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < C; c += W) {
        auto s = initial_state(b, c);
        s.write(start_of(0, b) + c, C, C - c);
        for (int64_t segment = 1; segment < shares.segments; ++segment) {
          Acc* p = start_of(segment, b) + c;
          s = join<Acc>(s, State<Acc>::read(p, C, C - c), load_some<Acc>(w + c, C - c), shares.steps);
          s.write(p, C, C - c);
        }
      }
  }

  void forward(Storage* y, Acc* final, Acc* checkpoints) const {
    join_segments();
    for_blocks(1, [&](int64_t b, int64_t first, int64_t last, int64_t segment) {
      Buffer<Acc> carried(3 * shares.width);
      for (int64_t c = first; c < last; c += W) {
        auto s = shares.segments == 1 ? initial_state(b, c) : State<Acc>::read(start_of(segment, b) + c, C, C - c);
        s.write(&carried[c - first], shares.width, W);
      }
      for_tiles(segment, false, [&](int64_t begin, int64_t end) {
        Acc* saved = checkpoints && begin % SAVED == 0 ? checkpoints + (begin / SAVED * B + b) * 3 * C : nullptr;
        int64_t c = first;
        // What is read next: the channels after these, at the last ones the first of the tile after.
        auto ahead = [&](int64_t n) { return c + n < last ? n : TILE_STEPS * C + first - c; };
        for (; c + 2 * W <= last; c += 2 * W)
          tile<2>(b, c, begin, end, &carried[c - first], saved, y, ahead(2 * W));
        for (; c < last; c += W) tile<1>(b, c, begin, end, &carried[c - first], saved, y, ahead(W));
      }, TILE_STEPS);
      if (segment + 1 == shares.segments)
        for (int64_t c = first; c < last; c += W)
          State<Acc>::with_empty(State<Acc>::read(&carried[c - first], shares.width, W), EMPTY_EXPONENT)
              .write(final + b * 3 * C + c, C, C - c);
    });
  }

  // N vectors of channels from c on through a tile of steps: their chains of operations fill each other's gaps.
  template <int N>
  void tile(int64_t b, int64_t c, int64_t begin, int64_t end, Acc* carried, Acc* saved, Storage* y,
            int64_t ahead) const {
    State<Acc> s[N];
    Vec<Acc> decay[N], bonus[N];
    const int64_t count = N > 1 ? W : C - c;
    PK_UNROLL
    for (int n = 0; n < N; ++n) {
      s[n] = State<Acc>::read(carried + n * W, shares.width, W);
      decay[n] = load_some<Acc>(w + c + n * W, count);
      bonus[n] = load_some<Acc>(u + c + n * W, count);
      if (saved) s[n].write(saved + c + n * W, C, count);
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (b * T + t) * C + c;
      PK_UNROLL
      for (int n = 0; n < N; ++n) {
        __builtin_prefetch(k + at + ahead + n * W);
        __builtin_prefetch(v + at + ahead + n * W);
        const Vec<Acc> key = load_some<Acc>(k + at + n * W, count), value = load_some<Acc>(v + at + n * W, count);
        const Weights<Acc> q = weigh<Acc>(s[n].pp, finite<Acc>(bonus[n] + key));
        store_some<Acc>(y + at + n * W, (q.past * s[n].aa + q.present * value) / (q.past * s[n].bb + q.present), count);
        advance<Acc>(s[n], decay[n], key, value);
      }
    }
    PK_UNROLL
    for (int n = 0; n < N; ++n) s[n].write(carried + n * W, shares.width, W);
  }
};

template <class Storage>
struct Wkv4Backward : Wkv4<Storage> {
  using Base = Wkv4<Storage>;
  using Acc = typename Base::Acc;
  using Base::B, Base::T, Base::C, Base::W, Base::w, Base::u, Base::k, Base::v, Base::shares;

  const Storage* grad_y;      // or null
  const Acc* grad_final;      // [B][3][C] or null
  const Acc* checkpoints;     // [ceil(T / SAVED)][B][3][C]
  Storage *grad_k, *grad_v;
  Acc* grad_initial;          // [B][3][C] or null
  Acc *grad_w, *grad_u;       // [C]

  // Between tiles, of a vector of channels: the gradients of the state (rest: of pp beyond aa and bb's shares), the
  // sums of the decay's and the bonus's, and of a segment whether the state won every step, and its weight at the end:
  // the product of the steps', not e^(pp + n w - pp'), which rounds otherwise than they did.
  enum { GA, GB, REST, GW, GU, KEPT, WEIGHT, CARRIED };

  struct Step {
    Vec<Acc> aa, bb, past, present, from_past, from_present, y;
    Vec<Bits<Acc>> wins;
  };

  void run() {
    if (C == 0) return;
    Buffer<Acc> incoming(shares.segments * B * 3 * C), sums(shares.segments * B * 2 * C);
    auto incoming_of = [&](int64_t segment, int64_t b) { return incoming.get() + (segment * B + b) * 3 * C; };
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < 3 * C; ++c)
        incoming_of(shares.segments - 1, b)[c] = grad_final && c < 2 * C ? grad_final[b * 3 * C + c] : Acc(0);
    if (shares.segments > 1) join_backward(incoming_of);

    this->for_blocks(3, [&](int64_t b, int64_t first, int64_t last, int64_t segment) {
      Buffer<Acc> carried(CARRIED * shares.width);
      for (int64_t c = first; c < last; c += W) {
        Acc* own = &carried[(c - first) * CARRIED];
        const Acc* in = incoming_of(segment, b) + c;
        for (int i : {GA, GB, REST}) store(own + i * W, load_some<Acc>(in + i * C, C - c));
        for (int i : {GW, GU}) store(own + i * W, Vec<Acc>{});
        for (int i : {KEPT, WEIGHT}) store(own + i * W, broadcast(Acc(1)));
      }
      pass<true>(b, first, last, segment, carried);
      for (int64_t c = first; c < last; c += W) {
        const Acc* own = &carried[(c - first) * CARRIED];
        const int64_t count = C - c;
        for (int i = 0; i < 2; ++i)
          store_some<Acc>(&sums[((segment * B + b) * 2 + i) * C + c], load<Vec<Acc>>(own + (GW + i) * W), count);
        if (segment == 0 && grad_initial) store_initial(b, c, own);
      }
    });

    for (int64_t c = 0; c < C; ++c) grad_w[c] = grad_u[c] = 0;
    for (int64_t part = 0; part < shares.segments * B; ++part)
      for (int64_t c = 0; c < C; ++c) {
        grad_w[c] += sums[part * 2 * C + c];
        grad_u[c] += sums[(part * 2 + 1) * C + c];
      }
  }

  // The gradients that enter each segment from the one after it.
  template <class F>
  void join_backward(const F& incoming_of) {
    Buffer<Acc> local(shares.segments * B * CARRIED * round_up(C, W));
    auto local_of = [&](int64_t segment, int64_t b, int64_t c) {
      return local.get() + ((segment * B + b) * round_up(C, W) + c) * CARRIED;
    };
    this->for_blocks(3, [&](int64_t b, int64_t first, int64_t last, int64_t segment) {
      if (segment == 0) return;
      Buffer<Acc> carried(CARRIED * shares.width);
      for (int64_t c = first; c < last; c += W) {
        Acc* own = &carried[(c - first) * CARRIED];
        for (int i = 0; i < CARRIED; ++i) store(own + i * W, broadcast(Acc(i == KEPT || i == WEIGHT)));
      }
      pass<false>(b, first, last, segment, carried);
      std::copy_n(carried.get(), round_up(last - first, W) * CARRIED, local_of(segment, b, first));
    });
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < C; c += W) {
        const int64_t count = C - c;
        for (int64_t segment = shares.segments - 1; segment > 0; --segment) {
          const Acc *own = local_of(segment, b, c), *in = incoming_of(segment, b) + c;
          Acc* out = incoming_of(segment - 1, b) + c;
          const Vec<Acc> kept = load<Vec<Acc>>(own + KEPT * W), weight = load<Vec<Acc>>(own + WEIGHT * W);
          for (int i : {GA, GB})
            store_some<Acc>(out + i * C, load<Vec<Acc>>(own + i * W) + weight * load_some<Acc>(in + i * C, count),
                            count);
          const Vec<Acc> through = load_some<Acc>(in + REST * C, count);
          store_some<Acc>(out + REST * C,
                          load<Vec<Acc>>(own + REST * W) + select<Acc>(kept != Acc(0), through, Vec<Acc>{}), count);
        }
      }
  }

  // A segment of a block, backwards: its tiles' steps again from their checkpoint, then back through them.
  template <bool WRITE>
  void pass(int64_t b, int64_t first, int64_t last, int64_t segment, const Buffer<Acc>& carried) {
    Step steps[SAVED];
    this->for_tiles(segment, true, [&](int64_t begin, int64_t end) {
      for (int64_t c = first; c < last; c += W) {
        const int64_t count = C - c;
        Acc* own = &carried[(c - first) * CARRIED];
        auto carry = [&](int i) { return load<Vec<Acc>>(own + i * W); };
        auto at = [&](int64_t t) { return (b * T + t) * C + c; };
        const Vec<Acc> decay = load_some<Acc>(w + c, count), bonus = load_some<Acc>(u + c, count);
        auto s = State<Acc>::read(checkpoints + (begin / SAVED * B + b) * 3 * C + c, C, count);
        for (int64_t t = begin; t < end; ++t) {
          const Vec<Acc> key = load_some<Acc>(k + at(t), count), value = load_some<Acc>(v + at(t), count);
          Step& step = steps[t - begin];
          step.aa = s.aa;
          step.bb = s.bb;
          const Weights<Acc> q = weigh<Acc>(s.pp, finite<Acc>(bonus + key));
          const Vec<Acc> inverse = Acc(1) / (q.past * s.bb + q.present);
          step.from_past = q.past * inverse;
          step.from_present = q.present * inverse;
          step.y = step.from_past * s.aa + step.from_present * value;
          const Weights<Acc> next = advance<Acc>(s, decay, key, value);
          step.past = next.past;
          step.present = next.present;
          step.wins = next.wins;
        }
        Vec<Acc> ga = carry(GA), gb = carry(GB), rest = carry(REST), gw = carry(GW), gu = carry(GU), kept = carry(KEPT),
                 weight = carry(WEIGHT);
        if (end == T && grad_final) {
          const auto given = State<Acc>::read(grad_final + b * 3 * C + c, C, count);
          rest = select<Acc>(s.bb == Acc(0), Vec<Acc>{}, given.pp - (given.aa * s.aa + given.bb * s.bb));
        }
        for (int64_t t = end - 1; t >= begin; --t) {
          const Step& step = steps[t - begin];
          const Vec<Acc> gy = grad_y ? load_some<Acc>(grad_y + at(t), count) : Vec<Acc>{};
          const Vec<Acc> z = gy * step.from_past;
          if constexpr (WRITE) {
            const Vec<Acc> value = load_some<Acc>(v + at(t), count), x = gy * step.from_present;
            const Vec<Acc> m = x * (value - step.y);
            store_some<Acc>(grad_v + at(t), x + step.present * ga, count);
            store_some<Acc>(grad_k + at(t),
                            m + step.present * (ga * value + gb) + select<Acc>(step.wins, rest, Vec<Acc>{}), count);
            gu += m;
            gw += step.past * (ga * step.aa + gb * step.bb) + select<Acc>(step.wins, Vec<Acc>{}, rest);
          }
          rest = select<Acc>(step.wins, Vec<Acc>{}, rest);
          kept = select<Acc>(step.wins, Vec<Acc>{}, kept);
          weight *= step.past;
          ga = z + step.past * ga;
          gb = step.past * gb - z * step.y;
        }
        const Vec<Acc> out[] = {ga, gb, rest, gw, gu, kept, weight};
        for (int i = GA; i < CARRIED; ++i) store(own + i * W, out[i]);
      }
    });
  }

  // Of the state before the first step, from what was carried to it.
  void store_initial(int64_t b, int64_t c, const Acc* own) const {
    const int64_t count = C - c, at = b * 3 * C + c;
    const auto s = State<Acc>::read(this->initial + at, C, count);
    const Vec<Acc> ga = load<Vec<Acc>>(own + GA * W), gb = load<Vec<Acc>>(own + GB * W);
    Vec<Acc> pp = load<Vec<Acc>>(own + REST * W) + (ga * s.aa + gb * s.bb);
    if (T == 0) pp = grad_final ? load_some<Acc>(grad_final + at + 2 * C, count) : Vec<Acc>{};
    pp = select<Acc>(s.bb == Acc(0), Vec<Acc>{}, pp);
    State<Acc>{ga, gb, pp}.write(grad_initial + at, C, count);
  }
};

// ---- the ops --------------------------------------------------------------------------------------------------------

void check_wkv4(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                const std::optional<Tensor>& state) {
  constexpr Layout ANY = Layout::ANY;
  const ScalarType dtype = k.scalar_type(), exact = accumulator_of(dtype);
  check(k, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, dtype, "k", ANY);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  check(v, {B, T, C}, dtype, "v", ANY);
  check(w, {C}, exact, "w", ANY);
  check(u, {C}, exact, "u", ANY);
  check(state, {B, 3, C}, exact, "state", ANY);
}

std::tuple<Tensor, Tensor, Tensor> wkv4(Tensor w, Tensor u, Tensor k, Tensor v, std::optional<Tensor> state,
                                        bool training, int64_t /*backend*/) {
  check_wkv4(w, u, k, v, state);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  const ScalarType exact = accumulator_of(k.scalar_type());
  Tensor y = empty({B, T, C}, k.scalar_type()), final = empty({B, 3, C}, exact);
  Tensor checkpoints = empty({training ? ceil_div(T, SAVED) * B * 3 * C : 0}, exact);
  w = dense(w), u = dense(u), k = dense(k), v = dense(v), state = dense(state);
  for_dtype(k.scalar_type(), [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    Wkv4<Storage>(w, u, k, v, state)
        .forward(data<Storage>(y), data<Acc>(final), training ? data<Acc>(checkpoints) : nullptr);
  });
  return {y, final, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(std::optional<Tensor> grad_y,
                                                                 std::optional<Tensor> grad_final, Tensor w, Tensor u,
                                                                 Tensor k, Tensor v, std::optional<Tensor> state,
                                                                 Tensor checkpoints, int64_t /*backend*/) {
  check_wkv4(w, u, k, v, state);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  const ScalarType exact = accumulator_of(k.scalar_type());
  check(grad_y, {B, T, C}, k.scalar_type(), "grad_y", Layout::ANY);
  check(grad_final, {B, 3, C}, exact, "grad_final", Layout::ANY);
  check(checkpoints, {ceil_div(T, SAVED) * B * 3 * C}, exact, "checkpoints", Layout::ANY);
  Tensor grad_w = empty({C}, exact), grad_u = empty({C}, exact);
  Tensor grad_k = empty({B, T, C}, k.scalar_type()), grad_v = empty({B, T, C}, k.scalar_type());
  Tensor grad_initial = empty(state ? std::vector<int64_t>{B, 3, C} : std::vector<int64_t>{0}, exact);
  w = dense(w), u = dense(u), k = dense(k), v = dense(v), state = dense(state), checkpoints = dense(checkpoints);
  grad_y = dense(grad_y), grad_final = dense(grad_final);
  for_dtype(k.scalar_type(), [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    Wkv4Backward<Storage>{{w, u, k, v, state},
                          data<const Storage>(grad_y),
                          data<const Acc>(grad_final),
                          data<const Acc>(checkpoints),
                          data<Storage>(grad_k),
                          data<Storage>(grad_v),
                          state ? data<Acc>(grad_initial) : nullptr,
                          data<Acc>(grad_w),
                          data<Acc>(grad_u)}
        .run();
  });
  return {grad_w, grad_u, grad_k, grad_v, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("wkv4", TORCH_BOX(&wkv4));
  m.impl("wkv4_backward", TORCH_BOX(&wkv4_backward));
}
