// Gradients of LSTM, GRU and Elman RNN on the CPU, through time.
//
//   LSTM  dc += dh ∘ o ∘ (1 − tanh² c');  di, df, dg, do = dc ∘ g, dc ∘ c, dc ∘ i, dh ∘ tanh c';  dc = dc ∘ f
//   GRU   dz, dn = dh ∘ (h − n), dh ∘ (1 − z);  dr = dn ∘ (W_hn h + b_hn);  dh = dh ∘ z + …
//   RNN   da = dh
//   then through σ' = s (1 − s) and tanh' = 1 − y², and dh (+)= dgates W_hh; with a projection dh = dh' W_hr before
//   dx = dgates W_ih;  dW_ih = dgatesᵀ x;  dW_hh = dgatesᵀ h;  db = Σ dgates;  dW_hr = dh'ᵀ (o ∘ tanh c')
//
// The steps run backwards on a team of threads. A member owns hidden units, with their dh, dc and bias sums, and the
// columns of W_hh (and W_hr) that lead to them, packed once. In a step it writes the dgates of its units, meets the
// others, and multiplies all dgates with its columns: one meeting a step, two with a projection. What the step wrote
// stays: after the loop each weight's gradient is one product over all rows, as is dx.
//
// Rows are (step, active sequence) pairs, in order of time, and only those: padding costs nothing. dgates are kept as
// the products' operands (bf16 where the hardware multiplies bf16), everything else in the accumulator type. Of the
// GRU's n gate there are two, dn for the input and dn ∘ r for the state; as n_h, r, z, n_x both sides find theirs side
// by side, the state's in the order n, r, z.
//
// Reads what the forward read, output, gates, cells and the gradients; writes every element of the wanted results.

#include "gemm.h"
#include "rnn.h"

namespace {

constexpr int blocks_of(Cell cell) { return cell == Cell::GRU ? 4 : gates_of(cell); }  // of dgates, in units of H

enum Result { INPUT, H0, C0, WEIGHT_IH, WEIGHT_HH, BIAS_IH, BIAS_HH, WEIGHT_HR, RESULTS };

// One step of W units. saved: [saved_of(cell)]; before, after: c of the LSTM, else h. d: [blocks_of(cell)] gets the
// gradients before the nonlinearities, dc becomes that of the step before; returns what of dh goes there directly.
template <Cell cell, class Acc>
PK_INLINE Vec<Acc> differentiate(const Vec<Acc>* saved, Vec<Acc> before, Vec<Acc> after, Vec<Acc> dh, Vec<Acc>& dc,
                                 Vec<Acc>* d) {
  auto through_sigmoid = [](Vec<Acc> grad, Vec<Acc> s) { return grad * s * (Acc(1) - s); };
  auto through_tanh = [](Vec<Acc> grad, Vec<Acc> y) { return grad * (Acc(1) - y * y); };
  if constexpr (cell == Cell::LSTM) {
    Vec<Acc> i = saved[0], f = saved[1], g = saved[2], o = saved[3], squashed = tanh<Acc>(after);
    dc += through_tanh(dh * o, squashed);
    d[0] = through_sigmoid(dc * g, i);
    d[1] = through_sigmoid(dc * before, f);
    d[2] = through_tanh(dc * i, g);
    d[3] = through_sigmoid(dh * squashed, o);
    dc = dc * f;
    return Vec<Acc>{};
  } else if constexpr (cell == Cell::GRU) {
    Vec<Acc> r = saved[0], z = saved[1], n = saved[2], from_state = saved[3];
    d[3] = through_tanh(dh * (Acc(1) - z), n);
    d[0] = d[3] * r;
    d[1] = through_sigmoid(d[3] * from_state, r);
    d[2] = through_sigmoid(dh * (before - n), z);
    return dh * z;
  } else {
    d[0] = cell == Cell::RNN_TANH ? through_tanh(dh, after) : select<Acc>(after <= Acc(0), Vec<Acc>{}, dh);
    return Vec<Acc>{};
  }
}

// ---- arguments and sizes --------------------------------------------------------------------------------------------

template <class Storage>
struct IncomingGradients {
  View<const Storage, 3> output;
  View<const Storage, 2> h_n, c_n;  // without data: zero
};

// The forward's results, contiguous.
template <class Storage>
struct SavedSteps {
  const Storage* output;
  const AccOf<Storage>*gates, *cells;
};

template <class Storage>
struct RnnBackwardProblem {
  using P = typename ComputeOf<Storage>::type;
  using Element = ElementOf<P, Storage>;  // of an operand of the products
  static constexpr int W = lanes<typename P::Acc>;

