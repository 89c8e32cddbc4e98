// The backward of the linear recurrence (equations: pykernels/ops/linear_recurrence.py).
//
// A task owns a head of a sequence and takes it SAVED steps at a time, from the last to the first. States lie
// transposed, K along the vectors, since most results are sums over V, in tiles of W columns by W rows (W the vector's
// width): all of a tile's addresses are one pointer and constants. Of SAVED steps a tile's columns are taken at a time:
// their states are made again from the saved one and kept, then the steps are gone through backwards.

#include "linear_recurrence.h"

namespace {

// ---- a head's memory ------------------------------------------------------------------------------------------------

// The rows of a step, and the gradients of these.
enum RecurrenceRow { R, D, KEY, A, CORRECTION, ROWS };

template <class Acc>
constexpr int64_t TILE = lanes<Acc> * lanes<Acc>;  // numbers in it

template <class Acc>
struct HeadScratch {
  static constexpr int64_t W = lanes<Acc>;

  int64_t padded, columns;
  Buffer<Acc> G;             // [columns / W][padded / W][TILE], the gradient of the state
  Buffer<Acc> states;        // [SAVED + 1][padded / W][TILE], of a tile's columns
  Buffer<Acc> rows;          // [ROWS][SAVED][padded]
  Buffer<Acc> grads;         // [ROWS][SAVED][padded]
  Buffer<Acc> v, g, grad_v;  // [SAVED][columns]
  Buffer<Acc> s;             // [SAVED][W], aᵀS of those columns
  Buffer<Acc> grad_u;        // [padded]

