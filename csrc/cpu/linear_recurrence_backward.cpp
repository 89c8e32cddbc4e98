// The backward of RWKV-6's and RWKV-7's WKV (equations: pykernels/ops/linear_recurrence.py).
//
// A task owns a head of a sequence and goes through its chunks from the last to the first. States lie transposed,
// K along the vectors, since most results are sums over V, in tiles of W columns by W rows (W the vector's width): all
// of a tile's addresses are one pointer and constants. Within a chunk, a tile's columns at a time: their states are
// made again from the checkpoint and kept, then the steps are gone through backwards.
#include "linear_recurrence.h"

namespace {

template <class Storage, bool CORRECTED>
struct Backward : Arguments<Storage> {
  using Base = Arguments<Storage>;
  using Acc = typename Base::Acc;
  using Base::B, Base::T, Base::H, Base::K, Base::V, Base::W;

  Rows<Storage> grad_y;    // [B, T, H, V]; no data if there is none
  const Acc* grad_final;   // [B][H][K][V] or null
  const Acc* checkpoints;  // [chunks][B][H][K][V]
  Storage* grad_r;         // results, contiguous; null where there is none
  Acc* grad_w;
  Storage *grad_k, *grad_v;
  Acc* grad_u;
  Storage *grad_a, *grad_b;
  Acc* grad_initial;

  // Of a chunk: the rows, and the gradients of rows, [CHUNK][padded].
  enum Row { R, D, KEY, A, CORRECTION, ROWS };
  static constexpr int COUNT = CORRECTED ? ROWS : A;

  static constexpr int64_t TILE = W * W;

  struct Scratch {
    int64_t padded, columns;
    Buffer<Acc> G;             // [columns / W][padded / W][TILE], the gradient of the state
    Buffer<Acc> states;        // [CHUNK + 1][padded / W][TILE], of a tile's columns
    Buffer<Acc> rows;          // [ROWS][CHUNK][padded]
    Buffer<Acc> grads;         // [ROWS][CHUNK][padded]
    Buffer<Acc> v, g, grad_v;  // [CHUNK][columns]
    Buffer<Acc> s;             // [CHUNK][W], aᵀS of those columns
    Buffer<Acc> grad_u;        // [padded]

    Scratch(int64_t padded, int64_t columns)
        : padded(padded), columns(columns), G(columns * padded), states((CHUNK + 1) * W * padded),
          rows(ROWS * CHUNK * padded), grads(ROWS * CHUNK * padded), v(CHUNK * columns), g(CHUNK * columns),
          grad_v(CHUNK * columns), s(CHUNK * W), grad_u(padded) {}
    Acc* row(int which, int64_t t) const { return &rows[(which * CHUNK + t) * padded]; }
    Acc* grad(int which, int64_t t) const { return &grads[(which * CHUNK + t) * padded]; }
    Acc* state(int64_t t) const { return &states[t * W * padded]; }
    Acc* G_of(int64_t j) const { return &G[j * padded]; }
  };

  // The columns from j on of a [K][V] matrix (null: zeros) as tiles, and back.
  void to_tiles(const Acc* from, int64_t j, Acc* to) const {
    for (int64_t i = 0; i < K; i += W, to += TILE) {
      Vec<Acc> m[W];
      for (int64_t n = 0; n < W; ++n)
        m[n] = from && i + n < K ? load_some<Acc>(from + (i + n) * V + j, V - j) : Vec<Acc>{};
      transpose<Acc>(m);
      for (int64_t n = 0; n < W; ++n) store(to + n * W, m[n]);
    }
  }
  void from_tiles(const Acc* from, int64_t j, Acc* to) const {
    for (int64_t i = 0; i < K; i += W, from += TILE) {
      Vec<Acc> m[W];
      for (int64_t n = 0; n < W; ++n) m[n] = load<Vec<Acc>>(from + n * W);
      transpose<Acc>(m);
      for (int64_t n = 0; n < W && i + n < K; ++n) store_some<Acc>(to + (i + n) * V + j, m[n], V - j);
    }
  }

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
    const Scratch x(round_up(K, W), round_up(V, W));
    const int64_t at = (b * H + h) * K * V;
    for (int64_t j = 0; j < V; j += W) to_tiles(grad_final ? grad_final + at : nullptr, j, x.G_of(j));
    std::fill_n(x.grad_u.get(), x.padded, Acc(0));

