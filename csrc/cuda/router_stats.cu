#include "../scores.h"
#include "router_stats.h"
#include "rows.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokens = 128;  // of a block, whose scores are added in float32
constexpr int kRun = 4;       // neighbouring columns of a lane
constexpr int kWidest = 32;   // columns a lane can have

struct Logits {
  Typed logits, idx;
  const bool* mask;
  int64_t T;
  int E, K;
  bool runs;  // every kRun columns may be read at once
};

// Column of a lane's n-th logit: lanes have kRun neighbours, then the next 32 x kRun follow.
__device__ inline int column_of(int n, int lane) { return (n / kRun * kWarp + lane) * kRun + n % kRun; }

template <int kEach, class T>
__device__ void read_row_as(const T* row, int E, bool runs, int lane, float* logit) {
  for (int n = 0; n < kEach; n += kRun) {
    const int column = column_of(n, lane);
    if (runs && column < E) {
      const Vector<T, kRun> run = read<kRun>(row + column);
      for (int j = 0; j < kRun; ++j) logit[n + j] = load(run.at[j]);
    } else {
      for (int j = 0; j < kRun; ++j) logit[n + j] = column + j < E ? load(row[column + j]) : kNone;
    }
  }
}

// A lane's logits of a row, -inf from E on.
template <int kEach>
__device__ void read_row(const Logits& a, int64_t t, int lane, float* logit) {
  if (a.logits.dtype == Dtype::f32)
    read_row_as<kEach>(static_cast<const float*>(a.logits.data) + t * a.E, a.E, a.runs, lane, logit);
  else if (a.logits.dtype == Dtype::bf16)
    read_row_as<kEach>(static_cast<const bfloat16*>(a.logits.data) + t * a.E, a.E, a.runs, lane, logit);
  else
    read_row_as<kEach>(static_cast<const float16*>(a.logits.data) + t * a.E, a.E, a.runs, lane, logit);
}

__device__ inline float max_of_warp(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v = larger(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

__device__ inline float min_of_warp(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAll, v, step);
    v = other < v ? other : v;
  }
  return v;
}

struct Boundary {
  float kth, next;  // the k-th and the (k+1)-th largest logit; NaN where there are none
};

// From the largest value down, a value a round: for rows whose chosen slots are not simply the largest.
template <int kEach>
__device__ Boundary search(const float* logit, int E, int K, int lane) {
  Boundary found{NAN, NAN};
  float bound = INFINITY;
  for (int taken = 0; taken <= K;) {
    float most = kNone;
    int own = 0;
    for (int n = 0; n < kEach; ++n)
      if (taken == 0 || logit[n] < bound) most = larger(most, logit[n]);
    most = max_of_warp(most);
    for (int n = 0; n < kEach; ++n) own += column_of(n, lane) < E && logit[n] == most && (taken == 0 || most < bound);
    const int count = sum_of_warp(own);
    if (count == 0) return found;
    if (taken < K && taken + count >= K) found.kth = most;
    if (taken + count > K) found.next = most;
    taken += count;
    bound = most;
  }
  return found;
}

template <int kEach>
__device__ Boundary boundary_of(const Logits& a, const float* logit, int64_t t, int lane) {
  float least = INFINITY;
  bool all = true;
  for (int k = lane; k < a.K; k += kWarp) {
    const int e = expert_at(a.idx, t * a.K + k, a.E);
    all = all && e >= 0;
    const float x = float_at(a.logits, t * a.E + (e >= 0 ? e : 0));
    least = x < least ? x : least;
  }
  least = min_of_warp(least);
  all = __all_sync(kAll, all);
  // If exactly K logits reach the least chosen one, these are the K largest and the rest's maximum comes next.
  int own = 0;
  float below = kNone;
  for (int n = 0; n < kEach; ++n) {
    own += logit[n] >= least;
    below = larger(below, logit[n] < least ? logit[n] : kNone);
  }
  if (sum_of_warp(own) == a.K && all && least > kNone) return {least, max_of_warp(below)};
  return search<kEach>(logit, a.E, a.K, lane);
}

struct Measured {
  double entropy, margin;
};

