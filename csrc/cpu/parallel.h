// Fork and join. Tasks are handed out in any order and each writes its own results, so threads never change a bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace moekern::cpu {

inline int workers_for(int64_t tasks, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, threads)));
}

// task(i, worker) for 0 <= i < tasks and 0 <= worker < workers_for(tasks, threads). A task must not throw.
template <class Task>
void parallel_for(int64_t tasks, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t i = next++; i < tasks; i = next++) task(i, worker);
  };
  std::vector<std::thread> others;
  const int workers = workers_for(tasks, threads);
  others.reserve(workers - 1);
  try {
    for (int worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started and this one do the work.
  }
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace moekern::cpu
