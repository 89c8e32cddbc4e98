// LSTM, GRU and RNN over a sequence on the CPU.
//
//   LSTM  i, f, o = σ(·), g = tanh(·) of W_ih x + b_ih + W_hh h + b_hh;  c' = f∘c + i∘g;  h' = [W_hr] (o ∘ tanh c')
//   GRU   r, z = σ(·);  n = tanh(W_in x + b_in + r∘(W_hn h + b_hn));  h' = (1 − z)∘n + z∘h
//   RNN   h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh
//
// A member of the team owns a range of hidden units for the whole sequence: their rows of both weights, which it packs
// once so that they stay in its caches, and their cells. For a chunk of steps it computes what the input gives to its
// own units, as one product, and then runs the steps of that chunk. At each step a tile of the product with h holds
// all gates of W units for six sequences, and the cell follows on the tile. Members exchange only h, once a step,
// through a double buffer; with a projection, o ∘ tanh c' as well. The state that is carried elementwise (c; h of the
// GRU) is in the accumulator type, by unit. For a few rows in all (a step), packing would cost more than the products:
// the weights are read in place.
//
// An output element's sum has the same order whoever computes it: results repeat bit by bit, for any number of threads.
//
// Reads all arguments; writes output, h_n, c_n and, for training, gates and cells, every element.

#include <tuple>

#include "rnn_weights.h"

namespace {

constexpr int64_t FEW_ROWS = 12;        // T·B, up to which weights are read in place
constexpr int64_t FEW_STEPS = 64;       // T, up to which W_hh is when B is 1: then packing gains less of the bandwidth
constexpr int64_t CHUNK_ROWS = 256;     // rows of input multiplied at a time
constexpr int64_t MEMBER_WORK = 65536;  // multiply-adds that are worth another thread, in all
constexpr int64_t MEETING_WORK = 8192;  // and at each step, after which the team meets

// ---- how a call is cut ----------------------------------------------------------------------------------------------

template <class Storage>
struct RnnResults {
  Storage *output, *h_n, *c_n;
  AccOf<Storage> *gates, *cells;  // null unless training
};

// The arguments as the kernel sees them, who takes part, and how many steps' inputs are multiplied at once.
template <class Storage, Cell cell>
struct RnnPlan {
  using P = typename ComputeOf<Storage>::type;
  static constexpr int W = lanes<typename P::Acc>;
  static constexpr int64_t G = gates_of(cell);

  const Schedule schedule;
  const int64_t T, B, H;
  const View<const Storage, 3> input;
  const View<const Storage, 2> h0, c0;
  const View<const Storage, 1> bias_ih, bias_hh;
  const bool projected;
  RnnWeight<P, Storage> from_input, from_state, projection;
  int64_t members, chunks, chunk;  // chunk: steps whose input is multiplied at once

  explicit RnnPlan(const RnnArguments& a)
      : schedule(a), T(schedule.T), B(schedule.B), H(a.H()), input(a.input), h0(a.h0), c0(a.c0), bias_ih(a.bias_ih),
        bias_hh(a.bias_hh), projected(a.weight_hr.has_value()) {
    const int64_t threads = thread_count();
    auto operand = [&](const Tensor& weight, int64_t gates) {
      RnnWeight<P, Storage> w{View<const Storage, 2>(weight), gates, weight.size(0) / gates, weight.size(1), 1};
      // Narrow blocks are taken by four, unless that would leave threads without any.
      if (gates == 1) w.group = std::clamp<int64_t>(ceil_div(w.N, W) / threads, 1, 4);
      w.in_place = w.readable() && T * B <= FEW_ROWS;
      return w;
    };
    from_input = operand(a.weight_ih, G), from_state = operand(a.weight_hh, G);
    if (B == 1 && T <= FEW_STEPS) from_state.in_place = from_state.readable();
    if (projected) projection = operand(*a.weight_hr, 1);

    const int64_t step_work = B * G * H * from_state.K, work = T * (step_work + B * G * H * from_input.K);
    members = std::min({threads, from_state.blocks(), work / MEMBER_WORK});
    if (T > 1 || projected) members = std::min(members, step_work / MEETING_WORK);
    members = std::max<int64_t>(members, 1);
    chunks = std::max<int64_t>(ceil_div(T * B, CHUNK_ROWS), 1);
    chunk = ceil_div(T, chunks);
  }