  const RnnArguments& a;
  const IncomingGradients<Storage>& grad;
  const SavedSteps<Storage>& saved;
  const std::array<Storage*, RESULTS>& result;  // null where not wanted
  const Schedule schedule{a};

  const Cell cell = a.cell;
  const int64_t B = a.B(), I = a.I(), H = a.H(), PH = a.P(), GH = gates_of(cell) * H;
  const int64_t width = round_up(H, W), state_width = round_up(PH, W);
  const int64_t dgates_width = operand_width(blocks_of(cell) * H), projected_width = operand_width(PH);
  const bool projects = a.weight_hr.has_value(), recurs = schedule.T > 1 || result[H0];

  // Whole units, and not a power of two: rows a multiple of 4 KiB apart would meet in the same lines of the L1.
  static int64_t operand_width(int64_t n) { return round_up(n, 64 / sizeof(Element)) + 64 / sizeof(Element); }

  // The row of W_hh of a column of dgates.
  int64_t state_gate(int64_t k) const { return cell != Cell::GRU ? k : k < H ? k + 2 * H : k - H; }
  // The first block of dgates on the input's side; on the state's side it is block 0.
  int input_block() const { return cell == Cell::GRU ? 1 : 0; }
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// A step of a sequence.
template <class Storage>
struct StepRow {
  const Storage *x, *h;      // x_t, h_{t-1}
  const AccOf<Storage>* c;   // c_{t-1}
  int64_t place;             // among the rows of input, output, gates and cells
};

template <class Storage>
struct StepRows {
  using Acc = AccOf<Storage>;

  Buffer<Storage> h0;  // [B + 1][P], the last row zero
  Buffer<Acc> c0;      // [B + 1][H], the same
  std::vector<StepRow<Storage>> all;
  std::vector<int64_t> first;  // of each step's rows

  explicit StepRows(const RnnBackwardProblem<Storage>& problem)
      : h0((problem.B + 1) * problem.PH), c0((problem.B + 1) * problem.H) {
    const RnnArguments& a = problem.a;
    const Schedule& schedule = problem.schedule;
    const int64_t B = problem.B, H = problem.H, PH = problem.PH;
    const View<const Storage, 2> from_h(a.h0), from_c(a.c0);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < PH; ++j) h0[b * PH + j] = *from_h.at(b, j);
      for (int64_t j = 0; from_c && j < H; ++j) c0[b * H + j] = static_cast<Acc>(*from_c.at(b, j));
    }
    std::fill_n(&h0[B * PH], PH, Storage(0));
    std::fill_n(&c0[B * H], H, Acc(0));
    const View<const Storage, 3> input(a.input);
    for (int64_t t = 0; t < schedule.T; ++t) {
      const int64_t before = a.reverse ? t + 1 : t - 1;
      const int64_t started = before < 0 || before >= schedule.T ? 0 : schedule.active(before);
      first.push_back(all.size());
      for (int64_t slot = 0; slot < schedule.active(t); ++slot) {
        StepRow<Storage> row{schedule.at(input, t, slot), nullptr, nullptr, schedule.row(t, slot)};
        const bool reset = schedule.reset(t, slot);
        if (slot < started && !reset) {
          const int64_t place = schedule.row(before, slot);
          row.h = problem.saved.output + place * PH, row.c = problem.saved.cells + place * H;
        } else {
          const int64_t b = reset ? B : schedule.sequence(slot);
          row.h = &h0[b * PH], row.c = &c0[b * H];
        }
        all.push_back(row);
      }
    }
  }
};

