// The gradients of RWKV-6's and RWKV-7's WKV (equations: pykernels/ops/linear_recurrence.py), given the states S before every 32
// steps and their gradients G after these, which csrc/cuda/linear_recurrence.cu has left.
//
//   a block owns   32 steps of a head, all columns; then others
//   reads          r, w, k, v, gy, a, b, S before the steps, G after them
//   writes         the gradients of all but the first state, each 32 steps' part of gu
//
// It goes forward through groups of 8 steps, then back through them: of a group S before each step is made again and
// kept in shared memory. A step's sums over columns take the place of its S, and are added over warps, always in the
// same order.
//
// What limits it, by instruction counts for sm_90 (nothing was timed): issue slots, at 0.19 of the peak of FMA (RWKV-6)
// and 0.21 (RWKV-7): sums over columns take selects and shuffles beside their FMAs. Its shared memory leaves room for
// two blocks on a multiprocessor: eight warps.
#include "linear_recurrence_tile.h"

namespace {

template <class Storage>
struct Gradients {
  Rows<Storage> r, k, v, a, b, grad_y;
  Rows<float> w;
  const float *u, *checkpoints;   // [H, K]; [⌈T/32⌉, B, H, K, V], S before every 32 steps
  float* ends;                    // as checkpoints, G after them; overwritten
  float* scratch;                 // [blocks, 3, passes, 16, THREADS]
  float* sums;                    // [⌈T/32⌉, B, H, K], gu
  Storage *grad_r, *grad_k, *grad_v, *grad_a, *grad_b;  // dense
  float* grad_w;
  float scale;
  int64_t heads, items;           // B·H, ⌈T/32⌉·B·H
  int T, H, K, V, passes;         // passes over blocks of columns
  bool aligned, even, whole;      // see Sequence; whole: K is a multiple of 4
};

constexpr int PAIR = 2;  // columns a lane

template <int KB, bool CORRECTED>
struct Slots {
  static constexpr int KINDS = COUNT<CORRECTED>;
  static constexpr int SIZE = std::max(LANES * ROWS * PAIR, KINDS * KB);  // S before a step, or a step's sums
  static constexpr int VALUES = CORRECTED ? 3 : 2;                            // v, g and (RWKV-7) s of a step
  static constexpr int NUMBERS = GROUP * (KINDS * KB + 1 + WARPS + VALUES * Tile<KB, PAIR>::BLOCK + WARPS * SIZE) + KB;
};

// What a block has in shared memory, and its work on one group of steps, in the order in which it does it.
template <class Storage, int KB, bool CORRECTED>
struct GroupWork {
  using Columns = Tile<KB, PAIR>;
  using Slot = Slots<KB, CORRECTED>;
  using Pair = Pack<float, PAIR>;
  static constexpr int KINDS = COUNT<CORRECTED>, LAST = READER<CORRECTED>, QUADS = KB / 4, WIDTH = Columns::WIDTH;
  static constexpr int TOTALS = (GROUP * KINDS * QUADS + THREADS - 1) / THREADS;  // quads of a group's sums a thread
  static constexpr int HELD = ROWS * PAIR / 4;                                    // quads of a lane's part of S
  static_assert(Columns::BLOCK == TILE_NUMBERS / KB && ROWS * PAIR == SCRATCH_ROWS && THREADS == SCRATCH_COLUMNS);

  const Gradients<Storage>& a;
  const Columns own;
  float* const rows = reinterpret_cast<float*>(dynamic_shared());  // [GROUP][KINDS][KB]
  float* const present = rows + GROUP * KINDS * KB;                // [GROUP], r·(u∘k)
  float* const bonus = present + GROUP;                            // [WARPS][GROUP], v·g of a warp's columns
  float* const u = bonus + WARPS * GROUP;                          // [KB]
  float* const slots = u + KB;                                     // [GROUP][WARPS][SIZE]
  float* const values = slots + (GROUP * WARPS * Slot::SIZE + own.warp * GROUP * Slot::VALUES * WIDTH);
  // values: the warp's [GROUP][v, g, s][WIDTH]

  __device__ explicit GroupWork(const Gradients<Storage>& a) : a(a) {}