  // W_ih is packed again for each chunk when these are few.
  bool repacks() const { return chunks <= 2; }
  int64_t group() const { return from_state.group; }
  int64_t chunk_rows() const { return chunk * B + TILE_ROWS; }
  int64_t stage_size() const {
    return stage_units<P>(std::max({from_input.K, from_state.K, projected ? H : int64_t(0)}));
  }

  // Rows are a cache line apart from a power of two, which would crowd a few sets of the cache.
  static int64_t width(int64_t units) { return round_up(units, 16) + 16; }
  int64_t input_width() const { return width(from_input.units()); }
  int64_t h_width() const { return width(from_state.units()); }
  int64_t hidden_width() const { return width(projection.units()); }
};

// The memory that the members share, or of which each has a part.
template <class Storage, Cell cell>
struct RnnArrays {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t G = gates_of(cell);

  const RnnPlan<Storage, cell>& plan;
  // Packed weights, by block. Where W_ih is packed again for each chunk, its place is the member's own and stays in its
  // cache: pages new from the system cost more than packing.
  Unit *input_panels, *state_panels, *projection_panels;
  // Shared: h: [2][B][h_width], read and written in turns; hidden: [B][hidden_width], o ∘ tanh c' before a projection.
  Unit *h[2], *hidden;
  // By block of units, so each part is one member's. x: [blocks][chunk rows][group][G][W], the gates' part from the input;
  // bias: [blocks][group][G][W]; hidden_bias: [blocks][group][W], of the GRU's n; state: [blocks][group][B][W].
  Acc *x, *bias, *hidden_bias, *state;
  // By member. inputs: [chunk rows][input_width].
  Unit *inputs, *stage;

  RnnArrays(Arena& arena, const RnnPlan<Storage, cell>& plan) : plan(plan) {
    const int64_t blocks = plan.from_state.blocks(), group = plan.group(), B = plan.B;
    arena.place(input_panels, (plan.repacks() ? plan.members : blocks) * plan.from_input.block_units());
    arena.place(state_panels, blocks * plan.from_state.block_units());
    for (Unit*& buffer : h) arena.place(buffer, (B + TILE_ROWS) * plan.h_width());
    if (plan.projected) {
      arena.place(projection_panels, plan.projection.blocks() * plan.projection.block_units());
      arena.place(hidden, (B + TILE_ROWS) * plan.hidden_width());
    }
    arena.place(x, blocks * x_block());
    arena.place(bias, blocks * group * G * W);
    arena.place(hidden_bias, blocks * group * W);
    arena.place(state, has_state(cell) ? blocks * group * B * W : 0);
    arena.place(inputs, plan.members * plan.chunk_rows() * plan.input_width());
    arena.place(stage, plan.members * plan.stage_size());
  }

