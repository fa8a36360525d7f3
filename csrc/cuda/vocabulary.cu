// Which token ids reached which expert, one bit each, and how many bits one or two experts have.
#include "block.h"
#include "launch.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPairs = 32;  // experts a side of a tile of pairs; 4 pairs a thread
constexpr int kWords = 32;  // words of each expert in shared memory

__device__ int64_t int_at(const Typed& values, int64_t i) {
  if (values.dtype == Dtype::i64) return static_cast<const int64_t*>(values.data)[i];
  return static_cast<const int32_t*>(values.data)[i];
}

// Ids that have no bit are passed over: nothing here may wait for the device to tell of them.
__global__ void set_bits(Vocabulary args) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= args.T * args.K) return;
  const int64_t t = slot / args.K;
  if (args.mask && !args.mask[t]) return;
  const int64_t id = int_at(args.token_ids, t), e = expert_at(args.idx, slot, args.E);
  if (id < 0 || id >= 64 * args.W || e < 0) return;
  uint64_t* word = args.bits + e * args.W + id / 64;
  const uint64_t bit = uint64_t{1} << id % 64;
  // Most bits of frequent ids are set long since. A word read too early costs one atomic more, never a bit.
  if (!(*word & bit)) atomicOr(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(bit));
}

__global__ void count_each(const uint64_t* bits, int64_t W, int64_t* count) {
  const uint64_t* row = bits + blockIdx.x * W;
  int64_t ones = 0;
  for (int64_t w = threadIdx.x; w < W; w += kThreads) ones += __popcll(row[w]);
  ones = block_sum<kThreads>(ones);
  if (threadIdx.x == 0) count[blockIdx.x] = ones;
}

__global__ void count_pairs(const uint64_t* bits, int64_t E, int64_t W, int64_t* count) {
  constexpr int kHalf = kPairs / 2;
  __shared__ uint64_t a[kPairs][kWords + 1], b[kPairs][kWords + 1];
  if (blockIdx.x < blockIdx.y) return;  // the other triangle
  const int64_t first_a = int64_t{blockIdx.y} * kPairs, first_b = int64_t{blockIdx.x} * kPairs;
  const int row = threadIdx.x / kHalf, column = threadIdx.x % kHalf;
  int64_t ones[2][2] = {};
  for (int64_t w = 0; w < W; w += kWords) {
    __syncthreads();
    for (int n = threadIdx.x; n < kPairs * kWords; n += kThreads) {
      const int r = n / kWords, i = n % kWords;
      a[r][i] = first_a + r < E && w + i < W ? bits[(first_a + r) * W + w + i] : 0;
      b[r][i] = first_b + r < E && w + i < W ? bits[(first_b + r) * W + w + i] : 0;
    }
    __syncthreads();
    for (int i = 0; i < kWords; ++i)
      for (int r = 0; r < 2; ++r)
        for (int c = 0; c < 2; ++c) ones[r][c] += __popcll(a[row + r * kHalf][i] & b[column + c * kHalf][i]);
  }
  for (int r = 0; r < 2; ++r)
    for (int c = 0; c < 2; ++c) {
      const int64_t i = first_a + row + r * kHalf, j = first_b + column + c * kHalf;
      if (i <= j && j < E) count[i * E + j] = count[j * E + i] = ones[r][c];
    }
}

}  // namespace

void vocabulary(const Vocabulary& args, void* stream) {
  launch(set_bits, blocks(parts(args.T * args.K, kThreads)), kThreads, 0, static_cast<cudaStream_t>(stream), args);
}

void popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, void* stream) {
  launch(count_each, blocks(E), kThreads, 0, static_cast<cudaStream_t>(stream), bits, W, count);
}

void pair_popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, void* stream) {
  const int64_t sides = parts(E, kPairs);
  launch(count_pairs, blocks(sides, sides), kThreads, 0, static_cast<cudaStream_t>(stream), bits, E, W, count);
}

}  // namespace moekern::cuda
