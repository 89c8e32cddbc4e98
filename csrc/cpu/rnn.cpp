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

#include "rnn.h"

namespace {

constexpr int64_t FEW_ROWS = 12;        // T·B, up to which weights are read in place
constexpr int64_t FEW_STEPS = 64;       // T, up to which W_hh is when B is 1: then packing gains less of the bandwidth
constexpr int64_t CHUNK_ROWS = 256;     // rows of input multiplied at a time
constexpr int64_t SUM_UNITS = 256;      // units of k summed in registers: 128 is 3 % slower, more is less accurate
constexpr int64_t MEMBER_WORK = 65536;  // multiply-adds that are worth another thread, in all
constexpr int64_t MEETING_WORK = 8192;  // and at each step, after which the team meets

// ---- products -------------------------------------------------------------------------------------------------------

// c[v][W] = a · b of one row, b: [depth][VECTORS * lanes]. Two sums for each column, since with one the additions'
// latency would show; each of at most 64 products.
template <class P, int VECTORS>
void row_product(int64_t depth, const typename P::Unit* a, const typename P::Unit* b, typename P::Acc* c) {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  constexpr int W = lanes<Acc>;
  Vec<Acc> total[VECTORS] = {};
  for (int64_t k = 0; k < depth;) {
    Vec<Acc> even[VECTORS] = {}, odd[VECTORS] = {};
    int64_t end = std::min(depth, k + 128);
    for (; k + 2 <= end; k += 2) {
      Vec<Unit> low = broadcast(a[k]), high = broadcast(a[k + 1]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        even[v] = P::multiply_add(low, load<Vec<Unit>>(b + (k * VECTORS + v) * W), even[v]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        odd[v] = P::multiply_add(high, load<Vec<Unit>>(b + ((k + 1) * VECTORS + v) * W), odd[v]);
    }
    if (k < end) {
      Vec<Unit> low = broadcast(a[k]);
      PK_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        even[v] = P::multiply_add(low, load<Vec<Unit>>(b + (k * VECTORS + v) * W), even[v]);
      ++k;
    }
    PK_UNROLL
    for (int v = 0; v < VECTORS; ++v) total[v] += even[v] + odd[v];
  }
  PK_UNROLL
  for (int v = 0; v < VECTORS; ++v) store(c + v * W, total[v]);
}

// s[j] = a · row[j] over n elements, for W rows in place, n at least a vector of them. The last vector ends with the
// row: it overlaps the one before, and what was seen is masked away in both operands. Four rows at a time: sixteen rows
// 4 KiB apart fall on the same set of L1 (84 GB/s of L3 against 58, one Zen 4 core).
template <class P, class Storage>
void dot_in_place(const typename P::Unit* a, const Storage* const (&row)[lanes<typename P::Acc>], int64_t n,
                  typename P::Acc* s) {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Mask = Vec<Bits<Acc>>;
  constexpr int W = lanes<Acc>, step = W * P::depth, ROWS = std::min(W, 4);
  auto* x = reinterpret_cast<const ElementOf<P, Storage>*>(a);
  auto units = [](const auto* p) {
    if constexpr (P::depth == 2) return load<Vec<Unit>>(p);
    else return load_as<Unit>(p);
  };
  alignas(64) uint8_t bytes[PK_VECTOR_BYTES];
  const int64_t rest = n % step, seen = (step - rest) * sizeof(Acc) / P::depth;
  std::memset(bytes, 0, seen), std::memset(bytes + seen, 255, sizeof bytes - seen);
  const auto unseen = load<Mask>(bytes);
  auto masked = [&](const auto* p) { return (Vec<Unit>)((Mask)units(p + n - step) & unseen); };
  Vec<Acc> sums[W];
  PK_UNROLL
  for (int j0 = 0; j0 < W; j0 += ROWS) {
    Vec<Acc> even[ROWS] = {}, odd[ROWS] = {};
    int64_t i = 0;
    for (; i + 2 * step <= n; i += 2 * step) {
      Vec<Unit> low = units(x + i), high = units(x + i + step);
      PK_UNROLL
      for (int j = 0; j < ROWS; ++j) {
        even[j] = P::multiply_add(low, units(row[j0 + j] + i), even[j]);
        odd[j] = P::multiply_add(high, units(row[j0 + j] + i + step), odd[j]);
      }
    }
    if (i + step <= n) {
      PK_UNROLL
      for (int j = 0; j < ROWS; ++j) even[j] = P::multiply_add(units(x + i), units(row[j0 + j] + i), even[j]);
    }
    if (rest > 0) {
      PK_UNROLL
      for (int j = 0; j < ROWS; ++j) odd[j] = P::multiply_add(masked(x), masked(row[j0 + j]), odd[j]);
    }
    PK_UNROLL
    for (int j = 0; j < ROWS; ++j) sums[j0 + j] = even[j] + odd[j];
  }
  transpose<Acc>(sums);
  PK_UNROLL
  for (int m = W / 2; m > 0; m /= 2) {
    PK_UNROLL
    for (int j = 0; j < m; ++j) sums[j] += sums[j + m];
  }
  store(s, sums[0]);
}

// A weight [gates · N, K] as the right operand of y = a · weightᵀ. Rows are taken by blocks of `group` times W of the
// N, all gates of these together: `vectors` vectors of columns, unit by unit, then gate by gate.
template <class P, class Storage>
struct Operand {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;

  Strided<const Storage> weight;
  int64_t gates, N, K, group;
  bool in_place = false;

  int64_t units() const { return ceil_div(K, P::depth); }
  int64_t vectors() const { return gates * group; }
  int64_t blocks() const { return ceil_div(N, W * group); }
  int64_t block_units() const { return in_place ? 0 : units() * vectors() * W; }

  // Whether a row can be read where it is: whole vectors of it.
  bool readable() const { return weight.stride == 1 && K >= W * P::depth; }

  // Row j of vector v, or, past the last, the last one.
  const Storage* row(int64_t block, int64_t v, int64_t j) const {
    return weight.row(v % gates * N + std::min((block * group + v / gates) * W + j, N - 1));
  }
  int64_t count(int64_t block, int64_t v) const {
    return std::clamp<int64_t>(N - (block * group + v / gates) * W, 0, W);
  }

  void pack(int64_t block, Unit* to, Unit* stage) const {
    if (in_place || K == 0) return;
    for (int64_t v = 0; v < vectors(); ++v) {
      if (count(block, v) > 0) {
        pack_transposed<P>([&](int64_t j) { return row(block, v, j); }, weight.stride, count(block, v), K, to + v * W,
                           vectors() * W, stage);
      } else {
        for (int64_t k = 0; k < units(); ++k) store(to + (k * vectors() + v) * W, Vec<Unit>{});
      }
    }
  }

  // c: [rows][vectors * W] = a: [rows][K] · weightᵀ, at most TILE_ROWS rows, of which a and c have room for all.
  // b: what pack made of the block.
  void multiply(int64_t block, const Unit* b, int64_t rows, const Unit* a, int64_t lda, Acc* c) const {
    const int64_t ldc = vectors() * W;
    if (in_place) {
      for (int64_t v = 0; v < vectors(); ++v) {
        const Storage* columns[W];
        for (int64_t j = 0; j < W; ++j) columns[j] = row(block, v, j);
        for (int64_t r = 0; r < rows; ++r) dot_in_place<P>(a + r * lda, columns, K, c + r * ldc + v * W);
      }
      return;
    }
    if (rows > 1) {
      int64_t k = 0;
      do {
        gemm_strip<P>(rows, vectors(), std::min(SUM_UNITS, units() - k), {a + k, lda, 1}, b + k * ldc, ldc, c, ldc,
                      k > 0);
      } while ((k += SUM_UNITS) < units());
      return;
    }
    switch (vectors()) {
      case 1: return row_product<P, 1>(units(), a, b, c);
      case 2: return row_product<P, 2>(units(), a, b, c);
      case 3: return row_product<P, 3>(units(), a, b, c);
      default: return row_product<P, 4>(units(), a, b, c);
    }
  }

  // The same of any number of rows, tile by tile; c moves along if `keep`. body(first row, rows) is called after each.
  template <class Body>
  void multiply_all(int64_t block, const Unit* b, int64_t rows, const Unit* a, int64_t lda, Acc* c, bool keep,
                    const Body& body) const {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t tile = std::min<int64_t>(rows - r, TILE_ROWS);
      multiply(block, b, tile, a + r * lda, lda, c + (keep ? r * vectors() * W : 0));
      body(r, tile);
    }
  }
};

// ---- the forward pass -----------------------------------------------------------------------------------------------

template <class Storage>
struct Results {
  Storage *output, *h_n, *c_n;
  typename ComputeOf<Storage>::type::Acc *gates, *cells;  // null unless training
};

template <class Storage, Cell cell>
class Forward {
  using P = typename ComputeOf<Storage>::type;
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  static constexpr int W = lanes<Acc>;
  static constexpr int64_t G = gates_of(cell), SAVED = saved_of(cell);
  static_assert(sizeof(Unit) == sizeof(Acc));

 public:
  Forward(const Arguments& a, const Results<Storage>& results)
      : out(results), schedule(a), T(schedule.T), B(schedule.B), H(a.H()), input(a.input), h0(a.h0), c0(a.c0),
        bias_ih(a.bias_ih), bias_hh(a.bias_hh), projected(a.weight_hr.has_value()) {
    const int64_t threads = thread_count();
    auto operand = [&](const Tensor& weight, int64_t gates) {
      Operand<P, Storage> w{Strided<const Storage>(weight), gates, weight.size(0) / gates, weight.size(1), 1};
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

  void run() {
    Buffer<Unit> memory(place(nullptr));
    place(memory.get());
    begin();
    if (T > 0 && B > 0) {
      // With nobody to wait for, always the same threads for the same units: these stay in their caches between calls.
      auto alone = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(i, members, [] {});
      };
      if (T > 1 || projected)
        run_team(members, [&](Team& team, int64_t i) { work(i, team.size(), [&] { team.meet(i); }); });
      else if (members == 1) alone(0, 1);
      else torch::stable::parallel_for(0, members, 1, alone);
    }
    finish();
  }

 private:
  const Results<Storage> out;
  const Schedule schedule;
  const int64_t T, B, H;
  const Strided<const Storage> input, h0, c0, bias_ih, bias_hh;
  const bool projected;
  Operand<P, Storage> from_input, from_state, projection;
  int64_t members, chunks, chunk;  // chunk: steps whose input is multiplied at once

  // Packed weights, by block. W_ih is packed again for each chunk when these are few, into a place of the member's own
  // that stays in its cache: pages new from the system cost more than packing.
  Unit *input_panels, *state_panels, *projection_panels;
  // Shared: h: [2][B][h_width], read and written in turns; hidden: [B][hidden_width], o ∘ tanh c' before a projection.
  Unit *h[2], *hidden;
  // By block of units, so each part is one member's. x: [blocks][chunk rows][group][G][W], what the input gives;
  // bias: [blocks][group][G][W]; hidden_bias: [blocks][group][W], of the GRU's n; state: [blocks][group][B][W].
  Acc *x, *bias, *hidden_bias, *state;
  // By member. inputs: [chunk rows][input_width].
  Unit *inputs, *stage;

  // Rows are a cache line apart from a power of two, which would crowd a few sets of the cache.
  static int64_t width(int64_t units) { return round_up(units, 16) + 16; }
  int64_t input_width() const { return width(from_input.units()); }
  int64_t h_width() const { return width(from_state.units()); }
  int64_t hidden_width() const { return width(projection.units()); }
  int64_t chunk_rows() const { return chunk * B + TILE_ROWS; }
  int64_t group() const { return from_state.group; }
  bool repack() const { return chunks <= 2; }
  Unit* input_panel(int64_t block, int64_t member) const {
    return input_panels + (repack() ? member : block) * from_input.block_units();
  }
  Unit* state_panel(int64_t block) const { return state_panels + block * from_state.block_units(); }
  Unit* projection_panel(int64_t block) const { return projection_panels + block * projection.block_units(); }
  int64_t x_block() const { return chunk_rows() * group() * G * W; }
  int64_t stage_size() const {
    return stage_units<P>(std::max({from_input.K, from_state.K, projected ? H : int64_t(0)}));
  }

  // Places the arrays one after the other, each at a cache line, and returns the units they take.
  int64_t place(Unit* memory) {
    int64_t used = 0;
    auto next = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += round_up(count, 16);
    };
    const int64_t blocks = from_state.blocks();
    next(input_panels, (repack() ? members : blocks) * from_input.block_units());
    next(state_panels, blocks * from_state.block_units());
    for (Unit*& buffer : h) next(buffer, (B + TILE_ROWS) * h_width());
    if (projected) {
      next(projection_panels, projection.blocks() * projection.block_units());
      next(hidden, (B + TILE_ROWS) * hidden_width());
    }
    next(x, blocks * x_block());
    next(bias, blocks * group() * G * W);
    next(hidden_bias, blocks * group() * W);
    next(state, has_state(cell) ? blocks * group() * B * W : 0);
    next(inputs, members * chunk_rows() * input_width());
    next(stage, members * stage_size());
    return used;
  }

  Acc* state_of(int64_t unit, int64_t slot) const { return state + unit * B + slot * W; }  // unit: a multiple of W

  // The states before the first step.
  void begin() {
    for (int64_t slot = 0; slot < B; ++slot) {
      const int64_t b = schedule.sequence(slot);
      const bool reset = schedule.any_resets() && schedule.length(slot) > 0 &&
                         schedule.reset(schedule.first_time(slot), slot);
      for (Unit* buffer : h) {
        Unit* row = buffer + slot * h_width();
        if (reset) std::fill_n(row, h_width(), Unit(0));
        else copy_row<P>(h0.row(b), h0.stride, from_state.K, row, h_width());
      }
      if constexpr (has_state(cell)) {
        const auto& from = cell == Cell::LSTM ? c0 : h0;
        for (int64_t u = 0; u < H; u += W)
          store(state_of(u, slot), load_some<Acc>(from.row(b) + u * from.stride, H - u, from.stride));
      }
    }
    // Inactive rows, which are none of any member's.
    const double bytes = double(T) * B * (from_state.K * sizeof(Storage) + (SAVED + 1) * H * sizeof(Acc));
    run_tasks(schedule.ragged() ? T : 0, bytes * BYTE, [&](int64_t, int64_t t) {
      for (int64_t slot = schedule.active(t); slot < B; ++slot) {
        const int64_t row = schedule.row(t, slot), P_ = from_state.K;
        std::fill_n(out.output + row * P_, P_, Storage(0));
        if (SAVED > 0 && out.gates) std::fill_n(out.gates + row * SAVED * H, SAVED * H, Acc(0));
        if (cell == Cell::LSTM && out.cells) std::fill_n(out.cells + row * H, H, Acc(0));
      }
    });
  }

  // The states after the last step.
  void finish() {
    const int64_t K = from_state.K;
    for (int64_t slot = 0; slot < B; ++slot) {
      const int64_t b = schedule.sequence(slot);
      if (out.h_n && schedule.length(slot) > 0)
        std::copy_n(out.output + schedule.row(schedule.last_time(slot), slot) * K, K, out.h_n + b * K);
      else if (out.h_n)
        for (int64_t p = 0; p < K; ++p) out.h_n[b * K + p] = h0.row(b)[p * h0.stride];
      if constexpr (cell == Cell::LSTM)
        for (int64_t u = 0; u < H; u += W)
          store_some<Acc>(out.c_n + b * H + u, load<Vec<Acc>>(state_of(u, slot)), H - u);
    }
  }

  template <class Meet>
  void work(int64_t member, int64_t size, const Meet& meet) {
    const auto [first, last] = share(from_state.blocks(), member, size);
    const auto [first_p, last_p] = share(projected ? projection.blocks() : 0, member, size);
    Unit* staged = stage + member * stage_size();
    for (int64_t b = first; b < last; ++b) {
      if (!repack()) from_input.pack(b, input_panel(b, member), staged);
      from_state.pack(b, state_panel(b), staged);
      add_biases(b);
    }
    for (int64_t b = first_p; b < last_p; ++b) projection.pack(b, projection_panel(b), staged);
    for (int64_t k0 = 0; k0 < T; k0 += chunk) {
      const int64_t k1 = std::min(T, k0 + chunk);
      multiply_inputs(k0, k1, first, last, member);
      for (int64_t k = k0, row = 0; k < k1; row += schedule.active(schedule.time(k)), ++k) {
        if (k > 0) meet();
        for (int64_t b = first; b < last; ++b) step(k, b, x + b * x_block() + row * group() * G * W);
        if (!projected) continue;
        meet();
        for (int64_t b = first_p; b < last_p; ++b) project(k, b);
      }
    }
  }

  // The biases of x and of h, which are one but in the GRU's n.
  void add_biases(int64_t block) {
    for (int64_t v = 0; v < group() * G; ++v) {
      const int64_t gate = v % G, at = gate * H + (block * group() + v / G) * W, count = from_state.count(block, v);
      auto part = [&](const Strided<const Storage>& b) {
        return b ? load_some<Acc>(b.data + at * b.stride, count, b.stride) : Vec<Acc>{};
      };
      const bool apart = cell == Cell::GRU && gate == 2;
      store(bias + (block * group() * G + v) * W, apart ? part(bias_ih) : part(bias_ih) + part(bias_hh));
      if (apart) store(hidden_bias + (block * group() + v / G) * W, part(bias_hh));
    }
  }

  // x of steps k0 .. k1-1. Every member gathers all rows for itself: a small part of its product.
  void multiply_inputs(int64_t k0, int64_t k1, int64_t first, int64_t last, int64_t member) {
    const int64_t units = from_input.units(), ld = input_width();
    Unit* rows = inputs + member * chunk_rows() * ld;
    int64_t count = 0;
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t t = schedule.time(k);
      for (int64_t slot = 0; slot < schedule.active(t); ++slot)
        copy_row<P>(schedule.at(input, t, slot), input.stride, from_input.K, rows + count++ * ld, units);
    }
    for (int64_t b = first; b < last; ++b) {
      if (repack()) from_input.pack(b, input_panel(b, member), stage + member * stage_size());
      from_input.multiply_all(b, input_panel(b, member), count, rows, ld, x + b * x_block(), true,
                              [](int64_t, int64_t) {});
    }
  }

  // The k-th step of a block of units. x: [active][group][G][W]
  void step(int64_t k, int64_t block, const Acc* x) {
    const int64_t t = schedule.time(k), vectors = group() * G;
    alignas(64) Acc products[TILE_ROWS * 4 * W];
    from_state.multiply_all(block, state_panel(block), schedule.active(t), h[k % 2], h_width(), products, false,
                            [&](int64_t first, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t u = 0; u < group(); ++u) {
          const int64_t unit = (block * group() + u) * W;
          if (unit < H)
            advance_units(k, t, first + r, unit, x + ((first + r) * vectors + u * G) * W,
                          products + (r * vectors + u * G) * W);
        }
    });
  }

