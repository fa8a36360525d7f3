// What a logit's score is, on a CPU and on a GPU: one source, so the same operations and the same bits.
#pragma once

#include "floats.h"

namespace moekern {

constexpr float kLow = -87.0f;  // exp below this is taken as 0
constexpr float kNone = -INFINITY;

// One logit's score before it is divided by the row's total, and the score's logarithm.
struct Scored {
  float score, log;
};

struct Softmax {
  static constexpr bool kDivide = true;
  static MOEKERN_INLINE Scored of(float x) {  // x <= 0: the largest logit is subtracted before
    const float c = x < kLow ? kLow : x;
    const float s = exponential(c);
    return {x < kLow ? 0.0f : s, c};
  }
};

struct Sigmoid {
  static constexpr bool kDivide = false;
  static MOEKERN_INLINE Scored of(float x) {
    float c = x < kLow ? kLow : x;
    c = c > -kLow ? -kLow : c;
    const float s = 1.0f / (1.0f + exponential(-c));
    return {x < kLow ? 0.0f : s, logarithm(s)};
  }
};

struct SqrtSoftplus {
  static constexpr bool kDivide = false;
  static MOEKERN_INLINE Scored of(float x) {
    const float size = fabsf(x);
    const float c = size > -kLow ? kLow : -size;
    const float softplus = larger(0.0f, x) + logarithm_of_one_plus(exponential(c));
    const float s = sqrtf(softplus);
    return {x < kLow ? 0.0f : s, 0.5f * logarithm(softplus)};
  }
};

struct Identity {
  static constexpr bool kDivide = false;
  static MOEKERN_INLINE Scored of(float x) {
    const float positive = x > 0.0f ? x : 1.0f;
    return {x == kNone ? 0.0f : x, logarithm(positive)};
  }
};

}  // namespace moekern