// The memory that the members share, or of which each owns the columns of its units.
template <class Storage>
struct RnnBackwardArrays {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Element = ElementOf<P, Storage>;

  Element *dgates, *projected, *squashed;  // [rows][...]: dgates; with a projection dh' and o ∘ tanh c'
  Acc *dh, *dc, *dm;                       // [B][...] by slot; dm: of o ∘ tanh c' at this step
  Acc *bias_sums, *bias_parts;             // [blocks][width]
  typename P::Unit *packed_hh, *packed_hr; // each member's panels, one after the other; no packed_hh: not needed

  RnnBackwardArrays(Arena& arena, const RnnBackwardProblem<Storage>& problem, int64_t rows) {
    const int64_t B = problem.B, width = problem.width, state_width = problem.state_width;
    const int64_t biases = blocks_of(problem.cell) * width;
    arena.place(dgates, rows * problem.dgates_width);
    arena.place(projected, problem.projects ? rows * problem.projected_width : 0);
    arena.place(squashed, problem.result[WEIGHT_HR] ? rows * width : 0);
    arena.place(dh, B * state_width);
    arena.place(dc, B * width);
    arena.place(dm, problem.projects ? B * width : 0);
    arena.place(bias_sums, biases);
    arena.place(bias_parts, biases);
    arena.place(packed_hh, problem.recurs ? Panels<P>(state_width, problem.GH).size() : 0);
    arena.place(packed_hr, problem.projects ? Panels<P>(width, problem.PH).size() : 0);
    if (!problem.recurs) packed_hh = nullptr;
  }
};

// ---- the recurrence -------------------------------------------------------------------------------------------------

// A member's part of a row's units or columns, in whole vectors of W.
struct RowPart {
  int64_t first, last;
  RowPart(int64_t columns, int64_t W, int64_t member, int64_t members) {
    auto [v0, v1] = member_share(ceil_div(columns, W), member, members);
    first = v0 * W, last = std::min(columns, v1 * W);
  }
  int64_t size() const { return std::max<int64_t>(last - first, 0); }
};

template <class Storage>
class RnnBackward {
  using Problem = RnnBackwardProblem<Storage>;
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Element = ElementOf<P, Storage>;
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t LEAST_STEP = int64_t(1) << 13, LEAST_WORK = int64_t(1) << 18;  // products for each thread
  static constexpr int64_t SUM_ROWS = 64;  // dgates in a partial bias sum, for accuracy

 public:
  RnnBackward(const Problem& problem, const StepRows<Storage>& rows, const RnnBackwardArrays<Storage>& arrays)
      : problem(problem), a(problem.a), schedule(problem.schedule), rows(rows), to(arrays), H(problem.H),
        PH(problem.PH), width(problem.width), state_width(problem.state_width) {}

  void run() const {
    const int64_t work = std::max<int64_t>(problem.B, 1) * problem.GH * (PH + (problem.projects ? H : 0));
    const int64_t most = std::min(std::min(work / LEAST_STEP, work * schedule.T / LEAST_WORK),
                                  std::min(thread_count(), ceil_div(H, W)));
    run_team(std::max<int64_t>(most, 1), [&](Team& team, int64_t member) { run_member(team, member); });
  }

 private:
  const Problem& problem;
  const RnnArguments& a;
  const Schedule& schedule;
  const StepRows<Storage>& rows;
  const RnnBackwardArrays<Storage> to;
  const int64_t H, PH, width, state_width;

