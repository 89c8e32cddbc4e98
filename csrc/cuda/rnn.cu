// LSTM and GRU over a sequence in one launch: the recurrent weights stay on the chip for all steps.
//
//   LSTM  i, f, o = σ(·), g = tanh(·) of W_ih x + b_ih + W_hh h + b_hh;  c' = f∘c + i∘g;  h' = o ∘ tanh c'
//   GRU   r, z = σ(·);  n = tanh(W_in x + b_in + r∘(W_hn h + b_hn));  h' = (1 − z)∘n + z∘h
//   backward, of the step after: dh = W_hhᵀ dgates, then the cell's derivatives; the weights' gradients are products
//   with all rows at once, after the loop, and a library's, as W_ih x is before it.
//
// A block owns some octets, which are eight hidden units, of a team of blocks that share some sequences. Both passes
// are one loop: the product of the block's weights with what the team exchanges (h; backward: dgates), the sum over
// warps, the cells, and their part of the next exchange:
//
//   weights   groups of ROWS rows: [i|f|g|o][8 units] forward; units of W_hhᵀ backward, whose columns go by unit, then
//             gate. A warp holds the columns of its KB k-blocks (32 columns): the first IN_REGISTERS groups in
//             registers, the others in shared memory
//   exchange  [2][sequences][K], zeros in the padding, so that no load in the loop has a guard. In the team's own part of
//             global memory and one counter per team; or, where a team fits one cluster (sm_90 and newer), a copy in
//             each block's shared memory, which all write to, and the cluster's barrier. Read in one half, written in the
//             other: one wait a step is enough, and two barriers of the block (one, with a cluster)
//   cells     a lane has all gates of one unit for two sequences: the layout of the tensor core's sums
//
// bf16 and fp16 multiply with mma.m16n8k16: a is weights, b is h; fp32 exactly, a lane for each row of the weights. Sums
// go in one order whatever the grid: by k-block within a warp, then over warps; results repeat bit by bit.
//
// What limits it is latency: a step of H = 1024 reads 16 KiB of h per block and eight sequences, and waits for the slowest
// of its team; the arithmetic of so few sequences is a small part of a step.

#include "rnn_steps.h"

namespace {

// ---- forward ---------------------------------------------------------------------------------------------------------

template <class L, Cell CELL>
struct Forward {
  using S = typename L::S;
  static constexpr int SUMS = 4, GATES = CELL == LSTM ? 4 : 3;

  Steps steps;
  int64_t H;
  const float* pre;             // [rows][GATES · H]: W_ih x
  const S *h0, *b_ih, *b_hh;    // [B][H]; [GATES · H] or null
  S *output, *h_n;              // [rows][H], [B][H]
  float *state, *gates, *cells; // [B][H]: c or h before, then after; [rows][4 · H], [rows][H], or null

  struct Inputs {
    Steps::Place place[2], next[2];
    float pre[2][4], state[2];
  };

  __device__ void begin(const Exchange<L>& exchange, int columns, int b, int unit, int units) const {
    if (exchange.cluster) unit = 0, units = int(H);
    S* to = exchange.cluster ? exchange.shared : exchange.global;
    for (int column = 0; column < columns; ++column) {
      const bool zero = b + column >= steps.B || steps.at(0, b + column).reset;
      for (int j = unit + threadIdx.x; j < min(int64_t(unit) + units, H); j += blockDim.x)
        to[exchange.offset(0, column, j)] = to[exchange.offset(1, column, j)] =
            zero ? static_cast<S>(0.0f) : h0[(b + column) * H + j];
    }
  }

  __device__ Inputs load(const Job& job, int k) const {
    Inputs in{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      in.place[i] = steps.at(k, job.b + i);
      in.next[i] = steps.at(k + 1, job.b + i);
      if (!in.place[i].active || job.unit >= H) continue;
      if (!in.place[i].reset) in.state[i] = state[(job.b + i) * H + job.unit];
#pragma unroll
      for (int g = 0; g < GATES; ++g) in.pre[i][g] = pre[in.place[i].row * (GATES * H) + g * H + job.unit];
    }
    return in;
  }

