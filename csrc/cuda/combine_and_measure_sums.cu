#include "combine_and_measure.h"
#include "grouped.h"
#include "rows.h"
#include "slots.h"

namespace moekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kSlices = 16;      // of an expert's rows, at most: a block each
constexpr int64_t kLeast = 64;       // rows that are worth a slice, where experts have equally many
constexpr int64_t kChunk = 256;      // rows whose dimensions are added in float32
constexpr int64_t kBytes = 1 << 25;  // of pairs that blocks leave behind
constexpr int kColumnThreads = 128;  // of a block that adds dimensions
constexpr int kRun = 4;              // neighbouring columns of a thread

struct Experts {
  Typed idx;
  const int64_t *order, *offsets;
  const bool* mask;
  RowMeasures rows;
  int64_t N, slots, E;
  int K;
};

// What a row, a thread or a block adds to its expert.
struct Scalars {
  double norm, square, gated, gated_square, turned;
  unsigned top;  // bits of the largest |y|: NaN is above all

  __device__ void join(const Scalars& other) {
    norm += other.norm;
    square += other.square;
    gated += other.gated;
    gated_square += other.gated_square;
    turned += other.turned;
    top = max(top, other.top);
  }
};

// Block (expert, slice): its share of the expert's chunks of rows, a row a thread.
__global__ void __launch_bounds__(kThreads) scalars_kernel(Experts a, Scalars* sums) {
  __shared__ Scalars of[kThreads];
  const int64_t e = blockIdx.x;
  const Range range = rows_of(a.offsets, e, a.N);
  Scalars mine = {};
  for (int64_t row = range.first + blockIdx.y * kThreads + threadIdx.x; row < range.stop; row += gridDim.y * kThreads) {
    const int64_t slot = counted_slot(a, row);
    if (slot < 0) continue;
    const double square = a.rows.square[row], gated = a.rows.gated[slot];
    Scalars own;
    own.norm = sqrt(square);
    own.square = square;
    own.gated = gated;
    own.gated_square = gated * gated;
    own.turned = a.rows.turn ? gated * a.rows.turn[slot / a.K] : 0;
    own.top = bit_cast<unsigned>(a.rows.top[row]);
    mine.join(own);
  }
  of[threadIdx.x] = mine;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) of[threadIdx.x].join(of[threadIdx.x + width]);
  }
  if (threadIdx.x == 0) sums[e * gridDim.y + blockIdx.y] = of[0];
}

// A thread for each expert.
__global__ void add_scalars_kernel(const Scalars* sums, int64_t slices, CombineAndMeasure to) {
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= to.E) return;
  Scalars all = {};
  for (int64_t s = 0; s < slices; ++s) all.join(sums[e * slices + s]);
  to.norm_sum[e] += all.norm;
  to.norm_square_sum[e] += all.square;
  to.gated_norm_sum[e] += all.gated;
  to.gated_norm_square_sum[e] += all.gated_square;
  if (to.residual) to.residual_sum[e] += all.turned;
  const double top = bit_cast<float>(all.top), before = to.max_abs[e];
  to.max_abs[e] = top <= before || before != before ? before : top;  // a NaN stays
}

// Block (expert, slice): the products of its rows with the other slots of their tokens. A warp takes a row at a time,
// in order, and adds to a table of its own: sums [experts of this launch, slices, E].
__global__ void __launch_bounds__(kThreads) pairs_kernel(Experts a, int64_t first_expert, double* sums) {
  double* tables = dynamic_shared<double>();  // [warps, E]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t e = first_expert + blockIdx.x;
  for (int64_t i = threadIdx.x; i < kWarps * a.E; i += kThreads) tables[i] = 0;
  __syncthreads();
  const Range range = rows_of(a.offsets, e, a.N);
  double* own = tables + warp * a.E;
  for (int64_t row = range.first + blockIdx.y * kWarps + warp; row < range.stop; row += gridDim.y * kWarps) {
    const int64_t slot = counted_slot(a, row);
    if (slot < 0) continue;
    const int64_t other = slot / a.K * a.K + lane;
    int expert = lane < a.K ? expert_at(a.idx, other, a.E) : -1;
    if (expert < e || (expert == e && other != slot)) expert = -1;  // the mirror; equal ids make no pair
    const double product = expert >= 0 ? a.rows.gated[slot] * a.rows.gated[other] : 0.0;
    in_turns(expert, a.K, lane, [&] { own[expert] += product; });
  }
  __syncthreads();
  double* to = sums + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * a.E;
  for (int64_t i = threadIdx.x; i < a.E; i += kThreads) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += tables[w * a.E + i];
    to[i] = sum;
  }
}

// pair_sum[first + i, j] += the slices of sums [i, slice, j], and the mirror. Only the upper half is read, so that both
// are the same bits.
__global__ void add_pairs_kernel(const double* sums, int64_t slices, int64_t first, int64_t n, int64_t E, double* pair_sum) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, e = first + at / E, j = at % E;
  if (at >= n * E || j < e) return;
  double sum = 0;
  for (int64_t s = 0; s < slices; ++s) sum += sums[(at / E * slices + s) * E + j];
  pair_sum[e * E + j] += sum;
  if (j > e) pair_sum[j * E + e] += sum;
}

