#include "../kernels.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

MOEKERN_INLINE int64_t ones(const uint64_t* a, const uint64_t* b, int64_t n) {
  int64_t total = 0;
  for (int64_t w = 0; w < n; ++w) total += __builtin_popcountll(a[w] & b[w]);
  return total;
}

template <class Int>
void read_token_ids(const Vocabulary& args, const Int* from, std::vector<int64_t>& to) {
  for (int64_t t = 0; t < args.T; ++t) {
    to[t] = args.mask && !args.mask[t] ? -1 : static_cast<int64_t>(from[t]);
    if ((!args.mask || args.mask[t]) && (to[t] < 0 || to[t] >= 64 * args.W))
      throw ArgumentError("token_ids", "expected ids from 0 to " + std::to_string(64 * args.W - 1) + ", got " +
                                           std::to_string(to[t]) + " for token " + std::to_string(t));
  }
}

}  // namespace

void vocabulary(const Vocabulary& args, const Run& run) {
  std::vector<int64_t> token_ids(args.T);  // -1: not counted
  if (args.token_ids.dtype == Dtype::i64)
    read_token_ids(args, static_cast<const int64_t*>(args.token_ids.data), token_ids);
  else
    read_token_ids(args, static_cast<const int32_t*>(args.token_ids.data), token_ids);
  std::vector<int32_t> ids(args.T * args.K);
  read_ids(args.idx, 0, args.T * args.K, args.E, ids.data());

  // Each task sets the bits of its own experts, so no word has two writers.
  const int64_t parts = workers_for(args.E, run.threads);
  parallel_for(parts, run.threads, [&](int64_t part, int) {
    const int64_t first = args.E * part / parts, stop = args.E * (part + 1) / parts;
    for (int64_t t = 0; t < args.T; ++t) {
      const int64_t id = token_ids[t];
      if (id < 0) continue;
      for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot)
        if (ids[slot] >= first && ids[slot] < stop) args.bits[ids[slot] * args.W + id / 64] |= uint64_t{1} << id % 64;
    }
  });
}

void popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, const Run& run) {
  const Level level = level_of(run.level);
  parallel_for(E, run.threads, [&](int64_t e, int) {
    at_level(level, [&]() __attribute__((always_inline)) { count[e] = ones(bits + e * W, bits + e * W, W); });
  });
}

void pair_popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, const Run& run) {
  const Level level = level_of(run.level);
  parallel_for(E, run.threads, [&](int64_t i, int) {
    at_level(level, [&]() __attribute__((always_inline)) {
      for (int64_t j = i; j < E; ++j) count[i * E + j] = count[j * E + i] = ones(bits + i * W, bits + j * W, W);
    });
  });
}

}  // namespace moekern::cpu