  HeadScratch(int64_t padded, int64_t columns)
      : padded(padded), columns(columns), G(columns * padded), states((SAVED + 1) * W * padded),
        rows(ROWS * SAVED * padded), grads(ROWS * SAVED * padded), v(SAVED * columns), g(SAVED * columns),
        grad_v(SAVED * columns), s(SAVED * W), grad_u(padded) {}
  Acc* row(RecurrenceRow which, int64_t t) const { return &rows[(which * SAVED + t) * padded]; }
  Acc* grad(RecurrenceRow which, int64_t t) const { return &grads[(which * SAVED + t) * padded]; }
  Acc* state(int64_t t) const { return &states[t * W * padded]; }
  Acc* G_of(int64_t j) const { return &G[j * padded]; }
};

// The columns from j on of a [K][V] matrix (null: zeros) as tiles, and back.
template <class Acc>
void to_tiles(const Acc* from, int64_t K, int64_t V, int64_t j, Acc* to) {
  constexpr int64_t W = lanes<Acc>;
  for (int64_t i = 0; i < K; i += W, to += TILE<Acc>) {
    Vec<Acc> m[W];
    for (int64_t n = 0; n < W; ++n)
      m[n] = from && i + n < K ? load_some<Acc>(from + (i + n) * V + j, V - j) : Vec<Acc>{};
    transpose<Acc>(m);
    for (int64_t n = 0; n < W; ++n) store(to + n * W, m[n]);
  }
}

template <class Acc>
void from_tiles(const Acc* from, int64_t K, int64_t V, int64_t j, Acc* to) {
  constexpr int64_t W = lanes<Acc>;
  for (int64_t i = 0; i < K; i += W, from += TILE<Acc>) {
    Vec<Acc> m[W];
    for (int64_t n = 0; n < W; ++n) m[n] = load<Vec<Acc>>(from + n * W);
    transpose<Acc>(m);
    for (int64_t n = 0; n < W && i + n < K; ++n) store_some<Acc>(to + (i + n) * V + j, m[n], V - j);
  }
}

// ---- steps ----------------------------------------------------------------------------------------------------------

// Every column's product with a row.
template <class Acc>
Vec<Acc> row_products(const Acc* tile, const Acc* row, int64_t padded) {
  constexpr int64_t W = lanes<Acc>;
  Vec<Acc> sums[W] = {};
  for (int64_t i = 0; i < padded; i += W, tile += TILE<Acc>) {
    const Vec<Acc> x = load<Vec<Acc>>(row + i);
    PK_UNROLL
    for (int n = 0; n < W; ++n) sums[n] += x * load<Vec<Acc>>(tile + n * W);
  }
  return row_sums<Acc>(sums);
}

template <class Acc>
PK_INLINE void add_to(Acc* p, Vec<Acc> v) { store(p, load<Vec<Acc>>(p) + v); }

// The states after every step, of the columns from j on; x.state(0) is the state before the first.
template <bool CORRECTED, class Acc>
PK_INLINE void replay(const HeadScratch<Acc>& x, int64_t j, int64_t steps) {
  constexpr int64_t W = lanes<Acc>;
  const int64_t padded = x.padded;
  for (int64_t t = 0; t < steps; ++t) {
    const Acc *v = &x.v[t * x.columns + j], *s = &x.s[t * W], *from = x.state(t);
    const Acc *d = x.row(D, t), *k = x.row(KEY, t), *correction = x.row(CORRECTION, t);
    Acc* to = x.state(t + 1);
    if constexpr (CORRECTED) store(&x.s[t * W], row_products(from, x.row(A, t), padded));
    for (int64_t i = 0; i < padded; i += W, from += TILE<Acc>, to += TILE<Acc>) {
      const Vec<Acc> decay = load<Vec<Acc>>(d + i), key = load<Vec<Acc>>(k + i);
      Vec<Acc> b = {};
      if constexpr (CORRECTED) b = load<Vec<Acc>>(correction + i);
      PK_UNROLL
      for (int n = 0; n < W; ++n) {
        Vec<Acc> value = decay * load<Vec<Acc>>(from + n * W) + key * v[n];
        if constexpr (CORRECTED) value += b * s[n];
        store(to + n * W, value);
      }
    }
  }
}

template <class Acc>
PK_INLINE void step_back(const HeadScratch<Acc>& x, int64_t j, int64_t t) {
  constexpr int64_t W = lanes<Acc>;
  const int64_t padded = x.padded;
  alignas(64) Acc v[W], g[W];  // copies: the compiler cannot know that no store to G changes them
  std::copy_n(&x.v[t * x.columns + j], W, v), std::copy_n(&x.g[t * x.columns + j], W, g);
  const Acc* S = x.state(t);
  const Acc *r = x.row(R, t), *d = x.row(D, t), *k = x.row(KEY, t);
  Acc *G = x.G_of(j), *grad_r = x.grad(R, t), *grad_d = x.grad(D, t), *grad_k = x.grad(KEY, t);
  add_to(&x.grad_v[t * x.columns + j], row_products(G, k, padded));
  for (int64_t i = 0; i < padded; i += W, G += TILE<Acc>, S += TILE<Acc>) {
    const Vec<Acc> reader = load<Vec<Acc>>(r + i), decay = load<Vec<Acc>>(d + i);
    Vec<Acc> gr[2] = {}, gk[2] = {}, gd[2] = {};
    PK_UNROLL
    for (int n = 0; n < W; ++n) {
      const Vec<Acc> of = load<Vec<Acc>>(G + n * W), state = load<Vec<Acc>>(S + n * W);
      gr[n % 2] += state * g[n];
      gk[n % 2] += of * v[n];
      gd[n % 2] += state * of;
      store(G + n * W, decay * of + reader * g[n]);
    }
    add_to(grad_r + i, gr[0] + gr[1]);
    add_to(grad_k + i, gk[0] + gk[1]);
    add_to(grad_d + i, gd[0] + gd[1]);
  }
}

template <class Acc>
PK_INLINE void step_back_corrected(const HeadScratch<Acc>& x, int64_t j, int64_t t) {
  constexpr int64_t W = lanes<Acc>;
  const int64_t padded = x.padded;
  alignas(64) Acc v[W], g[W], s[W];  // copies, as in step_back
  std::copy_n(&x.v[t * x.columns + j], W, v), std::copy_n(&x.g[t * x.columns + j], W, g);
  std::copy_n(&x.s[t * W], W, s);
  const Acc *before = x.state(t), *after = x.state(t + 1), *r = x.row(R, t), *d = x.row(D, t), *a = x.row(A, t);
  Acc *G = x.G_of(j), *of_r = x.grad(R, t), *of_k = x.grad(KEY, t), *of_b = x.grad(CORRECTION, t);
  for (int64_t i = 0; i < padded; i += W, G += TILE<Acc>, after += TILE<Acc>) {
    const Vec<Acc> reader = load<Vec<Acc>>(r + i);
    Vec<Acc> gr[2] = {}, gk[2] = {}, gb[2] = {};
    PK_UNROLL
    for (int n = 0; n < W; ++n) {
      const Vec<Acc> of = load<Vec<Acc>>(G + n * W) + reader * g[n];
      store(G + n * W, of);
      gr[n % 2] += load<Vec<Acc>>(after + n * W) * g[n];
      gk[n % 2] += of * v[n];
      gb[n % 2] += of * s[n];
    }
    add_to(of_r + i, gr[0] + gr[1]);
    add_to(of_k + i, gk[0] + gk[1]);
    add_to(of_b + i, gb[0] + gb[1]);
  }
  G = x.G_of(j);
  add_to(&x.grad_v[t * x.columns + j], row_products(G, x.row(KEY, t), padded));
  alignas(64) Acc c[W];
  store(c, row_products(G, x.row(CORRECTION, t), padded));
  Acc *of_a = x.grad(A, t), *of_d = x.grad(D, t);
  for (int64_t i = 0; i < padded; i += W, G += TILE<Acc>, before += TILE<Acc>) {
    const Vec<Acc> corrected = load<Vec<Acc>>(a + i), decay = load<Vec<Acc>>(d + i);
    Vec<Acc> ga[2] = {}, gd[2] = {};
    PK_UNROLL
    for (int n = 0; n < W; ++n) {
      const Vec<Acc> of = load<Vec<Acc>>(G + n * W), state = load<Vec<Acc>>(before + n * W);
      ga[n % 2] += state * c[n];
      gd[n % 2] += state * of;
      store(G + n * W, decay * of + corrected * c[n]);
    }
    add_to(of_a + i, ga[0] + ga[1]);
    add_to(of_d + i, gd[0] + gd[1]);
  }
}

// ---- heads ----------------------------------------------------------------------------------------------------------

template <class Storage, bool CORRECTED>
struct RecurrenceBackward : RecurrenceArguments<Storage> {
  using Base = RecurrenceArguments<Storage>;
  using Acc = typename Base::Acc;
  using Base::B, Base::T, Base::H, Base::K, Base::V, Base::W;