  int64_t x_block() const { return plan.chunk_rows() * plan.group() * G * W; }
  Unit* input_panel(int64_t block, int64_t member) const {
    return input_panels + (plan.repacks() ? member : block) * plan.from_input.block_units();
  }
  Unit* state_panel(int64_t block) const { return state_panels + block * plan.from_state.block_units(); }
  Unit* projection_panel(int64_t block) const { return projection_panels + block * plan.projection.block_units(); }
  Unit* stage_of(int64_t member) const { return stage + member * plan.stage_size(); }
  // unit: a multiple of W
  Acc* state_of(int64_t unit, int64_t slot) const { return state + unit * plan.B + slot * W; }
};

// ---- before the first step and after the last -----------------------------------------------------------------------

// The states before the first step, and the rows of the results that belong to no member: the inactive ones.
template <class Storage, Cell cell>
void begin_states(const RnnPlan<Storage, cell>& plan, const RnnArrays<Storage, cell>& arrays,
                  const RnnResults<Storage>& out) {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  const Schedule& schedule = plan.schedule;
  const int64_t H = plan.H, K = plan.from_state.K;
  for (int64_t slot = 0; slot < plan.B; ++slot) {
    const int64_t b = schedule.sequence(slot);
    const bool reset = schedule.any_resets() && schedule.length(slot) > 0 &&
                       schedule.reset(schedule.first_time(slot), slot);
    for (Unit* buffer : arrays.h) {
      Unit* row = buffer + slot * plan.h_width();
      if (reset) std::fill_n(row, plan.h_width(), Unit(0));
      else copy_row<P>(plan.h0.at(b), plan.h0.stride[1], K, row, plan.h_width());
    }
    if constexpr (has_state(cell)) {
      const auto& from = cell == Cell::LSTM ? plan.c0 : plan.h0;
      for (int64_t u = 0; u < H; u += lanes<Acc>)
        store(arrays.state_of(u, slot), load_some<Acc>(from.at(b, u), H - u, from.stride[1]));
    }
  }
  constexpr int64_t SAVED_GATES = saved_of(cell);
  const double bytes = double(plan.T) * plan.B * (K * sizeof(Storage) + (SAVED_GATES + 1) * H * sizeof(Acc));
  run_tasks(schedule.ragged() ? plan.T : 0, bytes * BYTE, [&](int64_t, int64_t t) {
    for (int64_t slot = schedule.active(t); slot < plan.B; ++slot) {
      const int64_t row = schedule.row(t, slot);
      std::fill_n(out.output + row * K, K, Storage(0));
      if (SAVED_GATES > 0 && out.gates) std::fill_n(out.gates + row * SAVED_GATES * H, SAVED_GATES * H, Acc(0));
      if (cell == Cell::LSTM && out.cells) std::fill_n(out.cells + row * H, H, Acc(0));
    }
  });
}

// h_n and c_n.
template <class Storage, Cell cell>
void finish_states(const RnnPlan<Storage, cell>& plan, const RnnArrays<Storage, cell>& arrays,
                   const RnnResults<Storage>& out) {
  using Acc = AccOf<Storage>;
  const Schedule& schedule = plan.schedule;
  const int64_t H = plan.H, K = plan.from_state.K;
  for (int64_t slot = 0; slot < plan.B; ++slot) {
    const int64_t b = schedule.sequence(slot);
    if (out.h_n && schedule.length(slot) > 0)
      std::copy_n(out.output + schedule.row(schedule.last_time(slot), slot) * K, K, out.h_n + b * K);
    else if (out.h_n)
      for (int64_t p = 0; p < K; ++p) out.h_n[b * K + p] = *plan.h0.at(b, p);
    if constexpr (cell == Cell::LSTM)
      for (int64_t u = 0; u < H; u += lanes<Acc>)
        store_some<Acc>(out.c_n + b * H + u, load<Vec<Acc>>(arrays.state_of(u, slot)), H - u);
  }
}

// ---- the steps ------------------------------------------------------------------------------------------------------

template <class Storage, Cell cell>
class RnnForward {
  using Plan = RnnPlan<Storage, cell>;
  using Arrays = RnnArrays<Storage, cell>;
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t G = gates_of(cell), SAVED_GATES = saved_of(cell);

 public:
  RnnForward(const Plan& plan, const Arrays& arrays, const RnnResults<Storage>& results)
      : plan(plan), arrays(arrays), schedule(plan.schedule), out(results), T(plan.T), H(plan.H) {}

