// Sums of each output dimension over an expert's rows: y^2, y and y / norm, in a second read of the rows.
#pragma once

#include "../kernels.h"
#include "slots.h"

namespace moekern::cpu {

constexpr int64_t kDimensions = 1024;  // columns of an expert's sums a task adds to, so that these stay in L1
constexpr int64_t kRows = 256;         // rows that are summed in float32 before they join the float64 sums
constexpr int kTogether = 4;           // of these, rows that pass while a sum is in a register

// One expert's rows of a chunk, and one over their norms: rows of norm 0 have no direction.
template <class T>
struct Chunk {
  const T* rows[kRows];
  float inverses[kRows];
  int64_t n = 0;
};

template <class T>
void find_chunk(const CombineAndMeasure& args, const T* y, const float* squares, int64_t first, int64_t stop,
                Chunk<T>& chunk) {
  chunk.n = 0;
  for (int64_t row = first; row < stop; ++row) {
    if (args.mask && !args.mask[args.order[row] / args.K]) continue;
    const double square = squares[row];
    chunk.rows[chunk.n] = y + row * args.H;
    chunk.inverses[chunk.n++] = square == 0 ? 0.0f : static_cast<float>(1 / std::sqrt(square));
  }
}

// Sums of a block of columns; they lie as unpacked.
struct Dimensions {
  float square[kDimensions], value[kDimensions], unit[kDimensions];
};

// kAdded rows join the sums of 16 columns, one after the other.
template <int kAdded, class T>
MOEKERN_INLINE void add_row_columns(const T* const* rows, const float* inverses, int64_t at, int64_t i, Dimensions& sums) {
  Floats square_a = read<Floats>(sums.square + i), square_b = read<Floats>(sums.square + i + kVector);
  Floats value_a = read<Floats>(sums.value + i), value_b = read<Floats>(sums.value + i + kVector);
  Floats unit_a = read<Floats>(sums.unit + i), unit_b = read<Floats>(sums.unit + i + kVector);
  for (int r = 0; r < kAdded; ++r) {
    Floats a, b;
    unpack(rows[r] + at, a, b);
    square_a += a * a;
    square_b += b * b;
    value_a += a;
    value_b += b;
    unit_a += a * inverses[r];
    unit_b += b * inverses[r];
  }
  pack(square_a, square_b, sums.square + i);
  pack(value_a, value_b, sums.value + i);
  pack(unit_a, unit_b, sums.unit + i);
}

// Columns [start, start + n) of kAdded rows; the rows that come next are fetched.
template <int kAdded, class T>
MOEKERN_INLINE void add_columns_of_rows(const T* const* rows, const float* inverses, int64_t ahead, int64_t start,
                                        int64_t n, Dimensions& sums) {
  int64_t i = 0;
  for (; i + 2 * kVector <= n; i += 2 * kVector) {
    for (int r = 0; r < kAdded; ++r) prefetch(rows[r] + ahead + start + i);
    add_row_columns<kAdded>(rows, inverses, start + i, i, sums);
  }
  if (i == n) return;
  T tails[kAdded][2 * kVector] = {};
  const T* at[kAdded];
  for (int r = 0; r < kAdded; ++r) {
    std::memcpy(tails[r], rows[r] + start + i, (n - i) * sizeof(T));
    at[r] = tails[r];
  }
  add_row_columns<kAdded>(at, inverses, 0, i, sums);
}

template <class T>
MOEKERN_INLINE void add_to_total(const float* sum, int64_t n, double* total, const T* y) {
  for (int64_t i = 0; i < n; i += 2 * kVector) {
    float column[2 * kVector];
    in_order(read<Floats>(sum + i), read<Floats>(sum + i + kVector), column, y);
    for (int64_t j = 0; j < std::min<int64_t>(2 * kVector, n - i); ++j) total[i + j] += column[j];
  }
}

// A block of columns of one expert's sums: its rows lie side by side, so this second read of y is sequential.
template <class T>
MOEKERN_INLINE void add_dimensions(const CombineAndMeasure& args, const Chunk<T>& chunk, const T* y, int64_t e,
                                   int64_t start) {
  const int64_t H = args.H, n = std::min(kDimensions, H - start);
  Dimensions sums = {};
  int64_t r = 0;
  for (; r + kTogether <= chunk.n; r += kTogether) {
    const int64_t ahead = r + 2 * kTogether <= chunk.n ? chunk.rows[r + kTogether] - chunk.rows[r] : 0;
    add_columns_of_rows<kTogether>(chunk.rows + r, chunk.inverses + r, ahead, start, n, sums);
  }
  for (; r < chunk.n; ++r) add_columns_of_rows<1>(chunk.rows + r, chunk.inverses + r, 0, start, n, sums);
  const int64_t at = e * H + start;
  add_to_total(sums.square, n, args.square_sum + at, y);
  add_to_total(sums.value, n, args.value_sum + at, y);
  add_to_total(sums.unit, n, args.unit_sum + at, y);
}

}  // namespace moekern::cpu