__global__ void residual_tokens_kernel(const bool* mask, int64_t T, int64_t* tokens) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int counted = __popc(__ballot_sync(kAll, t < T && (!mask || mask[t])));
  if (threadIdx.x % kWarp == 0 && counted)
    atomicAdd(reinterpret_cast<unsigned long long*>(tokens), static_cast<unsigned long long>(counted));
}

// Block (columns, expert): its rows lie side by side, so this second read of y is sequential.
template <bool kWhole, class T>
__global__ void __launch_bounds__(kColumnThreads) dimensions_kernel(const T* y, Experts a, int64_t H,
                                                                   CombineAndMeasure to) {
  const int64_t e = blockIdx.y, column = (int64_t{blockIdx.x} * kColumnThreads + threadIdx.x) * kRun;
  if (column >= H) return;
  const Range range = rows_of(a.offsets, e, a.N);
  double squares[kRun] = {}, values[kRun] = {}, units[kRun] = {};
  for (int64_t first = range.first; first < range.stop; first += kChunk) {
    float square[kRun] = {}, value[kRun] = {}, unit[kRun] = {};
#pragma unroll 4
    for (int64_t row = first; row < min(first + kChunk, range.stop); ++row) {
      const float inverse = a.rows.inverse[row];
      const bool counted = !(inverse < 0);  // a NaN counts
      Vector<T, kRun> run = {};
      if (kWhole) {
        run = read<kRun>(y + row * H + column);
      } else {
        for (int j = 0; j < kRun; ++j)
          if (column + j < H) run.at[j] = y[row * H + column + j];
      }
      for (int j = 0; j < kRun; ++j) {
        const float v = counted ? load(run.at[j]) : 0.0f;
        square[j] += v * v;
        value[j] += v;
        unit[j] += v * (counted ? inverse : 0.0f);
      }
    }
    for (int j = 0; j < kRun; ++j) {
      squares[j] += square[j];
      values[j] += value[j];
      units[j] += unit[j];
    }
  }
  for (int j = 0; j < kRun && column + j < H; ++j) {
    const int64_t at = e * H + column + j;
    to.square_sum[at] += squares[j];
    to.value_sum[at] += values[j];
    to.unit_sum[at] += units[j];
  }
}

Experts experts_of(const CombineAndMeasure& args, const RowMeasures& rows) {
  return {args.idx, args.order, args.offsets, args.mask, rows, args.N, args.T * args.K, args.E, static_cast<int>(args.K)};
}

void add_pairs(const CombineAndMeasure& args, const Experts& a, int64_t slices, cudaStream_t stream) {
  const int64_t size = slices * a.E * sizeof(double), most = std::max<int64_t>(1, std::min(a.E, kBytes / size));
  const Scratch<double> sums(most * slices * a.E, stream);
  for (int64_t first = 0; first < a.E; first += most) {
    const int64_t n = std::min(most, a.E - first);
    launch(pairs_kernel, blocks(n, slices), kThreads, kWarps * a.E * sizeof(double), stream, a, first, sums);
    launch(add_pairs_kernel, blocks(parts(n * a.E, kThreads)), kThreads, 0, stream, sums, slices, first, n, a.E,
           args.pair_sum);
  }
}

}  // namespace

void add_expert_sums(const CombineAndMeasure& args, const RowMeasures& rows, cudaStream_t stream) {
  if (args.E == 0) return;
  const Experts a = experts_of(args, rows);
  const int64_t slices = std::max<int64_t>(1, std::min(kSlices, args.N / (kLeast * args.E)));
  const Scratch<Scalars> sums(a.E * slices, stream);
  launch(scalars_kernel, blocks(a.E, slices), kThreads, 0, stream, a, sums);
  launch(add_scalars_kernel, blocks(parts(a.E, kThreads)), kThreads, 0, stream, sums, slices, args);
  add_pairs(args, a, slices, stream);
  if (args.residual)
    launch(residual_tokens_kernel, blocks(parts(args.T, kThreads)), kThreads, 0, stream, args.mask, args.T,
           args.residual_tokens);
}

void add_dimensions(const CombineAndMeasure& args, const RowMeasures& rows, cudaStream_t stream) {
  const Experts a = experts_of(args, rows);
  const dim3 grid = blocks(parts(args.H, kColumnThreads * kRun), args.E);
  with_floats(args.y, [&](const auto* y) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(y)>>;
    const bool whole = args.H % kRun == 0 && aligned(y, sizeof(T) * kRun);
    launch(whole ? dimensions_kernel<true, T> : dimensions_kernel<false, T>, grid, kColumnThreads, 0, stream, y, a, args.H,
           args);
  });
}

}  // namespace moekern::cuda
