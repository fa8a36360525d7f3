#include "gather.h"

#include <algorithm>
#include <cstring>

namespace moekern::io {

namespace {

constexpr int64_t kWindow = int64_t{1} << 20;

// Columns of so many bytes, which the compiler knows; `row` begins with the first of them.
template <int64_t kBytes>
void copy_columns(const char* row, const int64_t* columns, int64_t count, char* to) {
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * kBytes, row + (columns[k] - columns[0]) * kBytes, kBytes);
}

void copy_columns(const char* row, const int64_t* columns, int64_t count, int64_t bytes, char* to) {
  if (bytes == 1) return copy_columns<1>(row, columns, count, to);
  if (bytes == 2) return copy_columns<2>(row, columns, count, to);
  if (bytes == 4) return copy_columns<4>(row, columns, count, to);
  for (int64_t k = 0; k < count; ++k)
    std::memcpy(to + k * bytes, row + (columns[k] - columns[0]) * bytes, static_cast<size_t>(bytes));
}

// A byte of the result: its row, the column that it lies in, by its number among those that stay, and where in that.
struct Place {
  int64_t row, column, inside;

  Place(const Piece& piece, int64_t at) {
    const int64_t kept = static_cast<int64_t>(piece.columns.size()), number = at / piece.column_bytes;
    row = number / kept, column = number % kept, inside = at % piece.column_bytes;
  }

  // In the source.
  int64_t of(const Piece& piece) const {
    return piece.offset + (row * piece.width + piece.columns[column]) * piece.column_bytes + inside;
  }
};

}  // namespace

std::pair<int64_t, int64_t> extent(const Part& part) {
  const Piece& piece = *part.gathered;
  return {Place(piece, part.offset).of(piece), Place(piece, part.offset + part.length - 1).of(piece) + 1};
}

void Gatherer::read(const Part& part, char* to) {
  const Piece& piece = *part.gathered;
  const int64_t bytes = piece.column_bytes, kept = static_cast<int64_t>(piece.columns.size());
  const int64_t last = extent(part).second;
  window_.resize(kWindow);
  for (int64_t at = part.offset, stop = at + part.length; at < stop;) {
    const int64_t start = Place(piece, at).of(piece), size = std::min(last - start, kWindow);
    part.source->read(window_.data(), size, start);
    while (at < stop) {
      const Place place(piece, at);
      const int64_t from = place.of(piece) - start;
      if (from >= size) break;
      if (place.inside > 0 || std::min(stop - at, size - from) < bytes) {  // where a part or the window ends
        const int64_t n = std::min({bytes - place.inside, stop - at, size - from});
        std::memcpy(to, window_.data() + from, static_cast<size_t>(n));
        to += n, at += n;
        continue;
      }
      const int64_t* const first = piece.columns.data() + place.column;
      const int64_t* const past = first + std::min(kept - place.column, (stop - at) / bytes);
      const int64_t count = std::upper_bound(first, past, *first + (size - from) / bytes - 1) - first;
      copy_columns(window_.data() + from, first, count, bytes, to);
      to += count * bytes, at += count * bytes;
    }
  }
}

}  // namespace moekern::io
