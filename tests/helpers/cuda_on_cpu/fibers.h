// A block's threads as fibers: they switch only where threads meet, in an order drawn from a seed, so that a missing
// barrier shows. A barrier not all reach, an access outside of an allocation and shared memory over what was asked end
// the launch with an exception that says where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>

namespace cuda_on_cpu {

constexpr int kMostShared = 227 * 1024;
constexpr int kBallot = -1;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern Index thread_index, block_index;
extern dim3 block_size, grid_size;
extern std::map<const void*, size_t> shared_asked;  // by kernel

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

// Called by fibers.
void meet_block(int line);
// The source lane's value, once all the mask's lanes are here; for kBallot the lanes whose values are odd.
uint64_t exchange(unsigned mask, uint64_t value, int source, int line);
int lane();

// Memory between pages that may not be touched, flush with the end or with the start. Filled with 0xFF.
void* allocate(size_t bytes, bool at_end);
void release(void* data);

}  // namespace cuda_on_cpu
