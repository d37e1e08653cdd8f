#include "block_sparse_attention/lists.h"

namespace longspan::block_sparse {
namespace {

BlockList ReadList(const Problem& problem, Input counts, Input indices) {
  BlockList list;
  const Shape& shape = *problem.input_shapes[indices];
  list.rows = {shape[0], shape[1], shape[2]};
  list.width = shape[3];
  list.counts = static_cast<const int32_t*>(problem.inputs[counts]);
  list.indices = static_cast<const int32_t*>(problem.inputs[indices]);
  return list;
}

[[noreturn]] void Refuse(const char* name, const BlockList& list, int64_t row, int64_t slot, int64_t value, int64_t low,
                         int64_t high) {
  const int64_t rows = list.rows.size, heads = list.rows.heads;
  Fail(name, "[batch ", row / rows / heads, ", head ", row / rows % heads, ", row ", row % rows,
       slot < 0 ? "" : ", slot ", slot < 0 ? "" : std::to_string(slot), "] = ", value, ": must be between ", low,
       " and ", high);
}

// Checks the read entries of `values`, which has the shape of the list's indices.
void CheckEntries(const char* name, const BlockList& list, const int32_t* values, int64_t low, int64_t high) {
  const int64_t rows = list.rows.batches * list.rows.heads * list.rows.size;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* entries = values + row * list.width;
    // One pass without a branch per entry; the place matters only when something is wrong.
    bool good = true;
    for (int64_t slot = 0; slot < list.counts[row]; ++slot) good &= entries[slot] >= low && entries[slot] <= high;
    if (good) continue;
    int64_t slot = 0;
    while (entries[slot] >= low && entries[slot] <= high) ++slot;
    Refuse(name, list, row, slot, entries[slot], low, high);
  }
}

void CheckList(const char* counts, const char* indices, const BlockList& list, int64_t kv_blocks, int64_t masks) {
  const int64_t rows = list.rows.batches * list.rows.heads * list.rows.size;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = list.counts[row];
    if (count < 0 || count > list.width) Refuse(counts, list, row, -1, count, 0, list.width);
  }
  CheckEntries(indices, list, list.indices, 0, kv_blocks - 1);
  if (list.masks != nullptr) CheckEntries("block_mask_ids", list, list.masks, -1, masks - 1);
}

}  // namespace

Lists::Lists(const Problem& problem)
    : partial(ReadList(problem, kKvNumBlocks, kKvIndices)), full(ReadList(problem, kFullKvNumBlocks, kFullKvIndices)) {
  partial.masks = static_cast<const int32_t*>(problem.inputs[kBlockMaskIds]);
}

void CheckLists(const Problem& problem, const Lists& lists) {
  const int64_t kv_blocks = problem.attributes.KvBlocks(problem.shapes.seq_k);
  const int64_t masks = problem.input_shapes[kBlockMasks] ? (*problem.input_shapes[kBlockMasks])[0] : 0;
  CheckList("kv_num_blocks", "kv_indices", lists.partial, kv_blocks, masks);
  CheckList("full_kv_num_blocks", "full_kv_indices", lists.full, kv_blocks, masks);
}

}  // namespace longspan::block_sparse
