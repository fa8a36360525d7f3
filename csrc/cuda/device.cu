#include <cuda_runtime.h>

#include "../kernels.h"

namespace moekern::cuda {
namespace {

__global__ void probe() {}

}  // namespace

std::string architectures() { return MOEKERN_CUDA_ARCHITECTURES; }

int device_count() {
  int visible = 0, usable = 0, current = 0;
  if (cudaGetDeviceCount(&visible) != cudaSuccess || cudaGetDevice(&current) != cudaSuccess) return 0;
  for (int device = 0; device < visible; ++device) {
    cudaFuncAttributes attributes;
    const bool runs = cudaSetDevice(device) == cudaSuccess && cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
    if (runs) ++usable;
  }
  cudaSetDevice(current);
  cudaGetLastError();  // a device without code for it leaves an error behind
  return usable;
}

}  // namespace moekern::cuda
