#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "../scores.h"
#include "parallel.h"
#include "router_stats_gram.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int kFew = kLanes / 2;  // logits that need no more lanes
constexpr int64_t kChunk = 256;  // tokens: summed in float32 within, in float64 across, always in this order

// What one chunk of tokens adds.
struct Partial {
  int64_t tokens = 0;
  double entropy = 0, margin = 0;
};

// Buffers of one worker. Integers add up in any order, so their tables belong to the worker and not to the chunk.
struct Scratch {
  std::vector<float> logit, score, candidates;  // [padded E], tail of logit -inf
  std::vector<int32_t> ids;                     // [chunk, K]
  std::vector<float> gates;                     // [chunk, K]
  std::vector<int32_t> chosen;                  // [K]
  std::vector<int64_t> top1, count;             // [E]
  std::vector<uint32_t> pairs;                  // [E, E]: earlier slot's expert, later slot's
  std::vector<float> total, weighted, kth, next, log_total;  // [chunk], of the tokens that count
};

// The k-th and the (k+1)-th largest of n logits, by selection: for rows whose chosen slots are not simply the largest.
void select(const Scratch& s, int64_t n, int64_t K, float least, std::vector<float>& found, float* kth, float* next) {
  found.clear();
  for (int64_t i = 0; i < n; ++i)
    if (s.logit[i] >= least) found.push_back(s.logit[i]);
  *kth = *next = std::numeric_limits<float>::quiet_NaN();
  if (static_cast<int64_t>(found.size()) <= K) return;
  std::nth_element(found.begin(), found.begin() + K, found.end(), std::greater<float>());
  *next = found[K];
  *kth = *std::min_element(found.begin(), found.begin() + K);
}

// kWidth lanes: kLanes, or half of them where these hold all logits, which changes no bit.
template <int kWidth>
MOEKERN_INLINE void kth_and_next(Scratch& s, int64_t E, int64_t padded, int64_t K, const int32_t* ids, float* kth,
                                 float* next) {
  float least = std::numeric_limits<float>::infinity();
  bool all = true;
  for (int64_t k = 0; k < K; ++k) {
    all = all && ids[k] >= 0;
    const float x = s.logit[ids[k] >= 0 ? ids[k] : 0];
    least = x < least ? x : least;
  }
  // If exactly K logits reach the least chosen one, these are the K largest and the rest's maximum comes next.
  float reach[kWidth] = {}, below[kWidth];
  for (int j = 0; j < kWidth; ++j) below[j] = kNone;
  const float* logit = s.logit.data();
  for (int64_t i = 0; i < padded; i += kWidth)
    for (int j = 0; j < kWidth; ++j) {
      const float x = logit[i + j];
      reach[j] += x >= least ? 1.0f : 0.0f;
      below[j] = larger(below[j], x < least ? x : kNone);
    }
  const float reached = sum_of<kWidth>(reach);
  *kth = least;
  *next = max_of<kWidth>(below);
  if (all && least > kNone && reached == static_cast<float>(K)) return;
  const bool bounded = all && reached > static_cast<float>(K);
  select(s, E, K, bounded ? least : kNone, s.candidates, kth, next);
}