  void run() const {
    if (T == 0 || plan.B == 0) return;
    // With nobody to wait for, always the same threads for the same units: these stay in their caches between calls.
    auto alone = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i, plan.members, [] {});
    };
    if (T > 1 || plan.projected)
      run_team(plan.members, [&](Team& team, int64_t i) { work(i, team.size(), [&] { team.meet(i); }); });
    else if (plan.members == 1) alone(0, 1);
    else torch::stable::parallel_for(0, plan.members, 1, alone);
  }

 private:
  const Plan& plan;
  const Arrays& arrays;
  const Schedule& schedule;
  const RnnResults<Storage>& out;
  const int64_t T, H;

  // The whole sequence, for one member's units.
  template <class Meet>
  void work(int64_t member, int64_t size, const Meet& meet) const {
    const auto [first, last] = member_share(plan.from_state.blocks(), member, size);
    const auto [first_p, last_p] = member_share(plan.projected ? plan.projection.blocks() : 0, member, size);
    Unit* staged = arrays.stage_of(member);
    for (int64_t b = first; b < last; ++b) {
      if (!plan.repacks()) plan.from_input.pack(b, arrays.input_panel(b, member), staged);
      plan.from_state.pack(b, arrays.state_panel(b), staged);
      add_biases(b);
    }
    for (int64_t b = first_p; b < last_p; ++b) plan.projection.pack(b, arrays.projection_panel(b), staged);
    for (int64_t k0 = 0; k0 < T; k0 += plan.chunk) {
      const int64_t k1 = std::min(T, k0 + plan.chunk);
      multiply_inputs(k0, k1, first, last, member);
      for (int64_t k = k0, row = 0; k < k1; row += schedule.active(schedule.time(k)), ++k) {
        if (k > 0) meet();
        for (int64_t b = first; b < last; ++b) step(k, b, arrays.x + b * arrays.x_block() + row * plan.group() * G * W);
        if (!plan.projected) continue;
        meet();
        for (int64_t b = first_p; b < last_p; ++b) project(k, b);
      }
    }
  }

  // The biases of x and of h, which are one but in the GRU's n.
  void add_biases(int64_t block) const {
    const int64_t group = plan.group();
    for (int64_t v = 0; v < group * G; ++v) {
      const int64_t gate = v % G, at = gate * H + (block * group + v / G) * W, count = plan.from_state.count(block, v);
      auto part = [&](const View<const Storage, 1>& b) {
        return b ? load_some<Acc>(b.at(at), count, b.stride[0]) : Vec<Acc>{};
      };
      const bool apart = cell == Cell::GRU && gate == 2;
      store(arrays.bias + (block * group * G + v) * W,
            apart ? part(plan.bias_ih) : part(plan.bias_ih) + part(plan.bias_hh));
      if (apart) store(arrays.hidden_bias + (block * group + v / G) * W, part(plan.bias_hh));
    }
  }

  // x of steps k0 .. k1-1. Every member gathers all rows for itself: a small part of its product.
  void multiply_inputs(int64_t k0, int64_t k1, int64_t first, int64_t last, int64_t member) const {
    const int64_t units = plan.from_input.units(), ld = plan.input_width();
    Unit* rows = arrays.inputs + member * plan.chunk_rows() * ld;
    int64_t count = 0;
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t t = schedule.time(k);
      for (int64_t slot = 0; slot < schedule.active(t); ++slot)
        copy_row<P>(schedule.at(plan.input, t, slot), plan.input.stride[2], plan.from_input.K, rows + count++ * ld,
                    units);
    }
    for (int64_t b = first; b < last; ++b) {
      Unit* panel = arrays.input_panel(b, member);
      if (plan.repacks()) plan.from_input.pack(b, panel, arrays.stage_of(member));
      plan.from_input.multiply_all(b, panel, count, rows, ld, arrays.x + b * arrays.x_block(), true,
                                   [](int64_t, int64_t) {});
    }
  }

  // The k-th step of a block of units. x: [active][group][G][W]
  void step(int64_t k, int64_t block, const Acc* x) const {
    const int64_t t = schedule.time(k), group = plan.group(), vectors = group * G;
    alignas(64) Acc products[TILE_ROWS * 4 * W];
    plan.from_state.multiply_all(block, arrays.state_panel(block), schedule.active(t), arrays.h[k % 2], plan.h_width(),
                                 products, false, [&](int64_t first, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t u = 0; u < group; ++u) {
          const int64_t unit = (block * group + u) * W;
          if (unit < H)
            advance_units(k, t, first + r, unit, x + ((first + r) * vectors + u * G) * W,
                          products + (r * vectors + u * G) * W);
        }
    });
  }

  // The cells of one sequence from `unit` on. x, s: [G][W]
  void advance_units(int64_t k, int64_t t, int64_t slot, int64_t unit, const Acc* x, const Acc* s) const {
    const int64_t count = H - unit, row = schedule.row(t, slot);
    Vec<Acc> from_x[G], from_h[G], saved[4], carried{};
    PK_UNROLL
    for (int g = 0; g < G; ++g) {
      from_x[g] = load<Vec<Acc>>(x + g * W) + load<Vec<Acc>>(arrays.bias + unit * G + g * W);
      from_h[g] = load<Vec<Acc>>(s + g * W);
    }
    if constexpr (cell == Cell::GRU) from_h[2] += load<Vec<Acc>>(arrays.hidden_bias + unit);
    if (has_state(cell) && !schedule.reset(t, slot)) carried = load<Vec<Acc>>(arrays.state_of(unit, slot));
    Vec<Acc> h = advance<cell, Acc>(from_x, from_h, carried, saved);
    if constexpr (has_state(cell)) store(arrays.state_of(unit, slot), carried);
    if (SAVED_GATES > 0 && out.gates) {
      PK_UNROLL
      for (int64_t g = 0; g < SAVED_GATES; ++g)
        store_some<Acc>(out.gates + (row * SAVED_GATES + g) * H + unit, saved[g], count);
    }
    if (cell == Cell::LSTM && out.cells) store_some<Acc>(out.cells + row * H + unit, carried, count);
    if (!plan.projected) return pass_on(k, slot, row, unit, h);
    store_as<Acc>(reinterpret_cast<ElementOf<P, Storage>*>(arrays.hidden + slot * plan.hidden_width()) + unit, h);
  }

  // W elements of h' from p on: to output, and to the step after the k-th, where a reset makes them zero.
  void pass_on(int64_t k, int64_t slot, int64_t row, int64_t p, Vec<Acc> v) const {
    const int64_t K = plan.from_state.K;
    store_some<Acc>(out.output + row * K + p, v, K - p);
    if (k + 1 == T) return;
    if (schedule.reset(schedule.time(k + 1), slot)) v = Vec<Acc>{};
    store_as<Acc>(reinterpret_cast<ElementOf<P, Storage>*>(arrays.h[(k + 1) % 2] + slot * plan.h_width()) + p, v);
  }

  // h' = W_hr (o ∘ tanh c') at the k-th step, of a block of h's elements.
  void project(int64_t k, int64_t block) const {
    const RnnWeight<P, Storage>& projection = plan.projection;
    const int64_t t = schedule.time(k), group = projection.group;
    alignas(64) Acc products[TILE_ROWS * 4 * W];
    projection.multiply_all(block, arrays.projection_panel(block), schedule.active(t), arrays.hidden,
                            plan.hidden_width(), products, false, [&](int64_t first, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t u = 0; u < group; ++u) {
          const int64_t p = (block * group + u) * W, slot = first + r;
          if (p < projection.N)
            pass_on(k, slot, schedule.row(t, slot), p, load<Vec<Acc>>(products + (r * group + u) * W));
        }
    });
  }
};