  void run_member(Team& team, int64_t member) const {
    const RowPart units(H, W, member, team.size()), columns(PH, W, member, team.size());
    const Panels<P> hh(columns.size(), problem.GH), hr(units.size(), PH);
    Unit* own_hh = to.packed_hh + columns.first * hh.units;
    Unit* own_hr = to.packed_hr + units.first * hr.units;
    pack_weights(units, columns, hh, hr, own_hh, own_hr);
    begin_gradients(problem.grad.h_n, columns, to.dh, state_width);
    begin_gradients(problem.grad.c_n, units, to.dc, width);
    for (int block = 0; block < 2 * blocks_of(problem.cell); ++block)
      std::fill_n(to.bias_sums + block * width + units.first, round_up(units.size(), W), Acc(0));
    int64_t summed = 0;  // rows in bias_parts
    for (int64_t k = schedule.T - 1; k >= 0; --k) {
      const int64_t t = schedule.time(k), active = schedule.active(t), row0 = rows.first[t];
      if (problem.projects) {
        add_outputs(t, active, columns);
        team.meet(member);
        hr.multiply(active, left(to.projected, row0, problem.projected_width), own_hr, to.dm + units.first, width,
                    false);
      }
      for_cell(problem.cell, [&](auto constant) {
        for (int64_t slot = 0; slot < active; ++slot) {
          differentiate_row<constant>(t, slot, units);
          if (++summed == SUM_ROWS) add_bias_parts(units), summed = 0;
        }
      });
      if (to.packed_hh && (k > 0 || problem.result[H0])) {
        team.meet(member);
        hh.multiply(active, left(to.dgates, row0, problem.dgates_width), own_hh, to.dh + columns.first, state_width,
                    problem.cell == Cell::GRU);
      }
      clear_resets(t, active, units, columns);
    }
    add_bias_parts(units);
  }

  void pack_weights(const RowPart& units, const RowPart& columns, const Panels<P>& hh, const Panels<P>& hr,
                    Unit* own_hh, Unit* own_hr) const {
    alignas(64) Unit stage[stage_units<P>(TILE_VECTORS * W)];
    if (to.packed_hh) {
      const View<const Storage, 2> weight(a.weight_hh);
      auto row = [&](int64_t k) { return weight.at(problem.state_gate(k)); };
      hh.pack(rows_of_k(row, weight.stride[1]), columns.first, columns.last, 0, problem.GH, own_hh, stage);
    }
    if (problem.projects) {
      const View<const Storage, 2> weight(a.weight_hr);
      auto row = [&](int64_t p) { return weight.at(p); };
      hr.pack(rows_of_k(row, weight.stride[1]), units.first, units.last, 0, PH, own_hr, stage);
    }
  }

  Left<Unit> left(const Element* operand, int64_t row, int64_t row_width) const {
    return {reinterpret_cast<const Unit*>(operand + row * row_width), row_width / P::depth, 1};
  }

  void begin_gradients(const View<const Storage, 2>& from, const RowPart& part, Acc* into, int64_t into_width) const {
    for (int64_t slot = 0; slot < problem.B; ++slot)
      for (int64_t j = part.first; j < part.last; j += W) {
        Vec<Acc> v = {};
        if (from) v = load_some<Acc>(from.at(schedule.sequence(slot), j), part.last - j, from.stride[1]);
        store(into + slot * into_width + j, v);
      }
  }

  // A reset cuts what a step's state gets from the steps after it.
  void clear_resets(int64_t t, int64_t active, const RowPart& units, const RowPart& columns) const {
    for (int64_t slot = 0; slot < active; ++slot) {
      if (!schedule.reset(t, slot)) continue;
      std::fill_n(to.dh + slot * state_width + columns.first, columns.size(), Acc(0));
      std::fill_n(to.dc + slot * width + units.first, units.size(), Acc(0));
    }
  }

  // dh of the step: the gradient from later steps and the output's.
  Vec<Acc> state_gradient(int64_t t, int64_t slot, int64_t j, int64_t last) const {
    auto v = load<Vec<Acc>>(to.dh + slot * state_width + j);
    const View<const Storage, 3>& output = problem.grad.output;
    if (!output) return v;
    return v + load_some<Acc>(schedule.at(output, t, slot) + j * output.stride[2], last - j, output.stride[2]);
  }