template <class S, int kWidth, class T>
MOEKERN_INLINE void measure_logits(const T* row, int64_t E, int64_t padded, int64_t K, const int32_t* ids, Scratch& s,
                                   float* score_sum, int64_t t) {
  float* logit = s.logit.data();
  float* score = s.score.data();
  for (int64_t i = 0; i < E; ++i) logit[i] = load(row[i]);

  float top = 0.0f;
  if (S::kDivide) {
    float lane[kWidth];
    for (int j = 0; j < kWidth; ++j) lane[j] = kNone;
    for (int64_t i = 0; i < padded; i += kWidth)
      for (int j = 0; j < kWidth; ++j) lane[j] = larger(lane[j], logit[i + j]);
    top = max_of<kWidth>(lane);
  }

  float total[kWidth] = {}, weighted[kWidth] = {};
  for (int64_t i = 0; i < padded; i += kWidth)
    for (int j = 0; j < kWidth; ++j) {
      const Scored scored = S::of(logit[i + j] - top);
      score[i + j] = scored.score;
      total[j] += scored.score;
      weighted[j] += scored.score * scored.log;
    }
  const float sum = sum_of<kWidth>(total);
  const float scale = S::kDivide ? 1.0f / sum : 1.0f;
  for (int64_t i = 0; i < padded; ++i) score_sum[i] += score[i] * scale;
  s.total[t] = sum;
  s.weighted[t] = sum_of<kWidth>(weighted);
  if (K == 0 || K >= E) return;
  float kth, next;
  kth_and_next<kWidth>(s, E, padded, K, ids, &kth, &next);
  s.kth[t] = kth - top;
  s.next[t] = next - top;
}

// Entropy and margin of n measured tokens: logarithms and exponentials side by side, sums in the tokens' order.
template <class S>
MOEKERN_INLINE void add_tokens(int64_t n, bool margins, Scratch& s, Partial& partial) {
  for (int64_t t = 0; t < n; ++t) s.log_total[t] = logarithm(s.total[t]);
  // With p = s / total: -sum of p ln p = ln total - (sum of s ln s) / total.
  for (int64_t t = 0; t < n; ++t)
    partial.entropy += static_cast<double>(s.log_total[t]) - static_cast<double>(s.weighted[t]) / s.total[t];
  if (!margins) return;
  for (int64_t t = 0; t < n; ++t) {
    const float scale = S::kDivide ? 1.0f / s.total[t] : 1.0f;
    s.kth[t] = S::of(s.kth[t]).score * scale;
    s.next[t] = S::of(s.next[t]).score * scale;
  }
  for (int64_t t = 0; t < n; ++t) partial.margin += static_cast<double>(s.kth[t]) - s.next[t];
}

// gate_sums holds gate sum and gate square sum side by side for each expert.
void count_slots(const int32_t* ids, const float* gates, int64_t K, int64_t E, Scratch& s, double* gate_sums) {
  int64_t n = 0, best = 0;
  float best_gate = 0.0f;
  for (int64_t k = 0; k < K; ++k) {
    if (ids[k] < 0) continue;
    if (n == 0 || gates[k] > best_gate) {
      best = ids[k];
      best_gate = gates[k];
    }
    const double gate = gates[k];
    gate_sums[2 * ids[k]] += gate;
    gate_sums[2 * ids[k] + 1] += gate * gate;
    ++s.count[ids[k]];
    s.chosen[n++] = ids[k];
  }
  if (n > 0) ++s.top1[best];
  const int32_t* chosen = s.chosen.data();
  uint32_t* pairs = s.pairs.data();
  for (int64_t a = 0; a < n; ++a) {
    uint32_t* row = pairs + chosen[a] * E;
    for (int64_t b = a + 1; b < n; ++b) ++row[chosen[b]];
  }
}

template <class S, class T>
Partial run_chunk(const RouterStats& args, const T* logits, int64_t start, int64_t padded, Level level, Scratch& s,
                  float* score_sum, double* gate_sums) {
  Partial partial;
  const int64_t n = std::min(kChunk, args.T - start), E = args.E, K = args.K;
  read_ids(args.idx, start * K, n * K, E, s.ids.data());
  read_floats(args.weight, start * K, n * K, s.gates.data());
  const bool* mask = args.mask ? args.mask + start : nullptr;
  for (int64_t t = 0; t < n; ++t) {
    if (mask && !mask[t]) continue;
    ++partial.tokens;
    count_slots(s.ids.data() + t * K, s.gates.data() + t * K, K, E, s, gate_sums);
  }
  if (!logits) return partial;
  at_level(level, [&]() __attribute__((always_inline)) {
    int64_t measured = 0;
    const auto measure = [&](auto width) __attribute__((always_inline)) {
      for (int64_t t = 0; t < n; ++t)
        if (!mask || mask[t])
          measure_logits<S, width>(logits + (start + t) * E, E, padded, K, s.ids.data() + t * K, s, score_sum,
                                   measured++);
    };
    if (padded == kFew)
      measure(std::integral_constant<int, kFew>());
    else
      measure(std::integral_constant<int, kLanes>());
    add_tokens<S>(measured, K > 0 && K < E, s, partial);
  });
  return partial;
}

