#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "copy.h"
#include "file.h"

namespace moekern::io {

// A stretch of the output that is filled from one place.
struct Part {
  const File* source;   // null: literal
  int64_t offset;       // in source
  const char* literal;  // at its first byte
  int64_t length;
};

// A stretch of the output, at most `limit` bytes, filled from parts[first] to parts[last - 1].
struct Chunk {
  int64_t position;
  int64_t length;
  size_t first, last;
};

using Sources = std::map<std::string, File>;

struct Chunks {
  std::vector<Part> parts;
  std::vector<Chunk> chunks;
  int64_t cloned = 0, holes = 0;
};

// What remains to be copied into `out` (of its full length, all hole) once blocks are cloned, if asked for, and the holes
// of the sources are left out.
Chunks cut(const std::vector<Piece>& pieces, Sources& sources, const File& out, Copy copy, int64_t limit);

}  // namespace moekern::io