template <class Storage, Cell cell>
void run_rnn(const RnnArguments& a, const RnnResults<Storage>& results) {
  const RnnPlan<Storage, cell> plan(a);
  Workspace<RnnArrays<Storage, cell>> memory(1, plan);
  const RnnArrays<Storage, cell>& arrays = memory[0];
  begin_states(plan, arrays, results);
  RnnForward<Storage, cell>(plan, arrays, results).run();
  finish_states(plan, arrays, results);
}

// ---- the op ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn(
    Tensor input, std::optional<Tensor> batch_sizes, Tensor h0, std::optional<Tensor> c0, Tensor weight_ih,
    Tensor weight_hh, std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, std::optional<Tensor> weight_hr,
    std::optional<Tensor> lengths, std::optional<Tensor> resets, int64_t cell, bool reverse, bool training,
    int64_t /*backend*/) {
  const RnnArguments a{input,   batch_sizes, h0,        c0,      weight_ih, weight_hh, bias_ih,
                    bias_hh, weight_hr,   lengths,   resets,  Cell(cell), reverse};
  a.check();
  const int64_t saved = training ? saved_of(a.cell) * a.H() : 0;
  const bool lstm = a.cell == Cell::LSTM, cells = training && lstm;
  const ScalarType exact = accumulator_of(a.storage());
  const std::vector<int64_t> none{0};
  Tensor output = empty(a.rows_by(a.P()), a.storage());
  Tensor h_n = empty(a.step() ? none : std::vector{a.B(), a.P()}, a.storage());
  Tensor c_n = empty(lstm ? std::vector{a.B(), a.H()} : none, a.storage());
  Tensor gates = empty(saved ? a.rows_by(saved) : none, exact);
  Tensor cell_states = empty(cells ? a.rows_by(a.H()) : none, exact);
  for_dtype(a.storage(), [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    const RnnResults<Storage> results{data<Storage>(output),
                             a.step() ? nullptr : data<Storage>(h_n),
                             lstm ? data<Storage>(c_n) : nullptr,
                             saved > 0 ? data<Acc>(gates) : nullptr,
                             cells ? data<Acc>(cell_states) : nullptr};
    for_cell(a.cell, [&](auto which) { run_rnn<Storage, which>(a, results); });
  });
  return {output, h_n, c_n, gates, cell_states};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("rnn", TORCH_BOX(&rnn)); }
