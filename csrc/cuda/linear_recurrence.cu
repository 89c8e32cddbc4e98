// RWKV-6's and RWKV-7's WKV (equations: pykernels/ops/linear_recurrence.py): a matrix per head, S: [K, V], whose rows decay, a step
// at a time. A block owns some columns of a head's S, all K of them, through all T steps.
//
//   reads    r, w, k, v, a, b: groups of 8 steps, brought by asynchronous copies two groups ahead
//   writes   y, the state before every 32 steps and after the last
//
// REVERSE goes through the steps from the last to the first with the gradient G of S, which does not depend on S:
//
//   reads    r, w, gy, a, b
//   writes   G after every 32 steps and before the first: what csrc/cuda/linear_recurrence_backward.cu needs to take them side by side
//
// What limits it, by instruction counts for sm_90 and K of 64 (nothing was timed): lanes of 4 columns reach 0.37 of the
// peak of FMA (RWKV-6) or 0.47 (RWKV-7) if all units overlap, by issue slots, shared memory close behind, for it gives
// each lane its 24 or 40 numbers of a step's rows; lanes of 1 column 0.13 or 0.18, by shared memory alone.
#include "linear_recurrence_tile.h"

namespace {

constexpr int RING = 3;  // groups on their way or in use

// ---- a sequence ----------------------------------------------------------------------------------------------------

template <class Storage>
struct Sequence {
  Rows<Storage> r, k, v, a, b;    // REVERSE: -, r, gy, b, a
  Rows<float> w;
  const float *u, *initial;       // [H, K]; [B, H, K, V] or null
  Storage* y;                     // [B, T, H, V]; REVERSE: none
  float *final, *saved;           // [B, H, K, V], [⌈T/32⌉, B, H, K, V], or null
  float scale;
  int64_t heads;                  // B·H
  int T, H, K, V, blocks;         // blocks of columns
  bool aligned, even;             // rows 16 bytes at a time, columns of states COLUMNS at a time
};

// Reversed, the step is G ← diag(d) G + r gᵀ (RWKV-6), G += r gᵀ, G ← diag(d) G + a (bᵀ G) (RWKV-7).
// audit: sequence: dynamic shared 32 * ((3 + 2 * CORRECTED - REVERSE) * KB + 1) + 8192 * size * COLUMNS // KB +
//   3 * (32 * KB + 8 * size * ((2 + 2 * CORRECTED - REVERSE) * KB + 1024 * COLUMNS // KB)): rows of a group, y, the ring
template <class Storage, int KB, int COLUMNS, bool CORRECTED, bool REVERSE>
__global__ void __launch_bounds__(THREADS, COLUMNS > 1 ? 3 : 4) sequence(const Sequence<Storage> a) {
  using Columns = Tile<KB, COLUMNS>;
  constexpr int KINDS = COUNT<CORRECTED> - REVERSE, LAST = KINDS - 1;  // rows of a step; LAST: reversed there is no reader
  constexpr int NARROW = GROUP * (LAST * KB + Columns::BLOCK);     // numbers in Storage that a group has
  const Columns own;
  const Head head(blockIdx.x / a.blocks, a.H);
  const int begin = blockIdx.x % a.blocks * Columns::BLOCK, mine = own.warp * Columns::WIDTH + own.first;
  const int column = begin + mine, groups = (a.T + GROUP - 1) / GROUP;
  const int64_t area = int64_t(a.K) * a.V;

  float* const ready = reinterpret_cast<float*>(dynamic_shared());  // [GROUP][KINDS][KB]
  float* const present = ready + GROUP * KINDS * KB;                // [GROUP], r·(u∘k)
  float* const rates = present + GROUP;                             // [RING][GROUP][KB], w
  Storage* const narrow = reinterpret_cast<Storage*>(rates + RING * GROUP * KB);  // [RING][k, a, b, r; v][GROUP]
  Storage* const results = narrow + RING * NARROW;                                // [GROUP][BLOCK], y

  auto start_of = [&](int n) { return (REVERSE ? groups - 1 - n : n) * GROUP; };
  auto fetch_group = [&](int n) {
    if (n < groups) {
      const int t = start_of(n);
      Storage* to = narrow + n % RING * NARROW;
      fetch<KB>(rates + n % RING * GROUP * KB, a.w, head, t, a.T, 0, a.K, a.aligned);
      auto bring = [&](const Rows<Storage>& from) {
        fetch<KB>(to, from, head, t, a.T, 0, a.K, a.aligned);
        to += GROUP * KB;
      };
      bring(a.k);
      if constexpr (CORRECTED) bring(a.a), bring(a.b);
      if constexpr (!REVERSE) bring(a.r);
      fetch<Columns::BLOCK>(to, a.v, head, t, a.T, begin, a.V, a.aligned);
    }
    commit_copies();
  };

  constexpr int QUADS = KB / 4;  // of a row; a thread's quad is the same in all rows
  Quad u{};
  if constexpr (!CORRECTED && !REVERSE)
    u = load_quad(a.u + int64_t(head.h) * a.K, int(threadIdx.x) % QUADS * 4, a.K, false);
  auto prepare = [&](int n) {
    const Storage* const from = narrow + n % RING * NARROW;
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * QUADS; i += THREADS) {
      const int row = i / QUADS;
      Quad* const to = reinterpret_cast<Quad*>(ready + row * KINDS * KB) + i % QUADS;
      auto quad = [&](int kind) {
        return to_floats(reinterpret_cast<const Pack<Storage, 4>*>(from)[kind * GROUP * QUADS + i]);
      };
      const Quad k = scaled(quad(0), REVERSE ? a.scale : 1);
      to[KEY * QUADS] = k;
      to[DECAY * QUADS] = decays(reinterpret_cast<const Quad*>(rates + n % RING * GROUP * KB)[i]);
      if constexpr (CORRECTED) {
        to[FIRST * QUADS] = quad(1);
        to[SECOND * QUADS] = quad(2);
      }
      if constexpr (!REVERSE) {
        const Quad r = scaled(quad(LAST - 1), a.scale);
        to[LAST * QUADS] = r;
        if constexpr (!CORRECTED) {
          const float sum = sum_over<QUADS>(product(r, u, k));
          if (i % QUADS == 0) present[row] = sum;
        }
      }
    }
  };
  auto store_results = [&](int t, int count) {
    auto move = [&]<int N>(std::integral_constant<int, N>) {
#pragma unroll 1
      for (int i = threadIdx.x * N; i < GROUP * Columns::BLOCK; i += THREADS * N) {
        const int row = i / Columns::BLOCK, x = begin + i % Columns::BLOCK;
        if (row < count && x < a.V)
          *reinterpret_cast<Pack<Storage, N>*>(a.y + ((head.b * int64_t(a.T) + t + row) * a.H + head.h) * a.V + x) =
              *reinterpret_cast<const Pack<Storage, N>*>(results + i);
      }
    };
    if (a.aligned) move(std::integral_constant<int, 16 / sizeof(Storage)>{});
    else move(std::integral_constant<int, 1>{});
  };