  __device__ float* slot(int i, int warp) const { return slots + (i * WARPS + warp) * Slot::SIZE; }
  __device__ int64_t row_of(const Head& head, int t) const { return (head.b * int64_t(a.T) + t) * a.H + head.h; }
  __device__ Pair* pair_of(int i, int kind) const {
    return reinterpret_cast<Pair*>(values + (i * Slot::VALUES + kind) * WIDTH + own.first);
  }
  __device__ void value(float (&x)[PAIR], int i, int kind) const {
    const Pair pair = *pair_of(i, kind);
    x[0] = pair.of[0], x[1] = pair.of[1];
  }
  __device__ float bonus_of(int row) const {
    static_assert(WARPS == 4);
    return bonus[row] + bonus[GROUP + row] + bonus[2 * GROUP + row] + bonus[3 * GROUP + row];
  }

  // A lane's part of S in quads, `stride` apart.
  __device__ static void hold(const float (&S)[ROWS][PAIR], Quad* to, int stride) {
#pragma unroll
    for (int q = 0; q < HELD; ++q) to[q * stride] = {S[2 * q][0], S[2 * q][1], S[2 * q + 1][0], S[2 * q + 1][1]};
  }
  __device__ static void held(float (&S)[ROWS][PAIR], const Quad* from, int stride) {
#pragma unroll
    for (int q = 0; q < HELD; ++q) {
      const Quad x = from[q * stride];
      S[2 * q][0] = x.of[0], S[2 * q][1] = x.of[1], S[2 * q + 1][0] = x.of[2], S[2 * q + 1][1] = x.of[3];
    }
  }

  // Brings the group's rows of length K, all warps together.
  __device__ void stage_rows(const Head& head, int first, int count) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * QUADS; i += THREADS) {
      const int row = i / QUADS, x = i % QUADS * 4, t = first + row, width = row < count ? a.K : 0;
      Quad* const to = reinterpret_cast<Quad*>(rows + row * KINDS * KB + x);
      auto quad = [&](const auto& from) { return load_quad(from.at(head.b, head.h, t), x, width, a.aligned); };
      const Quad k = quad(a.k), r = quad(a.r), w = quad(a.w);
      if constexpr (CORRECTED) {
        const Quad first_row = quad(a.a), second = quad(a.b);
        to[FIRST * QUADS] = first_row;
        to[SECOND * QUADS] = second;
      } else {
        const float sum = sum_over<QUADS>(product(r, *reinterpret_cast<const Quad*>(u + x), k));
        if (x == 0) present[row] = sum;
      }
      to[KEY * QUADS] = k;
      to[DECAY * QUADS] = decays(w);
      to[LAST * QUADS] = r;
    }
    for (int i = threadIdx.x; i < WARPS * GROUP; i += THREADS) bonus[i] = 0;
  }

  // Brings v and g of the warp's columns, and adds what these give to v·g (of which only the way back will read).
  __device__ void stage_values(const Head& head, int first, int count, int begin) const {
    __syncwarp();
    constexpr int PIECES = WIDTH / 4;
#pragma unroll
    for (int i = own.lane; i < 2 * GROUP * PIECES; i += LANES) {
      const int row = i / PIECES % GROUP, x = i % PIECES * 4, kind = i / (GROUP * PIECES);
      const Rows<Storage>& from = kind ? a.grad_y : a.v;
      const Quad quad = load_quad(from.at(head.b, head.h, first + row), begin + x,
                                  row < count && from.given ? a.V : 0, a.aligned);
      Quad* const to = reinterpret_cast<Quad*>(values + (row * Slot::VALUES + kind) * WIDTH + x);
      *to = scaled(quad, kind ? a.scale : 1);
    }
    __syncwarp();
    if (!CORRECTED && own.lane < GROUP) {
      const float* const pair = values + own.lane * Slot::VALUES * WIDTH;
      float sum = 0;
#pragma unroll
      for (int x = 0; x < WIDTH; ++x) sum += pair[x] * pair[WIDTH + x];
      bonus[own.warp * GROUP + own.lane] += sum;
    }
  }

  // Takes S over the group's steps; on the way back it keeps S before each of them, and s.
  __device__ void replay(float (&S)[ROWS][PAIR], int count, bool back) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const float* const row = rows + i * KINDS * KB;
      if (back) hold(S, reinterpret_cast<Quad*>(slot(i, own.warp)) + own.lane, LANES);
      float d[ROWS], x[ROWS], v[PAIR], s[PAIR];
      value(v, i, 0);
      if constexpr (CORRECTED) {
        own.read(x, row + FIRST * KB);
        own.products(s, x, S);
        if (back && own.share == 0) *pair_of(i, 2) = {s[0], s[1]};
      }
      own.read(d, row + DECAY * KB);
      own.read(x, row + KEY * KB);
      advance(S, d, x, v);
      if constexpr (CORRECTED) {
        own.read(x, row + SECOND * KB);
        add(S, x, s);
      }
    }
  }

  // A step's Σ over columns of a kind goes to the warp's slot; put_products: of X y.
  __device__ void put(float* place, int kind, float (&sums)[ROWS]) const {
    constexpr int KEPT = ROWS / Columns::PLACES;
    share_sums<ROWS, Columns::PLACES, Columns::SHARES>(sums, own.place);
    Pack<float, KEPT> x;
#pragma unroll
    for (int m = 0; m < KEPT; ++m) x.of[m] = sums[m];
    *reinterpret_cast<Pack<float, KEPT>*>(place + kind * KB + own.row(own.place * KEPT)) = x;
  }
  __device__ void put_products(float* place, int kind, const float (&X)[ROWS][PAIR], const float (&y)[PAIR]) const {
    float sums[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m) sums[m] = X[m][0] * y[0] + X[m][1] * y[1];
    put(place, kind, sums);
  }

  // Takes G back over step i. S: after the step, and then before it.
  __device__ void step_back(float (&G)[ROWS][PAIR], float (&S)[ROWS][PAIR], const Head& head, int i, int first,
                            int begin) const {
    const float* const row = rows + i * KINDS * KB;
    float* const place = slot(i, own.warp);
    float before[ROWS][PAIR];
    held(before, reinterpret_cast<const Quad*>(place) + own.lane, LANES);
    __syncwarp();  // the sums take its place
    float d[ROWS], x[ROWS], v[PAIR], g[PAIR], s[PAIR], grad_v[PAIR], sums[ROWS];
    value(v, i, 0);
    value(g, i, 1);
    if constexpr (CORRECTED) {
      own.read(x, row + LAST * KB);
      add(G, x, g);
      put_products(place, LAST, S, g);
      value(s, i, 2);
      put_products(place, SECOND, G, s);
    } else {
      put_products(place, LAST, before, g);
    }
    put_products(place, KEY, G, v);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) sums[m] = before[m][0] * G[m][0] + before[m][1] * G[m][1];
    put(place, DECAY, sums);
    own.read(x, row + KEY * KB);
