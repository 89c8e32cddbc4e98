// Weighted sums of a table's rows chosen by index, and their gradients:
//
//   y_n = Σ_j w_nj V[i_nj];    dw_nj = dy_n · V[i_nj];    dV[m] = Σ_{n, j: i_nj = m} w_nj dy_n
//
//   kernel       a warp owns                             reads                           writes
//   sum_rows     a block of a bag's columns; four share  the bag's rows, 8 or more side  y
//                it where there are few                  by side
//   dot_rows     32 entries of a bag                     their rows, eight lanes a row;  dw
//                                                        the bag's dy
//   sum_hits     a block of columns of LOT hits, sorted  w and dy of the hits            dV of rows that end within,
//                by row, then position                                                   sums of those cut at an end
//   join_hits    a block of columns of a row that was    its sums, in order              its dV
//                cut
//
// A bag is (n, g): table g's. An index out of range is a row of zeros: it is not read. The caller sorts the hits, which
// are cut into equal lots wherever rows begin and end, so that a row with all the hits costs no more than any others; a
// lot adds in order and the lots' sums are added in order: nothing is atomic, and the bits are the same in every run.
// All is limited by memory: loads of 16 bytes a lane, eight of them under way.

#include "rows.h"

namespace {

constexpr int WARPS = 4, ROWS = 8;  // of a block; that a lane has under way
constexpr int64_t ENOUGH_WARPS = 1056;  // that keep a GPU busy

template <class T>
struct Table {
  const T* values;  // [G, M, d]
  int64_t table_stride, row_stride, G, M, d;
};

// ---- reading a table ------------------------------------------------------------------------------------------------

// indices, weights: [bags, k]; y: [bags, d]. `lanes` lanes of a warp read a row, the others further rows, and `share`
// warps a bag's.
// audit: sum_rows: allow narrow load: beside 8 bytes of an index a lane has 4 of its weight
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(32 * WARPS)
sum_rows(const Table<T> table, const int64_t* indices, const float* weights, T* y, int64_t bags, int64_t k, int lanes,
         int share) {
  constexpr int E = PART_NUMBERS<T>;
  __shared__ float shared[WARPS][E][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = lane % lanes, groups = 32 / lanes;
  const int64_t blocks = ceil_div(table.d, lanes * E);
  const int64_t task = (blockIdx.x * int64_t(WARPS) + warp) / share;
  const int64_t bag = task / blocks, column = (task % blocks * lanes + own) * E;
  float sums[E] = {};
  if (bag < bags) {
    const T* rows = table.values + bag % table.G * table.table_stride;
    indices += bag * k, weights += bag * k;
    // This warp's entries: of every share · 32, 32 neighbouring ones, which the lanes read together.
    for (int64_t first = warp % share * 32; first < k; first += share * 32) {
      const int64_t j = first + lane;
      const int64_t m = j < k ? indices[j] : -1;
      const float w = j < k ? weights[j] : 0.f;
      const int count = int(min(k - first, int64_t(32)));
      for (int i = 0; i < count; i += ROWS * groups) {
        uint4 parts[ROWS];
        float by[ROWS];
        bool exist[ROWS];
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
          const int from = i + u * groups + lane / lanes;
          const int64_t row = __shfl_sync(~0u, m, from % 32);
          by[u] = __shfl_sync(~0u, w, from % 32);
          exist[u] = from < count && row >= 0 && row < table.M;
          parts[u] = exist[u] ? load_part<ALIGNED>(rows + row * table.row_stride, column, table.d) : uint4{};
        }
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
          const Numbers<T> numbers = std::bit_cast<Numbers<T>>(parts[u]);
#pragma unroll
          for (int e = 0; e < E; ++e)
            if (exist[u]) sums[e] = fmaf(by[u], float(numbers.at[e]), sums[e]);
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e)
    for (int step = lanes; step < 32; step *= 2) sums[e] += __shfl_xor_sync(~0u, sums[e], step);
  if (share > 1) {
#pragma unroll
    for (int e = 0; e < E; ++e) shared[warp][e][lane] = sums[e];
    __syncthreads();
    if (warp % share != 0) return;
    for (int other = 1; other < share; ++other)
#pragma unroll
      for (int e = 0; e < E; ++e) sums[e] += shared[warp + other][e][lane];
  }
  if (bag < bags && lane < lanes) store_part<ALIGNED>(y + bag * table.d, column, table.d, sums);
}

// grad: [bags, d]; indices, grad_weights: [bags, k]
// audit: dot_rows where ALIGNED=false: allow narrow load: rows begin anywhere
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(32 * WARPS)
dot_rows(const Table<T> table, const T* grad, const int64_t* indices, float* grad_weights, int64_t bags, int64_t k) {
  constexpr int E = PART_NUMBERS<T>;
  const int lane = threadIdx.x % 32, own = lane % 8, group = lane / 8;
  const int64_t task = blockIdx.x * int64_t(WARPS) + threadIdx.x / 32, pieces = ceil_div(k, 32), bag = task / pieces;
  if (bag >= bags) return;
  const int64_t first = task % pieces * 32;
  const T* rows[ROWS];
  bool exist[ROWS];
#pragma unroll
  for (int u = 0; u < ROWS; ++u) {
    const int64_t j = first + 4 * u + group, m = j < k ? indices[bag * k + j] : -1;
    exist[u] = m >= 0 && m < table.M;
    rows[u] = table.values + bag % table.G * table.table_stride + (exist[u] ? m : 0) * table.row_stride;
  }
  float sums[ROWS] = {};
  for (int64_t column = own * E; column < table.d; column += 8 * E) {
    uint4 parts[ROWS];
#pragma unroll
    for (int u = 0; u < ROWS; ++u) parts[u] = exist[u] ? load_part<ALIGNED>(rows[u], column, table.d) : uint4{};
    const Numbers<T> dy = std::bit_cast<Numbers<T>>(load_part<ALIGNED>(grad + bag * table.d, column, table.d));
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      const Numbers<T> numbers = std::bit_cast<Numbers<T>>(parts[u]);
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (exist[u]) sums[u] = fmaf(float(dy.at[e]), float(numbers.at[e]), sums[u]);
    }
  }
  const float dot = sum_across(sums);
  const int64_t j = first + 4 * own + group;
  if (j < k) grad_weights[bag * k + j] = dot;
}

// ---- the table's gradient -------------------------------------------------------------------------------------------

template <class Int>
struct Hits {
  const Int *rows, *order;  // [count]: their rows, ascending, and their positions in weights
  int64_t count, k, M, d;

  __device__ int64_t row(int64_t i) const { return i >= 0 && i < count ? int64_t(rows[i]) : -1; }
};

// grad: [bags, d], weights: [bags, k], out: [M, d]. cut: [lots, 2, d], the sums of the row that a lot before began, and
// of the row that the lot after goes on with.
// audit: sum_hits where ALIGNED=false: allow narrow load: rows begin anywhere
template <class T, class Int, bool ALIGNED>
__global__ void __launch_bounds__(32 * WARPS)
sum_hits(const Hits<Int> hits, const T* grad, const float* weights, T* out, float* cut) {
  constexpr int E = PART_NUMBERS<T>;
  const int lane = threadIdx.x % 32;
  const int64_t blocks = ceil_div(hits.d, 32 * E), task = blockIdx.x * int64_t(WARPS) + threadIdx.x / 32;
  const int64_t lot = task / blocks, first = lot * LOT, column = (task % blocks * 32 + lane) * E;
  if (first >= hits.count) return;
  const int count = int(min(hits.count - first, int64_t(LOT)));
  const int64_t i = first + lane;  // the hit that this lane reads for all
  const int64_t position = i < hits.count ? int64_t(hits.order[i]) : 0;
  const int64_t own_row = hits.row(i), next_row = hits.row(i + 1);
  const float own_weight = i < hits.count ? weights[position] : 0.f;
  const int64_t own_bag = position / hits.k;
  bool begun = hits.row(first - 1) == __shfl_sync(~0u, own_row, 0);
  float sums[E] = {};
  auto save = [&](int64_t end) {
    float* to = cut + (lot * 2 + end) * hits.d;
#pragma unroll
    for (int e = 0; e < E; e += 4)
      store_part<ALIGNED>(to, column + e, hits.d, {sums[e], sums[e + 1], sums[e + 2], sums[e + 3]});
  };
  for (int start = 0; start < count; start += ROWS) {
    uint4 parts[ROWS];
#pragma unroll
    for (int u = 0; u < ROWS; ++u)
      parts[u] = load_part<ALIGNED>(grad + __shfl_sync(~0u, own_bag, start + u) * hits.d, column, hits.d);
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      const float w = __shfl_sync(~0u, own_weight, start + u);
      const int64_t row = __shfl_sync(~0u, own_row, start + u), next = __shfl_sync(~0u, next_row, start + u);
      if (start + u >= count) continue;
      const Numbers<T> numbers = std::bit_cast<Numbers<T>>(parts[u]);
#pragma unroll
      for (int e = 0; e < E; ++e) sums[e] = fmaf(w, float(numbers.at[e]), sums[e]);
      if (row == next) continue;
      if (begun) save(0);
      else if (row >= 0 && row < hits.M) store_part<ALIGNED>(out + row * hits.d, column, hits.d, sums);
      begun = false;
#pragma unroll
      for (int e = 0; e < E; ++e) sums[e] = 0.f;
    }
  }
  if (begun) save(0);  // the whole lot is of one row
  else save(1);
}

// The row that begins in a lot and goes on in those after.
// audit: join_hits where ALIGNED=false: allow narrow load: rows begin anywhere
// audit: join_hits where ALIGNED=true Int=int: allow narrow load: one number a step of the search for the last lot
template <class T, class Int, bool ALIGNED>
__global__ void __launch_bounds__(32 * WARPS) join_hits(const Hits<Int> hits, const float* cut, T* out) {
  constexpr int E = PART_NUMBERS<T>;
  const int lane = threadIdx.x % 32;
  const int64_t blocks = ceil_div(hits.d, 32 * E), task = blockIdx.x * int64_t(WARPS) + threadIdx.x / 32;
  const int64_t lot = task / blocks, first = lot * LOT, column = (task % blocks * 32 + lane) * E;
  if (first + LOT >= hits.count) return;
  const int64_t row = hits.row(first + LOT - 1);
  if (hits.row(first + LOT) != row || row < 0 || row >= hits.M) return;
  if (hits.row(first - 1) == row) return;  // it began before
  int64_t last = lot + 1, none = ceil_div(hits.count, LOT);  // the last lot that begins with this row
  while (none - last > 1) {
    const int64_t middle = (last + none) / 2;
    if (hits.row(middle * LOT) == row) last = middle;
    else none = middle;
  }
  float sums[E] = {};
  for (int64_t start = lot; start <= last; start += ROWS) {
    uint4 parts[ROWS][E / 4];
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      const float* from = cut + ((start + u) * 2 + (start + u == lot)) * hits.d;
#pragma unroll
      for (int e = 0; e < E; e += 4)
        parts[u][e / 4] = start + u <= last ? load_part<ALIGNED>(from, column + e, hits.d) : uint4{};
    }
#pragma unroll
    for (int u = 0; u < ROWS; ++u)
#pragma unroll
      for (int e = 0; e < E; ++e) sums[e] += std::bit_cast<Numbers<float>>(parts[u][e / 4]).at[e % 4];
  }
  store_part<ALIGNED>(out + row * hits.d, column, hits.d, sums);
}