  float S[ROWS][COLUMNS] = {};
  if (a.initial) own.load(S, a.initial + head.index * area, a.K, a.V, column, a.even);
  for (int n = 0; n < RING - 1; ++n) fetch_group(n);
  for (int n = 0; n < groups; ++n) {
    const int t = start_of(n), count = min(GROUP, a.T - t);
    wait_copies<RING - 2>();
    __syncthreads();  // the group has come; all are done with the one before: with `ready`, its place, and y is whole
    if (!REVERSE && n > 0) store_results(t - GROUP, GROUP);
    prepare(n);
    fetch_group(n + RING - 1);
    if (a.saved && (REVERSE ? (t + GROUP) % SAVED == 0 || t + GROUP >= a.T : t % SAVED == 0))
      own.store(S, a.saved + (t / SAVED * a.heads + head.index) * area, a.K, a.V, column, a.even);
    __syncthreads();
    if (column - own.first >= a.V) continue;  // the warp has no column
    const Storage* const values = narrow + n % RING * NARROW + GROUP * LAST * KB + mine;
#pragma unroll 2
    for (int step = 0; step < count; ++step) {
      const int i = REVERSE ? count - 1 - step : step;
      const float* const rows = ready + i * KINDS * KB;
      const auto packed = *reinterpret_cast<const Pack<Storage, COLUMNS>*>(values + i * Columns::BLOCK);
      float v[COLUMNS], d[ROWS], k[ROWS], x[ROWS], y[COLUMNS];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) v[c] = static_cast<float>(packed.of[c]);
      own.read(d, rows + DECAY * KB);
      own.read(k, rows + KEY * KB);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) y[c] = !CORRECTED && !REVERSE && own.share == 0 ? present[i] * v[c] : 0;
      if constexpr (!CORRECTED) {
        if constexpr (!REVERSE) {
          own.read(x, rows + LAST * KB);
          own.add_products(y, x, S);
        }
        advance(S, d, k, v);
      } else {
        float s[COLUMNS];
        if constexpr (REVERSE) add(S, k, v);
        own.read(x, rows + FIRST * KB);
        own.products(s, x, S);
        own.read(x, rows + SECOND * KB);
        if constexpr (REVERSE) advance(S, d, x, s);
        else {
          advance(S, d, k, v);
          add(S, x, s);
          own.read(x, rows + LAST * KB);
          own.add_products(y, x, S);
        }
      }
      if constexpr (!REVERSE) {
        const float sum = own.share_columns(y);
        Storage* const to = results + i * Columns::BLOCK + own.warp * Columns::WIDTH;
        if (own.tells()) to[own.shared_column()] = static_cast<Storage>(sum);
      }
    }
  }
  if constexpr (!REVERSE) {
    __syncthreads();
    if (groups > 0) store_results(start_of(groups - 1), a.T - start_of(groups - 1));
  }
  if (a.final) own.store(S, a.final + head.index * area, a.K, a.V, column, a.even);
}

// ---- entries -------------------------------------------------------------------------------------------------------

