#include "ort/block_sparse_attention_op.h"

#include "block_sparse_attention/attention.h"
#include "block_sparse_attention/problem.h"
#include "ort/cuda_attention_op.h"

namespace longspan::ort {
namespace {

struct BlockSparse {
  using Attributes = block_sparse::Attributes;
  using Problem = block_sparse::Problem;
  static constexpr const char* kName = "BlockSparseAttention";
  static constexpr size_t kInputCount = block_sparse::kInputCount;

  static Attributes ReadAttributes(const AttributeReader& node) {
    Attributes a;
    a.q_block_size = node.Int("q_block_size", a.q_block_size);
    a.kv_block_size = node.Int("kv_block_size", a.kv_block_size);
    a.exclude_self = node.Int("exclude_self", a.exclude_self) != 0;
    ReadCommonAttributes(node, &a);
    a.Check();
    return a;
  }

  // The attributes that only this operator has, for the choice and the parameters of GPU kernels.
  static void Describe(const Attributes& a, cuda::Node* node) {
    node->integers["q_block_size"] = a.q_block_size;
    node->integers["kv_block_size"] = a.kv_block_size;
    node->integers["exclude_self"] = a.exclude_self;
  }

  static ONNXTensorElementDataType InputType(size_t index) {
    switch (index) {
      case kQ:
      case kK:
      case kV:
      case block_sparse::kSinks:
      case block_sparse::kDistanceBias:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
      case block_sparse::kBlockMasks:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
      case block_sparse::kAttnMask:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
      case block_sparse::kNonpadKvSeqlen:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      default:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }
  }

  static bool IsRequired(size_t index) { return index <= block_sparse::kFullKvIndices; }

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
