#include "ort/block_sparse_attention_op.h"

#include "block_sparse_attention/attention.h"
#include "block_sparse_attention/node.h"
#include "ort/cuda_attention_op.h"

namespace longspan::ort {
namespace {

struct BlockSparse : block_sparse::Operator {
  static void Compute(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor) {
    block_sparse::Compute(problem, kernels, executor);
  }
};

}  // namespace

AttentionOps BlockSparseAttentionOps() { return MakeAttentionOps<BlockSparse, AttentionKernel<BlockSparse>>(nullptr); }

AttentionOps BlockSparseAttentionCudaOps(const char* provider) {
  return MakeAttentionOps<BlockSparse, CudaAttentionKernel<BlockSparse>>(provider);
}

}  // namespace longspan::ort