// A warp's token; its scores join the lane's sums.
template <class S, int kEach>
__device__ void measure(const Logits& a, int64_t t, int lane, float* score_sum, Measured& measured) {
  float logit[kEach], score[kEach];
  read_row<kEach>(a, t, lane, logit);
  float top = 0.0f;
  if (S::kDivide) {
    top = kNone;
    for (int n = 0; n < kEach; ++n) top = larger(top, logit[n]);
    top = max_of_warp(top);
  }
  float total = 0, weighted = 0;
  for (int n = 0; n < kEach; ++n) {
    const Scored scored = S::of(logit[n] - top);
    score[n] = scored.score;
    total += scored.score;
    weighted += scored.score * scored.log;
  }
  total = sum_of_warp(total);
  weighted = sum_of_warp(weighted);
  const float scale = S::kDivide ? 1.0f / total : 1.0f;
  for (int n = 0; n < kEach; ++n) score_sum[n] += score[n] * scale;
  // With p = s / sum: -sum of p ln p = ln sum - (sum of s ln s) / sum.
  measured.entropy += static_cast<double>(logarithm(total)) - static_cast<double>(weighted) / total;
  if (a.K == 0 || a.K >= a.E) return;
  const Boundary b = boundary_of<kEach>(a, logit, t, lane);
  measured.margin += static_cast<double>(S::of(b.kth - top).score * scale) - S::of(b.next - top).score * scale;
}

// A warp takes every eighth token of its block and keeps its columns' sums in registers; the warps' sums are then added
// in order: scores [blocks, E], entropies and margins [blocks].
template <class S, int kEach>
__global__ void __launch_bounds__(kThreads) scores_kernel(Logits a, float* scores, double* entropies, double* margins) {
  __shared__ Measured of_warp[kWarps];
  float* sums = dynamic_shared<float>();  // [warps, E]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = int64_t{blockIdx.x} * kTokens, stop = min(first + kTokens, a.T);
  float score_sum[kEach] = {};
  Measured measured = {};
  for (int64_t t = first + warp; t < stop; t += kWarps)
    if (!a.mask || a.mask[t]) measure<S, kEach>(a, t, lane, score_sum, measured);
  for (int n = 0; n < kEach; ++n)
    if (column_of(n, lane) < a.E) sums[warp * a.E + column_of(n, lane)] = score_sum[n];
  if (lane == 0) of_warp[warp] = measured;
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * a.E + e];
    scores[int64_t{blockIdx.x} * a.E + e] = sum;
  }
  if (threadIdx.x > 0) return;
  Measured all = {};
  for (int w = 0; w < kWarps; ++w) {
    all.entropy += of_warp[w].entropy;
    all.margin += of_warp[w].margin;
  }
  entropies[blockIdx.x] = all.entropy;
  margins[blockIdx.x] = all.margin;
}

template <class S, int kEach>
void launch_scores(const RouterStats& args, cudaStream_t stream) {
  const int64_t n = parts(args.T, kTokens);
  const int size = args.logits.dtype == Dtype::f32 ? 4 : 2, E = static_cast<int>(args.E);
  const bool runs = E % kRun == 0 && aligned(args.logits.data, kRun * size);
  const Logits a{args.logits, args.idx, args.mask, args.T, E, static_cast<int>(args.K), runs};
  const Scratch<float> scores(n * E, stream);
  const Scratch<double> entropies(n, stream), margins(n, stream);
  launch(scores_kernel<S, kEach>, blocks(n), kThreads, kWarps * E * sizeof(float), stream, a, scores, entropies, margins);
  add_rows<float>(scores, n, E, args.score_sum, stream);
  add_rows<double>(entropies, n, 1, args.entropy_sum, stream);
  add_rows<double>(margins, n, 1, args.margin_sum, stream);
}

template <class S>
void launch_width(const RouterStats& args, cudaStream_t stream) {
  if (args.E <= 4 * kWarp) return launch_scores<S, 4>(args, stream);
  if (args.E <= 8 * kWarp) return launch_scores<S, 8>(args, stream);
  if (args.E <= 16 * kWarp) return launch_scores<S, 16>(args, stream);
  launch_scores<S, kWidest>(args, stream);
}

}  // namespace

void add_scores(const RouterStats& args, cudaStream_t stream) {
  switch (args.score) {
    case Score::softmax: return launch_width<Softmax>(args, stream);
    case Score::sigmoid: return launch_width<Sigmoid>(args, stream);
    case Score::sqrtsoftplus: return launch_width<SqrtSoftplus>(args, stream);
    case Score::identity: return launch_width<Identity>(args, stream);
  }
}

void router_stats(const RouterStats& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int64_t widest = kWidest * kWarp;
  if (args.E > widest) throw ArgumentError("count", "expected at most " + std::to_string(widest) + " experts on a GPU");
  if (args.K > kWarp) throw ArgumentError("topk_idx", "expected at most " + std::to_string(kWarp) + " slots on a GPU");
  if (args.T == 0) return;
  add_slots(args, stream);
  if (!args.logits.data) return;
  add_scores(args, stream);
  if (args.logit_gram) add_logit_gram(args, stream);
}

}  // namespace moekern::cuda
