// A token's rows pass once: blocks of their columns, times their gates, lie side by side while they are added up, held
// against their sum and multiplied with each other. Float32 inside a row, float64 across rows, in their order.
#include "../mixture.h"
#include "parallel.h"
#include "rows.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kTokens = 16;    // of a task
constexpr int64_t kColumns = 128;  // of a block
constexpr int64_t kWidth = 2 * kVector;

// What tokens leave for the sums by expert.
struct Slots {
  std::vector<int32_t> ids;           // [T, K], -1: empty
  std::vector<int64_t> row_of;        // [T, K], -1: empty
  std::vector<float> gates, shares;   // [T, K]
  std::vector<double> total;          // [T] sum of the filled slots' shares
  std::vector<float> square;          // [T, K] of the distance from the mixture
  std::vector<float> dots;            // [T, K, K]: i <= j of the filled slots, by their order
};

// The lanes of one sum.
struct Lanes {
  Floats a = {}, b = {};
};

// The filled slots of one token, and the lanes of their sums.
struct Token {
  std::vector<int64_t> slots;
  std::vector<float> w, block, mixture;  // block: [K, kColumns]
  std::vector<Lanes> apart, dots;        // [K], [K, K]
};

Slots read_slots(const MixtureStats& args) {
  const int64_t n = args.T * args.K;
  Slots s;
  s.ids.resize(n);
  s.gates.resize(n);
  s.shares.resize(n);
  s.total.resize(args.T);
  s.square.resize(args.norm_sum ? n : 0);
  s.dots.resize(args.gram ? n * args.K : 0);
  read_ids(args.idx, 0, n, args.E, s.ids.data());
  read_floats(args.weight, 0, n, s.gates.data());
  read_floats(args.share, 0, n, s.shares.data());
  s.row_of = rows_of_slots(s.ids, args.order, args.offsets, args.E, args.N);
  for (int64_t slot = 0; slot < n; ++slot)
    if (s.ids[slot] >= 0) s.total[slot / args.K] += s.shares[slot];
  return s;
}

// Up to kColumns columns of a row times its gate, zero behind the last, join those of the mixture; they lie as unpacked.
template <class T>
MOEKERN_INLINE void scale_columns(const T* y, int64_t n, float gate, float* to, float* mixture) {
  for (int64_t i = 0; i < n; i += kWidth) {
    T tail[kWidth] = {};
    const T* from = y + i;
    if (n - i < kWidth) {
      std::memcpy(tail, from, (n - i) * sizeof(T));
      from = tail;
    }
    Floats a, b;
    unpack(from, a, b);
    a *= gate;
    b *= gate;
    pack(a, b, to + i);
    pack(read<Floats>(mixture + i) + a, read<Floats>(mixture + i + kVector) + b, mixture + i);
  }
}

MOEKERN_INLINE void add_distance(const float* p, const float* mixture, float w, int64_t n, Lanes& sum) {
  Floats a = sum.a, b = sum.b;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Floats x = read<Floats>(p + i) - w * read<Floats>(mixture + i);
    const Floats y = read<Floats>(p + i + kVector) - w * read<Floats>(mixture + i + kVector);
    a += x * x;
    b += y * y;
  }
  sum = {a, b};
}

MOEKERN_INLINE void add_dot(const float* p, const float* q, int64_t n, Lanes& sum) {
  Floats a = sum.a, b = sum.b;
  for (int64_t i = 0; i < n; i += kWidth) {
    a += read<Floats>(p + i) * read<Floats>(q + i);
    b += read<Floats>(p + i + kVector) * read<Floats>(q + i + kVector);
  }
  sum = {a, b};
}

template <class T>
MOEKERN_INLINE void measure_token(const MixtureStats& args, const T* y, const Slots& s, Token& token) {
  const int64_t filled = token.slots.size(), K = args.K;
  const bool apart = args.norm_sum != nullptr, dots = args.gram != nullptr;
  std::fill(token.apart.begin(), token.apart.end(), Lanes{});
  std::fill(token.dots.begin(), token.dots.end(), Lanes{});
  for (int64_t start = 0; start < args.H; start += kColumns) {
    const int64_t n = std::min(kColumns, args.H - start);
    std::fill(token.mixture.begin(), token.mixture.end(), 0.0f);
    for (int64_t k = 0; k < filled; ++k) {
      const int64_t slot = token.slots[k];
      scale_columns(y + s.row_of[slot] * args.H + start, n, s.gates[slot], token.block.data() + k * kColumns,
                    token.mixture.data());
    }
    for (int64_t k = 0; apart && k < filled; ++k)
      add_distance(token.block.data() + k * kColumns, token.mixture.data(), token.w[k], n, token.apart[k]);
    for (int64_t i = 0; dots && i < filled; ++i)
      for (int64_t j = i; j < filled; ++j)
        add_dot(token.block.data() + i * kColumns, token.block.data() + j * kColumns, n, token.dots[i * K + j]);
  }
}

