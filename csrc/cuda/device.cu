#include <map>
#include <mutex>

#include "launch.h"

namespace moekern::cuda {
namespace {

constexpr uint64_t kKept = 64 << 20;  // bytes of scratch memory that stay with a pool when the device is idle

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

// A pool of our own: the default one gives its memory back whenever the device is idle, and its settings are the program's.
cudaMemPool_t pool() {
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = pools.find(device);
  if (found != pools.end()) return found->second;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t made;
  check(cudaMemPoolCreate(&made, &properties), "memory pool");
  uint64_t kept = kKept;
  check(cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &kept), "memory pool");
  pools.emplace(device, made);
  return made;
}

}  // namespace moekern::cuda