// ---- entries --------------------------------------------------------------------------------------------------------

template <class T>
Table<T> table_of(const Tensor& values) {
  return {data<const T>(values), values.stride(0), values.stride(1), values.size(0), values.size(1),
          values.size(2)};
}

template <class T>
bool is_aligned(int64_t numbers, std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return numbers % PART_NUMBERS<T> == 0 && bits % 16 == 0;
}

unsigned blocks_of(int64_t warps) {
  STD_TORCH_CHECK(ceil_div(warps, WARPS) < int64_t(1) << 31, "indices: expected fewer");
  return unsigned(ceil_div(warps, WARPS));
}

void check_table(const Tensor& values, const Tensor& indices) {
  check(values, {ANY_SIZE, ANY_SIZE, ANY_SIZE}, values.scalar_type(), "values", Layout::ROWS);
  check(indices, {ANY_SIZE, values.size(0), ANY_SIZE}, ScalarType::Long, "indices");
}

// values: [G, M, d], indices, weights: [N, G, k] -> out: [N, G, d]
void gather_sum_rows(Tensor values, Tensor indices, Tensor weights, Tensor out, int64_t stream) {
  check_table(values, indices);
  const int64_t N = indices.size(0), G = indices.size(1), bags = N * G, k = indices.size(2), d = values.size(2);
  check(weights, {N, G, k}, ScalarType::Float, "weights");
  check(out, {N, G, d}, values.scalar_type(), "out");
  if (bags * d == 0) return;
  DeviceGuard guard(values);
  for_device_dtype(values.scalar_type(), [&]<class T>(T) {
    const Table<T> table = table_of<T>(values);
    int lanes = 1;
    while (lanes < 32 && lanes * PART_NUMBERS<T> < d) lanes *= 2;
    const int64_t tasks = bags * ceil_div(d, lanes * PART_NUMBERS<T>);
    const int share = tasks < ENOUGH_WARPS && k > 32 ? WARPS : 1;
    T* y = data<T>(out);
    const bool aligned = is_aligned<T>(d | table.table_stride | table.row_stride, {table.values, y});
    launch({.grid = blocks_of(tasks * share), .block = 32 * WARPS, .stream = stream},
           aligned ? sum_rows<T, true> : sum_rows<T, false>, table, data<const int64_t>(indices),
           data<const float>(weights), y, bags, k, lanes, share);
  });
}

