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

template <class Storage>
struct Incoming {
  Strided<const Storage> output, h_n, c_n;  // without data: zero
};

// What the forward saved, contiguous.
template <class Storage, class Acc>
struct Saved {
  const Storage* output;
  const Acc *gates, *cells;
};

template <class Storage>
class Backward {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Element = ElementOf<P, Storage>;  // of an operand of the products
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t LEAST_STEP = int64_t(1) << 13, LEAST_WORK = int64_t(1) << 18;  // products for each thread
  static constexpr int64_t SUM_ROWS = 64;  // dgates in a partial bias sum, for accuracy

 public:
  Backward(const Arguments& arguments, const Incoming<Storage>& incoming, const Saved<Storage, Acc>& saved,
           const std::array<Storage*, RESULTS>& results)
      : a(arguments), schedule(arguments), grad(incoming), saved(saved), result(results), cell(a.cell), B(a.B()),
        I(a.I()), H(a.H()), PH(a.P()), GH(gates_of(cell) * H), width(round_up(H, W)), state_width(round_up(PH, W)),
        dgates_width(operand_width(blocks_of(cell) * H)), projected_width(operand_width(PH)),
        h0(schedule.B * PH + PH), c0((schedule.B + 1) * H) {}

  void run() {
    find_rows();
    const int64_t count = rows.size();
    const bool projects = a.weight_hr.has_value(), recurs = schedule.T > 1 || result[H0];
    Buffer<Element> dgates_memory(count * dgates_width), dh_memory(projects ? count * projected_width : 0);
    Buffer<Element> squashed_memory(result[WEIGHT_HR] ? count * width : 0);
    Buffer<Acc> dh_state(B * state_width), dc_state(B * width), dm_state(projects ? B * width : 0);
    Buffer<Acc> sums(2 * blocks_of(cell) * width);
    Buffer<Unit> hh(recurs ? Panels<P>(state_width, GH).size() : 0);
    Buffer<Unit> hr(projects ? Panels<P>(width, PH).size() : 0);
    dgates = dgates_memory.get(), projected = dh_memory.get(), squashed = squashed_memory.get();
    dh = dh_state.get(), dc = dc_state.get(), dm = dm_state.get();
    packed_hh = recurs ? hh.get() : nullptr, packed_hr = hr.get();
    bias_sums = sums.get(), bias_parts = bias_sums + blocks_of(cell) * width;
    const int64_t work = std::max<int64_t>(B, 1) * GH * (PH + (projects ? H : 0));
    const int64_t most = std::min(std::min(work / LEAST_STEP, work * schedule.T / LEAST_WORK),
                                  std::min(thread_count(), ceil_div(H, W)));
    run_team(std::max<int64_t>(most, 1), [&](Team& team, int64_t member) { run_member(team, member); });
    finish_states();
    finish_biases();
    multiply_rows();
  }

 private:
  // A step of a sequence.
  struct Row {
    const Storage *x, *h;  // x_t, h_{t-1}
    const Acc* c;          // c_{t-1}
    int64_t place;         // among the rows of input, output, gates and cells
  };

  const Arguments& a;
  const Schedule schedule;
  const Incoming<Storage>& grad;
  const Saved<Storage, Acc>& saved;
  const std::array<Storage*, RESULTS>& result;  // null where not wanted
  const Cell cell;
  const int64_t B, I, H, PH, GH, width, state_width, dgates_width, projected_width;
  Buffer<Storage> h0;  // [B + 1][P], the last row zero
  Buffer<Acc> c0;      // [B + 1][H], the same
  std::vector<Row> rows;
  std::vector<int64_t> first;  // of each step's rows
  Element *dgates, *projected, *squashed;  // [rows][...]: dgates; with a projection dh' and o ∘ tanh c'
  Acc *dh, *dc, *dm;                       // [B][...] by slot; dm: of o ∘ tanh c' at this step
  Acc *bias_sums, *bias_parts;             // [blocks][width]
  Unit *packed_hh, *packed_hr;             // each member's panels, one after the other; no packed_hh: not needed

