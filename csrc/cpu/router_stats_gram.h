// Sums of the products of every two logits: float32 in token order inside a chunk, float64 across chunks.
#pragma once

#include <memory>

#include "../kernels.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {

constexpr int64_t kPanel = 2 * kVector;       // columns
constexpr int64_t kPanelRows = 4;             // rows times a panel: 8 sums of 8 lanes stay in registers
constexpr int64_t kPanelBytes = 1 << 24;      // of packed logits whose products are waited for
constexpr int64_t kProductTokens = 256;       // a chunk: two panels of one fit in L1

// The counted tokens of a chunk, [panels, kProductTokens, kPanel]; returns how many. Columns from E on are left as they are.
template <class T>
int64_t pack_logits(const RouterStats& args, const T* logits, int64_t start, float* to) {
  int64_t n = 0;
  for (int64_t t = start; t < std::min(start + kProductTokens, args.T); ++t) {
    if (args.mask && !args.mask[t]) continue;
    const T* row = logits + t * args.E;
    for (int64_t i = 0; i < args.E; i += kPanel) {
      float* panel = to + i * kProductTokens + n * kPanel;
      for (int64_t j = 0; j < std::min(kPanel, args.E - i); ++j) panel[j] = load(row[i + j]);
    }
    ++n;
  }
  return n;
}

// product [kPanelRows, kPanel] = the sum over n tokens of a's first columns times b's panel.
MOEKERN_INLINE void multiply_panels(const float* a, const float* b, int64_t n, float* product) {
  Floats s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {}, s30 = {}, s31 = {};
  for (int64_t t = 0; t < n; ++t, a += kPanel, b += kPanel) {
    const Floats b0 = read<Floats>(b), b1 = read<Floats>(b + kVector);
    s00 += a[0] * b0;
    s01 += a[0] * b1;
    s10 += a[1] * b0;
    s11 += a[1] * b1;
    s20 += a[2] * b0;
    s21 += a[2] * b1;
    s30 += a[3] * b0;
    s31 += a[3] * b1;
  }
  pack(s00, s01, product);
  pack(s10, s11, product + kPanel);
  pack(s20, s21, product + 2 * kPanel);
  pack(s30, s31, product + 3 * kPanel);
}

// One chunk's products of the experts of panel p with all from their own panel on.
MOEKERN_INLINE void add_panel(const float* packed, int64_t n, int64_t p, int64_t E, double* gram) {
  for (int64_t c = p; c < E; c += kPanel)
    for (int64_t r = p; r < std::min(p + kPanel, E); r += kPanelRows) {
      float product[kPanelRows * kPanel];
      multiply_panels(packed + p * kProductTokens + r - p, packed + c * kProductTokens, n, product);
      for (int64_t i = 0; i < std::min(kPanelRows, E - r); ++i)
        for (int64_t j = 0; j < std::min(kPanel, E - c); ++j) gram[(r + i) * E + c + j] += product[i * kPanel + j];
    }
}

template <class T>
void add_logit_gram(const RouterStats& args, const T* logits, int threads, Level level) {
  const int64_t E = args.E, panels = (E + kPanel - 1) / kPanel, size = panels * kPanel * kProductTokens;
  const int64_t chunks = (args.T + kProductTokens - 1) / kProductTokens;
  if (size == 0 || chunks == 0) return;
  const int64_t group = std::min(chunks, std::max<int64_t>(kPanelBytes / (4 * size), 2 * threads));
  std::vector<float> packed(group * size);
  std::vector<int64_t> tokens(group);
  for (int64_t first = 0; first < chunks; first += group) {
    const int64_t n = std::min(group, chunks - first);
    parallel_for(n, threads, [&](int64_t c, int) {
      tokens[c] = pack_logits(args, logits, (first + c) * kProductTokens, packed.data() + c * size);
    });
    parallel_for(panels, threads, [&](int64_t p, int) {
      at_level(level, [&]() __attribute__((always_inline)) {
        for (int64_t c = 0; c < n; ++c)
          add_panel(packed.data() + c * size, tokens[c], p * kPanel, E, args.logit_gram);
      });
    });
  }
  for (int64_t i = 0; i < E; ++i)
    for (int64_t j = i + 1; j < E; ++j) args.logit_gram[j * E + i] = args.logit_gram[i * E + j];
}

}  // namespace moekern::cpu
