#include "simd.h"

namespace moekern::cpu {

std::vector<std::string> levels() {
  std::vector<std::string> names{"baseline"};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v3) names.emplace_back("x86-64-v3");
  if (v4) names.emplace_back("x86-64-v4");
#endif
  return names;
}

Level level_of(const std::string& name) {
  const std::vector<std::string> names = levels();
  if (name.empty()) return static_cast<Level>(names.size() - 1);
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<Level>(i);
  throw ArgumentError("level", "expected an instruction set of this machine, got " + name);
}

}  // namespace moekern::cpu
