#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace longspan::cpu {
namespace {

// Kernels that this machine runs, best first.
std::vector<const TileKernels*> Supported() {
  std::vector<const TileKernels*> found;
#if defined(LONGSPAN_X86)
  // __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&kAvx2Kernels);
  }
#endif
  found.push_back(&kBaselineKernels);
  return found;
}

}  // namespace

const TileKernels& SelectKernels() {
  const std::vector<const TileKernels*> supported = Supported();
  const char* wanted = std::getenv("LONGSPAN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *supported.front();
  std::string names;
  for (const TileKernels* kernels : supported) {
    if (std::string(wanted) == kernels->name) return *kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("LONGSPAN_CPU_ISA = " + std::string(wanted) + ": this machine has " + names +
                              "; unset it to use the first");
}

}  // namespace longspan::cpu
