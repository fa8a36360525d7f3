// What is left of a token's shares without one of them, on a CPU and on a GPU: one source.
#pragma once

#include "floats.h"

namespace moekern {

constexpr double kLeastRest = 1e-6;

// A slot's share of the sum of its token's; 0 where that is 0.
MOEKERN_INLINE double part_of(double share, double total) { return total == 0 ? 0.0 : share / total; }

MOEKERN_INLINE double rest_of(double w) { return 1 - w < kLeastRest ? kLeastRest : 1 - w; }

}  // namespace moekern
