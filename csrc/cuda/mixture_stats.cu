#include "../mixture.h"
#include "block.h"
#include "grouped.h"
#include "launch.h"
#include "slots.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = kThreads;  // of a token's rows that lie in shared memory at a time
constexpr int kMostSlots = kWarp;
constexpr int kMostSums = kMostSlots + kMostSlots * (kMostSlots + 1) / 2;

template <class T>
struct Mixture {
  const T* y;
  Typed weight, share;
  const int64_t* row_of;  // [T, K], -1: empty, or of a token that does not count
  float *square, *dots;   // [T, K] and [T, K, K], either may be null
  double *rest, *total;   // [T, K] 1 - w and [T] sum of the shares
  int64_t H;
  int K;
};

struct Experts {
  Typed idx;
  const int64_t *order, *offsets;
  const bool* mask;
  const float *square, *dots;
  const double *rest, *total;
  int64_t N, slots, E;
  int K;
};

// Sums of a token: of slot k's squared distance, then of the products of slots i <= j.
__device__ inline int sums_of(int K, bool apart, bool dots) { return (apart ? K : 0) + (dots ? K * (K + 1) / 2 : 0); }

// A block for each token. Its rows' columns times their gates lie in shared memory while warps take a sum each.
template <class T>
__global__ void __launch_bounds__(kThreads) mixture_kernel(Mixture<T> a) {
  __shared__ float sums[kMostSums], w[kMostSlots], mixture[kColumns];
  __shared__ unsigned char first[kMostSums], second[kMostSums];
  float* block = dynamic_shared<float>();  // [K, kColumns]
  const int64_t t = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, thread = threadIdx.x;
  const int of_slots = a.square ? a.K : 0, count = sums_of(a.K, a.square, a.dots);
  for (int i = thread; i < count; i += kThreads) sums[i] = 0;
  if (thread == 0) {
    double total = 0;
    for (int k = 0; k < a.K; ++k)
      if (a.row_of[t * a.K + k] >= 0) total += float_at(a.share, t * a.K + k);
    a.total[t] = total;
    for (int k = 0; k < a.K; ++k) {
      const int64_t slot = t * a.K + k;
      const double part = a.row_of[slot] >= 0 ? part_of(float_at(a.share, slot), total) : 0.0;
      w[k] = static_cast<float>(part);
      a.rest[slot] = rest_of(part);
    }
    for (int i = 0, at = of_slots; a.dots && i < a.K; ++i)
      for (int j = i; j < a.K; ++j, ++at) {
        first[at] = static_cast<unsigned char>(i);
        second[at] = static_cast<unsigned char>(j);
      }
  }
  for (int64_t start = 0; start < a.H; start += kColumns) {
    __syncthreads();
    const int64_t column = start + thread;
    float sum = 0;
    for (int k = 0; k < a.K; ++k) {
      const int64_t row = a.row_of[t * a.K + k];
      const float v = row >= 0 && column < a.H ? load(a.y[row * a.H + column]) : 0.0f;
      const float p = row >= 0 ? float_at(a.weight, t * a.K + k) * v : 0.0f;
      block[k * kColumns + thread] = p;
      sum += p;
    }
    mixture[thread] = sum;
    __syncthreads();
    for (int i = warp; i < count; i += kWarps) {
      float mine = 0;
      for (int c = lane; c < kColumns; c += kWarp) {
        if (i < of_slots) {
          const float apart = block[i * kColumns + c] - w[i] * mixture[c];
          mine += apart * apart;
        } else {
          mine += block[first[i] * kColumns + c] * block[second[i] * kColumns + c];
        }
      }
      mine = sum_of_warp(mine);
      if (lane == 0) sums[i] += mine;
    }
  }
  __syncthreads();
  for (int i = thread; i < count; i += kThreads) {
    if (i < of_slots) {
      a.square[t * a.K + i] = sums[i];
    } else {
      const int64_t k = first[i], j = second[i];
      a.dots[(t * a.K + k) * a.K + j] = a.dots[(t * a.K + j) * a.K + k] = sums[i];
    }
  }
}

struct Distances {
  double norm, square, left, left_square;
};