  __device__ void finish(const Job& job, int k, const Inputs& in, const float2 (&sum)[4],
                         const Exchange<L>& exchange) const {
    const int unit = job.unit;
    const bool inside = unit < H;
    float bias[4] = {};
    if (b_ih && inside) {
#pragma unroll
      for (int g = 0; g < GATES; ++g) {
        bias[g] = static_cast<float>(b_ih[g * H + unit]);
        (CELL == GRU && g == 2 ? bias[3] : bias[g]) += static_cast<float>(b_hh[g * H + unit]);
      }
    }
    unsigned word[2][1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float s[4], saved[4], carried = in.state[i];
#pragma unroll
      for (int g = 0; g < 4; ++g) s[g] = in.pre[i][g] + bias[g] + (i ? sum[g].y : sum[g].x);
      if constexpr (CELL == GRU) {  // of n, what comes from h stands apart
        s[2] = in.pre[i][2] + bias[2];
        s[3] = (i ? sum[2].y : sum[2].x) + bias[3];
      }
      float h = advance<CELL>(s, carried, saved);
      const bool active = in.place[i].active && inside;
      if (!active) h = 0;
      word[i][0] = in.next[i].reset ? 0 : bits_of<S>(h);
      if (inside && in.place[i].present) {
        const int64_t row = in.place[i].row;
        output[row * H + unit] = static_cast<S>(h);
        if (gates)
#pragma unroll
          for (int g = 0; g < 4; ++g) gates[(row * 4 + g) * H + unit] = active ? saved[g] : 0;
        if (CELL == LSTM && cells) cells[row * H + unit] = active ? carried : 0;
      }
      if (active) {
        state[(job.b + i) * H + unit] = carried;
        if (!in.next[i].active) h_n[(job.b + i) * H + unit] = static_cast<S>(h);
      }
    }
    if (k + 1 == steps.T) return;

    // 16 bytes of a sequence are eight units of a column in half precision, which four lanes then have; four in fp32, two.
    uint4 chunk;
    if constexpr (L::HALF) {
      unsigned two[2], four[2], pair[1], eight[4];
      exchange_columns<1>(word[0], word[1], two);
      pair[0] = two[0] | two[1] << 16;
      join_lanes<1>(pair, 8, four);
      join_lanes<2>(four, 16, eight);
      chunk = {eight[0], eight[1], eight[2], eight[3]};
    } else {
      unsigned two[2], four[4];
      exchange_columns<1>(word[0], word[1], two);
      join_lanes<2>(two, 8, four);
      chunk = {four[0], four[1], four[2], four[3]};
    }
    const int g = job.lane / 4, mine = g % 2;
    const bool active = mine ? in.place[1].active : in.place[0].active;
    if (!active && !(mine ? in.next[1].reset : in.next[0].reset)) return;  // it keeps the h that both halves have
    const int first = unit - g + (L::HALF ? 0 : g / 4 * 4);
    exchange.store(k + 1, job.column + job.first() + mine, first, chunk, L::HALF ? g / 2 : g / 2 % 2, L::HALF ? 4 : 2);
  }
};

// ---- backward --------------------------------------------------------------------------------------------------------

template <class L, Cell CELL>
struct Backward {
  using S = typename L::S;
  static constexpr int SUMS = 1;

  Steps steps;
  int64_t H;
  const S *grad_output, *h0, *c0, *output;  // [rows][H] or null; [B][H]; [B][H], of the LSTM; [rows][H]
  const float *gates, *cells;               // [rows][4 · H], [rows][H]
  float *grad_h, *grad_c;                   // [B][H]: of the final state, then of the initial one
  S *grad_gates, *previous;                 // [rows][4 · H]; [rows][H], h before the step, or null

  struct Inputs {
    Steps::Place place[2];
    float gate[2][4], c[2], before[2], dh[2], dc[2];
  };

  __device__ void begin(const Exchange<L>&, int, int, int, int) const {}

  // The k-th from the end; k = T is before the first: what is left is the gradient of h0.
  __device__ Inputs load(const Job& job, int k) const {
    Inputs in{};
    const int step = int(steps.T) - 1 - k;
    const int unit = job.unit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int b = job.b + i;
      const int64_t at = b * H + unit;
      const Steps::Place place = in.place[i] = steps.at(step, b);
      if (b >= steps.B || unit >= H) continue;
      in.dh[i] = grad_h[at];
      if (!place.active) continue;
      const int64_t here = place.row * H + unit;
      if (grad_output) in.dh[i] += static_cast<float>(grad_output[here]);
#pragma unroll
      for (int g = 0; g < 4; ++g) in.gate[i][g] = gates[(place.row * 4 + g) * H + unit];
      const Steps::Place before = steps.at(step - 1, b);
      const int64_t there = before.row * H + unit;
      if constexpr (CELL == LSTM) {
        in.c[i] = cells[here];
        in.dc[i] = grad_c[at];
        if (!place.reset) in.before[i] = before.active ? cells[there] : static_cast<float>(c0[at]);
      }
      if (CELL == GRU || previous) {
        const S h = place.reset ? static_cast<S>(0.0f) : before.active ? output[there] : h0[at];
        if constexpr (CELL == GRU) in.before[i] = static_cast<float>(h);
        if (previous) previous[here] = h;
      }
    }
    return in;
  }

