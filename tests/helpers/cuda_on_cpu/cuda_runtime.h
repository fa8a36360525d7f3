// Stands in for CUDA's header, so that g++ compiles the .cu files and a CPU runs them: what the kernels use of it, no more.
// Threads of a block are fibers of one system thread that switch where CUDA's threads meet; see fibers.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // blocks follow one another in one thread; at block scope this is also static

using cuda_on_cpu::dim3;
inline cuda_on_cpu::Index& threadIdx = cuda_on_cpu::thread_index;
inline cuda_on_cpu::Index& blockIdx = cuda_on_cpu::block_index;
inline dim3& blockDim = cuda_on_cpu::block_size;
inline dim3& gridDim = cuda_on_cpu::grid_size;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
enum { cudaMemAllocationTypePinned, cudaMemLocationTypeDevice };
using cudaStream_t = struct Stream*;
using cudaMemPool_t = struct Pool*;
struct cudaMemPoolProps {
  int allocType;
  struct {
    int type, id;
  } location;
};
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidValue : cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return cudaSuccess; }
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return *pool = nullptr, cudaSuccess; }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
inline cudaError_t cudaMallocFromPoolAsync(void** data, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return *data = cuda_on_cpu::allocate((bytes + 15) / 16 * 16, true), cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) { return cuda_on_cpu::release(data), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int byte, size_t n, cudaStream_t) {
  return std::memset(data, byte, n), cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::shared_asked[kernel] = bytes;
  return bytes <= cuda_on_cpu::kMostShared ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const auto asked = cuda_on_cpu::shared_asked.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = asked == cuda_on_cpu::shared_asked.end() ? 48 * 1024 : asked->second;
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  if (config->dynamicSmemBytes > allowed || block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidValue;
  cuda_on_cpu::run(grid, block, config->dynamicSmemBytes, [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::meet_block(line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(mask, 0, cuda_on_cpu::kBallot, line);
}
inline void __threadfence() {}

template <class T>
T from_lane(unsigned mask, T value, int lane, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::exchange(mask, bits, lane & 31, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, int line = __builtin_LINE()) {
  const int own = cuda_on_cpu::lane();
  return from_lane(mask, v, own / width * width + lane % width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int step, int width = 32, int line = __builtin_LINE()) {
  const int own = cuda_on_cpu::lane(), from = own ^ step;
  return from_lane(mask, v, from / width <= own / width ? from : own, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int step, int width = 32, int line = __builtin_LINE()) {
  const int own = cuda_on_cpu::lane();
  return from_lane(mask, v, own % width >= step ? own - step : own, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int step, int width = 32, int line = __builtin_LINE()) {
  const int own = cuda_on_cpu::lane();
  return from_lane(mask, v, own % width + step < width ? own + step : own, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return static_cast<unsigned>(cuda_on_cpu::exchange(mask, vote != 0, cuda_on_cpu::kBallot, line));
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) == mask;
}

// No other fiber runs between the two accesses.
template <class T, class V>
T atomicAdd(T* at, V v) {
  const T old = *at;
  *at = static_cast<T>(old + v);
  return old;
}
template <class T, class V>
T atomicMax(T* at, V v) {
  const T old = *at;
  *at = std::max(old, static_cast<T>(v));
  return old;
}
template <class T, class V>
T atomicOr(T* at, V v) {
  const T old = *at;
  *at = old | static_cast<T>(v);
  return old;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <class T>
T __ldg(const T* at) {
  return *at;
}
using std::max;
using std::min;