#pragma unroll
    for (int c = 0; c < PAIR; ++c) grad_v[c] = !CORRECTED && own.share == 0 ? present[i] * g[c] : 0;
    own.add_products(grad_v, x, G);
    const float shared = own.share_columns(grad_v);
    const int to = begin + own.shared_column();
    if (own.tells() && to < a.V) a.grad_v[row_of(head, first + i) * a.V + to] = static_cast<Storage>(shared);
    own.read(d, row + DECAY * KB);
    if constexpr (CORRECTED) {
      own.read(x, row + SECOND * KB);
      own.products(s, x, G);
      put_products(place, FIRST, before, s);
      own.read(x, row + FIRST * KB);
      advance(G, d, x, s);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) S[m][0] = before[m][0], S[m][1] = before[m][1];
    } else {
      own.read(x, row + LAST * KB);
      advance(G, d, x, g);
    }
  }

  // Adds the steps' sums of the pass over its warps.
  __device__ void reduce(Quad (&totals)[TOTALS], int count, int pass) const {
    const int warps = min(WARPS, (a.V - pass * Columns::BLOCK + WIDTH - 1) / WIDTH);
#pragma unroll
    for (int m = 0; m < TOTALS; ++m) {
      const int i = threadIdx.x + m * THREADS;
      if (i >= count * KINDS * QUADS) break;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) {
        if (warp >= warps) break;
        const Quad x = reinterpret_cast<const Quad*>(slot(i / (KINDS * QUADS), warp))[i % (KINDS * QUADS)];
#pragma unroll
        for (int c = 0; c < 4; ++c) totals[m].of[c] += x.of[c];
      }
    }
  }

  // Four numbers of a row's gradient, from column x on.
  template <class Element>
  __device__ void write(Element* to, const Quad& total, int x) const {
    Pack<Element, 4> result;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      result.of[c] = static_cast<Element>(total.of[c]);
      if (!a.whole && x + c < a.K) to[c] = result.of[c];
    }
    if (a.whole && x < a.K) *reinterpret_cast<Pack<Element, 4>*>(to) = result;
  }

  // Writes the gradients of the group's rows of length K.
  __device__ void store(const Quad (&totals)[TOTALS], const Head& head, int first, int count) const {
#pragma unroll
    for (int m = 0; m < TOTALS; ++m) {
      const int i = threadIdx.x + m * THREADS;
      if (i >= count * KINDS * QUADS) break;
      const int step = i / (KINDS * QUADS), kind = i / QUADS % KINDS, x = i % QUADS * 4;
      const float* const row = rows + step * KINDS * KB + x;
      Quad total = totals[m];
      if (kind == DECAY) {
#pragma unroll
        for (int c = 0; c < 4; ++c) total.of[c] *= row[DECAY * KB + c];
      }
      if (!CORRECTED && kind != DECAY) {
        const float sum = bonus_of(step);
        const float* const other = row + (kind == KEY ? LAST : KEY) * KB;
#pragma unroll
        for (int c = 0; c < 4; ++c) total.of[c] += u[x + c] * other[c] * sum;
      }
      const int64_t to = row_of(head, first + step) * a.K + x;
      if (kind == DECAY) write(a.grad_w + to, total, x);
      else write((kind == KEY ? a.grad_k : kind == LAST ? a.grad_r : kind == FIRST ? a.grad_a : a.grad_b) + to, total, x);
    }
  }

  // The group's part of gu, of the thread's place in K.
  __device__ void add_bonus(float& grad_u, int count) const {
    if (int(threadIdx.x) < KB)
      for (int i = count - 1; i >= 0; --i) {
        const float* const row = rows + i * KINDS * KB + threadIdx.x;
        grad_u += row[LAST * KB] * row[KEY * KB] * bonus_of(i);
      }
  }
};