void add_integers(const RouterStats& args, const std::vector<Scratch>& scratch) {
  const int64_t E = args.E;
  for (const Scratch& s : scratch)
    for (int64_t i = 0; i < E; ++i) {
      args.top1_count[i] += s.top1[i];
      args.count[i] += s.count[i];
      args.coactivation[i * E + i] += s.count[i];
      for (int64_t j = i + 1; j < E; ++j)
        if (const int64_t pairs = int64_t{s.pairs[i * E + j]} + s.pairs[j * E + i]) {
          args.coactivation[i * E + j] += pairs;
          args.coactivation[j * E + i] += pairs;
        }
    }
}

template <class S, class T>
void run_all(const RouterStats& args, const T* logits, const Run& run) {
  const int64_t E = args.E, K = args.K, chunks = (args.T + kChunk - 1) / kChunk;
  const int64_t padded = E <= kFew ? kFew : (E + kLanes - 1) / kLanes * kLanes;
  const Level level = level_of(run.level);
  std::vector<Partial> partials(chunks);
  std::vector<float> score_sums(logits ? chunks * padded : 0);
  std::vector<double> gate_sums(chunks * 2 * E);
  std::vector<Scratch> scratch(workers_for(chunks, run.threads));
  for (Scratch& s : scratch) {
    s.logit.assign(padded, kNone);
    s.score.resize(padded);
    s.candidates.reserve(E);
    s.ids.resize(kChunk * K);
    s.gates.resize(kChunk * K);
    s.chosen.resize(K);
    s.top1.resize(E);
    s.count.resize(E);
    for (auto* each : {&s.total, &s.weighted, &s.kth, &s.next, &s.log_total}) each->resize(kChunk);
    s.pairs.resize(E * E);
  }

  parallel_for(chunks, run.threads, [&](int64_t c, int worker) {
    float* score_sum = logits ? score_sums.data() + c * padded : nullptr;
    partials[c] = run_chunk<S>(args, logits, c * kChunk, padded, level, scratch[worker], score_sum,
                               gate_sums.data() + c * 2 * E);
  });

  for (int64_t c = 0; c < chunks; ++c) {
    *args.tokens += partials[c].tokens;
    if (logits) *args.logit_tokens += partials[c].tokens;
    *args.entropy_sum += partials[c].entropy;
    *args.margin_sum += partials[c].margin;
    for (int64_t e = 0; e < E; ++e) {
      args.gate_sum[e] += gate_sums[(c * E + e) * 2];
      args.gate_square_sum[e] += gate_sums[(c * E + e) * 2 + 1];
      if (logits) args.score_sum[e] += score_sums[c * padded + e];
    }
  }
  add_integers(args, scratch);
  if (logits && args.logit_gram) add_logit_gram(args, logits, run.threads, level);
}

}  // namespace

void router_stats(const RouterStats& args, const Run& run) {
  with_floats(args.logits, [&](const auto* logits) {
    switch (args.score) {
      case Score::softmax: return run_all<Softmax>(args, logits, run);
      case Score::sigmoid: return run_all<Sigmoid>(args, logits, run);
      case Score::sqrtsoftplus: return run_all<SqrtSoftplus>(args, logits, run);
      case Score::identity: return run_all<Identity>(args, logits, run);
    }
  });
}

}  // namespace moekern::cpu