  // The cells of one sequence from `unit` on. x, s: [G][W]
  void advance_units(int64_t k, int64_t t, int64_t slot, int64_t unit, const Acc* x, const Acc* s) {
    const int64_t count = H - unit, row = schedule.row(t, slot);
    Vec<Acc> from_x[G], from_h[G], saved[4], carried{};
    PK_UNROLL
    for (int g = 0; g < G; ++g) {
      from_x[g] = load<Vec<Acc>>(x + g * W) + load<Vec<Acc>>(bias + unit * G + g * W);
      from_h[g] = load<Vec<Acc>>(s + g * W);
    }
    if constexpr (cell == Cell::GRU) from_h[2] += load<Vec<Acc>>(hidden_bias + unit);
    if (has_state(cell) && !schedule.reset(t, slot)) carried = load<Vec<Acc>>(state_of(unit, slot));
    Vec<Acc> h = advance<cell, Acc>(from_x, from_h, carried, saved);
    if constexpr (has_state(cell)) store(state_of(unit, slot), carried);
    if (SAVED > 0 && out.gates) {
      PK_UNROLL
      for (int64_t g = 0; g < SAVED; ++g) store_some<Acc>(out.gates + (row * SAVED + g) * H + unit, saved[g], count);
    }
    if (cell == Cell::LSTM && out.cells) store_some<Acc>(out.cells + row * H + unit, carried, count);
    if (!projected) return pass_on(k, slot, row, unit, h);
    store_as<Acc>(reinterpret_cast<ElementOf<P, Storage>*>(hidden + slot * hidden_width()) + unit, h);
  }