template <int KB, int COLUMNS, bool CORRECTED, bool REVERSE, class Storage>
void run_sequence(Sequence<Storage> a, int64_t stream) {
  constexpr int KINDS = COUNT<CORRECTED> - REVERSE, BLOCK = Tile<KB, COLUMNS>::BLOCK;
  a.blocks = (a.V + BLOCK - 1) / BLOCK;
  const int64_t blocks = a.heads * a.blocks;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "expected at most ", INT32_MAX, " blocks, got ", blocks);
  const size_t ready = sizeof(float) * GROUP * (KINDS * KB + 1);
  const size_t group = sizeof(float) * GROUP * KB + sizeof(Storage) * GROUP * ((KINDS - 1) * KB + BLOCK);
  launch({.grid = unsigned(blocks),
          .block = THREADS,
          .stream = stream,
          .shared = ready + RING * group + sizeof(Storage) * GROUP * BLOCK},
         sequence<Storage, KB, COLUMNS, CORRECTED, REVERSE>, a);
}

// wide: lanes take 4 columns, else 1.
void linear_recurrence(Tensor r, Tensor w, Tensor k, Tensor v, std::optional<Tensor> u, std::optional<Tensor> a,
         std::optional<Tensor> b, std::optional<Tensor> state, Tensor y, Tensor final, Tensor checkpoints, double scale,
         bool wide, int64_t stream) {
  const Arguments given(r, w, k, v, u, a, b, std::nullopt);
  const auto [B, T, H, K, V] = std::tuple(given.B, given.T, given.H, given.K, given.V);
  check(state, {B, H, K, V}, ScalarType::Float, "state");
  check(y, {B, T, H, V}, given.dtype, "y");
  check(final, {B, H, K, V}, ScalarType::Float, "final");
  const bool training = checkpoints.size(0) > 0;
  check(checkpoints, {training ? given.chunks() : 0, B, H, K, V}, ScalarType::Float, "checkpoints");
  const DeviceGuard guard(r);
  const bool even = given.even(4, {pointer(state), &final, &checkpoints});
  given.dispatch([&]<class Storage, class Width, class Corrected>(Storage, Width, Corrected) {
    const Sequence<Storage> call{rows_of<Storage>(r),
                                 rows_of<Storage>(k),
                                 rows_of<Storage>(v),
                                 rows_of<Storage>(a, r),
                                 rows_of<Storage>(b, r),
                                 rows_of<float>(w),
                                 data<const float>(u),
                                 data<const float>(state),
                                 data<Storage>(y),
                                 data<float>(final),
                                 training ? data<float>(checkpoints) : nullptr,
                                 float(scale),
                                 B * H,
                                 int(T),
                                 int(H),
                                 int(K),
                                 int(V),
                                 0,
                                 given.aligned && is_aligned(y, false),
                                 even};
    if (wide) run_sequence<Width::value, 4, Corrected::value, false>(call, stream);
    else run_sequence<Width::value, 1, Corrected::value, false>(call, stream);
  });
}

// The gradient of the state after every 32 steps, and before the first; grad_y stands for v.
void linear_recurrence_ends(std::optional<Tensor> grad_y, std::optional<Tensor> grad_state, Tensor r, Tensor w, Tensor k, Tensor v,
              std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b, Tensor ends,
              std::optional<Tensor> grad_initial, double scale, int64_t stream) {
  const Arguments given(r, w, k, v, u, a, b, grad_y);
  const auto [B, T, H, K, V] = std::tuple(given.B, given.T, given.H, given.K, given.V);
  check(grad_state, {B, H, K, V}, ScalarType::Float, "grad_state");
  check(grad_initial, {B, H, K, V}, ScalarType::Float, "grad_initial");
  check(ends, {given.chunks(), B, H, K, V}, ScalarType::Float, "ends");
  const DeviceGuard guard(r);
  const bool even = given.even(4, {pointer(grad_state), pointer(grad_initial), &ends});
  given.dispatch([&]<class Storage, class Width, class Corrected>(Storage, Width, Corrected) {
    const Sequence<Storage> call{rows_of<Storage>(r),
                                 rows_of<Storage>(r),
                                 rows_of<Storage>(grad_y, v),
                                 rows_of<Storage>(b, r),
                                 rows_of<Storage>(a, r),
                                 rows_of<float>(w),
                                 nullptr,
                                 data<const float>(grad_state),
                                 nullptr,
                                 data<float>(grad_initial),
                                 data<float>(ends),
                                 float(scale),
                                 B * H,
                                 int(T),
                                 int(H),
                                 int(K),
                                 int(V),
                                 0,
                                 given.aligned,
                                 even};
    run_sequence<Width::value, 4, Corrected::value, true>(call, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("linear_recurrence(Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, Tensor? b, Tensor? state, Tensor(a!) y, "
        "Tensor(b!) final, Tensor(c!) checkpoints, float scale, bool wide, int stream) -> ()");
  m.def("linear_recurrence_ends(Tensor? grad_y, Tensor? grad_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, "
        "Tensor? b, Tensor(a!) ends, Tensor(b!)? grad_initial, float scale, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) {
  m.impl("linear_recurrence", TORCH_BOX(&linear_recurrence));
  m.impl("linear_recurrence_ends", TORCH_BOX(&linear_recurrence_ends));
}