  // Whole units, and not a power of two: rows a multiple of 4 KiB apart would meet in the same lines of the L1.
  static int64_t operand_width(int64_t n) { return round_up(n, 64 / sizeof(Element)) + 64 / sizeof(Element); }

  void find_rows() {
    for (int64_t b = 0; b < B; ++b) {
      const Strided<const Storage> from_h(a.h0), from_c(a.c0);
      for (int64_t j = 0; j < PH; ++j) h0[b * PH + j] = from_h.row(b)[j * from_h.stride];
      for (int64_t j = 0; from_c && j < H; ++j) c0[b * H + j] = static_cast<Acc>(from_c.row(b)[j * from_c.stride]);
    }
    std::fill_n(&h0[B * PH], PH, Storage(0));
    std::fill_n(&c0[B * H], H, Acc(0));
    const Strided<const Storage> input(a.input);
    for (int64_t t = 0; t < schedule.T; ++t) {
      const int64_t before = a.reverse ? t + 1 : t - 1;
      const int64_t started = before < 0 || before >= schedule.T ? 0 : schedule.active(before);
      first.push_back(rows.size());
      for (int64_t slot = 0; slot < schedule.active(t); ++slot) {
        Row row{schedule.at(input, t, slot), nullptr, nullptr, schedule.row(t, slot)};
        const bool reset = schedule.reset(t, slot);
        if (slot < started && !reset) {
          const int64_t place = schedule.row(before, slot);
          row.h = saved.output + place * PH, row.c = saved.cells + place * H;
        } else {
          const int64_t b = reset ? B : schedule.sequence(slot);
          row.h = &h0[b * PH], row.c = &c0[b * H];
        }
        rows.push_back(row);
      }
    }
  }

  // ------------------------------------------------------------------------------------------------- the recurrence

  // Part of a row's units or columns, in whole vectors.
  struct Part {
    int64_t first, last;
    Part(int64_t columns, int64_t member, int64_t members) {
      auto [v0, v1] = share(ceil_div(columns, W), member, members);
      first = v0 * W, last = std::min(columns, v1 * W);
    }
    int64_t size() const { return std::max<int64_t>(last - first, 0); }
  };

  void run_member(Team& team, int64_t member) {
    const Part units(H, member, team.size()), columns(PH, member, team.size());
    const Panels<P> hh(columns.size(), GH), hr(units.size(), PH);
    alignas(64) Unit stage[stage_units<P>(TILE_VECTORS * W)];
    Unit* own_hh = packed_hh + columns.first * hh.units;
    Unit* own_hr = packed_hr + units.first * hr.units;
    if (packed_hh) hh.pack(state_weight(), columns.first, columns.last, 0, GH, own_hh, stage);
    if (a.weight_hr) {
      const Strided<const Storage> weight(a.weight_hr);
      auto row = [&](int64_t p) { return weight.row(p); };
      hr.pack(rows_of_k(row, weight.stride), units.first, units.last, 0, PH, own_hr, stage);
    }
    begin(grad.h_n, columns, dh, state_width);
    begin(grad.c_n, units, dc, width);
    for (int block = 0; block < 2 * blocks_of(cell); ++block)
      std::fill_n(bias_sums + block * width + units.first, round_up(units.size(), W), Acc(0));
    int64_t summed = 0;  // rows in bias_parts
    for (int64_t k = schedule.T - 1; k >= 0; --k) {
      const int64_t t = schedule.time(k), active = schedule.active(t), row0 = first[t];
      if (a.weight_hr) {
        add_outputs(t, active, columns);
        team.meet(member);
        hr.multiply(active, left(projected, row0, projected_width), own_hr, dm + units.first, width, false);
      }
      for_cell(cell, [&](auto constant) {
        for (int64_t slot = 0; slot < active; ++slot) {
          differentiate_row<constant>(t, slot, units);
          if (++summed == SUM_ROWS) add_bias_parts(units), summed = 0;
        }
      });
      if (packed_hh && (k > 0 || result[H0])) {
        team.meet(member);
        hh.multiply(active, left(dgates, row0, dgates_width), own_hh, dh + columns.first, state_width,
                    cell == Cell::GRU);
      }
      for (int64_t slot = 0; slot < active; ++slot) {
        if (!schedule.reset(t, slot)) continue;
        std::fill_n(dh + slot * state_width + columns.first, columns.size(), Acc(0));
        std::fill_n(dc + slot * width + units.first, units.size(), Acc(0));
      }
    }
    add_bias_parts(units);
  }

