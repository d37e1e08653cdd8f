// How one execution is cut into tasks that threads run independently.
#ifndef LONGSPAN_BLOCK_SPARSE_ATTENTION_PLAN_H_
#define LONGSPAN_BLOCK_SPARSE_ATTENTION_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/row_tile.h"
#include "block_sparse_attention/lists.h"
#include "block_sparse_attention/problem.h"

namespace longspan::block_sparse {

// The columns of a block that one row of a block mask allows: some of [first, last), or all of them.
struct MaskRow {
  int first = 0;
  int last = 0;
  bool holes = false;
};

// Query rows that are computed together, of one batch entry and of heads that share keys and lists: whole consecutive
// rows of blocks, or, where a row of blocks is too tall for a tile, some of its queries.
struct Task {
  int64_t batch = 0;
  int64_t head = 0;  // first query head
  int64_t heads = 0;
  int64_t block = 0;  // first row of blocks
  int64_t blocks = 0;
  int64_t first = 0;  // queries [first, last)
  int64_t last = 0;
  double cost = 0;  // query-key pairs, about
};

struct Plan {
  explicit Plan(const Problem& problem) : lists(problem) {}

  const Lists lists;
  TileSize tile;
  int64_t max_listings = 0;  // of a task
  int64_t max_blocks = 0;    // rows of blocks of a task
  std::vector<KeyPadding> batches;
  int64_t mask_rows = 0;       // rows of a mask that queries can meet
  std::vector<MaskRow> masks;  // (M, mask_rows)
  std::vector<Task> tasks;     // heaviest first
};

// Keys from here on are padding, or come after every query before `last`.
inline int64_t KeyEnd(const Problem& problem, const KeyPadding& padding, int64_t last) {
  const bool causal = problem.attributes.is_causal && !problem.input_shapes[kQPositions];
  return causal ? std::min(padding.length, padding.offset + last) : padding.length;
}

// Throws InvalidOperands when the values of the block lists or of nonpad_kv_seqlen are out of range.
Plan MakePlan(const Problem& problem);

}  // namespace longspan::block_sparse

#endif  // LONGSPAN_BLOCK_SPARSE_ATTENTION_PLAN_H_
