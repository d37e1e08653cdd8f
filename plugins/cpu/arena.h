// Many arrays in one block of memory.
#ifndef LONGSPAN_CPU_ARENA_H_
#define LONGSPAN_CPU_ARENA_H_

#include <cstddef>
#include <cstdint>

namespace longspan::cpu {

// Carves arrays out of one block of memory; with no block it only measures.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  // The memory has kAlignment bytes more than the arrays need.
  explicit Arena(void* memory)
      : memory_(memory == nullptr ? nullptr
                                  : static_cast<char*>(memory) +
                                        (kAlignment - reinterpret_cast<uintptr_t>(memory) % kAlignment) % kAlignment) {}
  template <typename T>
  T* Take(int64_t count) {
    T* result = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }
  size_t Used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_ARENA_H_
