// What the library of CUDA kernels tells of itself, to whoever opens it with ctypes. On the host it has
// nothing to tell.
#if !defined(CUDA_ON_HOST)
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

__global__ void __launch_bounds__(1) nothing() {}

}  // namespace

// The compute capabilities that it was compiled for, 800 for 8.0, in ascending order, and a 0.
EXPORT const int pykernels_cuda_architectures[] = {
#if defined(__CUDA_ARCH_LIST__)
    __CUDA_ARCH_LIST__,
#endif
    0};

// Why no kernel of it can run on a GPU (code for others only, a driver older than the runtime), or nullptr.
EXPORT const char* pykernels_cuda_missing(int device) {
  int previous;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, nothing);
    cudaSetDevice(previous);
  }
  cudaGetLastError();  // or it would be reported by the next launch
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
