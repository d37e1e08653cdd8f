// Runs a plan's tasks on all threads of the host.
#ifndef LONGSPAN_ATTENTION_TASKS_H_
#define LONGSPAN_ATTENTION_TASKS_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>
#include <vector>

#include "cpu/arena.h"
#include "cpu/executor.h"

namespace longspan {

// Calls Run(task) of a Worker for every task. `make` makes a Worker for one thread; its Carve(Arena*) takes the scratch
// memory that it needs, the same whenever it is called. Tasks start in their order, so the heaviest come first.
// Throws std::bad_alloc when the executor has no memory.
template <typename Task, typename MakeWorker>
void RunTasks(const std::vector<Task>& tasks, const MakeWorker& make, cpu::Executor& executor) {
  struct Shared {
    const std::vector<Task>& tasks;
    const MakeWorker& make;
    cpu::Executor& executor;
    std::atomic<size_t> next{0};
    std::atomic<bool> out_of_memory{false};
  };
  const auto drain = [](void* context, size_t) {
    Shared& shared = *static_cast<Shared*>(context);
    size_t index = shared.next.fetch_add(1);
    if (index >= shared.tasks.size()) return;
    auto worker = shared.make();
    cpu::Arena measure(nullptr);
    worker.Carve(&measure);
    void* scratch = shared.executor.Allocate(measure.Used() + cpu::Arena::kAlignment);
    if (scratch == nullptr) {
      shared.out_of_memory = true;
      return;
    }
    cpu::Arena arena(scratch);
    worker.Carve(&arena);
    for (; index < shared.tasks.size(); index = shared.next.fetch_add(1)) worker.Run(shared.tasks[index]);
    shared.executor.Free(scratch);
  };
  if (tasks.empty()) return;
  Shared shared{tasks, make, executor};
  // One call per core, each running tasks until none is left. A pool with fewer threads makes the calls one after the
  // other; the late ones find nothing to do.
  executor.ParallelFor(drain, std::min(cpu::HardwareThreads(), tasks.size()), &shared);
  if (shared.out_of_memory) throw std::bad_alloc();
}

}  // namespace longspan

#endif  // LONGSPAN_ATTENTION_TASKS_H_