  auto state_weight() const {
    const Strided<const Storage> weight(a.weight_hh);
    auto row = [=, this](int64_t k) { return weight.row(state_gate(k)); };
    return rows_of_k(row, weight.stride);
  }
  // The row of W_hh of a column of dgates.
  int64_t state_gate(int64_t k) const { return cell != Cell::GRU ? k : k < H ? k + 2 * H : k - H; }

  Left<Unit> left(const Element* operand, int64_t row, int64_t row_width) const {
    return {reinterpret_cast<const Unit*>(operand + row * row_width), row_width / P::depth, 1};
  }

  void begin(const Strided<const Storage>& from, const Part& part, Acc* to, int64_t to_width) const {
    for (int64_t slot = 0; slot < B; ++slot)
      for (int64_t j = part.first; j < part.last; j += W) {
        Vec<Acc> v = {};
        if (from) v = load_some<Acc>(from.row(schedule.sequence(slot)) + j * from.stride, part.last - j, from.stride);
        store(to + slot * to_width + j, v);
      }
  }

  // dh of the step: what comes from later steps and what comes from the output.
  Vec<Acc> state_gradient(int64_t t, int64_t slot, int64_t j, int64_t last) const {
    auto v = load<Vec<Acc>>(dh + slot * state_width + j);
    if (!grad.output) return v;
    const int64_t stride = grad.output.stride;
    return v + load_some<Acc>(schedule.at(grad.output, t, slot) + j * stride, last - j, stride);
  }

  void add_outputs(int64_t t, int64_t active, const Part& columns) const {
    for (int64_t slot = 0; slot < active; ++slot) {
      Element* to = projected + (first[t] + slot) * projected_width;
      for (int64_t j = columns.first; j < columns.last; j += W)
        store_some<Acc>(to + j, state_gradient(t, slot, j, columns.last), columns.last - j);
      if (columns.last == PH) to[PH] = Element(0);  // the other half of a pair
    }
  }

  template <Cell CELL>
  void differentiate_row(int64_t t, int64_t slot, const Part& units) const {
    constexpr int SAVED = saved_of(CELL), BLOCKS = blocks_of(CELL);
    const Row& row = rows[first[t] + slot];
    const Acc* gates = saved.gates + row.place * SAVED * H;
    Element* to = dgates + (first[t] + slot) * dgates_width;
    for (int64_t j = units.first; j < units.last; j += W) {
      const int64_t count = units.last - j;
      Vec<Acc> from[std::max(SAVED, 1)], d[BLOCKS], before = {}, after = {}, grad_state = {};
      PK_UNROLL
      for (int i = 0; i < SAVED; ++i) from[i] = load_some<Acc>(gates + i * H + j, count);
      if constexpr (CELL == Cell::LSTM) {
        before = load_some<Acc>(row.c + j, count), after = load_some<Acc>(saved.cells + row.place * H + j, count);
        grad_state = load<Vec<Acc>>(dc + slot * width + j);
      } else if constexpr (CELL == Cell::GRU) {
        before = load_some<Acc>(row.h + j, count);
      } else {
        after = load_some<Acc>(saved.output + row.place * H + j, count);
      }
      Vec<Acc> grad_h = a.weight_hr ? load<Vec<Acc>>(dm + slot * width + j) : state_gradient(t, slot, j, units.last);
      Vec<Acc> direct = differentiate<CELL, Acc>(from, before, after, grad_h, grad_state, d);
      if constexpr (CELL == Cell::LSTM) {
        store(dc + slot * width + j, grad_state);
        if (result[WEIGHT_HR])
          store_some<Acc>(squashed + (first[t] + slot) * width + j, from[3] * tanh<Acc>(after), count);
      }
      if constexpr (CELL == Cell::GRU) store(dh + slot * state_width + j, direct);
      PK_UNROLL
      for (int i = 0; i < BLOCKS; ++i) {
        store_some<Acc>(to + i * H + j, d[i], count);
        Acc* part = bias_parts + i * width + j;
        store(part, load<Vec<Acc>>(part) + d[i]);
      }
    }
    if (units.last == H) to[BLOCKS * H] = Element(0);  // the other half of a pair
  }