// audit: gradients: dynamic shared 32 * ((3 + 2 * CORRECTED) * KB + 5 + (2 + CORRECTED) * 2048 // KB +
//   4 * (512 + 128 * CORRECTED * (KB // 128))) + 4 * KB: rows of a group, its v, g and s, u, S before each step
// audit: gradients: allow narrow load: where V is odd, states come one number at a time; u does, once in 32 steps
template <class Storage, int KB, bool CORRECTED>
__global__ void __launch_bounds__(THREADS, 2) gradients(const Gradients<Storage> a) {
  using Work = GroupWork<Storage, KB, CORRECTED>;
  const Work work(a);
  const auto& own = work.own;
  const int64_t area = int64_t(a.K) * a.V;

  for (int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
    const int64_t chunk = item / a.heads;
    const Head head(item % a.heads, a.H);
    const int start = int(chunk) * SAVED, groups = (min(SAVED, a.T - start) + GROUP - 1) / GROUP;
    float grad_u = 0;
    __syncthreads();
    const int mine = threadIdx.x;  // of K
    if (!CORRECTED && mine < KB) work.u[mine] = mine < a.K ? a.u[int64_t(head.h) * a.K + mine] : 0;

    for (int n = 0; n < 2 * groups - 1; ++n) {
      const bool back = n >= groups - 1;
      const int group = back ? 2 * groups - 2 - n : n, first = start + group * GROUP, count = min(GROUP, a.T - first);
      __syncthreads();  // all are done with the rows before
      work.stage_rows(head, first, count);
      __syncthreads();

      Quad totals[Work::TOTALS] = {};
      for (int pass = 0; pass < a.passes; ++pass) {
        const int begin = pass * Work::Columns::BLOCK + own.warp * Work::WIDTH, column = begin + own.first;
        const int64_t at = (chunk * a.heads + head.index) * area;
        Quad* const kept = reinterpret_cast<Quad*>(a.scratch) + threadIdx.x;  // S before groups 1, 2 and 3
        auto kept_of = [&](int group) {
          return kept + ((blockIdx.x * int64_t(SAVED / GROUP - 1) + group - 1) * a.passes + pass) * Work::HELD * THREADS;
        };
        if (begin < a.V) {
          work.stage_values(head, first, count, begin);
          float S[ROWS][PAIR], G[ROWS][PAIR];
          if (group == 0) own.load(S, a.checkpoints + at, a.K, a.V, column, a.even);
          else Work::held(S, kept_of(group), THREADS);
          work.replay(S, count, back);
          if (!back) {
            Work::hold(S, kept_of(group + 1), THREADS);
            continue;
          }
          __syncwarp();
          own.load(G, a.ends + at, a.K, a.V, column, a.even);
#pragma unroll 1
          for (int i = count - 1; i >= 0; --i) work.step_back(G, S, head, i, first, begin);
          if (group > 0) own.store(G, a.ends + at, a.K, a.V, column, a.even);
        }
        if (!back) continue;
        __syncthreads();
        work.reduce(totals, count, pass);
        __syncthreads();
      }
      if (!back) continue;
      work.store(totals, head, first, count);
      if constexpr (!CORRECTED) work.add_bonus(grad_u, count);
    }
    if (!CORRECTED && mine < a.K) a.sums[(chunk * a.heads + head.index) * a.K + mine] = grad_u;
  }
}

