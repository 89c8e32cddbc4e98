// The device that launches go to, and what it refuses.

#include <map>
#include <mutex>
#include <utility>

#include "scheduler.h"

namespace cuda_host {
namespace {

constexpr size_t K = 1024;

// An H100, but for the number of its multiprocessors.
struct Device {
  unsigned multiprocessors = 8;
  unsigned major = 9, minor = 0;
  unsigned threads_per_block = 1024, threads_per_multiprocessor = 2048, blocks_per_multiprocessor = 32;
  size_t shared_by_default = 48 * K, shared_per_block = 227 * K;
  size_t shared_per_multiprocessor = 228 * K, shared_reserved = 1 * K;  // reserved by the system, of each block
  unsigned portable_cluster = 8, largest_cluster = 16;
} device;

std::mutex mutex;  // one launch at a time
std::map<std::pair<const void*, cudaFuncAttribute>, int> attributes;

int attribute(const void* kernel, cudaFuncAttribute which, int otherwise) {
  const auto found = attributes.find({kernel, which});
  return found == attributes.end() ? otherwise : found->second;
}

uint64_t volume(dim3 size) { return uint64_t(size.x) * size.y * size.z; }

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && (value < 0 || size_t(value) > device.shared_per_block))
    return cudaErrorInvalidValue;
  attributes[{kernel, which}] = value;
  return cudaSuccess;
}

int blocks_per_multiprocessor(unsigned threads, size_t shared) {
  if (threads == 0 || threads > device.threads_per_block || shared > device.shared_per_block) return 0;
  const unsigned warps = (threads + 31) / 32;
  return std::min<size_t>({device.blocks_per_multiprocessor, device.threads_per_multiprocessor / (32 * warps),
                           device.shared_per_multiprocessor / (shared + device.shared_reserved)});
}

dim3 cluster_size(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto size = config.attrs[i].val.clusterDim;
      return {size.x, size.y, size.z};
    }
  return {};
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  const std::lock_guard lock(mutex);
  Grid grid;
  grid.size = config.gridDim;
  grid.block_size = config.blockDim;
  grid.cluster_size = cluster_size(config);
  grid.shared_bytes = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) grid.cooperative = config.attrs[i].val.cooperative;

  const uint64_t threads = volume(grid.block_size), cluster = volume(grid.cluster_size), blocks = volume(grid.size);
  if (blocks == 0 || grid.size.x > INT_MAX || grid.size.y > 65535 || grid.size.z > 65535 || threads == 0 ||
      threads > device.threads_per_block || grid.block_size.z > 64)
    return cudaErrorInvalidConfiguration;
  const size_t allowed =
      attribute(kernel.address, cudaFuncAttributeMaxDynamicSharedMemorySize, int(device.shared_by_default));
  if (grid.shared_bytes > std::max(allowed, device.shared_by_default)) return cudaErrorInvalidValue;
  const bool large = attribute(kernel.address, cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
  if (cluster == 0 || cluster > (large ? device.largest_cluster : device.portable_cluster) ||
      grid.size.x % grid.cluster_size.x || grid.size.y % grid.cluster_size.y || grid.size.z % grid.cluster_size.z)
    return cudaErrorInvalidClusterSize;
  const uint64_t resident = uint64_t(device.multiprocessors) * blocks_per_multiprocessor(threads, grid.shared_bytes);
  if (grid.cooperative && blocks > resident) return cudaErrorCooperativeLaunchTooLarge;
  run(grid, kernel);
  return cudaSuccess;
}

}  // namespace cuda_host

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  using cuda_host::device;
  if (index != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = device.threads_per_block; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device.threads_per_multiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = device.shared_by_default; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_per_multiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = device.shared_reserved; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrClusterLaunch: *value = device.major >= 9; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorInvalidClusterSize: return "cluster configuration is not valid";
  }
  return "unknown error";
}

// For the tests, by ctypes: "forward", "reverse" or "random:<seed>"; 0 if there is no such order.
extern "C" __attribute__((visibility("default"))) int cuda_host_order(const char* order) {
  return cuda_host::set_order(order);
}
// ... and the device's number of multiprocessors and its compute capability (90: 9.0).
extern "C" __attribute__((visibility("default"))) void cuda_host_device(unsigned multiprocessors, unsigned capability) {
  cuda_host::device.multiprocessors = multiprocessors;
  cuda_host::device.major = capability / 10;
  cuda_host::device.minor = capability % 10;
}
