// BlockSparseAttention for the glue to runtimes: its attributes and the types of its operands.
#ifndef LONGSPAN_BLOCK_SPARSE_ATTENTION_NODE_H_
#define LONGSPAN_BLOCK_SPARSE_ATTENTION_NODE_H_

#include "attention/node.h"
#include "block_sparse_attention/problem.h"
#include "cuda/node.h"

namespace longspan::block_sparse {

struct Operator {
  using Attributes = block_sparse::Attributes;
  using Problem = block_sparse::Problem;
  static constexpr const char* kName = "BlockSparseAttention";
  static constexpr size_t kInputCount = block_sparse::kInputCount;

  // Throws InvalidOperands, and what the reader throws.
  template <typename Reader>
  static Attributes ReadAttributes(const Reader& node) {
    Attributes a;
    a.q_block_size = node.Int("q_block_size", a.q_block_size);
    a.kv_block_size = node.Int("kv_block_size", a.kv_block_size);
    a.exclude_self = node.Int("exclude_self", a.exclude_self) != 0;
    ReadCommonAttributes(node, &a);
    a.Check();
    return a;
  }

  static Shapes CheckShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& a) {
    return InferShapes(inputs, a);
  }

  // The attributes that only this operator has, for the choice and the parameters of GPU kernels.
  static void Describe(const Attributes& a, cuda::Node* node) {
    node->integers["q_block_size"] = a.q_block_size;
    node->integers["kv_block_size"] = a.kv_block_size;
    node->integers["exclude_self"] = a.exclude_self;
  }

  static OperandType InputType(size_t index) {
    switch (index) {
      case kQ:
      case kK:
      case kV:
      case kSinks:
      case kDistanceBias:
        return OperandType::kT;
      case kBlockMasks:
        return OperandType::kUint8;
      case kAttnMask:
        return OperandType::kBool;
      case kNonpadKvSeqlen:
        return OperandType::kInt64;
      default:
        return OperandType::kInt32;
    }
  }

  static bool IsRequired(size_t index) { return index <= kFullKvIndices; }
};

}  // namespace longspan::block_sparse

#endif  // LONGSPAN_BLOCK_SPARSE_ATTENTION_NODE_H_