  __device__ void finish(const Job& job, int k, const Inputs& in, const float2 (&sum)[1],
                         const Exchange<L>& exchange) const {
    const int unit = job.unit;
    unsigned word[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int b = job.b + i;
      const int64_t at = b * H + unit, row = in.place[i].row;
      const bool inside = unit < H && b < steps.B, active = in.place[i].active && inside, reset = in.place[i].reset;
      const float dh = in.dh[i] + (i ? sum[0].y : sum[0].x);
      float d[4] = {};
      float before = retreat<CELL>(dh, in.dc[i], in.gate[i], in.c[i], in.before[i], d);
      if (reset) before = 0;
      if (inside) grad_h[at] = !active ? dh : CELL == GRU ? before : 0;
      if (CELL == LSTM && active) grad_c[at] = before;
      if (!active)
#pragma unroll
        for (int g = 0; g < 4; ++g) d[g] = 0;
      if (inside && in.place[i].present) {
#pragma unroll
        for (int g = 0; g < 4; ++g) grad_gates[(row * 4 + g) * H + unit] = static_cast<S>(d[g]);
        if (previous && !active) previous[row * H + unit] = static_cast<S>(0.0f);
      }
#pragma unroll
      for (int g = 0; g < 4; ++g) {  // GRU: those of W_hh, in the order of its rows
        const float value = CELL == LSTM ? d[g] : g < 3 ? d[g + 1] : 0.0f;
        word[i][g] = reset ? 0 : bits_of<S>(value);
      }
    }
    if (k == steps.T) return;
    if constexpr (L::HALF) {
      unsigned packed[2][2], both[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int g = 0; g < 2; ++g) packed[i][g] = word[i][2 * g] | word[i][2 * g + 1] << 16;
      exchange_columns<2>(packed[0], packed[1], both);
      const int even = unit & ~1;
      if (even >= H) return;
      exchange.store(k + 1, job.column + job.first() + job.lane / 4 % 2, even * 4, {both[0], both[1], both[2], both[3]},
                     0, 1);
    } else {
      if (unit >= H) return;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        exchange.store(k + 1, job.column + job.first() + i, unit * 4, {word[i][0], word[i][1], word[i][2], word[i][3]}, 0,
                       1);
    }
  }
};

// ---- kernels ---------------------------------------------------------------------------------------------------------

// Of a group of weights: its rows, and the hidden units that they are of.
template <class S, bool BACKWARD>
constexpr int ROWS = !BACKWARD ? 32 : sizeof(S) == 2 ? 16 : 8;
template <class S, bool BACKWARD>
constexpr int UNITS = BACKWARD ? ROWS<S, true> : 8;

template <class S, bool BACKWARD, int KB>
using LayoutOf = TileLayout<S, ROWS<S, BACKWARD>, KB>;
template <class S, bool BACKWARD, int KB, int CELL>
using Body = std::conditional_t<BACKWARD, Backward<LayoutOf<S, BACKWARD, KB>, Cell(CELL)>,
                                Forward<LayoutOf<S, BACKWARD, KB>, Cell(CELL)>>;

// audit: sequence_kernel: allow narrow load: what a cell needs is of one unit and two sequences a lane, as the sums are:
//     eight lanes read a sector. The loop lives on the exchange, which it reads 16 bytes a lane
// audit: sequence_kernel where S=float BACKWARD=true KB=8 target=sm_100: allow spill: 8 bytes, of the loop over the
//     steps: read once a step, outside the product
// audit: sequence_kernel where target=sm_80: dynamic shared 163 * 1024: at most: launch_steps looks for what fits
// audit: sequence_kernel where target=sm_90 target=sm_100: dynamic shared 227 * 1024: at most: launch_steps looks for
//     what fits
template <class S, bool BACKWARD, int KB, int CELL>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    sequence_kernel(const Plan<S> plan, const Body<S, BACKWARD, KB, CELL> body, const int count) {
  run_steps<LayoutOf<S, BACKWARD, KB>>(plan, body, count);
}