// A block for each expert: a thread adds rows that lie 256 apart, in order.
__global__ void __launch_bounds__(kThreads) distances_kernel(Experts a, MixtureStats to) {
  const int64_t e = blockIdx.x;
  const Range range = rows_of(a.offsets, e, a.N);
  Distances mine = {};
  for (int64_t row = range.first + threadIdx.x; row < range.stop; row += kThreads) {
    const int64_t slot = counted_slot(a, row);
    if (slot < 0) continue;
    const double square = a.square[slot], rest = a.rest[slot];
    mine.norm += sqrt(square);
    mine.square += square;
    mine.left += sqrt(square) / rest;
    mine.left_square += square / (rest * rest);
  }
  const Distances all = block_reduce<kThreads>(mine, [](const Distances& a, const Distances& b) {
    return Distances{a.norm + b.norm, a.square + b.square, a.left + b.left, a.left_square + b.left_square};
  });
  if (threadIdx.x > 0) return;
  to.norm_sum[e] += all.norm;
  to.square_sum[e] += all.square;
  to.left_norm_sum[e] += all.left;
  to.left_square_sum[e] += all.left_square;
}

// A block for each expert: the products of its rows with the other slots of their tokens. A warp takes a row at a time,
// in order, and adds to a table of its own; experts of lower numbers are the mirror's.
__global__ void __launch_bounds__(kThreads) contributions_kernel(Experts a, double* gram) {
  double* tables = dynamic_shared<double>();  // [warps, E]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t e = blockIdx.x;
  for (int64_t i = threadIdx.x; i < kWarps * a.E; i += kThreads) tables[i] = 0;
  __syncthreads();
  const Range range = rows_of(a.offsets, e, a.N);
  double* own = tables + warp * a.E;
  for (int64_t row = range.first + warp; row < range.stop; row += kWarps) {
    const int64_t slot = counted_slot(a, row);
    if (slot < 0) continue;
    const int64_t other = slot / a.K * a.K + lane;
    int expert = lane < a.K ? expert_at(a.idx, other, a.E) : -1;
    if (expert < e || (expert == e && other != slot)) expert = -1;  // equal ids make no pair
    const double product = expert >= 0 ? a.dots[slot * a.K + lane] : 0.0;
    in_turns(expert, a.K, lane, [&] { own[expert] += product; });
  }
  __syncthreads();
  for (int64_t j = e + threadIdx.x; j < a.E; j += kThreads) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += tables[w * a.E + j];
    gram[e * a.E + j] += sum;
    if (j > e) gram[j * a.E + e] += sum;
  }
}

// One block adds the tokens' sums of shares, and their squares.
__global__ void __launch_bounds__(kThreads) shares_kernel(const double* total, const bool* mask, int64_t T, double* sum,
                                                         double* square_sum) {
  double mine = 0, squares = 0;
  for (int64_t t = threadIdx.x; t < T; t += kThreads)
    if (!mask || mask[t]) {
      mine += total[t];
      squares += total[t] * total[t];
    }
  mine = block_sum<kThreads>(mine);
  squares = block_sum<kThreads>(squares);
  if (threadIdx.x > 0) return;
  *sum += mine;
  *square_sum += squares;
}

template <class T>
void run_all(const MixtureStats& args, const T* y, cudaStream_t stream) {
  const int64_t slots = args.T * args.K;
  const int K = static_cast<int>(args.K);
  const Scratch<int64_t> row_of(slots, stream);
  const Scratch<float> square(args.norm_sum ? slots : 0, stream), dots(args.gram ? slots * args.K : 0, stream);
  const Scratch<double> rest(slots, stream), total(args.T, stream);
  row_of.fill(0xFF);
  launch(row_of_kernel<kThreads>, blocks(parts(args.N, kThreads)), kThreads, 0, stream, args.order, args.offsets,
         args.mask, args.E, args.N, slots, args.K, row_of);
  const Mixture<T> a{y, args.weight, args.share, row_of, square, dots, rest, total, args.H, K};
  launch(mixture_kernel<T>, blocks(args.T), kThreads, K * kColumns * sizeof(float), stream, a);
  const Experts e{args.idx, args.order, args.offsets, args.mask, square, dots, rest, total, args.N, slots, args.E, K};
  if (args.norm_sum) {
    launch(distances_kernel, blocks(args.E), kThreads, 0, stream, e, args);
    launch(shares_kernel, blocks(1), kThreads, 0, stream, total, args.mask, args.T, args.share_sum,
           args.share_square_sum);
  }
  if (args.gram)
    launch(contributions_kernel, blocks(args.E), kThreads, kWarps * args.E * sizeof(double), stream, e, args.gram);
}

}  // namespace

void mixture_stats(const MixtureStats& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (args.K > kWarp) throw ArgumentError("topk_idx", "expected at most " + std::to_string(kWarp) + " slots on a GPU");
  if (args.T == 0 || args.K == 0) return;
  with_floats(args.y, [&](const auto* y) { run_all(args, y, stream); });
}

}  // namespace moekern::cuda
