// Kernels that test the host itself, by name: right ones, whose results a model in NumPy foretells, and one for each
// class of defect, which must be caught. tests/test_cuda_host.py calls them through run().

#include <functional>
#include <map>
#include <string>
#include <vector>

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace {

namespace cg = cooperative_groups;
namespace host = cuda_host;

struct How {
  dim3 grid = 1, block = 32;
  size_t shared = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const How& how, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = how.cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {how.cluster, 1, 1};
  cudaLaunchConfig_t config;
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

float* shared_floats() { return reinterpret_cast<float*>(host::dynamic_shared()); }

// ---- right ----------------------------------------------------------------------------------------------------------

// out[i] of thread i: what warp operation `op` gives for in[i], for the lanes of the mask.
__global__ void warp_operation(int op, int argument, int width, unsigned mask, const int* in, int* out) {
  const int i = threadIdx.x, x = in[i];
  if (!(mask >> i % 32 & 1)) return;
  switch (op) {
    case 0: out[i] = __shfl_sync(mask, x, argument, width); break;
    case 1: out[i] = __shfl_up_sync(mask, x, argument, width); break;
    case 2: out[i] = __shfl_down_sync(mask, x, argument, width); break;
    case 3: out[i] = __shfl_xor_sync(mask, x, argument, width); break;
    case 4: out[i] = __ballot_sync(mask, x > argument); break;
    case 5: out[i] = __any_sync(mask, x > argument); break;
    case 6: out[i] = __all_sync(mask, x > argument); break;
    case 7: out[i] = __match_any_sync(mask, x); break;
    case 8: out[i] = __reduce_add_sync(mask, x); break;
    case 9: out[i] = __reduce_min_sync(mask, x); break;
    case 10: out[i] = __reduce_max_sync(mask, x); break;
    case 11: out[i] = __reduce_xor_sync(mask, unsigned(x)); break;
    case 12: {
      int all;
      const unsigned lanes = __match_all_sync(mask, x, &all);
      out[i] = all ? lanes : 0;
      break;
    }
  }
}

// Pairs of lanes run far ahead of the others while these still read what the whole warp gave.
__global__ void lanes_run_ahead(int* out) {
  const int lane = threadIdx.x;
  int sum = 0;
  for (int step = 0; step < 5; ++step) {
    const int* all = host::gather(lane * (step + 1));
    const unsigned pair = 3u << (lane & ~1);
    if (lane < 8) {
      int ahead = lane;
      for (int repeat = 0; repeat < lane / 2 + 3; ++repeat) ahead = __shfl_xor_sync(pair, ahead, 1);
      sum += ahead;
    } else {
      for (int other = 0; other < 32; ++other) sum += all[other];
    }
  }
  out[lane] = sum;
}

// A matrix product's worth of values a lane: out[i][j] = Σ over lanes of a[lane][i] b[lane][j], 16 floats a lane.
__global__ void gathers(const float* in, float* out) {
  struct Row {
    float values[16];
  } mine;
  const int lane = threadIdx.x;
  for (int i = 0; i < 16; ++i) mine.values[i] = in[16 * lane + i];
  const Row* rows = host::gather(mine);
  for (int i = lane; i < 256; i += 32) {
    float sum = 0;
    for (int k = 0; k < 32; ++k) sum += rows[k].values[i / 16] * rows[k].values[i % 16];
    out[i] = sum;
  }
}

// Sums of each block's part, through static and dynamic shared memory, with asynchronous copies two steps ahead; then
// the last block to finish adds them up.
__global__ void block_sums(const float* in, int n, float* sums, unsigned* ticket) {
  __shared__ float warps[32];
  __shared__ bool last;
  float* stages = shared_floats();  // [3][threads]
  const int threads = blockDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = (n + threads * gridDim.x - 1) / (threads * gridDim.x);
  const auto issue = [&](int step) {
    const int i = (step * gridDim.x + blockIdx.x) * threads + threadIdx.x;
    if (step < steps) host::copy_async<4>(&stages[step % 3 * threads + threadIdx.x], &in[i], i < n);
    host::commit_copies();
  };
  issue(0);
  issue(1);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    issue(step + 2);
    host::wait_copies(2);
    __syncthreads();
    sum += stages[step % 3 * threads + (threadIdx.x + 1) % threads];
    __syncthreads();
  }
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  if (lane == 0) warps[warp] = sum;
  if (__syncthreads_count(lane == 0) != threads / 32) return;
  if (threadIdx.x == 0) {
    for (int other = 1; other < threads / 32; ++other) sum += warps[other];
    sums[blockIdx.x] = sum;
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += sums[block];
    sums[gridDim.x] = sum;
  }
}

__global__ void count(const int* in, int n, int* bins, float* largest) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&bins[in[i] & 7], 1);
  unsigned* bits = reinterpret_cast<unsigned*>(largest);
  for (unsigned old = *bits; __uint_as_float(old) < in[i];) {
    const unsigned before = atomicCAS(bits, old, __float_as_uint(in[i]));
    if (before == old) break;
    old = before;
  }
}

