// Products of matrices in float32: each number is a sum over k in order, every product a fused multiply-add. How many
// sums stay in registers depends on the instruction set, their order does not: the same bits on all of them.
#pragma once

#include <memory>

#include "simd.h"

namespace moekern::cpu {

constexpr int64_t kProductDepth = 256;  // numbers that are summed in float32
constexpr int64_t kMostTile = 14 * 32;  // products of a tile
constexpr int64_t kPackedRows = 672;    // of the left matrix that stay packed while columns pass: 0.7 MB

// product [rows, columns] = the sum over k < depth of a [depth, rows] times b [depth, columns].
struct Tile {
  int64_t rows, columns;
  void (*multiply)(const float* a, const float* b, int64_t depth, float* product);
};

Tile tile_of(Level level);

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory that starts on a line of the cache.
class Lines {
 public:
  explicit Lines(int64_t n) : held_(new char[n * sizeof(float) + kLine]) {
    void* at = held_.get();
    size_t room = n * sizeof(float) + kLine;
    at_ = static_cast<float*>(std::align(kLine, n * sizeof(float), at, room));
  }
  float* at() const { return at_; }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<char[]> held_;
  float* at_;
};

// Rows of the left matrix that are packed at a time: the same number of tiles each time, but for the last.
inline int64_t packed_rows(const Tile& tile, int64_t rows) {
  const int64_t tiles = parts(rows, tile.rows), times = parts(tiles, kPackedRows / tile.rows);
  return parts(tiles, std::max<int64_t>(times, 1)) * tile.rows;
}

// What one thread packs.
struct Packed {
  Packed(const Tile& tile, int64_t rows)
      : a(packed_rows(tile, rows) * kProductDepth), b(tile.columns * kProductDepth) {}
  Lines a;  // [tiles, depth, tile.rows]
  Lines b;  // [depth, tile.columns]
};

// `width` numbers from each of `depth` places, with zeros behind the first `there`.
template <class At>
inline void pack(int64_t depth, int64_t width, int64_t there, const At& at, float* to) {
  if (there >= width) {
    for (int64_t k = 0; k < depth; ++k, to += width) std::memcpy(to, at(k), width * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < depth; ++k, to += width) {
    std::memcpy(to, at(k), there * sizeof(float));
    std::fill(to + there, to + width, 0.0f);
  }
}

}  // namespace moekern::cpu