    for (int64_t begin = (ceil_div(T, CHUNK) - 1) * CHUNK; begin >= 0; begin -= CHUNK) {
      const int64_t steps = std::min(T - begin, CHUNK);
      read(x, b, h, begin, steps);
      if constexpr (!CORRECTED) bonus(x, h, steps);
      const Acc* start = checkpoints + begin / CHUNK * B * H * K * V + at;
      for (int64_t j = 0; j < V; j += W) {
        replay(x, start, j, steps);
        for (int64_t t = steps - 1; t >= 0; --t) CORRECTED ? step_back_corrected(x, j, t) : step_back(x, j, t);
      }
      write(x, b, h, begin, steps);
    }

    if constexpr (!CORRECTED) std::copy_n(x.grad_u.get(), K, bonus_sum);
    if (grad_initial)
      for (int64_t j = 0; j < V; j += W) from_tiles(x.G_of(j), j, grad_initial + at);
  }

  // The chunk's rows; gradients become zero.
  void read(const Scratch& x, int64_t b, int64_t h, int64_t begin, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t) {
      if (begin > 0) {  // the chunk before is next
        this->prefetch(b, begin - CHUNK + t, h, 0);
        if (grad_y.data) grad_y.prefetch(b, begin - CHUNK + t, h, V);
      }
      this->r.read(b, begin + t, h, K, x.row(R, t));
      this->k.read(b, begin + t, h, K, x.row(KEY, t));
      this->read_decay(b, begin + t, h, x.row(D, t));
      if constexpr (CORRECTED) {
        this->a.read(b, begin + t, h, K, x.row(A, t));
        this->b.read(b, begin + t, h, K, x.row(CORRECTION, t));
      }
      this->v.read(b, begin + t, h, V, &x.v[t * x.columns]);
      Acc* g = &x.g[t * x.columns];
      if (!grad_y.data) {
        std::fill_n(g, x.columns, Acc(0));
        continue;
      }
      grad_y.read(b, begin + t, h, V, g);
      for (int64_t j = 0; j < x.columns; j += W) store(g + j, this->scale * load<Vec<Acc>>(g + j));
    }
    std::fill_n(x.grads.get(), COUNT * CHUNK * x.padded, Acc(0));
    std::fill_n(x.grad_v.get(), CHUNK * x.columns, Acc(0));
  }

  // What goes through u: y has v (r·(u∘k)).
  void bonus(const Scratch& x, int64_t h, int64_t steps) const {
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

  // The states before and after every step, of the columns from j on.
  void replay(const Scratch& x, const Acc* start, int64_t j, int64_t steps) const {
    const int64_t padded = x.padded;
    to_tiles(start, j, x.state(0));
    for (int64_t t = 0; t < steps; ++t) {
      const Acc *v = &x.v[t * x.columns + j], *s = &x.s[t * W], *from = x.state(t);
      const Acc *d = x.row(D, t), *k = x.row(KEY, t), *correction = x.row(CORRECTION, t);
      Acc* to = x.state(t + 1);
      if constexpr (CORRECTED) store(&x.s[t * W], products(from, x.row(A, t), padded));
      for (int64_t i = 0; i < padded; i += W, from += TILE, to += TILE) {
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

  // Every column's product with a row.
  static Vec<Acc> products(const Acc* tile, const Acc* row, int64_t padded) {
    Vec<Acc> sums[W] = {};
    for (int64_t i = 0; i < padded; i += W, tile += TILE) {
      const Vec<Acc> x = load<Vec<Acc>>(row + i);
      PK_UNROLL
      for (int n = 0; n < W; ++n) sums[n] += x * load<Vec<Acc>>(tile + n * W);
    }
    return row_sums<Acc>(sums);
  }

  static void add(Acc* p, Vec<Acc> v) { store(p, load<Vec<Acc>>(p) + v); }

  void step_back(const Scratch& x, int64_t j, int64_t t) const {
    const int64_t padded = x.padded;
    const Acc *v = &x.v[t * x.columns + j], *g = &x.g[t * x.columns + j], *S = x.state(t);
    const Acc *r = x.row(R, t), *d = x.row(D, t), *k = x.row(KEY, t);
    Acc *G = x.G_of(j), *grad_r = x.grad(R, t), *grad_d = x.grad(D, t), *grad_k = x.grad(KEY, t);
    add(&x.grad_v[t * x.columns + j], products(G, k, padded));
    for (int64_t i = 0; i < padded; i += W, G += TILE, S += TILE) {
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
      add(grad_r + i, gr[0] + gr[1]);
      add(grad_k + i, gk[0] + gk[1]);
      add(grad_d + i, gd[0] + gd[1]);
    }
  }

  void step_back_corrected(const Scratch& x, int64_t j, int64_t t) const {
    const int64_t padded = x.padded;
    const Acc *v = &x.v[t * x.columns + j], *g = &x.g[t * x.columns + j], *s = &x.s[t * W];
    const Acc *before = x.state(t), *after = x.state(t + 1), *r = x.row(R, t), *d = x.row(D, t), *a = x.row(A, t);
    Acc *G = x.G_of(j), *of_r = x.grad(R, t), *of_k = x.grad(KEY, t), *of_b = x.grad(CORRECTION, t);
    for (int64_t i = 0; i < padded; i += W, G += TILE, after += TILE) {
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
      add(of_r + i, gr[0] + gr[1]);
      add(of_k + i, gk[0] + gk[1]);
      add(of_b + i, gb[0] + gb[1]);
    }
    G = x.G_of(j);
    add(&x.grad_v[t * x.columns + j], products(G, x.row(KEY, t), padded));
    alignas(64) Acc c[W];
    store(c, products(G, x.row(CORRECTION, t), padded));
    Acc *of_a = x.grad(A, t), *of_d = x.grad(D, t);
    for (int64_t i = 0; i < padded; i += W, G += TILE, before += TILE) {
      const Vec<Acc> corrected = load<Vec<Acc>>(a + i), decay = load<Vec<Acc>>(d + i);
      Vec<Acc> ga[2] = {}, gd[2] = {};
      PK_UNROLL
      for (int n = 0; n < W; ++n) {
        const Vec<Acc> of = load<Vec<Acc>>(G + n * W), state = load<Vec<Acc>>(before + n * W);
        ga[n % 2] += state * c[n];
        gd[n % 2] += state * of;
        store(G + n * W, decay * of + corrected * c[n]);
      }
      add(of_a + i, ga[0] + ga[1]);
      add(of_d + i, gd[0] + gd[1]);
    }
  }

  void write(const Scratch& x, int64_t b, int64_t h, int64_t begin, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (b * T + begin + t) * H + h;
      for (int64_t i = 0; i < K; i += W) {
        const int64_t to = at * K + i, count = K - i;
        auto grad = [&](int which) { return load<Vec<Acc>>(x.grad(which, t) + i); };
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_recurrence_backward(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_state, Tensor r, Tensor w, Tensor k, Tensor v,
    std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b, std::optional<Tensor> state,
    Tensor checkpoints, double scale, int64_t /*backend*/) {
  check(r, w, k, v, u, a, b, state);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), K = r.size(3), V = v.size(3);
  const ScalarType dtype = r.scalar_type(), exact = accumulator_of(dtype);
  auto check_shape = [&](const Tensor& t, ScalarType type, std::vector<int64_t> shape, const char* name) {
    check_cpu_tensor(t, shape.size(), type, name);
    for (size_t d = 0; d < shape.size(); ++d) check_size(t, d, shape[d], name);
  };
  if (grad_y) check_shape(*grad_y, dtype, {B, T, H, V}, "grad_y");
  if (grad_state) check_shape(*grad_state, exact, {B, H, K, V}, "grad_state");
  check_shape(checkpoints, exact, {ceil_div(T, CHUNK) * B * H * K * V}, "checkpoints");
  std::optional<Tensor> saved = checkpoints;
  dense({&u, &grad_state, &saved}, {&r, &w, &k, &v}, {&a, &b, &grad_y});

  const std::vector<int64_t> none{0}, wide{B, T, H, K};
  Tensor grad_r = empty(wide, dtype), grad_w = empty(wide, exact), grad_k = empty(wide, dtype);
  Tensor grad_v = empty({B, T, H, V}, dtype), grad_u = empty(u ? std::vector{H, K} : none, exact);
  Tensor grad_a = empty(a ? wide : none, a ? dtype : exact), grad_b = empty(b ? wide : none, b ? dtype : exact);
  Tensor grad_initial = empty(state ? std::vector{B, H, K, V} : none, exact);
  for_dtype(dtype, [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    auto run = [&]<bool CORRECTED>(std::bool_constant<CORRECTED>) {
      auto narrow = [](const Tensor& t) { return data<Storage>(t); };
      auto exactly = [](const Tensor& t) { return data<Acc>(t); };
      Backward<Storage, CORRECTED>{{r, w, k, v, u, a, b, state, scale},
                                   Rows<Storage>(grad_y),
                                   grad_state ? exactly(*grad_state) : nullptr,
                                   exactly(*saved),
                                   narrow(grad_r),
                                   exactly(grad_w),
                                   narrow(grad_k),
                                   narrow(grad_v),
                                   exactly(grad_u),
                                   narrow(grad_a),
                                   narrow(grad_b),
                                   state ? exactly(grad_initial) : nullptr}
          .run();
    };
    a ? run(std::true_type{}) : run(std::false_type{});
  });
  return {grad_r, grad_w, grad_k, grad_v, grad_u, grad_a, grad_b, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("linear_recurrence_backward", TORCH_BOX(&linear_recurrence_backward)); }
