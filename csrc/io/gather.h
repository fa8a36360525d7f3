#pragma once
#include <vector>

#include "chunks.h"

namespace moekern::io {

// Reads columns of matrices through a window of bounded size. For one thread.
class Gatherer {
 public:
  // The bytes of a part of a piece with columns.
  void read(const Part& part, char* to);

 private:
  std::vector<char> window_;
};

// What lies between the first and the last byte of a part in its source, the columns that go with those that stay.
std::pair<int64_t, int64_t> extent(const Part& part);

}  // namespace moekern::io
