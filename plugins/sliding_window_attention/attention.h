// SlidingWindowAttention on the CPU: windows, dilation, padding and global tokens as tiles of rows and keys.
#ifndef LONGSPAN_SLIDING_WINDOW_ATTENTION_ATTENTION_H_
#define LONGSPAN_SLIDING_WINDOW_ATTENTION_ATTENTION_H_

#include "cpu/executor.h"
#include "cpu/tile_kernels.h"
#include "sliding_window_attention/problem.h"

namespace longspan::sliding_window {

// Computes problem.output and problem.lse. Memory beyond the tensors is a few hundred KB per thread and O(B * S).
// Throws InvalidOperands when nonpad_kv_seqlen is out of range, std::bad_alloc when the executor has no memory.
void Compute(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor);

}  // namespace longspan::sliding_window

#endif  // LONGSPAN_SLIDING_WINDOW_ATTENTION_ATTENTION_H_
