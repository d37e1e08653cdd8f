// BlockSparseAttention on the CPU: the listed blocks of keys as tiles of rows and keys.
#ifndef LONGSPAN_BLOCK_SPARSE_ATTENTION_ATTENTION_H_
#define LONGSPAN_BLOCK_SPARSE_ATTENTION_ATTENTION_H_

#include "block_sparse_attention/problem.h"
#include "cpu/executor.h"
#include "cpu/tile_kernels.h"

namespace longspan::block_sparse {

// Computes problem.output and problem.lse. Memory beyond the tensors is a few hundred KB per thread, the list of one
// task, and O(M * q_block_size). Throws InvalidOperands when the values of the block lists or of
// nonpad_kv_seqlen are out of range, std::bad_alloc when the executor has no memory.
void Compute(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor);

}  // namespace longspan::block_sparse

#endif  // LONGSPAN_BLOCK_SPARSE_ATTENTION_ATTENTION_H_
