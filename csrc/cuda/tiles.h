// Products of row-major matrices along their columns: a block of 64 threads makes kTile x kTile of them, kEach x kEach
// a thread, from kDepth columns at a time in shared memory. Float32 with fused multiply-add, no tensor cores.
#pragma once

#include "eight.h"

namespace moekern::cuda {

constexpr int kTileThreads = 64;
constexpr int kDepth = 16;  // columns in shared memory
constexpr int kChain = 64;  // columns that a thread adds in order before they join its float32 sum, in order

// One side of a tile, column by column: the rows that a thread reads lie side by side.
template <int kTile>
struct Side {
  static constexpr int kStride = kTile + 4;
  alignas(16) float at[kDepth * kStride];
};

// Which row (or column) of the tile is the i-th of a thread's kEach. They come in runs of 4, and the runs of
// neighbouring threads lie side by side, so that a warp's reads meet in no bank.
template <int kTile, int kEach>
struct Owned {
  static constexpr int kRun = kEach < 4 ? kEach : 4, kLines = kTile / kEach;
  static_assert(kLines * kLines == kTileThreads && kEach % kRun == 0, "64 threads own a tile");

  struct alignas(4 * kRun) Run {
    float v[kRun];
  };

  static __device__ int at(int line, int i) { return i / kRun * kLines * kRun + line * kRun + i % kRun; }

  static __device__ void read(const float* column, int line, float* v) {
    for (int i = 0; i < kEach; i += kRun) {
      const Run run = *reinterpret_cast<const Run*>(column + at(line, i));
      for (int j = 0; j < kRun; ++j) v[i + j] = run.v[j];
    }
  }
};

// A thread's products: the chain of columns that is being added, and the sum of those before.
template <int kTile, int kEach>
struct Products {
  using Mine = Owned<kTile, kEach>;
  float chain[kEach][kEach] = {}, total[kEach][kEach] = {};

  __device__ void add_columns(const Side<kTile>& a, const Side<kTile>& b, int row_line, int column_line) {
    for (int k = 0; k < kDepth; ++k) {
      float rows[kEach], columns[kEach];
      Mine::read(a.at + k * Side<kTile>::kStride, row_line, rows);
      Mine::read(b.at + k * Side<kTile>::kStride, column_line, columns);
      for (int i = 0; i < kEach; ++i)
        for (int j = 0; j < kEach; ++j) chain[i][j] = fmaf(rows[i], columns[j], chain[i][j]);
    }
  }

  // f(row, column, sum) for each of the tile's products that this thread has; the chain begins anew.
  template <class F>
  __device__ void take_chain(int row_line, int column_line, const F& f) {
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < kEach; ++j) {
        f(Mine::at(row_line, i), Mine::at(column_line, j), chain[i][j]);
        chain[i][j] = 0;
      }
  }

  __device__ void end_chain() {
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < kEach; ++j) {
        total[i][j] += chain[i][j];
        chain[i][j] = 0;
      }
  }
};

// What a thread carries from memory to one side: eights of columns, kept as they are stored until they are needed, so
// that reading the next columns overlaps with multiplying these.
template <class T, int kTile>
struct Carried {
  static constexpr int kEights = kTile * kDepth / 8, kMine = (kEights + kTileThreads - 1) / kTileThreads;
  Eight<T> eight[kMine];

  // row_at(r) is the tile's r-th row, or null beyond the last.
  template <class RowAt>
  __device__ void fetch(const RowAt& row_at, int64_t column, int64_t H) {
    for (int i = 0; i < kMine; ++i) {
      const int n = static_cast<int>(threadIdx.x) + i * kTileThreads;
      const T* row = n < kEights ? row_at(n / (kDepth / 8)) : nullptr;
      eight[i] = read_eight(row, column + n % (kDepth / 8) * 8, H);
    }
  }

  __device__ void put(Side<kTile>& side) const {
    for (int i = 0; i < kMine; ++i) {
      const int n = static_cast<int>(threadIdx.x) + i * kTileThreads;
      if (n >= kEights) return;
      float* to = side.at + n % (kDepth / 8) * 8 * Side<kTile>::kStride + n / (kDepth / 8);
      for (int j = 0; j < 8; ++j) to[j * Side<kTile>::kStride] = load(eight[i].at[j]);
    }
  }
};

// The same for a matrix whose sums go along its rows: thread n has column n of the tile.
template <int kTile>
struct CarriedRows {
  static_assert(kTile == kTileThreads);
  float v[kDepth];

  // row_at(k) is the k-th row of these, or null.
  template <class RowAt>
  __device__ void fetch(const RowAt& row_at, int64_t column, int64_t width) {
    for (int k = 0; k < kDepth; ++k) {
      const float* row = column + threadIdx.x < width ? row_at(k) : nullptr;
      v[k] = row ? row[column + threadIdx.x] : 0.0f;
    }
  }

  __device__ void put(Side<kTile>& side) const {
    for (int k = 0; k < kDepth; ++k) side.at[k * Side<kTile>::kStride + threadIdx.x] = v[k];
  }
};

// The tiles of the upper triangle, row by row.
__device__ inline void tile_at(int n, int tiles_a_side, int& row, int& column) {
  row = 0;
  for (int left = tiles_a_side; n >= left; --left, ++row) n -= left;
  column = row + n;
}

}  // namespace moekern::cuda