template <class T>
void measure_tokens(const MixtureStats& args, const T* y, Slots& s, const Run& run) {
  const Level level = level_of(run.level);
  const int64_t K = args.K, tasks = (args.T + kTokens - 1) / kTokens;
  std::vector<Token> tokens(workers_for(tasks, run.threads));
  for (Token& token : tokens) {
    token.block.resize(K * kColumns);
    token.mixture.resize(kColumns);
    token.apart.resize(K);
    token.dots.resize(args.gram ? K * K : 0);
  }
  parallel_for(tasks, run.threads, [&](int64_t task, int worker) {
    Token& token = tokens[worker];
    for (int64_t t = task * kTokens; t < std::min(args.T, (task + 1) * kTokens); ++t) {
      if (args.mask && !args.mask[t]) continue;
      token.slots.clear();
      token.w.clear();
      for (int64_t slot = t * K; slot < (t + 1) * K; ++slot)
        if (s.row_of[slot] >= 0) {
          token.slots.push_back(slot);
          token.w.push_back(static_cast<float>(part_of(s.shares[slot], s.total[t])));
        }
      at_level(level, [&]() __attribute__((always_inline)) { measure_token(args, y, s, token); });
      const int64_t filled = token.slots.size();
      for (int64_t i = 0; i < filled; ++i) {
        if (args.norm_sum) s.square[token.slots[i]] = sum_of_lanes(token.apart[i].a + token.apart[i].b);
        for (int64_t j = i; args.gram && j < filled; ++j) {
          const Lanes& sum = token.dots[i * K + j];
          const int64_t a = token.slots[i], b = token.slots[j];
          s.dots[a * K + b % K] = s.dots[b * K + a % K] = sum_of_lanes(sum.a + sum.b);
        }
      }
    }
  });
}

// One expert's rows in their order, and its pairs with experts of a higher number, mirrored.
void add_expert(const MixtureStats& args, const Slots& s, int64_t e, std::vector<double>& pairs) {
  const int64_t K = args.K, E = args.E;
  std::fill(pairs.begin(), pairs.end(), 0.0);
  for (int64_t n = args.offsets[e]; n < args.offsets[e + 1]; ++n) {
    const int64_t slot = args.order[n], t = slot / K;
    if (args.mask && !args.mask[t]) continue;
    if (args.norm_sum) {
      const double square = s.square[slot], rest = rest_of(part_of(s.shares[slot], s.total[t]));
      args.norm_sum[e] += std::sqrt(square);
      args.square_sum[e] += square;
      args.left_norm_sum[e] += std::sqrt(square) / rest;
      args.left_square_sum[e] += square / (rest * rest);
    }
    if (!args.gram) continue;
    args.gram[e * E + e] += s.dots[slot * K + slot % K];
    for (int64_t k = 0; k < K; ++k)
      if (s.ids[t * K + k] > e) pairs[s.ids[t * K + k]] += s.dots[slot * K + k];
  }
  for (int64_t j = e + 1; args.gram && j < E; ++j) {
    args.gram[e * E + j] += pairs[j];
    args.gram[j * E + e] += pairs[j];
  }
}

}  // namespace

void mixture_stats(const MixtureStats& args, const Run& run) {
  Slots s = read_slots(args);
  with_floats(args.y, [&](const auto* y) { measure_tokens(args, y, s, run); });
  std::vector<std::vector<double>> pairs(workers_for(args.E, run.threads), std::vector<double>(args.gram ? args.E : 0));
  parallel_for(args.E, run.threads, [&](int64_t e, int worker) { add_expert(args, s, e, pairs[worker]); });
  for (int64_t t = 0; args.norm_sum && t < args.T; ++t)
    if (!args.mask || args.mask[t]) {
      *args.share_sum += s.total[t];
      *args.share_square_sum += s.total[t] * s.total[t];
    }
}

}  // namespace moekern::cpu