// x[block] ← x[block] + x[its right neighbour], every block at once, `steps` times; each has static shared memory.
__global__ void neighbours(int* x, int steps) {
  __shared__ int next;
  const cg::grid_group grid = cg::this_grid();
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 1) next = x[blockIdx.x] + x[(blockIdx.x + 1) % gridDim.x];
    grid.sync();
    if (threadIdx.x == 0) x[blockIdx.x] = next;
    grid.sync();
  }
}

// The same between blocks that spin on flags: x[block] = x[block − 1] + 1.
__global__ void chain(volatile int* x) {
  if (threadIdx.x == 0) {
    if (blockIdx.x > 0)
      while (x[blockIdx.x - 1] == 0) host::spin();
    x[blockIdx.x] = blockIdx.x > 0 ? x[blockIdx.x - 1] + 1 : 1;
  }
}

// Each block pushes its numbers into the next block's shared memory, around the cluster; split barrier at the end.
__global__ void ring(const float* in, float* out) {
  const cg::cluster_group cluster = cg::this_cluster();
  float* mine = shared_floats();
  const unsigned rank = cluster.block_rank(), blocks = cluster.num_blocks();
  cluster.sync();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  cluster.map_shared_rank(mine, (rank + 1) % blocks)[threadIdx.x] = in[i];
  cluster.sync();
  const float pushed = mine[threadIdx.x];
  const float read = cluster.map_shared_rank(mine, (rank + blocks - 1) % blocks)[threadIdx.x];
  auto token = cluster.barrier_arrive();
  out[i] = 10 * pushed + read;
  cluster.barrier_wait(std::move(token));
}

// ---- defects --------------------------------------------------------------------------------------------------------

__device__ float* launder(float* pointer) {  // so that the compiler cannot see which array it is in
  asm volatile("" : "+r"(pointer));
  return pointer;
}