// grad: [N, G, d], values: [G, M, d], indices: [N, G, k] -> grad_weights: [N, G, k]
void gather_dot_rows(Tensor grad, Tensor values, Tensor indices, Tensor grad_weights, int64_t stream) {
  check_table(values, indices);
  const int64_t N = indices.size(0), G = indices.size(1), bags = N * G, k = indices.size(2), d = values.size(2);
  check(grad, {N, G, d}, values.scalar_type(), "grad");
  check(grad_weights, {N, G, k}, ScalarType::Float, "grad_weights");
  DeviceGuard guard(values);
  for_device_dtype(values.scalar_type(), [&]<class T>(T) {
    const Table<T> table = table_of<T>(values);
    const T* dy = data<const T>(grad);
    const bool aligned = is_aligned<T>(d | table.table_stride | table.row_stride, {table.values, dy});
    launch({.grid = blocks_of(bags * ceil_div(k, 32)), .block = 32 * WARPS, .stream = stream},
           aligned ? dot_rows<T, true> : dot_rows<T, false>, table, dy, data<const int64_t>(indices),
           data<float>(grad_weights), bags, k);
  });
}

// grad: [bags, d], weights: [bags, k]; rows, order: [count], of the hits their rows, ascending (those from M on are
// left out), and their positions in weights, in int32 or int64 -> the used rows of out: [M, d]. cut: [lots, 2, d],
// memory to work in.
void gather_sum_hits(Tensor grad, Tensor weights, Tensor rows, Tensor order, Tensor cut, Tensor out, int64_t stream) {
  const ScalarType integer = rows.scalar_type();
  STD_TORCH_CHECK(integer == ScalarType::Int || integer == ScalarType::Long, "rows: expected int32 or int64");
  check(grad, {ANY_SIZE, ANY_SIZE}, grad.scalar_type(), "grad");
  check(weights, {grad.size(0), ANY_SIZE}, ScalarType::Float, "weights");
  check(rows, {ANY_SIZE}, integer, "rows");
  const int64_t count = rows.size(0), d = grad.size(1), k = weights.size(1), lots = ceil_div(count, LOT);
  check(order, {count}, integer, "order");
  check(out, {ANY_SIZE, d}, grad.scalar_type(), "out");
  check(cut, {lots, 2, d}, ScalarType::Float, "cut");
  if (count * d == 0) return;
  DeviceGuard guard(grad);
  for_device_dtype(grad.scalar_type(), [&]<class T>(T) {
    const T* dy = data<const T>(grad);
    const float* w = data<const float>(weights);
    float* sums = data<float>(cut);
    T* to = data<T>(out);
    const bool aligned = is_aligned<T>(d, {dy, to, sums});
    const Launch how{.grid = blocks_of(lots * ceil_div(d, 32 * PART_NUMBERS<T>)), .block = 32 * WARPS,
                     .stream = stream};
    auto run = [&]<class Int>(Int) {
      const Hits<Int> hits{data<const Int>(rows), data<const Int>(order), count,
                           k, out.size(0), d};
      launch(how, aligned ? sum_hits<T, Int, true> : sum_hits<T, Int, false>, hits, dy, w, to, sums);
      if (lots > 1) launch(how, aligned ? join_hits<T, Int, true> : join_hits<T, Int, false>, hits, sums, to);
    };
    if (integer == ScalarType::Int) run(int32_t{});
    else run(int64_t{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels_cuda, m) {
  m.def("gather_sum_rows(Tensor values, Tensor indices, Tensor weights, Tensor(a!) out, int stream) -> ()");
  m.def("gather_dot_rows(Tensor grad, Tensor values, Tensor indices, Tensor(a!) grad_weights, int stream) -> ()");
  m.def("gather_sum_hits(Tensor grad, Tensor weights, Tensor rows, Tensor order, Tensor(a!) cut, Tensor(b!) out, "
        "int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pykernels_cuda, DEVICE_KEY, m) {
  m.impl("gather_sum_rows", TORCH_BOX(&gather_sum_rows));
  m.impl("gather_dot_rows", TORCH_BOX(&gather_dot_rows));
  m.impl("gather_sum_hits", TORCH_BOX(&gather_sum_hits));
}
