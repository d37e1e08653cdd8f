// What a kernel needs from its host: threads and memory. ONNX Runtime's in production, a stand-in in the tests.
#ifndef LONGSPAN_CPU_EXECUTOR_H_
#define LONGSPAN_CPU_EXECUTOR_H_

#include <algorithm>
#include <cstddef>
#include <thread>

namespace longspan::cpu {

// Threads that this machine runs at the same time.
inline size_t HardwareThreads() { return std::max(1u, std::thread::hardware_concurrency()); }

class Executor {
 public:
  virtual ~Executor() = default;

  // Calls fn(context, i) for i in [0, count), possibly at the same time from several threads. `fn` must not throw.
  virtual void ParallelFor(void (*fn)(void* context, size_t i), size_t count, void* context) = 0;

  // Memory for any type, or nullptr. May be called from the threads of ParallelFor.
  virtual void* Allocate(size_t bytes) = 0;
  virtual void Free(void* memory) = 0;
};

}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_EXECUTOR_H_