__global__ void global_overrun(float* data, int n) { data[threadIdx.x + n - 31] = 1; }
__global__ void dynamic_overrun(int n) { shared_floats()[threadIdx.x + n - 31] = 1; }
__global__ void static_overrun(int n) {
  __shared__ float tile[32];
  launder(tile)[threadIdx.x + n - 31] = 1;
}
__global__ void local_overrun(float* data, int n) {
  float row[32] = {};
  launder(row)[threadIdx.x + n - 31] = 1;
  data[threadIdx.x] = row[threadIdx.x];
}
__global__ void misaligned(float* data) {
  reinterpret_cast<float4*>(data + 1)[threadIdx.x % 2] = make_float4(0, 0, 0, 0);
}
__global__ void misaligned_copy(float* data) {
  host::copy_async<16>(shared_floats(), data + 1, true);
}
__global__ void signed_overflow(float* data, int rows, int columns) { data[rows * columns < 0 ? 0 : 1] = 1; }
__global__ void shift(float* data, int bits) { data[threadIdx.x] = 1 << bits; }
__global__ void offset_overflow(float* data, int row_size) {
  const int row = 100000 + blockIdx.x;
  const int offset = row * row_size;
  data[offset & 15] = 1;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
__global__ void barrier_in_branch() {
  if (threadIdx.x < 40) __syncthreads();
  else __syncwarp(__activemask());
}
__global__ void barrier_after_exit() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void absent_lane(float* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  else __syncthreads();
}
__global__ void exited_lane(float* data) {
  if (threadIdx.x == 7) return;
  data[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}
__global__ void unnamed_lane(float* data) { data[threadIdx.x] = __shfl_sync(1u, 1.0f, 0); }
__global__ void different_operations(float* data) {
  if (threadIdx.x & 1) data[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  else data[threadIdx.x] = __shfl_down_sync(~0u, 1.0f, 1);
}
__global__ void grid_barrier_missed() {
  if (blockIdx.x != 2) cg::this_grid().sync();
}
__global__ void endless_spin(volatile float* data) {
  while (data[0] == 0) host::spin();
}
__global__ void map_exited() {
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  for (int turn = 0; turn < 3; ++turn) host::spin();
  cluster.map_shared_rank(shared_floats(), 1);
}

// The next ones end as if nothing were wrong, with wrong results, NaN or in some order of the threads only.
__global__ void missing_barrier(float* data) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  if (threadIdx.x < 32) data[threadIdx.x] = tile[threadIdx.x] + tile[threadIdx.x + 32];
}
__global__ void missing_warp_barrier(float* data) {
  __shared__ float tile[32];
  tile[threadIdx.x] = 1;
  data[threadIdx.x] = tile[threadIdx.x ^ 1];
}
__global__ void missing_grid_barrier(float* data) {
  if (threadIdx.x == 0) {
    data[blockIdx.x] = 1;
    data[32 + blockIdx.x] = data[(blockIdx.x + 1) % gridDim.x];
  }
}
__global__ void missing_wait(const float* ones, float* data, int pending) {
  float* tile = shared_floats();
  host::copy_async<4>(tile + threadIdx.x, ones + threadIdx.x, true);
  host::commit_copies();
  host::wait_copies(pending);
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x ^ 1];
}
// A copy into a buffer that others may still read, of the values that it holds already: without the first barrier
// they read what is on its way.
__global__ void early_copy(const float* ones, float* data, bool barrier) {
  float* tile = shared_floats();
  tile[threadIdx.x] = 1;
  __syncthreads();
  const float mine = threadIdx.x ? tile[threadIdx.x - 1] : 1;
  if (barrier) __syncthreads();
  host::copy_async<4>(tile + threadIdx.x, ones + threadIdx.x, true);
  host::commit_copies();
  __syncthreads();
  host::wait_copies(0);
  data[threadIdx.x] = mine;
}
__global__ void uninitialised(float* data, bool is_static) {
  __shared__ float tile[32];
  float* read = is_static ? launder(tile) : shared_floats();
  data[32 * blockIdx.x + threadIdx.x] = read[threadIdx.x];
  read[threadIdx.x] = 1;  // not to be found by the next block
}

__global__ void early_exit_of_cluster(float* data) {
  const cg::cluster_group cluster = cg::this_cluster();
  float* mine = shared_floats();
  const float* other = cluster.map_shared_rank(mine, cluster.block_rank() ^ 1);
  mine[threadIdx.x] = 1;
  cluster.sync();
  data[threadIdx.x] = other[threadIdx.x];
}
__global__ void early_read_of_cluster(float* data) {
  const cg::cluster_group cluster = cg::this_cluster();
  float* mine = shared_floats();
  data[threadIdx.x] = cluster.map_shared_rank(mine, cluster.block_rank() ^ 1)[threadIdx.x];
  cluster.sync();
}

__global__ void nothing() {}

cudaError_t with_shared(size_t allowed, size_t used) {
  const cudaError_t error = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, int(allowed));
  return error ? error : launch({.shared = used}, nothing);
}

// ---- by name --------------------------------------------------------------------------------------------------------

struct Arguments {
  void* buffers[4];
  int64_t numbers[6];
  float* data() const { return static_cast<float*>(buffers[0]); }
  template <class T>
  T* buffer(int i) const { return static_cast<T*>(buffers[i]); }
  int number(int i) const { return int(numbers[i]); }
  unsigned size(int i) const { return unsigned(numbers[i]); }
};

#define CASE(name, ...) {#name, [](const Arguments& a) { return launch(__VA_ARGS__); }}