  // W elements of h' from p on: to output, and to the step after the k-th, where a reset makes them zero.
  void pass_on(int64_t k, int64_t slot, int64_t row, int64_t p, Vec<Acc> v) {
    store_some<Acc>(out.output + row * from_state.K + p, v, from_state.K - p);
    if (k + 1 == T) return;
    if (schedule.reset(schedule.time(k + 1), slot)) v = Vec<Acc>{};
    store_as<Acc>(reinterpret_cast<ElementOf<P, Storage>*>(h[(k + 1) % 2] + slot * h_width()) + p, v);
  }

  // h' = W_hr (o ∘ tanh c') at the k-th step, of a block of h's elements.
  void project(int64_t k, int64_t block) {
    const int64_t t = schedule.time(k), group = projection.group;
    alignas(64) Acc products[TILE_ROWS * 4 * W];
    projection.multiply_all(block, projection_panel(block), schedule.active(t), hidden, hidden_width(), products, false,
                            [&](int64_t first, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t u = 0; u < group; ++u) {
          const int64_t p = (block * group + u) * W, slot = first + r;
          if (p < projection.N)
            pass_on(k, slot, schedule.row(t, slot), p, load<Vec<Acc>>(products + (r * group + u) * W));
        }
    });
  }
};

// ---- the op ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn(
    Tensor input, std::optional<Tensor> batch_sizes, Tensor h0, std::optional<Tensor> c0, Tensor weight_ih,
    Tensor weight_hh, std::optional<Tensor> bias_ih, std::optional<Tensor> bias_hh, std::optional<Tensor> weight_hr,
    std::optional<Tensor> lengths, std::optional<Tensor> resets, int64_t cell, bool reverse, bool training,
    int64_t /*backend*/) {
  const Arguments a{input,   batch_sizes, h0,        c0,      weight_ih, weight_hh, bias_ih,
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
    using Acc = typename ComputeOf<Storage>::type::Acc;
    Results<Storage> results{data<Storage>(output),
                             a.step() ? nullptr : data<Storage>(h_n),
                             lstm ? data<Storage>(c_n) : nullptr,
                             saved > 0 ? data<Acc>(gates) : nullptr,
                             cells ? data<Acc>(cell_states) : nullptr};
    for_cell(a.cell, [&](auto which) { Forward<Storage, which>(a, results).run(); });
  });
  return {output, h_n, c_n, gates, cell_states};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("rnn", TORCH_BOX(&rnn)); }
