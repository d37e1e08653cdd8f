// One execution of BlockSparseAttention: attributes, shapes and pointers, checked against the definition.
#ifndef LONGSPAN_BLOCK_SPARSE_ATTENTION_PROBLEM_H_
#define LONGSPAN_BLOCK_SPARSE_ATTENTION_PROBLEM_H_

#include <cstdint>
#include <optional>

#include "attention/operands.h"

namespace longspan::block_sparse {

// Positions of the operator's inputs on a node, after kQ, kK and kV.
enum Input {
  kKvNumBlocks = kCommonInputs,
  kKvIndices,
  kFullKvNumBlocks,
  kFullKvIndices,
  kBlockMaskIds,
  kBlockMasks,
  kAttnMask,
  kNonpadKvSeqlen,
  kSinks,
  kQPositions,
  kKPositions,
  kDistanceBias,
  kInputCount
};

struct Attributes : CommonAttributes {
  int64_t q_block_size = 128;
  int64_t kv_block_size = 128;
  bool exclude_self = false;

  // Throws InvalidOperands when a value is outside what the definition allows.
  void Check() const;

  // Rows of blocks of `seq_q` queries, and blocks of `seq_k` keys.
  int64_t QBlocks(int64_t seq_q) const { return (seq_q + q_block_size - 1) / q_block_size; }
  int64_t KvBlocks(int64_t seq_k) const { return (seq_k + kv_block_size - 1) / kv_block_size; }
};

// Everything that the kernel reads and writes. Shapes and pointers of absent inputs are empty.
struct Problem : Execution {
  Attributes attributes;
  std::optional<Shape> input_shapes[kInputCount];
  const void* inputs[kInputCount] = {};
};

// Checks the shapes of all inputs present and returns the sizes. Throws InvalidOperands.
Shapes InferShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes);

}  // namespace longspan::block_sparse

#endif  // LONGSPAN_BLOCK_SPARSE_ATTENTION_PROBLEM_H_
