#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace moekern::cpu {
namespace {

// Without the instruction __builtin_fmaf is a call of the C library, which rounds once as well: slow, but the same bits.
template <int kRows, int kColumns>
void multiply_portably(const float* a, const float* b, int64_t depth, float* product) {
  float sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sum[i][j] = __builtin_fmaf(a[i], b[j], sum[i][j]);
  std::memcpy(product, sum, sizeof sum);
}

#if defined(__x86_64__) && defined(__GNUC__)
// 12 sums of 8 lanes, two vectors of b and one of a: 15 of 16 registers.
__attribute__((target("avx2,fma"))) void multiply_v3(const float* a, const float* b, int64_t depth, float* product) {
  constexpr int kRows = 6, kVectors = 2;
  __m256 sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += 8 * kVectors) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256 v = _mm256_broadcast_ss(a + i);
      sum[i][0] = _mm256_fmadd_ps(v, b0, sum[i][0]);
      sum[i][1] = _mm256_fmadd_ps(v, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i, product += 8 * kVectors) {
    _mm256_storeu_ps(product, sum[i][0]);
    _mm256_storeu_ps(product + 8, sum[i][1]);
  }
}

// 28 sums of 16 lanes, two vectors of b and one of a: 31 of 32 registers.
__attribute__((target("avx512f"))) void multiply_v4(const float* a, const float* b, int64_t depth, float* product) {
  constexpr int kRows = 14, kVectors = 2;
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += 16 * kVectors) {
    const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const __m512 v = _mm512_set1_ps(a[i]);
      sum[i][0] = _mm512_fmadd_ps(v, b0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(v, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i, product += 16 * kVectors) {
    _mm512_storeu_ps(product, sum[i][0]);
    _mm512_storeu_ps(product + 16, sum[i][1]);
  }
}
#endif

}  // namespace

Tile tile_of(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level == Level::v4) return {14, 32, multiply_v4};
  if (level == Level::v3) return {6, 16, multiply_v3};
#endif
  return {4, 8, multiply_portably<4, 8>};
}

}  // namespace moekern::cpu
