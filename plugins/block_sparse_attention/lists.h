// The block lists of one execution: which key blocks each row of blocks reads.
#ifndef LONGSPAN_BLOCK_SPARSE_ATTENTION_LISTS_H_
#define LONGSPAN_BLOCK_SPARSE_ATTENTION_LISTS_H_

#include <cstdint>

#include "block_sparse_attention/problem.h"

namespace longspan::block_sparse {

// A tensor whose first two axes, batch and heads, may be 1 and stand for all; `size` elements follow.
struct SharedAxes {
  int64_t Index(int64_t b, int64_t h) const { return ((batches > 1 ? b : 0) * heads + (heads > 1 ? h : 0)) * size; }

  int64_t batches = 0, heads = 0, size = 0;
};

// One of the two lists: (1|B, 1|H_q, n_q) counts and (1|B, 1|H_q, n_q, W) indices; the list of partial blocks has mask
// ids of the same shape, or null.
struct BlockList {
  // The entries of one row of blocks.
  struct Row {
    int64_t count;
    const int32_t* indices;
    const int32_t* masks;
  };
  Row At(int64_t b, int64_t h, int64_t row) const {
    const int64_t index = rows.Index(b, h) + row;
    return {counts[index], indices + index * width, masks == nullptr ? nullptr : masks + index * width};
  }

  SharedAxes rows;
  int64_t width = 0;
  const int32_t* counts = nullptr;
  const int32_t* indices = nullptr;
  const int32_t* masks = nullptr;
};

struct Lists {
  explicit Lists(const Problem& problem);

  BlockList partial, full;
};

// Checks every value that the kernel will read. Throws InvalidOperands, which names the place.
void CheckLists(const Problem& problem, const Lists& lists);

}  // namespace longspan::block_sparse

#endif  // LONGSPAN_BLOCK_SPARSE_ATTENTION_LISTS_H_