  RowView<Storage> grad_y;  // [B, T, H, V]; no data if there is none
  const Acc* grad_final;     // [B][H][K][V] or null
  const Acc* checkpoints;    // [ceil(T / SAVED)][B][H][K][V]
  Storage* grad_r;           // results, contiguous; null where there is none
  Acc* grad_w;
  Storage *grad_k, *grad_v;
  Acc* grad_u;
  Storage *grad_a, *grad_b;
  Acc* grad_initial;

  void run() const {
    Buffer<Acc> bonus_sums(CORRECTED ? 0 : B * H * K);
    const double work = double(B) * H * T * round_up(K, W) * round_up(V, W) * (CORRECTED ? 10 : 5) * MULTIPLY_ADD;
    run_tasks(B * H, work, [&](int64_t, int64_t task) {
      head(task / H, task % H, bonus_sums.get() + (CORRECTED ? 0 : task * K));
    });
    if constexpr (!CORRECTED)
      for (int64_t i = 0; i < H * K; ++i) {
        Acc sum = 0;
        for (int64_t b = 0; b < B; ++b) sum += bonus_sums[b * H * K + i];
        grad_u[i] = sum;
      }
  }

  void head(int64_t b, int64_t h, Acc* bonus_sum) const {
    const HeadScratch<Acc> x(round_up(K, W), round_up(V, W));
    const int64_t at = (b * H + h) * K * V;
    for (int64_t j = 0; j < V; j += W) to_tiles(grad_final ? grad_final + at : nullptr, K, V, j, x.G_of(j));
    std::fill_n(x.grad_u.get(), x.padded, Acc(0));

    for (int64_t begin = (ceil_div(T, SAVED) - 1) * SAVED; begin >= 0; begin -= SAVED) {
      const int64_t steps = std::min(T - begin, SAVED);
      read(x, b, h, begin, steps);
      if constexpr (!CORRECTED) bonus(x, h, steps);
      const Acc* start = checkpoints + begin / SAVED * B * H * K * V + at;
      for (int64_t j = 0; j < V; j += W) {
        to_tiles(start, K, V, j, x.state(0));
        replay<CORRECTED>(x, j, steps);
        for (int64_t t = steps - 1; t >= 0; --t) CORRECTED ? step_back_corrected(x, j, t) : step_back(x, j, t);
      }
      write(x, b, h, begin, steps);
    }

    if constexpr (!CORRECTED) std::copy_n(x.grad_u.get(), K, bonus_sum);
    if (grad_initial)
      for (int64_t j = 0; j < V; j += W) from_tiles(x.G_of(j), K, V, j, grad_initial + at);
  }