// ---- launches --------------------------------------------------------------------------------------------------------

// Lays out and, unless count is 0, launches the steps; false if the weights do not fit on the device's chip.
// largest_cluster: 0 keeps to the exchange in global memory.
template <class L, class Body>
bool launch_steps(void (*kernel)(Plan<typename L::S>, Body, int), Plan<typename L::S> plan, const Body& body, int count,
                  int warps, int64_t largest_cluster, int64_t stream) {
  const size_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limit)), "cudaFuncSetAttribute");
  plan.K = int64_t(warps) * L::KB * BLOCK_K;
  auto shared = [&] {
    const size_t columns = plan.cluster ? 2 * plan.tiles * 8 * (plan.K + L::PAD) : L::HALF ? 0 : 8 * plan.K;
    return std::max(0, plan.groups - L::IN_REGISTERS) * L::group_bytes(warps) +
           plan.pass * plan.groups * L::sums_bytes(warps) + columns * sizeof(typename L::S);
  };
  Launch how{.block = dim3(32 * warps), .stream = stream};
  auto start = [&](int slices, int teams, size_t room) {  // teams: at a time; room: for a block
    plan.tiles = int(ceil_div(plan.all_tiles, teams));
    while (plan.cluster && plan.tiles > 1 && shared() > room) --plan.tiles;
    plan.pass = std::min(plan.tiles, 4);
    while (plan.pass > 1 && shared() > room) --plan.pass;
    how.grid = dim3(slices, unsigned(ceil_div(plan.all_tiles, plan.tiles)));
    how.shared = shared();
    if (count > 0) launch(how, kernel, plan, body, count);
    return true;
  };

  // A team in one cluster: a power of two of blocks, each of as few groups as that leaves. Clusters need not be resident
  // together: they take turns.
  plan.cluster = true;
  const int64_t most = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? std::min<int64_t>(largest_cluster, 16) : 0;
  for (int slices = 1; slices <= most; slices *= 2) {
    plan.groups = int(ceil_div(plan.all_groups, slices)), plan.tiles = plan.pass = 1;
    if (shared() > limit || (plan.groups > L::IN_REGISTERS && slices < 8)) continue;
    how.grid = how.cluster = slices, how.shared = shared();
    const int teams = slices == 1 ? multiprocessors : resident_clusters(how, kernel);
    if (teams > 0) return start(slices, teams, limit);
  }

  plan.cluster = false, how.cluster = 1, how.cooperative = true;
  for (plan.groups = std::min(plan.all_groups, L::IN_REGISTERS);; ++plan.groups) {
    plan.tiles = plan.pass = 1;
    if (shared() > limit) return false;
    int blocks;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 32 * warps, shared()),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const int slices = int(ceil_div(plan.all_groups, plan.groups)), teams = blocks * multiprocessors / slices;
    if (teams > 0) return start(slices, teams, (limit + 1024) / blocks - 1024);  // 1 KiB a block is the system's
  }
}

// fill<L>(kernel, body, warps) with as few k-blocks a warp as H allows; false if it has too many.
template <class S, bool BACKWARD, int KB = !BACKWARD ? 1 : sizeof(S) == 2 ? 2 : 4, class Fill>
bool choose_depth(int64_t H, int64_t cell, const Fill& fill) {
  if constexpr (KB > (BACKWARD ? 16 : sizeof(S) == 2 ? 8 : 4)) {
    return false;
  } else {
    const int64_t blocks = ceil_div(BACKWARD ? 4 * H : H, BLOCK_K);
    if (blocks > MAX_WARPS * KB) return choose_depth<S, BACKWARD, 2 * KB>(H, cell, fill);
    auto of = [&]<int CELL>(std::integral_constant<int, CELL>) {
      return fill.template operator()<LayoutOf<S, BACKWARD, KB>>(
          sequence_kernel<S, BACKWARD, KB, CELL>, Body<S, BACKWARD, KB, CELL>{}, int(ceil_div(blocks, KB)));
    };
    if (cell == LSTM) return of(std::integral_constant<int, LSTM>{});
    return of(std::integral_constant<int, GRU>{});
  }
}

// ---- arguments -------------------------------------------------------------------------------------------------------

