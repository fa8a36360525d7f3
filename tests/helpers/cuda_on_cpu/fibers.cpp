#include "fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moekern::cuda {
extern thread_local unsigned char moekern_shared[];
alignas(16) thread_local unsigned char moekern_shared[cuda_on_cpu::kMostShared + 4096];  // what dynamic_shared gives
}  // namespace moekern::cuda

namespace cuda_on_cpu {

Index thread_index, block_index;
dim3 block_size, grid_size;
std::map<const void*, size_t> shared_asked;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned char kUnwritten = 0xFF;  // NaN in every float

enum class At { running, block, warp, end };

struct Fiber {
  jmp_buf context;
  bool started = false;
  At at = At::end;
  unsigned mask = 0;
  int line = 0, source = 0;
  uint64_t value = 0, result = 0;
  Index index;
  void* stack = nullptr;
};

std::vector<Fiber> fibers;
std::vector<unsigned> warps;  // lanes that wait
std::vector<int> runnable;
int threads = 0, alive = 0, at_block = 0, current = -1;
std::mt19937_64 order;
jmp_buf scheduler;
ucontext_t unused;
const std::function<void()>* body = nullptr;
std::string failure;

void leave() {
  if (!_setjmp(fibers[current].context)) _longjmp(scheduler, 1);
}

std::string place() {
  const auto text = [](const Index& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  return "block " + text(block_index) + " thread " + text(thread_index);
}

void fail(const std::string& what) {
  failure = place() + ": " + what;
  leave();
}

void wake(int fiber) {
  fibers[fiber].at = At::running;
  runnable.push_back(fiber);
}

void wake_block() {
  if (alive == 0 || at_block < alive) return;
  int line = 0;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i].at != At::block) continue;
    if (line && fibers[i].line != line) {
      failure = place() + ": __syncthreads of lines " + std::to_string(line) + " and " + std::to_string(fibers[i].line);
      return;
    }
    line = fibers[i].line;
    wake(i);
  }
  at_block = 0;
}

void entry() {
  for (;;) {
    (*body)();
    fibers[current].at = At::end;
    --alive;
    wake_block();
    leave();
  }
}

void enter(int fiber) {
  current = fiber;
  thread_index = fibers[fiber].index;
  if (_setjmp(scheduler)) return;
  if (fibers[fiber].started) _longjmp(fibers[fiber].context, 1);
  fibers[fiber].started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibers[fiber].stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = &unused;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

void outside(int, siginfo_t* info, void*) {
  if (current < 0) _exit(99);
  failure = place() + ": touches " + std::to_string(reinterpret_cast<uintptr_t>(info->si_addr)) + ", outside of its arguments";
  _longjmp(scheduler, 1);
}

// Faults inside a launch become exceptions; elsewhere they are Python's.
struct Watch {
  struct sigaction before[2];
  Watch() {
    struct sigaction action {};
    action.sa_sigaction = outside;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
  }
  ~Watch() {
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
    current = -1;
  }
};

void prepare(dim3 block) {
  threads = static_cast<int>(block.x * block.y * block.z);
  const size_t had = fibers.size();
  if (static_cast<size_t>(threads) > had) fibers.resize(threads);
  for (size_t i = had; i < fibers.size(); ++i)
    fibers[i].stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int i = 0; i < threads; ++i) {
    const unsigned n = static_cast<unsigned>(i);
    fibers[i].index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
  }
}

std::string waits() {
  std::string text = "threads wait that nothing wakes:";
  for (int i = 0, told = 0; i < threads && told < 4; ++i)
    if (fibers[i].at == At::block || fibers[i].at == At::warp) {
      text += " " + std::to_string(i) + (fibers[i].at == At::block ? " for its block" : " for its warp");
      text += " in line " + std::to_string(fibers[i].line) + ";";
      ++told;
    }
  return text;
}

