#include "router_stats.h"
#include "rows.h"
#include "slots.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kBlocks = 1024;  // at most; a number of the device's own would change the order of the sums
constexpr int64_t kLeast = 64;     // tokens that are worth a block

struct Slots {
  Typed idx, weight;
  const bool* mask;
  int64_t T, each;  // each: tokens of a block
  int E, K;
};

// Totals that whole numbers join in any order.
struct Whole {
  unsigned long long *tokens, *logit_tokens, *top1_count;
  unsigned *pairs;  // [E, E], filled where row <= column; the diagonal is the count
};

// What a warp knows of its token: a slot a lane.
struct Token {
  int expert = -1;
  float gate = 0;
};

__device__ inline Token read_token(const Slots& a, int64_t t, int64_t stop, int lane) {
  Token token;
  if (t >= stop || lane >= a.K || (a.mask && !a.mask[t])) return token;
  token.expert = expert_at(a.idx, t * a.K + lane, a.E);
  token.gate = float_at(a.weight, t * a.K + lane);
  return token;
}

__device__ inline void count_pairs(const Token& token, const Slots& a, int lane, unsigned* pairs) {
  for (int k = 1; k < a.K; ++k) {
    const int other = __shfl_sync(kAll, token.expert, k);
    if (lane >= k || token.expert < 0 || other < 0 || other == token.expert) continue;
    atomicAdd(&pairs[min(token.expert, other) * a.E + max(token.expert, other)], 1u);
  }
}

// The expert of the largest gate, of equal ones the lowest slot's; -1 for a token without slots. Valid in lane 0.
__device__ inline int top_expert(Token token, int lane) {
  int slot = token.expert >= 0 ? lane : kWarp;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const int slot_there = __shfl_down_sync(kAll, slot, step), expert_there = __shfl_down_sync(kAll, token.expert, step);
    const float gate_there = __shfl_down_sync(kAll, token.gate, step);
    const bool better = gate_there > token.gate || (gate_there == token.gate && slot_there < slot);
    if (slot_there == kWarp || (slot < kWarp && !better)) continue;
    slot = slot_there;
    token = {expert_there, gate_there};
  }
  return token.expert;
}

// Every warp adds the gates of its tokens, in order, to a table of its own: no two lanes touch one expert at once.
__global__ void __launch_bounds__(kThreads) slots_kernel(Slots a, Whole whole, double* gates, double* squares) {
  double* tables = dynamic_shared<double>();  // [warps, E] gate sums, [warps, E] sums of squares
  int* counts = reinterpret_cast<int*>(tables + 2 * kWarps * a.E);  // [E] slots, [E] largest gates
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < 2 * kWarps * a.E; i += kThreads) tables[i] = 0;
  for (int i = threadIdx.x; i < 2 * a.E; i += kThreads) counts[i] = 0;
  __syncthreads();

  double *gate_sum = tables + warp * a.E, *square_sum = gate_sum + kWarps * a.E;
  const int64_t first = blockIdx.x * a.each, stop = min(first + a.each, a.T);
  int tokens = 0;
  Token next = read_token(a, first + warp, stop, lane);
  for (int64_t t = first + warp; t < stop; t += kWarps) {
    const Token token = next;
    next = read_token(a, t + kWarps, stop, lane);
    tokens += !a.mask || a.mask[t];
    count_pairs(token, a, lane, whole.pairs);
    const int top = top_expert(token, lane);
    if (lane == 0 && top >= 0) atomicAdd(&counts[a.E + top], 1);
    if (token.expert >= 0) atomicAdd(&counts[token.expert], 1);
    in_turns(token.expert, a.K, lane, [&] {
      const double gate = token.gate;
      gate_sum[token.expert] += gate;
      square_sum[token.expert] += gate * gate;
    });
  }
  if (lane == 0 && tokens) {
    atomicAdd(whole.tokens, static_cast<unsigned long long>(tokens));
    if (whole.logit_tokens) atomicAdd(whole.logit_tokens, static_cast<unsigned long long>(tokens));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    double gate = 0, square = 0;
    for (int w = 0; w < kWarps; ++w) {
      gate += tables[w * a.E + e];
      square += tables[(kWarps + w) * a.E + e];
    }
    gates[int64_t{blockIdx.x} * a.E + e] = gate;
    squares[int64_t{blockIdx.x} * a.E + e] = square;
    if (counts[e]) atomicAdd(&whole.pairs[e * a.E + e], static_cast<unsigned>(counts[e]));
    if (counts[a.E + e]) atomicAdd(&whole.top1_count[e], static_cast<unsigned long long>(counts[a.E + e]));
  }
}

__global__ void mirror_kernel(const unsigned* pairs, int E, int64_t* count, int64_t* coactivation) {
  const int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (n >= int64_t{E} * E) return;
  const int i = static_cast<int>(n / E), j = static_cast<int>(n % E);
  const unsigned found = pairs[min(i, j) * E + max(i, j)];
  coactivation[n] += found;
  if (i == j) count[i] += found;
}

unsigned long long* counter(int64_t* at) { return reinterpret_cast<unsigned long long*>(at); }

}  // namespace

void add_slots(const RouterStats& args, cudaStream_t stream) {
  const int64_t each = std::max(kLeast, parts(args.T, kBlocks)), n = parts(args.T, each), E = args.E;
  const Scratch<unsigned> pairs(E * E, stream);
  const Scratch<double> gates(n * E, stream), squares(n * E, stream);
  pairs.fill(0);
  const Slots a{args.idx, args.weight, args.mask, args.T, each, static_cast<int>(E), static_cast<int>(args.K)};
  const Whole whole{counter(args.tokens), args.logits.data ? counter(args.logit_tokens) : nullptr,
                    counter(args.top1_count), pairs};
  const size_t shared = 2 * kWarps * E * sizeof(double) + 2 * E * sizeof(int);
  launch(slots_kernel, blocks(n), kThreads, shared, stream, a, whole, gates, squares);
  launch(mirror_kernel, blocks(parts(E * E, kThreads)), kThreads, 0, stream, pairs, static_cast<int>(E), args.count,
         args.coactivation);
  add_rows<double>(gates, n, E, args.gate_sum, stream);
  add_rows<double>(squares, n, E, args.gate_square_sum, stream);
}

}  // namespace moekern::cuda