  void add_bias_parts(const Part& units) const {
    for (int block = 0; block < blocks_of(cell); ++block)
      for (int64_t j = units.first; j < units.last; j += W) {
        Acc *sum = bias_sums + block * width + j, *part = bias_parts + block * width + j;
        store(sum, load<Vec<Acc>>(sum) + load<Vec<Acc>>(part));
        store(part, Vec<Acc>{});
      }
  }

  // ---------------------------------------------------------------------------------------------------- the results

  void finish_states() const {
    auto finish = [&](Storage* to, int64_t columns, const Acc* from, int64_t from_width) {
      for (int64_t slot = 0; to && slot < B; ++slot)
        for (int64_t j = 0; j < columns; j += W)
          store_some<Acc>(to + schedule.sequence(slot) * columns + j, load<Vec<Acc>>(from + slot * from_width + j),
                          columns - j);
    };
    finish(result[H0], PH, dh, state_width);
    finish(result[C0], H, dc, width);
  }

  void finish_biases() const {
    // sums: the first block of each side.
    auto finish = [&](Storage* to, int block, auto gate) {
      for (int64_t k = 0; to && k < GH; ++k)
        to[gate(k)] = static_cast<Storage>(bias_sums[(block + k / H) * width + k % H]);
    };
    finish(result[BIAS_IH], input_block(), [](int64_t k) { return k; });
    finish(result[BIAS_HH], 0, [&](int64_t k) { return state_gate(k); });
  }
  int input_block() const { return cell == Cell::GRU ? 1 : 0; }

  // Every product sums over rows, but dx.
  void multiply_rows() const {
    const int64_t count = rows.size();
    auto row_of = [](const Element* data, int64_t row_width) {
      return [=](int64_t i) { return data + i * row_width; };
    };
    auto from_state = row_of(dgates, dgates_width), from_input = row_of(dgates + input_block() * H, dgates_width);
    const Strided<const Storage> weight(a.weight_ih);
    if (Storage* to = result[INPUT]) {
      // dx: [rows, I] = dgates: [rows, GH] · W_ih: [GH, I]
      auto place = store_to<Acc>(to, I);
      Product<P>::run(count, I, GH, rows_along_k(from_input),
                      rows_of_k([&](int64_t k) { return weight.row(k); }, weight.stride),
                      [&](int64_t m, int64_t n, int64_t many, const Acc* c) { place(rows[m].place, n, many, c); });
    }
    if (Storage* to = result[WEIGHT_IH])  // [GH, I] = dgatesᵀ: [GH, rows] · x: [rows, I]
      Product<P>::run(GH, I, count, rows_of_k(from_input),
                      rows_of_k([&](int64_t k) { return rows[k].x; }, Strided<const Storage>(a.input).stride),
                      store_to<Acc>(to, I));
    if (Storage* to = result[WEIGHT_HH]) {
      // [GH, P] = dgatesᵀ: [GH, rows] · h: [rows, P]
      auto place = store_to<Acc>(to, PH);
      Product<P>::run(GH, PH, count, rows_of_k(from_state), rows_of_k([&](int64_t k) { return rows[k].h; }),
                      [&](int64_t m, int64_t n, int64_t many, const Acc* c) { place(state_gate(m), n, many, c); });
    }
    if (Storage* to = result[WEIGHT_HR])  // [P, H] = dh'ᵀ: [P, rows] · o ∘ tanh c': [rows, H]
      Product<P>::run(PH, H, count, rows_of_k(row_of(projected, projected_width)), rows_of_k(row_of(squashed, width)),
                      store_to<Acc>(to, H));
  }
};