void run_block(size_t shared) {
  unsigned char* bytes = moekern::cuda::moekern_shared;
  std::memset(bytes, kUnwritten, shared + 4096);
  warps.assign((threads + 31) / 32, 0);
  runnable.clear();
  alive = threads;
  at_block = 0;
  for (int i = 0; i < threads; ++i) wake(i);
  while (!runnable.empty() && failure.empty()) {
    const size_t pick = order() % runnable.size();
    std::swap(runnable[pick], runnable.back());
    const int fiber = runnable.back();
    runnable.pop_back();
    enter(fiber);
  }
  if (failure.empty() && alive) failure = place() + ": " + waits();
  for (size_t i = shared; i < shared + 4096 && failure.empty(); ++i)
    if (bytes[i] != kUnwritten) failure = place() + ": writes shared memory behind the " + std::to_string(shared) + " bytes asked for";
}

}  // namespace

int lane() { return current % 32; }

void meet_block(int line) {
  fibers[current].at = At::block;
  fibers[current].line = line;
  ++at_block;
  wake_block();
  leave();
}

uint64_t exchange(unsigned mask, uint64_t value, int source, int line) {
  const int first = current / 32 * 32, own = lane();
  Fiber& fiber = fibers[current];
  if (!(mask >> own & 1)) fail("line " + std::to_string(line) + ": its lane is not in the mask");
  if (source != kBallot && !(mask >> source & 1)) fail("line " + std::to_string(line) + ": reads a lane that is not in the mask");
  fiber.at = At::warp;
  fiber.mask = mask;
  fiber.line = line;
  fiber.value = value;
  fiber.source = source;
  unsigned& waiting = warps[current / 32];
  waiting |= 1u << own;
  bool complete = (waiting & mask) == mask;
  for (int i = 0; i < 32 && complete; ++i)
    if (mask >> i & 1) complete = fibers[first + i].mask == mask && fibers[first + i].line == line;
  if (complete) {
    uint64_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) votes |= (fibers[first + i].value & 1) << i;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) {
        Fiber& other = fibers[first + i];
        other.result = other.source == kBallot ? votes : fibers[first + other.source].value;
        wake(first + i);
      }
    waiting &= ~mask;
  }
  leave();
  return fiber.result;
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const Watch watch;
  prepare(block);
  body = &kernel;
  grid_size = grid;
  block_size = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, start = order() % blocks;
  for (uint64_t n = 0; n < blocks; ++n) {
    const uint64_t b = (start + n) % blocks;
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared);
    if (failure.empty()) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // they stopped somewhere: they start afresh
    throw std::runtime_error("[cuda on cpu] " + std::exchange(failure, ""));
  }
}

namespace {

struct Allocation {
  char* pages;
  size_t size;
};
std::map<void*, Allocation> allocations;

}  // namespace

void* allocate(size_t bytes, bool at_end) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
  char* pages = static_cast<char*>(mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages == MAP_FAILED) throw std::bad_alloc();
  if (inner) {
    mprotect(pages + page, inner, PROT_READ | PROT_WRITE);
    std::memset(pages + page, kUnwritten, inner);
  }
  char* data = pages + page + (at_end ? inner - bytes : 0);
  allocations[data] = {pages, inner + 2 * page};
  return data;
}

void release(void* data) {
  const Allocation allocation = allocations.at(data);
  munmap(allocation.pages, allocation.size);
  allocations.erase(data);
}

}  // namespace cuda_on_cpu

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void cuda_on_cpu_seed(uint64_t seed) { cuda_on_cpu::order.seed(seed); }
EXPORTED void* cuda_on_cpu_allocate(size_t bytes, bool at_end) { return cuda_on_cpu::allocate(bytes, at_end); }
EXPORTED void cuda_on_cpu_release(void* data) { cuda_on_cpu::release(data); }
EXPORTED size_t cuda_on_cpu_allocations() { return cuda_on_cpu::allocations.size(); }