// ---- entry ---------------------------------------------------------------------------------------------------------

// ends: as checkpoints, and scratch: [blocks, 3, passes, 16, 128]; sums: [⌈T/32⌉, B, H, K] of gu.
void linear_recurrence_gradients(std::optional<Tensor> grad_y, Tensor r, Tensor w, Tensor k, Tensor v, std::optional<Tensor> u,
                   std::optional<Tensor> a, std::optional<Tensor> b, Tensor checkpoints, Tensor ends, Tensor grad_r,
                   Tensor grad_w, Tensor grad_k, Tensor grad_v, std::optional<Tensor> sums,
                   std::optional<Tensor> grad_a, std::optional<Tensor> grad_b, Tensor scratch, double scale,
                   int64_t stream) {
  const Arguments given(r, w, k, v, u, a, b, grad_y);
  const auto [B, T, H, K, V] = std::tuple(given.B, given.T, given.H, given.K, given.V);
  const int64_t chunks = given.chunks();
  for (const Tensor* t : {&checkpoints, &ends})
    check(*t, {chunks, B, H, K, V}, ScalarType::Float, t == &ends ? "ends" : "checkpoints");
  check(grad_r, {B, T, H, K}, given.dtype, "grad_r");
  check(grad_w, {B, T, H, K}, ScalarType::Float, "grad_w");
  check(grad_k, {B, T, H, K}, given.dtype, "grad_k");
  check(grad_v, {B, T, H, V}, given.dtype, "grad_v");
  STD_TORCH_CHECK(grad_a.has_value() == a.has_value() && grad_b.has_value() == a.has_value() &&
                      sums.has_value() == u.has_value(),
                  "expected a gradient of all that is given");
  check(grad_a, {B, T, H, K}, given.dtype, "grad_a");
  check(grad_b, {B, T, H, K}, given.dtype, "grad_b");
  check(sums, {chunks, B, H, K}, ScalarType::Float, "sums");
  const DeviceGuard guard(r);
  given.dispatch([&]<class Storage, class Width, class Corrected>(Storage, Width, Corrected) {
    constexpr int KB = Width::value;
    constexpr bool CORRECTED = Corrected::value;
    using Slot = Slots<KB, CORRECTED>;
    const int64_t passes = ceil_div(V, Tile<KB, PAIR>::BLOCK), items = chunks * B * H;
    static_assert(!(CORRECTED && KB == 128) || sizeof(float) * Slot::NUMBERS == CORRECTED_SHARED);
    const int64_t blocks = scratch.size(0);
    check(scratch, {blocks, SAVED / GROUP - 1, passes, ROWS * PAIR, THREADS}, ScalarType::Float, "scratch");
    STD_TORCH_CHECK(blocks <= INT32_MAX && (items == 0 || blocks > 0), "scratch: expected room for a block");
    const Gradients<Storage> call{rows_of<Storage>(r),
                                  rows_of<Storage>(k),
                                  rows_of<Storage>(v),
                                  rows_of<Storage>(a, r),
                                  rows_of<Storage>(b, r),
                                  rows_of<Storage>(grad_y, v),
                                  rows_of<float>(w),
                                  data<const float>(u),
                                  data<const float>(checkpoints),
                                  data<float>(ends),
                                  data<float>(scratch),
                                  data<float>(sums),
                                  data<Storage>(grad_r),
                                  data<Storage>(grad_k),
                                  data<Storage>(grad_v),
                                  data<Storage>(grad_a),
                                  data<Storage>(grad_b),
                                  data<float>(grad_w),
                                  float(scale),
                                  B * H,
                                  items,
                                  int(T),
                                  int(H),
                                  int(K),
                                  int(V),
                                  int(passes),
                                  given.aligned,
                                  given.even(PAIR, {&checkpoints, &ends}),
                                  K % 4 == 0};
    launch({.grid = unsigned(std::min(blocks, items)),
            .block = THREADS,
            .stream = stream,
            .shared = sizeof(float) * Slot::NUMBERS},
           gradients<Storage, KB, CORRECTED>, call);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("linear_recurrence_gradients(Tensor? grad_y, Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, Tensor? b, "
        "Tensor checkpoints, Tensor(a!) ends, Tensor(b!) grad_r, Tensor(c!) grad_w, Tensor(d!) grad_k, "
        "Tensor(e!) grad_v, Tensor(f!)? sums, Tensor(g!)? grad_a, Tensor(h!)? grad_b, Tensor(i!) scratch, float scale, "
        "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) { m.impl("linear_recurrence_gradients", TORCH_BOX(&linear_recurrence_gradients)); }