  // The rows of the steps after a saved state; gradients become zero.
  void read(const HeadScratch<Acc>& x, int64_t b, int64_t h, int64_t begin, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t) {
      if (begin > 0) {  // the steps before these are next
        this->prefetch(b, begin - SAVED + t, h, 0);
        if (grad_y) ask_for_row(grad_y.at(b, begin - SAVED + t, h), V);
      }
      read_row(this->r.at(b, begin + t, h), K, x.row(R, t));
      read_row(this->k.at(b, begin + t, h), K, x.row(KEY, t));
      read_decay(this->w.at(b, begin + t, h), K, x.row(D, t));
      if constexpr (CORRECTED) {
        read_row(this->a.at(b, begin + t, h), K, x.row(A, t));
        read_row(this->b.at(b, begin + t, h), K, x.row(CORRECTION, t));
      }
      read_row(this->v.at(b, begin + t, h), V, &x.v[t * x.columns]);
      Acc* g = &x.g[t * x.columns];
      if (!grad_y) {
        std::fill_n(g, x.columns, Acc(0));
        continue;
      }
      read_row(grad_y.at(b, begin + t, h), V, g);
      for (int64_t j = 0; j < x.columns; j += W) store(g + j, this->scale * load<Vec<Acc>>(g + j));
    }
    std::fill_n(x.grads.get(), (CORRECTED ? ROWS : A) * SAVED * x.padded, Acc(0));
    std::fill_n(x.grad_v.get(), SAVED * x.columns, Acc(0));
  }

