#include "launch.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Slots of one block: each of its warps has as many, one after the other. Few enough blocks that their counts, a row of
// E + 1 each, stay small beside the slots themselves.
int64_t slots_of_block(int64_t slots, int64_t bins) {
  const int64_t least = std::max<int64_t>(kThreads * 4, parts(bins * 8, kThreads) * kThreads);
  const int64_t few = parts(parts(slots, 1024), kThreads) * kThreads;
  return std::max(least, few);
}

// The bin of a slot: its expert, or E for one that is empty or whose token is not kept.
struct Slots {
  Typed idx;
  const bool* mask;
  int64_t n, K, E;

  __device__ int bin(int64_t slot) const {
    const int e = expert_at(idx, slot, E);
    return e < 0 || (mask && !mask[slot / K]) ? static_cast<int>(E) : e;
  }
};

// counts [bins, blocks]: how many slots of each bin a block has.
__global__ void count_kernel(Slots slots, int64_t per_block, int bins, int64_t* counts) {
  int* count = dynamic_shared<int>();
  for (int b = threadIdx.x; b < bins; b += kThreads) count[b] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * per_block, stop = min(first + per_block, slots.n);
  for (int64_t slot = first + threadIdx.x; slot < stop; slot += kThreads) atomicAdd(&count[slots.bin(slot)], 1);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kThreads) counts[int64_t{b} * gridDim.x + blockIdx.x] = count[b];
}

// A warp for each bin: its blocks' counts become what lies before them in the bin, and totals [bins].
__global__ void scan_blocks_kernel(int64_t* counts, int64_t blocks, int bins, int64_t* totals) {
  const int bin = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (bin >= bins) return;
  int64_t* row = counts + bin * blocks;
  int64_t before = 0;
  for (int64_t start = 0; start < blocks; start += kWarp) {
    const int64_t own = start + lane < blocks ? row[start + lane] : 0;
    int64_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t left = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += left;
    }
    if (start + lane < blocks) row[start + lane] = before + sum - own;
    before += __shfl_sync(kAll, sum, kWarp - 1);
  }
  if (lane == 0) totals[bin] = before;
}

// One warp: offsets [bins], where each bin starts.
__global__ void scan_bins_kernel(const int64_t* totals, int bins, int64_t* offsets) {
  const int lane = threadIdx.x;
  int64_t before = 0;
  for (int start = 0; start < bins; start += kWarp) {
    const int64_t own = start + lane < bins ? totals[start + lane] : 0;
    int64_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t left = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += left;
    }
    if (start + lane < bins) offsets[start + lane] = before + sum - own;
    before += __shfl_sync(kAll, sum, kWarp - 1);
  }
}

// The lanes whose bin is the same as this lane's.
__device__ inline unsigned peers_of(int bin, int bits) {
  unsigned peers = kAll;
  for (int bit = 0; bit < bits; ++bit) {
    const unsigned set = __ballot_sync(kAll, bin >> bit & 1);
    peers &= bin >> bit & 1 ? set : ~set;
  }
  return peers;
}

// Each warp has a stretch of the block's slots. It counts them into next [warps, bins], the block turns the counts into
// places, and each warp hands its places out in the order of its slots.
__global__ void scatter_kernel(Slots slots, int64_t per_block, int bins, int bits, const int64_t* counts,
                               const int64_t* offsets, int64_t* order) {
  int* next = dynamic_shared<int>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < kWarps * bins; i += kThreads) next[i] = 0;
  __syncthreads();
  const int64_t per_warp = per_block / kWarps, first = blockIdx.x * per_block + warp * per_warp;
  const int64_t stop = min(first + per_warp, slots.n);
  int* own = next + warp * bins;
  for (int64_t slot = first + lane; slot < stop; slot += kWarp) atomicAdd(&own[slots.bin(slot)], 1);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    int before = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = next[w * bins + b];
      next[w * bins + b] = before;
      before += count;
    }
  }
  __syncthreads();
  for (int64_t start = first; start < stop; start += kWarp) {
    const int64_t slot = start + lane;
    const int bin = slot < stop ? slots.bin(slot) : (1 << bits) - 1;  // no slot's: bins < 2^bits
    const unsigned peers = peers_of(bin, bits);
    const int rank = __popc(peers & ((1u << lane) - 1));
    const int place = slot < stop ? own[bin] : 0;
    __syncwarp();
    if (slot < stop) {
      order[offsets[bin] + counts[int64_t{bin} * gridDim.x + blockIdx.x] + place + rank] = slot;
      if (rank == 0) own[bin] = place + __popc(peers);
    }
    __syncwarp();
  }
}

}  // namespace

// A stable counting sort in four launches; every count is a whole number, so the order of the additions is free.
void sort_by_expert(const SortByExpert& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Slots slots{args.idx, args.mask, args.T * args.K, args.K, args.E};
  const int bins = static_cast<int>(args.E + 1);
  int bits = 1;
  while ((1 << bits) <= bins) ++bits;
  const int64_t per_block = slots_of_block(slots.n, bins), n = parts(slots.n, per_block);
  const Scratch<int64_t> counts(n * bins, stream), totals(bins, stream);
  launch(count_kernel, blocks(n), kThreads, bins * sizeof(int), stream, slots, per_block, bins, counts);
  launch(scan_blocks_kernel, blocks(parts(bins, kWarps)), kThreads, 0, stream, counts, n, bins, totals);
  launch(scan_bins_kernel, blocks(1), kWarp, 0, stream, totals, bins, args.offsets);
  launch(scatter_kernel, blocks(n), kThreads, kWarps * bins * sizeof(int), stream, slots, per_block, bins, bits, counts,
         args.offsets, args.order);
}

}  // namespace moekern::cuda