// ---- the op ---------------------------------------------------------------------------------------------------------

void check_gradients(const Arguments& a, const std::optional<Tensor>& grad_output,
                     const std::optional<Tensor>& grad_h_n, const std::optional<Tensor>& grad_c_n,
                     const Tensor& output, const Tensor& gates, const Tensor& cells) {
  auto check_rows = [&](const Tensor& t, int64_t columns, ScalarType dtype, const char* name) {
    check_cpu_tensor(t, a.input.dim(), dtype, name);
    for (int64_t d = 0; d + 1 < a.input.dim(); ++d) check_size(t, d, a.input.size(d), name);
    check_size(t, a.input.dim() - 1, columns, name);
  };
  auto check_saved = [&](const Tensor& t, int64_t columns, ScalarType dtype, const char* name) {
    check_rows(t, columns, dtype, name);
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  };
  auto check_state = [&](const std::optional<Tensor>& t, int64_t columns, const char* name) {
    if (!t) return;
    check_cpu_tensor(*t, 2, a.storage(), name);
    check_size(*t, 0, a.B(), name), check_size(*t, 1, columns, name);
  };
  const ScalarType acc = accumulator_of(a.storage());
  check_saved(output, a.P(), a.storage(), "output");
  if (saved_of(a.cell) > 0) check_saved(gates, saved_of(a.cell) * a.H(), acc, "gates");
  if (a.cell == Cell::LSTM) check_saved(cells, a.H(), acc, "cells");
  if (grad_output) check_rows(*grad_output, a.P(), a.storage(), "grad_output");
  check_state(grad_h_n, a.P(), "grad_h_n");
  check_state(grad_c_n, a.H(), "grad_c_n");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_h_n, std::optional<Tensor> grad_c_n, Tensor input,
    std::optional<Tensor> batch_sizes, Tensor h0, std::optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh,
    std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, std::optional<Tensor> weight_hr,
    std::optional<Tensor> lengths, std::optional<Tensor> resets, Tensor output, Tensor gates, Tensor cells,
    int64_t cell, bool reverse, int64_t wanted, int64_t /*backend*/) {
  const Arguments a{input,   batch_sizes, h0,        c0,      weight_ih, weight_hh,  bias_ih,
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
    using Acc = typename ComputeOf<Storage>::type::Acc;
    const Incoming<Storage> incoming{Strided<const Storage>(grad_output), Strided<const Storage>(grad_h_n),
                                     Strided<const Storage>(grad_c_n)};
    const Saved<Storage, Acc> saved{data<const Storage>(output),
                                    data<const Acc>(gates),
                                    data<const Acc>(cells)};
    std::array<Storage*, RESULTS> pointers;
    for (int i = 0; i < RESULTS; ++i)
      pointers[i] = wanted >> i & 1 ? data<Storage>(results[i]) : nullptr;
    Backward<Storage>(a, incoming, saved, pointers).run();
  });
  return {results[0], results[1], results[2], results[3], results[4], results[5], results[6], results[7]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("rnn_backward", TORCH_BOX(&rnn_backward)); }