  // The gradients through u: y contains v (r·(u∘k)).
  void bonus(const HeadScratch<Acc>& x, int64_t h, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t) {
      Vec<Acc> products = {}, weights = {};
      for (int64_t j = 0; j < x.columns; j += W)
        products += load<Vec<Acc>>(&x.v[t * x.columns + j]) * load<Vec<Acc>>(&x.g[t * x.columns + j]);
      const Acc p = reduce_add<Acc>(products);
      for (int64_t i = 0; i < x.padded; i += W) {
        const Vec<Acc> u = load_some<Acc>(this->u + h * K + i, K - i);
        const Vec<Acc> r = load<Vec<Acc>>(x.row(R, t) + i), k = load<Vec<Acc>>(x.row(KEY, t) + i);
        store(x.grad(R, t) + i, u * k * p);
        store(x.grad(KEY, t) + i, u * r * p);
        store(&x.grad_u[i], load<Vec<Acc>>(&x.grad_u[i]) + r * k * p);
        weights += r * u * k;
      }
      const Acc weight = reduce_add<Acc>(weights);
      for (int64_t j = 0; j < x.columns; j += W)
        store(&x.grad_v[t * x.columns + j], weight * load<Vec<Acc>>(&x.g[t * x.columns + j]));
    }
  }

  void write(const HeadScratch<Acc>& x, int64_t b, int64_t h, int64_t begin, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (b * T + begin + t) * H + h;
      for (int64_t i = 0; i < K; i += W) {
        const int64_t to = at * K + i, count = K - i;
        auto grad = [&](RecurrenceRow which) { return load<Vec<Acc>>(x.grad(which, t) + i); };
        store_some<Acc>(grad_r + to, grad(R), count);
        store_some<Acc>(grad_w + to, grad(D) * load<Vec<Acc>>(x.row(D, t) + i), count);
        store_some<Acc>(grad_k + to, grad(KEY), count);
        if constexpr (CORRECTED) {
          store_some<Acc>(grad_a + to, grad(A), count);
          store_some<Acc>(grad_b + to, grad(CORRECTION), count);
        }
      }
      for (int64_t j = 0; j < V; j += W)
        store_some<Acc>(grad_v + at * V + j, load<Vec<Acc>>(&x.grad_v[t * x.columns + j]), V - j);
    }
  }
};

// ---- the op ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_recurrence_backward(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_final, Tensor r, Tensor w, Tensor k, Tensor v,
    std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b, std::optional<Tensor> state,
    Tensor checkpoints, double scale, int64_t /*backend*/) {
  check_recurrence(r, w, k, v, u, a, b, state);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), K = r.size(3), V = v.size(3);
  const ScalarType dtype = r.scalar_type(), exact = accumulator_of(dtype);
  check(grad_y, {B, T, H, V}, dtype, "grad_y", Layout::ANY);
  check(grad_final, {B, H, K, V}, exact, "grad_final", Layout::ANY);
  check(checkpoints, {ceil_div(T, SAVED) * B * H * K * V}, exact, "checkpoints", Layout::ANY);
  r = dense_rows(r), w = dense_rows(w), k = dense_rows(k), v = dense_rows(v), a = dense_rows(a), b = dense_rows(b);
  grad_y = dense_rows(grad_y), u = dense(u), grad_final = dense(grad_final), checkpoints = dense(checkpoints);

  const std::vector<int64_t> none{0}, wide{B, T, H, K};
  Tensor grad_r = empty(wide, dtype), grad_w = empty(wide, exact), grad_k = empty(wide, dtype);
  Tensor grad_v = empty({B, T, H, V}, dtype), grad_u = empty(u ? std::vector{H, K} : none, exact);
  Tensor grad_a = empty(a ? wide : none, a ? dtype : exact), grad_b = empty(b ? wide : none, b ? dtype : exact);
  Tensor grad_initial = empty(state ? std::vector{B, H, K, V} : none, exact);
  for_dtype(dtype, [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    auto run = [&]<bool CORRECTED>(std::bool_constant<CORRECTED>) {
      RecurrenceBackward<Storage, CORRECTED>{{r, w, k, v, u, a, b, state, scale},
                                             RowView<Storage>(grad_y),
                                             data<const Acc>(grad_final),
                                             data<const Acc>(checkpoints),
                                             data<Storage>(grad_r),
                                             data<Acc>(grad_w),
                                             data<Storage>(grad_k),
                                             data<Storage>(grad_v),
                                             data<Acc>(grad_u),
                                             data<Storage>(grad_a),
                                             data<Storage>(grad_b),
                                             state ? data<Acc>(grad_initial) : nullptr}
          .run();
    };
    a ? run(std::true_type{}) : run(std::false_type{});
  });
  return {grad_r, grad_w, grad_k, grad_v, grad_u, grad_a, grad_b, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("linear_recurrence_backward", TORCH_BOX(&linear_recurrence_backward));
}
