// RWKV-6's and RWKV-7's WKV (equations: pykernels/ops/linear_recurrence.py): a matrix per head, a step at a time.
//
// A task owns a head of a sequence and a few vectors of v's columns. Its state, [K][columns], stays in the first level
// cache; one pass over it a step reads it for y, decays it, adds to it and (RWKV-7) reads it for the correction of the
// step after.
//
// The chunked form that matrix units need saves a quarter of a step's arithmetic here, and asks as much for its
// scores: the plain recurrence is as fast, at any T.

#include "linear_recurrence.h"

namespace {

template <class Storage, bool CORRECTED>
struct RecurrenceForward : RecurrenceArguments<Storage> {
  using Base = RecurrenceArguments<Storage>;
  using Acc = typename Base::Acc;
  using Base::B, Base::T, Base::H, Base::K, Base::V, Base::W;

  Storage* y;        // [B][T][H][V]
  Acc* final;        // [B][H][K][V]
  Acc* checkpoints;  // [ceil(T / SAVED)][B][H][K][V] or null

  // Vectors of columns at a time: so many that v, y and (RWKV-7) two corrections stay in registers.
  static constexpr int64_t MOST_VECTORS = PK_VECTOR_REGISTERS == 32 ? 4 : CORRECTED ? 2 : 4;

  void run() const {
    const int64_t vectors = ceil_div(V, W), heads = B * H;
    const double work = double(heads) * T * K * round_up(V, W) * (CORRECTED ? 3 : 1.5) * MULTIPLY_ADD;
    // Narrower slices read r, w, k as often for less: only where there are too few tasks otherwise.
    int64_t width = std::min(vectors, MOST_VECTORS);
    while (width > 1 && heads * ceil_div(vectors, width) < 2 * threads_for(work)) width = ceil_div(width, 2);
    const int64_t slices = ceil_div(vectors, width);
    run_tasks(heads * slices, work, [&](int64_t, int64_t task) {
      const int64_t head = task / slices, first = task % slices * width, count = std::min(width, vectors - first);
      [&]<int... N>(std::integer_sequence<int, N...>) {
        ((count == N + 1 ? slice<N + 1>(head / H, head % H, first * W) : void()), ...);
      }(std::make_integer_sequence<int, MOST_VECTORS>{});
    });
  }

  // N vectors of columns from j on.
  template <int N>
  void slice(int64_t b, int64_t h, int64_t j) const {
    constexpr int ROWS = CORRECTED ? 5 : 3;
    const int64_t padded = round_up(K, W), at = (b * H + h) * K * V + j;
    const Buffer<Acc> S(K * N * W), rows((2 * ROWS + 1) * padded);
    for (int64_t i = 0; i < K; ++i)
      for (int n = 0; n < N; ++n)
        store(&S[(i * N + n) * W], this->state ? load_some<Acc>(this->state + at + i * V + n * W, V - j - n * W)
                                               : Vec<Acc>{});
    Acc* u = &rows[2 * ROWS * padded];
    if constexpr (!CORRECTED)
      for (int64_t i = 0; i < K; i += W) store(u + i, load_some<Acc>(this->u + h * K + i, K - i));

    // The rows of a step and of the one after it, in the accumulator type.
    auto row = [&](int64_t t, int which) { return &rows[(t % 2 * ROWS + which) * padded]; };
    auto prepare = [&](int64_t t) {
      this->prefetch(b, t + 2, h, j);
      read_row(this->r.at(b, t, h), K, row(t, 0));
      decay(b, t, h, row(t, 1));
      read_row(this->k.at(b, t, h), K, row(t, 2));
      if constexpr (CORRECTED)
        read_row(this->a.at(b, t, h), K, row(t, 3)), read_row(this->b.at(b, t, h), K, row(t, 4));
    };

    if (T > 0) prepare(0);
    Vec<Acc> s[N] = {};  // aᵀS
    if constexpr (CORRECTED)
      for (int64_t i = 0; T > 0 && i < K; ++i)
        for (int n = 0; n < N; ++n) s[n] += row(0, 3)[i] * load<Vec<Acc>>(&S[(i * N + n) * W]);
    for (int64_t t = 0; t < T; ++t) {
      if (checkpoints && t % SAVED == 0) copy_out<N>(S.get(), checkpoints + t / SAVED * B * H * K * V + at, j);
      if (t + 1 < T) prepare(t + 1);
      Vec<Acc> v[N], out[N];
      PK_UNROLL
      for (int n = 0; n < N; ++n) v[n] = load_some<Acc>(this->v.at(b, t, h) + j + n * W, V - j - n * W);
      advance<N>(S.get(), row(t, 0), row(t, 1), row(t, 2), row(t, 4 % ROWS), row(t + 1, 3 % ROWS), v, s, out);
      Acc present = 0;
      if constexpr (!CORRECTED) present = weight(row(t, 0), row(t, 2), u);
      PK_UNROLL
      for (int n = 0; n < N; ++n)
        store_some<Acc>(y_row(b, t, h) + j + n * W, this->scale * (out[n] + present * v[n]), V - j - n * W);
    }
    copy_out<N>(S.get(), final + at, j);
  }

