// How far a layer's output turns the residual stream that it is added to, on a CPU and on a GPU: one source.
#pragma once

#include "floats.h"

namespace moekern {

// 1 - cos(h, h + out), at least 0, from <h, h>, <h, out> and <out, out>. Where out is small the cosine is near 1: the
// determinant has what float32 has lost of it. A NaN stays one.
MOEKERN_INLINE double turned(double hh, double ho, double oo) {
  const double along = hh + ho, square = along + ho + oo, norms = sqrt(hh) * sqrt(square < 0 ? 0.0 : square);
  if (norms == 0) return 1;
  if (along < 0) return 1 - along / norms;
  const double determinant = hh * oo - ho * ho;
  return (determinant < 0 ? 0.0 : determinant) / (norms * (norms + along));
}

}  // namespace moekern
