// The vocabulary of the CUDA kernels: arguments, launches, and the instructions that C++ does not offer.
//
// A .cu file holds kernels and, under torch.ops.pykernels_cuda, an entry for each that writes into tensors which Python
// has allocated: nothing is allocated here, and everything runs on the stream given, so calls can be captured in a CUDA
// graph. Compiled with CUDA_ON_HOST against tests/cuda_host, the same file runs on CPU tensors; whatever is written in
// PTX stands here, beside its meaning in C++.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "sizes.h"

#if defined(CUDA_ON_HOST)
#define DEVICE_KEY CPU
#else
#define DEVICE_KEY CUDA
#endif

namespace {

// ---- arguments ------------------------------------------------------------------------------------------------------

// Whether rows of a tensor can be moved 16 bytes at a time.
inline bool is_aligned(const Tensor& t, bool strided = true) {
  const int64_t bytes = t.element_size(), last = t.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.size(last) * bytes % 16 == 0;
  for (int64_t dim = 0; strided && dim < last; ++dim) aligned = aligned && t.stride(dim) * bytes % 16 == 0;
  return aligned;
}

// As for_dtype, of the dtypes that GPUs are fast in.
template <class F>
void for_device_dtype(ScalarType storage, const F& f) {
  switch (storage) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "expected fp32, bf16 or fp16, got ", torch::headeronly::toString(storage));
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes a tensor's device the current one, until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    const int device = std::max<int>(t.get_device_index(), 0);
    if (device == previous_) previous_ = -1;
    else check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device, value;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

struct Launch {
  dim3 grid, block;
  int64_t stream = 0;       // a cudaStream_t, as torch hands it to Python
  size_t shared = 0;        // bytes of dynamic shared memory
  bool cooperative = false; // all blocks are resident at once: they may wait for each other
  unsigned cluster = 1;     // blocks of a cluster, along x
};

// A launch as CUDA takes it, of a kernel that was told what it will be asked for.
struct Configuration : cudaLaunchConfig_t {
  cudaLaunchAttribute all[2];

  template <class Kernel>
  Configuration(const Launch& how, Kernel* kernel) : cudaLaunchConfig_t{} {
    if (how.shared > 48 << 10)
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared)),
                 "cudaFuncSetAttribute");
    if (how.cluster > 8)
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
    gridDim = how.grid, blockDim = how.block, dynamicSmemBytes = how.shared;
    stream = reinterpret_cast<cudaStream_t>(how.stream);
    attrs = all, numAttrs = 0;
    if (how.cooperative) {
      all[numAttrs].id = cudaLaunchAttributeCooperative;
      all[numAttrs++].val.cooperative = 1;
    }
    if (how.cluster > 1) {
      all[numAttrs].id = cudaLaunchAttributeClusterDimension;
      all[numAttrs].val.clusterDim.x = how.cluster;
      all[numAttrs].val.clusterDim.y = all[numAttrs].val.clusterDim.z = 1;
      ++numAttrs;
    }
  }
  Configuration(const Configuration&) = delete;
};

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
  const Configuration configuration(how, kernel);
  check_cuda(cudaLaunchKernelEx(&configuration, kernel, std::forward<Arguments>(arguments)...), "launch");
  check_cuda(cudaGetLastError(), "launch");
}

// How many of a launch's clusters the device holds at a time; 0 if they do not fit.
template <class Kernel>
int resident_clusters(const Launch& how, Kernel* kernel) {
  const Configuration configuration(how, kernel);
  int clusters;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

constexpr int LANES = 32;
constexpr float LOG2E = 1.44269504f;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Storage, int N>
struct alignas(N * sizeof(Storage)) Pack {
  Storage of[N];
};

// ---- inside kernels -------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ inline unsigned char* dynamic_shared() {
#if defined(CUDA_ON_HOST)
  return cuda_host::dynamic_shared();
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
#endif
}

// Copies BYTES (4, 8 or 16, both sides aligned to that) from global to shared memory without waiting; zeros if !inside.
template <int BYTES>
__device__ inline void copy_async(void* shared, const void* global, bool inside = true) {
#if defined(CUDA_ON_HOST)
  cuda_host::copy_async<BYTES>(shared, global, inside);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int size = inside ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(size), "n"(BYTES)
                 : "memory");
#endif
}

// Ends a group of this thread's asynchronous copies.
__device__ inline void commit_copies() {
#if defined(CUDA_ON_HOST)
  cuda_host::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are under way. A barrier must follow before others read.
template <int PENDING>
__device__ inline void wait_copies() {
#if defined(CUDA_ON_HOST)
  cuda_host::wait_copies(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// 2^x, to about 2 units in the last place; 0 for -inf.
__device__ inline float exp2_fast(float x) {
#if defined(CUDA_ON_HOST)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1/x, to 1 unit in the last place, for 2^-126 ≤ |x| ≤ 2^126.
__device__ inline float reciprocal_fast(float x) {
#if defined(CUDA_ON_HOST)
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Blocks that wait for each other without all waiting for all. Whoever waits must be resident together with the rest.

// Adds 1 to a counter in global memory, after all that this thread wrote and, through barriers, has seen.
__device__ inline void signal(unsigned* counter) {
#if defined(CUDA_ON_HOST)
  atomicAdd(counter, 1u);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#endif
}

// Waits until a counter is at least so much; then what was written before those signals can be seen.
__device__ inline void wait_for(const unsigned* counter, unsigned least) {
#if defined(CUDA_ON_HOST)
  while (*static_cast<const volatile unsigned*>(counter) < least) cuda_host::spin();
#else
  unsigned count;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  while (count < least);
#endif
}

// A cluster's barrier in two halves, and the place of `mine` in the shared memory of its block `rank`; sm_90 and newer.
#if defined(CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive() {
#if defined(CUDA_ON_HOST)
  cooperative_groups::this_cluster().barrier_arrive();
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if defined(CUDA_ON_HOST)
  cooperative_groups::this_cluster().barrier_wait();
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Stores 16 bytes there.
__device__ inline void store_to_cluster(void* mine, unsigned rank, uint4 value) {
#if defined(CUDA_ON_HOST)
  *static_cast<uint4*>(cooperative_groups::this_cluster().map_shared_rank(mine, rank)) = value;
#else
  unsigned place;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(place)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(mine))), "r"(rank));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#endif
}
#else
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
__device__ inline void store_to_cluster(void*, unsigned, uint4) {}
#endif

}  // namespace