  // Apart from the loop over the state, which needs the registers of this one's constants.
  __attribute__((noinline)) void decay(int64_t b, int64_t t, int64_t h, Acc* to) const {
    read_decay(this->w.at(b, t, h), K, to);
  }

  // A step: S, and s from this step's aᵀS to the next one's. b: this step's correction; a: the next one's.
  template <int N>
  void advance(Acc* S, const Acc* r, const Acc* d, const Acc* k, const Acc* b, const Acc* a, const Vec<Acc> (&v)[N],
               Vec<Acc> (&s)[N], Vec<Acc> (&out)[N]) const {
    const int64_t rows = K;
    Vec<Acc> y[N] = {}, next[N] = {};
    for (int64_t i = 0; i < rows; ++i, S += N * W) {
      // Broadcast here, once for all columns: behind a store the compiler would load them again.
      const Vec<Acc> reader = broadcast(r[i]), decay = broadcast(d[i]), key = broadcast(k[i]);
      Vec<Acc> correction = {}, coming = {};
      if constexpr (CORRECTED) correction = broadcast(b[i]), coming = broadcast(a[i]);
      PK_UNROLL
      for (int n = 0; n < N; ++n) {
        Vec<Acc> x = load<Vec<Acc>>(S + n * W);
        if constexpr (!CORRECTED) y[n] += reader * x;
        x = decay * x + key * v[n];
        if constexpr (CORRECTED) {
          x += correction * s[n];
          y[n] += reader * x;
          next[n] += coming * x;
        }
        store(S + n * W, x);
      }
    }
    PK_UNROLL
    for (int n = 0; n < N; ++n) {
      out[n] = y[n];
      s[n] = next[n];
    }
  }

  // r·(u∘k)
  Acc weight(const Acc* r, const Acc* k, const Acc* u) const {
    Vec<Acc> sum = {};
    for (int64_t i = 0; i < K; i += W) sum += load<Vec<Acc>>(r + i) * load<Vec<Acc>>(u + i) * load<Vec<Acc>>(k + i);
    return reduce_add<Acc>(sum);
  }

  Storage* y_row(int64_t b, int64_t t, int64_t h) const { return y + ((b * T + t) * H + h) * V; }

  template <int N>
  void copy_out(const Acc* S, Acc* to, int64_t j) const {
    for (int64_t i = 0; i < K; ++i)
      for (int n = 0; n < N; ++n)
        store_some<Acc>(to + i * V + n * W, load<Vec<Acc>>(S + (i * N + n) * W), V - j - n * W);
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_recurrence(Tensor r, Tensor w, Tensor k, Tensor v, std::optional<Tensor> u,
                                                     std::optional<Tensor> a, std::optional<Tensor> b,
                                                     std::optional<Tensor> state, double scale, bool training,
                                                     int64_t /*backend*/) {
  check_recurrence(r, w, k, v, u, a, b, state);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), K = r.size(3), V = v.size(3);
  const ScalarType exact = accumulator_of(r.scalar_type());
  Tensor y = empty({B, T, H, V}, r.scalar_type()), final = empty({B, H, K, V}, exact);
  Tensor checkpoints = empty({training ? ceil_div(T, SAVED) * B * H * K * V : 0}, exact);
  r = dense_rows(r), w = dense_rows(w), k = dense_rows(k), v = dense_rows(v), a = dense_rows(a), b = dense_rows(b);
  u = dense(u), state = dense(state);
  for_dtype(r.scalar_type(), [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    auto run = [&]<bool CORRECTED>(std::bool_constant<CORRECTED>) {
      RecurrenceForward<Storage, CORRECTED>{{r, w, k, v, u, a, b, state, scale},
                                            data<Storage>(y),
                                            data<Acc>(final),
                                            training ? data<Acc>(checkpoints) : nullptr}
          .run();
    };
    a ? run(std::true_type{}) : run(std::false_type{});
  });
  return {y, final, checkpoints};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("linear_recurrence", TORCH_BOX(&linear_recurrence)); }
