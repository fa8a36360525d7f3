// The activations of experts, on a CPU and on a GPU: one source, plain operations in a fixed order.
#pragma once

#include "floats.h"
#include "kernels.h"

namespace moekern {

// exp(x), at the ends of exponential's range beyond them; a NaN stays one.
MOEKERN_INLINE float bounded_exponential(float x) {
  x = x > 87.0f ? 87.0f : x;
  return exponential(x < -87.0f ? -87.0f : x);
}

// erfc(z) for z >= 0, to 8 units in the last place of 1: a polynomial in 1 / (1 + z / 2), fitted to erfc(z) exp(z^2) by
// least squares.
MOEKERN_INLINE float complementary_error(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.0122838765f;
  p = p * t - 0.123254687f;
  p = p * t + 0.428928405f;
  p = p * t - 0.670022488f;
  p = p * t + 0.421274275f;
  p = p * t - 0.0983176306f;
  p = p * t + 0.225541845f;
  p = p * t + 0.238644838f;
  p = p * t + 0.282857031f;
  p = p * t + 0.282064497f;
  return p * t * bounded_exponential(-z * z);
}

template <Activation kActivation>
MOEKERN_INLINE float activated(float x) {
  if (kActivation == Activation::silu) return x / (1.0f + bounded_exponential(-x));
  if (kActivation == Activation::gelu) {
    const float z = x * 0.707106781f, tail = 0.5f * complementary_error(z < 0.0f ? -z : z);
    return x * (z < 0.0f ? tail : 1.0f - tail);
  }
  // (1 + tanh z) / 2 = 1 / (1 + exp(-2 z))
  if (kActivation == Activation::gelu_tanh)
    return x / (1.0f + bounded_exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
  return x;
}

// Calls f with the activation as a constant of the type.
template <Activation kActivation>
struct Activated {
  static MOEKERN_INLINE float of(float x) { return activated<kActivation>(x); }
};

template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::silu) return f(Activated<Activation::silu>{});
  if (activation == Activation::gelu) return f(Activated<Activation::gelu>{});
  if (activation == Activation::gelu_tanh) return f(Activated<Activation::gelu_tanh>{});
  f(Activated<Activation::none>{});
}

}  // namespace moekern
