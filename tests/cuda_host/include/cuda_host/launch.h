// Launches, and the part of the runtime API around them. The device they go to is described in launch.cpp.
#pragma once

#include <tuple>
#include <utility>

#include "thread.h"

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidDevice,
  cudaErrorCooperativeLaunchTooLarge,
  cudaErrorInvalidClusterSize,
};
typedef struct CUstream_st* cudaStream_t;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrWarpSize,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrL2CacheSize,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_host {

// What each thread calls: `call(arguments)`.
struct Kernel {
  const void* address;
  void (*call)(const void* arguments);
  const void* arguments;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
int blocks_per_multiprocessor(unsigned threads, size_t shared);

}  // namespace cuda_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Call = std::tuple<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  return cuda_host::launch(*config, {reinterpret_cast<const void*>(kernel),
                                     [](const void* pointer) {
                                       const auto& [function, values] = *static_cast<const Call*>(pointer);
                                       std::apply(function, values);
                                     },
                                     &call});
}

template <class K>
cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_host::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K*, int threads, size_t shared) {
  *blocks = cuda_host::blocks_per_multiprocessor(threads, shared);
  return cudaSuccess;
}
template <class K>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, K*, const cudaLaunchConfig_t* config);

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches return their own
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_host {
dim3 cluster_size(const cudaLaunchConfig_t& config);
}

template <class K>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, K*, const cudaLaunchConfig_t* config) {
  const dim3 block = config->blockDim, cluster = cuda_host::cluster_size(*config);
  int multiprocessors;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  const int blocks = cuda_host::blocks_per_multiprocessor(block.x * block.y * block.z, config->dynamicSmemBytes);
  *clusters = blocks * multiprocessors / int(cluster.x * cluster.y * cluster.z);
  return cudaSuccess;
}
