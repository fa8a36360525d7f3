// What every .cu shares: launches and calls that throw, memory in stream order, dispatch over dtypes.
// Kernels keep to a small part of CUDA, which tests/helpers/cuda_on_cpu can run without a GPU: no float atomics, no contraction.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../floats.h"
#include "../kernels.h"

namespace moekern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;           // every lane of a warp
constexpr size_t kSharedUnasked = 48 * 1024;     // bytes of shared memory a block has without asking for more
constexpr int64_t kMostBlocks = (1ll << 31) - 1;  // of a grid's first dimension

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that torch does not find it again
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A grid of n blocks by y.
inline dim3 blocks(int64_t n, int64_t y = 1) {
  if (n > kMostBlocks || y > 65535) throw std::runtime_error("CUDA: too many blocks: " + std::to_string(std::max(n, y)));
  return dim3(static_cast<unsigned>(n), static_cast<unsigned>(y));
}

// Starts kernel(args...) on the stream; nothing for an empty grid. `shared` is the bytes of dynamic_shared.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int block, size_t shared, cudaStream_t stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared > kSharedUnasked)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "shared memory of a block");
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "launch");
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char moekern_shared[];
  return reinterpret_cast<T*>(moekern_shared);
}

cudaMemPool_t pool();  // the current device's, for scratch memory

// n elements until the end of the scope, in the stream's order: no wait, and a CUDA graph may record it.
template <class T>
class Scratch {
 public:
  Scratch(int64_t n, cudaStream_t stream) : stream_(stream) {
    if (n > 0) {
      void* data = nullptr;
      check(cudaMallocFromPoolAsync(&data, n * sizeof(T), pool(), stream), "scratch memory");
      data_ = static_cast<T*>(data);
      bytes_ = n * sizeof(T);
    }
  }
  ~Scratch() {
    if (data_) cudaFreeAsync(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator T*() const { return data_; }
  void fill(int byte) const {
    if (data_) check(cudaMemsetAsync(data_, byte, bytes_, stream_), "fill");
  }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
  cudaStream_t stream_;
};

// Calls f with a typed pointer to the first element, null where values are null.
template <class F>
void with_floats(const Typed& values, const F& f) {
  if (values.dtype == Dtype::bf16) return f(static_cast<const bfloat16*>(values.data));
  if (values.dtype == Dtype::f16) return f(static_cast<const float16*>(values.data));
  f(static_cast<const float*>(values.data));
}

template <class F>
void with_ints(const Typed& values, const F& f) {
  if (values.dtype == Dtype::i64) return f(static_cast<const int64_t*>(values.data));
  f(static_cast<const int32_t*>(values.data));
}

// For small arrays, where a kernel of its own for each dtype is not worth its code.
__device__ inline float float_at(const Typed& values, int64_t i) {
  if (values.dtype == Dtype::bf16) return load(static_cast<const bfloat16*>(values.data)[i]);
  if (values.dtype == Dtype::f16) return load(static_cast<const float16*>(values.data)[i]);
  return static_cast<const float*>(values.data)[i];
}

// The expert of a slot; -1 for an empty one.
__device__ inline int expert_at(const Typed& idx, int64_t slot, int64_t E) {
  const int64_t id = idx.dtype == Dtype::i64 ? static_cast<const int64_t*>(idx.data)[slot]
                                             : static_cast<const int32_t*>(idx.data)[slot];
  return id >= 0 && id < E ? static_cast<int>(id) : -1;
}

// kN elements at once: one load of up to 16 bytes, whose address is a multiple of its size.
template <class T, int kN>
struct alignas(sizeof(T) * kN) Vector {
  T at[kN];
};

template <int kN, class T>
__device__ inline Vector<T, kN> read(const T* from) {
  return *reinterpret_cast<const Vector<T, kN>*>(from);
}

inline bool aligned(const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// Over the lanes of a warp, in a fixed order; every lane has the result.
__device__ inline float sum_of_warp(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}
__device__ inline double sum_of_warp(double v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}
__device__ inline int sum_of_warp(int v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}

}  // namespace moekern::cuda
