// Rows that are grouped by expert: where each expert's lie, and whether what says so can be followed.
#pragma once

#include <vector>

#include "../kernels.h"

namespace moekern::cpu {

inline void check_offsets(const int64_t* offsets, int64_t E, int64_t N) {
  bool rising = offsets[0] == 0 && offsets[E] <= N;
  for (int64_t e = 0; e < E; ++e) rising = rising && offsets[e] <= offsets[e + 1];
  if (!rising) throw ArgumentError("offsets", "expected offsets rising from 0 to at most " + std::to_string(N));
}

inline void check_tokens(const int64_t* tokens, int64_t N, int64_t T) {
  for (int64_t n = 0; n < N; ++n)
    if (tokens[n] < 0 || tokens[n] >= T)
      throw ArgumentError("tokens", "expected tokens from 0 to " + std::to_string(T - 1) + ", got " +
                                        std::to_string(tokens[n]) + " in row " + std::to_string(n));
}

// Rows of one expert would be added to one row twice, which a GPU cannot do. Those that rise are distinct.
inline void check_distinct(const int64_t* tokens, const int64_t* offsets, int64_t E, int64_t T) {
  bool rising = true;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t n = offsets[e] + 1; n < offsets[e + 1]; ++n) rising = rising && tokens[n - 1] < tokens[n];
  if (rising) return;
  std::vector<int64_t> last(T, -1);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t n = offsets[e]; n < offsets[e + 1]; ++n) {
      if (last[tokens[n]] == e)
        throw ArgumentError("tokens", "expected each token of expert " + std::to_string(e) + " once, got token " +
                                          std::to_string(tokens[n]) + " again in row " + std::to_string(n));
      last[tokens[n]] = e;
    }
}

}  // namespace moekern::cpu
