#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "copy.h"
#include "file.h"

namespace moekern::io {

// A stretch of the output that is filled from one place.
struct Part {
  const File* source;   // null: literal or made
  int64_t offset;       // in source, or in what is made or gathered
  const char* literal;  // at its first byte
  int64_t length;
  const Piece* made = nullptr;      // borrowed
  const Piece* gathered = nullptr;  // borrowed: columns of a matrix in source
};

// A stretch of the output, at most `limit` bytes, filled from parts[first] to parts[last - 1]; from one made piece alone
// where there is one.
struct Chunk {
  int64_t position;
  int64_t length;
  size_t first, last;
  const Piece* made;
};

// The bytes of the made piece whose turn it is: one at a time.
class Making {
 public:
  // At the part's first byte; makes the piece at its first part.
  const char* at(const Part& part) {
    if (part.offset == 0) bytes_ = part.made->make();
    return bytes_.get() + part.offset;
  }
  // Lets the piece go after its last part.
  void done(const Part& part) {
    if (part.offset + part.length == part.made->length) bytes_.reset();
  }

 private:
  std::shared_ptr<const char> bytes_;
};

using Sources = std::map<std::string, File>;

struct Chunks {
  std::vector<Part> parts;
  std::vector<Chunk> chunks;
  int64_t cloned = 0, holes = 0;
};

// What remains to be copied into `out` (of its full length, all hole) once blocks are cloned, if asked for, and the holes
// of the sources are left out. Borrows the pieces.
Chunks cut(const std::vector<Piece>& pieces, Sources& sources, const File& out, Copy copy, int64_t limit);

}  // namespace moekern::io