const std::map<std::string, std::function<cudaError_t(const Arguments&)>> cases = {
    {"warp_operation", [](const Arguments& a) {
       return launch({.block = a.size(4)}, warp_operation, a.number(0), a.number(1), a.number(2), a.size(3),
                     a.buffer<const int>(0), a.buffer<int>(1));
     }},
    CASE(lanes_run_ahead, {}, lanes_run_ahead, a.buffer<int>(0)),
    CASE(gathers, {}, gathers, a.buffer<const float>(0), a.buffer<float>(1)),
    {"block_sums", [](const Arguments& a) {
       return launch({.grid = a.size(1), .block = a.size(2), .shared = 12 * size_t(a.size(2))}, block_sums,
                     a.buffer<const float>(0), a.number(0), a.buffer<float>(1), a.buffer<unsigned>(2));
     }},
    CASE(count, {.grid = a.size(1), .block = a.size(2)}, count, a.buffer<const int>(0), a.number(0), a.buffer<int>(1),
           a.buffer<float>(2)),
    CASE(neighbours, {.grid = a.size(0), .block = 48, .cooperative = true}, neighbours, a.buffer<int>(0), a.number(1)),
    CASE(chain, {.grid = a.size(0), .cooperative = true}, chain, a.buffer<volatile int>(0)),
    CASE(ring, {.grid = a.size(0), .block = a.size(1), .shared = 4 * size_t(a.size(1)), .cluster = a.size(2)}, ring,
           a.buffer<const float>(0), a.buffer<float>(1)),

    CASE(global_overrun, {}, global_overrun, a.data(), a.number(0)),
    CASE(dynamic_overrun, {.shared = 4 * size_t(a.number(0))}, dynamic_overrun, a.number(0)),
    CASE(static_overrun, {}, static_overrun, 32),
    CASE(local_overrun, {}, local_overrun, a.data(), 32),
    CASE(misaligned, {}, misaligned, a.data()),
    CASE(misaligned_copy, {.shared = 16}, misaligned_copy, a.data()),
    CASE(signed_overflow, {}, signed_overflow, a.data(), 70000, 70000),
    CASE(shift, {}, shift, a.data(), 32),
    CASE(offset_overflow, {}, offset_overflow, a.data(), 40000),
    CASE(divergent_barrier, {.block = 64}, divergent_barrier),
    CASE(barrier_in_branch, {.block = 64}, barrier_in_branch),
    CASE(barrier_after_exit, {.block = 64}, barrier_after_exit),
    CASE(absent_lane, {}, absent_lane, a.data()),
    CASE(exited_lane, {}, exited_lane, a.data()),
    CASE(unnamed_lane, {}, unnamed_lane, a.data()),
    CASE(different_operations, {}, different_operations, a.data()),
    CASE(grid_barrier_missed, {.grid = 4, .cooperative = true}, grid_barrier_missed),
    CASE(grid_barrier_of_no_grid, {.grid = 4}, grid_barrier_missed),
    CASE(endless_spin, {}, endless_spin, a.data()),
    CASE(map_exited, {.grid = 2, .shared = 128, .cluster = 2}, map_exited),
    CASE(missing_barrier, {.block = 64}, missing_barrier, a.data()),
    CASE(missing_warp_barrier, {}, missing_warp_barrier, a.data()),
    CASE(missing_grid_barrier, {.grid = 4}, missing_grid_barrier, a.data()),
    CASE(missing_wait, {.shared = 128}, missing_wait, a.buffer<const float>(1), a.data(), a.number(0)),
    CASE(early_copy, {.block = 64, .shared = 256}, early_copy, a.buffer<const float>(1), a.data(), a.number(0) != 0),
    CASE(uninitialised, {.grid = 2, .shared = 128}, uninitialised, a.data(), a.number(0) != 0),
    CASE(early_exit_of_cluster, {.grid = 2, .shared = 128, .cluster = 2}, early_exit_of_cluster, a.data()),
    CASE(early_read_of_cluster, {.grid = 2, .shared = 128, .cluster = 2}, early_read_of_cluster, a.data()),
    CASE(threads, {.block = a.size(0)}, nothing),
    CASE(cooperative, {.grid = a.size(0), .block = a.size(1), .cooperative = true}, nothing),
    CASE(cluster, {.grid = a.size(0), .cluster = a.size(1)}, nothing),
    {"shared", [](const Arguments& a) { return with_shared(a.numbers[0], a.numbers[1]); }},
};

}  // namespace

// What went wrong, in words, or "".
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, void* const* buffers,
                                                                  const int64_t* numbers) {
  static std::string message;
  Arguments arguments;
  std::copy_n(buffers, 4, arguments.buffers);
  std::copy_n(numbers, 6, arguments.numbers);
  try {
    const cudaError_t error = cases.at(name)(arguments);
    message = error ? cudaGetErrorString(error) : "";
  } catch (const std::exception& exception) {
    message = exception.what();
  }
  return message.c_str();
}
