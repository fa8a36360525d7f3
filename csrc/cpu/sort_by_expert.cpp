#include <algorithm>

#include "../kernels.h"
#include "parallel.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kSlots = 1 << 15;  // slots that are worth a thread

// The expert of a flat slot; E for one that is empty or whose token is not kept.
template <class Int>
inline int64_t expert_of(const SortByExpert& args, const Int* idx, int64_t slot, int64_t t) {
  const int64_t id = idx[slot];
  const bool filled = id >= 0 && id < args.E && (!args.mask || args.mask[t]);
  return filled ? id : args.E;
}

// f(slot, expert) for the slots of tokens [start, stop), in order.
template <class Int, class F>
inline void for_slots(const SortByExpert& args, const Int* idx, int64_t start, int64_t stop, const F& f) {
  int64_t slot = start * args.K;
  for (int64_t t = start; t < stop; ++t)
    for (int64_t k = 0; k < args.K; ++k, ++slot) f(slot, expert_of(args, idx, slot, t));
}

// Each part of the tokens counts its slots, places are handed out by expert and then by part, and each part fills its
// own: the same permutation for every number of parts.
template <class Int>
void run_all(const SortByExpert& args, const Int* idx, int threads) {
  const int64_t bins = args.E + 1;
  const int64_t parts = workers_for(args.T * args.K / kSlots, threads);
  const auto first_token = [&](int64_t part) { return args.T * part / parts; };
  std::vector<int64_t> places(parts * bins, 0);

  parallel_for(parts, threads, [&](int64_t part, int) {
    int64_t* count = places.data() + part * bins;
    for_slots(args, idx, first_token(part), first_token(part + 1), [&](int64_t, int64_t e) { ++count[e]; });
  });

  int64_t place = 0;
  for (int64_t e = 0; e < bins; ++e) {
    args.offsets[e] = place;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = places[part * bins + e];
      places[part * bins + e] = place;
      place += count;
    }
  }

  parallel_for(parts, threads, [&](int64_t part, int) {
    int64_t* next = places.data() + part * bins;
    for_slots(args, idx, first_token(part), first_token(part + 1),
              [&](int64_t slot, int64_t e) { args.order[next[e]++] = slot; });
  });
}

}  // namespace

void sort_by_expert(const SortByExpert& args, int threads) {
  if (args.idx.dtype == Dtype::i64) return run_all(args, static_cast<const int64_t*>(args.idx.data), threads);
  run_all(args, static_cast<const int32_t*>(args.idx.data), threads);
}

}  // namespace moekern::cpu