Steps steps_of(const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
               const std::optional<Tensor>& offsets, int64_t T, int64_t B, int64_t rows, bool reverse) {
  STD_TORCH_CHECK(T < 1 << 24 && B < 1 << 30, "input: expected fewer steps and sequences");
  check(lengths, {B}, ScalarType::Long, "lengths"), check(offsets, {T + 1}, ScalarType::Long, "offsets");
  check(resets, {T, B}, ScalarType::Bool, "resets");
  STD_TORCH_CHECK(offsets || rows == T * B, "output: expected ", T * B, " rows, got ", rows);
  return {data<const int64_t>(lengths), data<const int64_t>(offsets), data<const bool>(resets), T, B, reverse};
}

template <class S, bool BACKWARD>
Plan<S> plan_of(const Tensor& weights, const Tensor& exchange, const Tensor& counters, int64_t B, int64_t H) {
  Plan<S> plan{};
  plan.columns = int(BACKWARD ? 4 * H : H), plan.stride = ceil_div(plan.columns, WEIGHT_COLUMNS) * WEIGHT_COLUMNS;
  plan.all_groups = int(ceil_div(H, UNITS<S, BACKWARD>)), plan.all_tiles = int(ceil_div(B, TILE_ROWS));
  const ScalarType dtype = weights.scalar_type();
  check(weights, {plan.all_groups, ROWS<S, BACKWARD>, plan.stride}, dtype, "weights");
  check(exchange, {2, plan.all_tiles * TILE_ROWS, plan.stride}, dtype, "exchange");
  check(counters, {plan.all_tiles, 32}, ScalarType::Int, "counters");
  plan.weights = data<const S>(weights), plan.exchange = data<S>(exchange), plan.counters = data<unsigned>(counters);
  return plan;
}

// ---- entries ---------------------------------------------------------------------------------------------------------

// Whether the weights of H hidden units fit on the chip of the device that `like` is on.
bool rnn_fits(Tensor like, int64_t H, int64_t cell, bool backward) {
  const DeviceGuard guard(like);
  bool fits = false;
  for_device_dtype(like.scalar_type(), [&]<class S>(S) {
    auto of = [&]<bool BACKWARD>(std::bool_constant<BACKWARD>) {
      Plan<S> plan{};
      plan.all_groups = int(ceil_div(H, UNITS<S, BACKWARD>)), plan.all_tiles = 1;
      return choose_depth<S, BACKWARD>(H, cell, [&]<class L>(auto kernel, auto body, int warps) {
        return launch_steps<L>(kernel, plan, body, 0, warps, 0, 0);
      });
    };
    fits = backward ? of(std::true_type{}) : of(std::false_type{});
  });
  return fits;
}

void rnn_forward(Tensor pre, Tensor weights, std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, Tensor h0,
                 std::optional<Tensor> lengths, std::optional<Tensor> resets, std::optional<Tensor> offsets,
                 Tensor output, Tensor h_n, Tensor state, std::optional<Tensor> gates, std::optional<Tensor> cells,
                 Tensor exchange, Tensor counters, int64_t steps, int64_t cell, bool reverse, int64_t largest_cluster,
                 int64_t stream) {
  const ScalarType dtype = weights.scalar_type();
  STD_TORCH_CHECK(cell == LSTM || cell == GRU, "cell: expected 0 or 1, got ", cell);
  check(h0, {ANY_SIZE, ANY_SIZE}, dtype, "h0");
  const int64_t B = h0.size(0), H = h0.size(1), G = cell == LSTM ? 4 : 3;
  check(pre, {ANY_SIZE, G * H}, ScalarType::Float, "pre");
  const int64_t rows = pre.size(0);
  check(output, {rows, H}, dtype, "output"), check(h_n, {B, H}, dtype, "h_n");
  check(state, {B, H}, ScalarType::Float, "state"), check(gates, {rows, 4 * H}, ScalarType::Float, "gates");
  check(cells, {rows, H}, ScalarType::Float, "cells");
  STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "bias_hh: expected together with bias_ih");
  check(bias_ih, {G * H}, dtype, "bias_ih"), check(bias_hh, {G * H}, dtype, "bias_hh");
  const DeviceGuard guard(pre);
  const Steps places = steps_of(lengths, resets, offsets, steps, B, rows, reverse);
  for_device_dtype(dtype, [&]<class S>(S) {
    const Plan<S> plan = plan_of<S, false>(weights, exchange, counters, B, H);
    const bool fits = choose_depth<S, false>(H, cell, [&]<class L>(auto kernel, auto body, int warps) {
      body.steps = places, body.H = H, body.pre = data<const float>(pre), body.h0 = data<const S>(h0);
      body.b_ih = data<const S>(bias_ih), body.b_hh = data<const S>(bias_hh);
      body.output = data<S>(output), body.h_n = data<S>(h_n), body.state = data<float>(state);
      body.gates = data<float>(gates), body.cells = data<float>(cells);
      return launch_steps<L>(kernel, plan, body, int(steps), warps, largest_cluster, stream);
    });
    STD_TORCH_CHECK(fits, "weights: a hidden size of ", H, " does not fit on the device's chip");
  });
}

