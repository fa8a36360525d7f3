// Rows grouped by expert, one for each filled slot: where each slot's lies.
#pragma once

#include <algorithm>

#include "grouped.h"

namespace moekern::cpu {

// Of slots with these ids, -1 for empty ones: the row of each, -1 for these.
inline std::vector<int64_t> rows_of_slots(const std::vector<int32_t>& ids, const int64_t* order, const int64_t* offsets,
                                          int64_t E, int64_t N) {
  const int64_t slots = ids.size();
  std::vector<int64_t> row_of(slots, -1);
  check_offsets(offsets, E, N);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t n = offsets[e]; n < offsets[e + 1]; ++n) {
      const int64_t slot = order[n];
      if (slot < 0 || slot >= slots || ids[slot] != e || row_of[slot] >= 0)
        throw ArgumentError("order", "expected each slot of expert " + std::to_string(e) + " once, got slot " +
                                         std::to_string(slot) + " in row " + std::to_string(n));
      row_of[slot] = n;
    }
  const int64_t filled = slots - std::count(ids.begin(), ids.end(), -1);
  if (filled != offsets[E])
    throw ArgumentError("offsets", "expected a row for each of " + std::to_string(filled) + " slots, got " +
                                       std::to_string(offsets[E]));
  return row_of;
}

}  // namespace moekern::cpu