  void add_outputs(int64_t t, int64_t active, const RowPart& columns) const {
    for (int64_t slot = 0; slot < active; ++slot) {
      Element* row = to.projected + (rows.first[t] + slot) * problem.projected_width;
      for (int64_t j = columns.first; j < columns.last; j += W)
        store_some<Acc>(row + j, state_gradient(t, slot, j, columns.last), columns.last - j);
      if (columns.last == PH) row[PH] = Element(0);  // the other half of a pair
    }
  }

  template <Cell CELL>
  void differentiate_row(int64_t t, int64_t slot, const RowPart& units) const {
    constexpr int SAVED_GATES = saved_of(CELL), BLOCKS = blocks_of(CELL);
    const StepRow<Storage>& row = rows.all[rows.first[t] + slot];
    const SavedSteps<Storage>& saved = problem.saved;
    const Acc* gates = saved.gates + row.place * SAVED_GATES * H;
    Element* dgates = to.dgates + (rows.first[t] + slot) * problem.dgates_width;
    for (int64_t j = units.first; j < units.last; j += W) {
      const int64_t count = units.last - j;
      Vec<Acc> from[std::max(SAVED_GATES, 1)], d[BLOCKS], before = {}, after = {}, grad_state = {};
      PK_UNROLL
      for (int i = 0; i < SAVED_GATES; ++i) from[i] = load_some<Acc>(gates + i * H + j, count);
      if constexpr (CELL == Cell::LSTM) {
        before = load_some<Acc>(row.c + j, count), after = load_some<Acc>(saved.cells + row.place * H + j, count);
        grad_state = load<Vec<Acc>>(to.dc + slot * width + j);
      } else if constexpr (CELL == Cell::GRU) {
        before = load_some<Acc>(row.h + j, count);
      } else {
        after = load_some<Acc>(saved.output + row.place * H + j, count);
      }
      Vec<Acc> grad_h = problem.projects ? load<Vec<Acc>>(to.dm + slot * width + j)
                                         : state_gradient(t, slot, j, units.last);
      Vec<Acc> direct = differentiate<CELL, Acc>(from, before, after, grad_h, grad_state, d);
      if constexpr (CELL == Cell::LSTM) {
        store(to.dc + slot * width + j, grad_state);
        if (problem.result[WEIGHT_HR])
          store_some<Acc>(to.squashed + (rows.first[t] + slot) * width + j, from[3] * tanh<Acc>(after), count);
      }
      if constexpr (CELL == Cell::GRU) store(to.dh + slot * state_width + j, direct);
      PK_UNROLL
      for (int i = 0; i < BLOCKS; ++i) {
        store_some<Acc>(dgates + i * H + j, d[i], count);
        Acc* part = to.bias_parts + i * width + j;
        store(part, load<Vec<Acc>>(part) + d[i]);
      }
    }
    if (units.last == H) dgates[BLOCKS * H] = Element(0);  // the other half of a pair
  }

  void add_bias_parts(const RowPart& units) const {
    for (int block = 0; block < blocks_of(problem.cell); ++block)
      for (int64_t j = units.first; j < units.last; j += W) {
        Acc *sum = to.bias_sums + block * width + j, *part = to.bias_parts + block * width + j;
        store(sum, load<Vec<Acc>>(sum) + load<Vec<Acc>>(part));
        store(part, Vec<Acc>{});
      }
  }
};

// ---- after the loop -------------------------------------------------------------------------------------------------