void rnn_backward(std::optional<Tensor> grad_output, Tensor weights, Tensor h0, std::optional<Tensor> c0,
                  std::optional<Tensor> lengths, std::optional<Tensor> resets, std::optional<Tensor> offsets,
                  Tensor output, Tensor gates, std::optional<Tensor> cells, Tensor grad_h,
                  std::optional<Tensor> grad_c, Tensor grad_gates, std::optional<Tensor> previous, Tensor exchange,
                  Tensor counters, int64_t steps, int64_t cell, bool reverse, int64_t largest_cluster, int64_t stream) {
  const ScalarType dtype = weights.scalar_type();
  STD_TORCH_CHECK(cell == LSTM || cell == GRU, "cell: expected 0 or 1, got ", cell);
  const bool lstm = cell == LSTM;
  STD_TORCH_CHECK(c0.has_value() == lstm && cells.has_value() == lstm && grad_c.has_value() == lstm,
                  "c0, cells, grad_c: expected for the LSTM and for no other cell");
  check(h0, {ANY_SIZE, ANY_SIZE}, dtype, "h0");
  const int64_t B = h0.size(0), H = h0.size(1);
  check(output, {ANY_SIZE, H}, dtype, "output");
  const int64_t rows = output.size(0);
  check(c0, {B, H}, dtype, "c0"), check(grad_output, {rows, H}, dtype, "grad_output");
  check(gates, {rows, 4 * H}, ScalarType::Float, "gates"), check(cells, {rows, H}, ScalarType::Float, "cells");
  check(grad_h, {B, H}, ScalarType::Float, "grad_h"), check(grad_c, {B, H}, ScalarType::Float, "grad_c");
  check(grad_gates, {rows, 4 * H}, dtype, "grad_gates"), check(previous, {rows, H}, dtype, "previous");
  const DeviceGuard guard(output);
  const Steps places = steps_of(lengths, resets, offsets, steps, B, rows, reverse);
  for_device_dtype(dtype, [&]<class S>(S) {
    const Plan<S> plan = plan_of<S, true>(weights, exchange, counters, B, H);
    const bool fits = choose_depth<S, true>(H, cell, [&]<class L>(auto kernel, auto body, int warps) {
      body.steps = places, body.H = H, body.grad_output = data<const S>(grad_output);
      body.h0 = data<const S>(h0), body.c0 = data<const S>(c0), body.output = data<const S>(output);
      body.gates = data<const float>(gates), body.cells = data<const float>(cells);
      body.grad_h = data<float>(grad_h), body.grad_c = data<float>(grad_c);
      body.grad_gates = data<S>(grad_gates), body.previous = data<S>(previous);
      return launch_steps<L>(kernel, plan, body, int(steps) + 1, warps, largest_cluster, stream);
    });
    STD_TORCH_CHECK(fits, "weights: a hidden size of ", H, " does not fit on the device's chip");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("rnn_fits(Tensor like, int H, int cell, bool backward) -> bool");
  m.def("rnn_forward(Tensor pre, Tensor weights, Tensor? bias_ih, Tensor? bias_hh, Tensor h0, Tensor? lengths, "
        "Tensor? resets, Tensor? offsets, Tensor(a!) output, Tensor(b!) h_n, Tensor(c!) state, Tensor(d!)? gates, "
        "Tensor(e!)? cells, Tensor(f!) exchange, Tensor(g!) counters, int steps, int cell, bool reverse, "
        "int largest_cluster, int stream) -> ()");
  m.def("rnn_backward(Tensor? grad_output, Tensor weights, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, "
        "Tensor? offsets, Tensor output, Tensor gates, Tensor? cells, Tensor(a!) grad_h, Tensor(b!)? grad_c, "
        "Tensor(c!) grad_gates, Tensor(d!)? previous, Tensor(e!) exchange, Tensor(f!) counters, int steps, int cell, "
        "bool reverse, int largest_cluster, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) {
  m.impl("rnn_fits", TORCH_BOX(&rnn_fits));
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}