template <class Storage>
void finish_states(const RnnBackwardProblem<Storage>& problem, const RnnBackwardArrays<Storage>& arrays) {
  using Acc = AccOf<Storage>;
  auto finish = [&](Storage* to, int64_t columns, const Acc* from, int64_t from_width) {
    for (int64_t slot = 0; to && slot < problem.B; ++slot)
      for (int64_t j = 0; j < columns; j += lanes<Acc>)
        store_some<Acc>(to + problem.schedule.sequence(slot) * columns + j,
                        load<Vec<Acc>>(from + slot * from_width + j), columns - j);
  };
  finish(problem.result[H0], problem.PH, arrays.dh, problem.state_width);
  finish(problem.result[C0], problem.H, arrays.dc, problem.width);
}

template <class Storage>
void finish_biases(const RnnBackwardProblem<Storage>& problem, const RnnBackwardArrays<Storage>& arrays) {
  const int64_t H = problem.H;
  // block: the first of the side's dgates.
  auto finish = [&](Storage* to, int block, auto gate) {
    for (int64_t k = 0; to && k < problem.GH; ++k)
      to[gate(k)] = static_cast<Storage>(arrays.bias_sums[(block + k / H) * problem.width + k % H]);
  };
  finish(problem.result[BIAS_IH], problem.input_block(), [](int64_t k) { return k; });
  finish(problem.result[BIAS_HH], 0, [&](int64_t k) { return problem.state_gate(k); });
}

// The products after the loop. All of them sum over rows, but dx.
template <class Storage>
void multiply_rows(const RnnBackwardProblem<Storage>& problem, const StepRows<Storage>& rows,
                   const RnnBackwardArrays<Storage>& arrays) {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Element = ElementOf<P, Storage>;
  const auto& result = problem.result;
  const int64_t count = rows.all.size(), I = problem.I, H = problem.H, PH = problem.PH, GH = problem.GH;
  auto row_of = [](const Element* data, int64_t row_width) {
    return [=](int64_t i) { return data + i * row_width; };
  };
  auto from_state = row_of(arrays.dgates, problem.dgates_width);
  auto from_input = row_of(arrays.dgates + problem.input_block() * H, problem.dgates_width);
  const View<const Storage, 2> weight(problem.a.weight_ih);
  if (Storage* to = result[INPUT]) {
    // dx: [rows, I] = dgates: [rows, GH] · W_ih: [GH, I]
    auto place = store_to<Acc>(to, I);
    Product<P>::run(count, I, GH, rows_along_k(from_input),
                    rows_of_k([&](int64_t k) { return weight.at(k); }, weight.stride[1]),
                    [&](int64_t m, int64_t n, int64_t many, const Acc* c) { place(rows.all[m].place, n, many, c); });
  }
  if (Storage* to = result[WEIGHT_IH])  // [GH, I] = dgatesᵀ: [GH, rows] · x: [rows, I]
    Product<P>::run(GH, I, count, rows_of_k(from_input),
                    rows_of_k([&](int64_t k) { return rows.all[k].x; },
                              View<const Storage, 3>(problem.a.input).stride[2]),
                    store_to<Acc>(to, I));
  if (Storage* to = result[WEIGHT_HH]) {
    // [GH, P] = dgatesᵀ: [GH, rows] · h: [rows, P]
    auto place = store_to<Acc>(to, PH);
    Product<P>::run(GH, PH, count, rows_of_k(from_state), rows_of_k([&](int64_t k) { return rows.all[k].h; }),
                    [&](int64_t m, int64_t n, int64_t many, const Acc* c) {
                      place(problem.state_gate(m), n, many, c);
                    });
  }
  if (Storage* to = result[WEIGHT_HR])  // [P, H] = dh'ᵀ: [P, rows] · o ∘ tanh c': [rows, H]
    Product<P>::run(PH, H, count, rows_of_k(row_of(arrays.projected, problem.projected_width)),
                    rows_of_k(row_of(arrays.squashed, problem.width)), store_to<Acc>(to, H));
}

// ---- the op ---------------------------------------------------------------------------------------------------------

void check_gradients(const RnnArguments& a, const std::optional<Tensor>& grad_output,
                     const std::optional<Tensor>& grad_h_n, const std::optional<Tensor>& grad_c_n,
                     const Tensor& output, const Tensor& gates, const Tensor& cells) {
  const ScalarType storage = a.storage(), acc = accumulator_of(storage);
  const bool matrix = a.input.dim() == 2;
  auto check_rows = [&](const std::optional<Tensor>& t, int64_t columns, ScalarType dtype, const char* name,
                        Layout layout) {
    if (matrix) check(t, {a.input.size(0), columns}, dtype, name, layout);
    else check(t, {a.input.size(0), a.input.size(1), columns}, dtype, name, layout);
  };
  check_rows(output, a.P(), storage, "output", Layout::DENSE);
  if (saved_of(a.cell) > 0) check_rows(gates, saved_of(a.cell) * a.H(), acc, "gates", Layout::DENSE);
  if (a.cell == Cell::LSTM) check_rows(cells, a.H(), acc, "cells", Layout::DENSE);
  check_rows(grad_output, a.P(), storage, "grad_output", Layout::ANY);
  check(grad_h_n, {a.B(), a.P()}, storage, "grad_h_n", Layout::ANY);
  check(grad_c_n, {a.B(), a.H()}, storage, "grad_c_n", Layout::ANY);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_h_n, std::optional<Tensor> grad_c_n, Tensor input,
    std::optional<Tensor> batch_sizes, Tensor h0, std::optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh,
    std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, std::optional<Tensor> weight_hr,
    std::optional<Tensor> lengths, std::optional<Tensor> resets, Tensor output, Tensor gates, Tensor cells,
    int64_t cell, bool reverse, int64_t wanted, int64_t /*backend*/) {
  const RnnArguments a{input,   batch_sizes, h0,        c0,      weight_ih, weight_hh,  bias_ih,
                    bias_hh, weight_hr,   lengths, resets,  Cell(cell), reverse};
  a.check();
  check_gradients(a, grad_output, grad_h_n, grad_c_n, output, gates, cells);

  const std::optional<Tensor> primal[RESULTS] = {input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr};
  std::vector<Tensor> results;
  for (int i = 0; i < RESULTS; ++i) {
    const bool want = wanted >> i & 1;
    STD_TORCH_CHECK(!want || primal[i], "wanted: bit ", i, " asks for the gradient of an argument that is not there");
    std::vector<int64_t> sizes = {0};
    if (want) {
      sizes.clear();
      for (int64_t d = 0; d < primal[i]->dim(); ++d) sizes.push_back(primal[i]->size(d));
    }
    results.push_back(torch::stable::new_empty(input, sizes, a.storage()));
  }
  if ((wanted >> INPUT & 1) && lengths) torch::stable::zero_(results[INPUT]);  // rows of no active sequence

  for_dtype(a.storage(), [&]<class Storage>(Storage) {
    using Acc = AccOf<Storage>;
    const IncomingGradients<Storage> incoming{View<const Storage, 3>(grad_output), View<const Storage, 2>(grad_h_n),
                                              View<const Storage, 2>(grad_c_n)};
    const SavedSteps<Storage> saved{data<const Storage>(output), data<const Acc>(gates), data<const Acc>(cells)};
    std::array<Storage*, RESULTS> pointers;
    for (int i = 0; i < RESULTS; ++i) pointers[i] = wanted >> i & 1 ? data<Storage>(results[i]) : nullptr;
    const RnnBackwardProblem<Storage> problem{a, incoming, saved, pointers};
    const StepRows<Storage> rows(problem);
    Workspace<RnnBackwardArrays<Storage>> memory(1, problem, int64_t(rows.all.size()));
    RnnBackward<Storage>(problem, rows, memory[0]).run();
    finish_states(problem, memory[0]);
    finish_biases(problem, memory[0]);
    multiply_rows(problem, rows, memory[0]);
  });
  return {results[0], results[1], results[2], results[3], results[4], results[5], results[6], results[7]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("rnn_backward", TORCH_BOX(&rnn_backward)); }
