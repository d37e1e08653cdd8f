#include "block_sparse_attention/problem.h"

#include <algorithm>
#include <string>
#include <utility>

namespace longspan::block_sparse {
namespace {

using InputShapes = std::optional<Shape>[kInputCount];

// Checks the shape of an input, if it is present, whose first axes may be 1 and stand for all.
void ExpectShared(const char* name, const std::optional<Shape>& got, const Shape& shared, const Shape& own) {
  if (!got) return;
  bool fits = got->size() == shared.size() + own.size();
  for (size_t i = 0; fits && i < got->size(); ++i) {
    const int64_t size = (*got)[i];
    fits = i < shared.size() ? size == 1 || size == shared[i] : size == own[i - shared.size()];
  }
  if (fits) return;
  std::string wanted;
  for (int64_t size : shared) wanted += (wanted.empty() ? "1|" : ", 1|") + std::to_string(size);
  for (int64_t size : own) wanted += ", " + std::to_string(size);
  Fail(name, " has shape ", Tuple(*got), ": must be (", wanted, ")");
}

void ExpectTogether(const InputShapes& inputs, Input first, const char* first_name, Input second,
                    const char* second_name) {
  if (inputs[first].has_value() == inputs[second].has_value()) return;
  Fail(inputs[first] ? first_name : second_name, " present: ", first_name, " and ", second_name,
       " come together or not at all");
}

void CheckList(const InputShapes& inputs, Input counts, const char* counts_name, Input indices,
               const char* indices_name, const Shapes& s, int64_t rows) {
  if (!inputs[counts]) Fail(counts_name, " is missing: it is required");
  if (!inputs[indices]) Fail(indices_name, " is missing: it is required");
  ExpectShared(counts_name, inputs[counts], {s.batch, s.q_num_heads}, {rows});
  const Shape& got = *inputs[indices];
  ExpectShared(indices_name, got, {s.batch, s.q_num_heads}, {rows, got.empty() ? 0 : got.back()});
  const Shape& beside = *inputs[counts];
  if (got[0] != beside[0] || got[1] != beside[1]) {
    Fail(indices_name, " has shape ", Tuple(got), " beside ", counts_name, " ", Tuple(beside), ": must begin alike");
  }
}

}  // namespace

void Attributes::Check() const {
  const std::pair<const char*, int64_t> sizes[] = {{"q_block_size", q_block_size}, {"kv_block_size", kv_block_size}};
  for (const auto& [name, size] : sizes) {
    if (size < 1 || size > kSizeLimit) Fail(name, " = ", size, ": must be between 1 and ", kSizeLimit);
  }
  CheckScores();
  CheckHeads();
}

Shapes InferShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes) {
  const Shapes s = InferCommonShapes(inputs, attributes);
  const int64_t rows = attributes.QBlocks(s.seq_q);
  CheckList(inputs, kKvNumBlocks, "kv_num_blocks", kKvIndices, "kv_indices", s, rows);
  CheckList(inputs, kFullKvNumBlocks, "full_kv_num_blocks", kFullKvIndices, "full_kv_indices", s, rows);
  ExpectTogether(inputs, kBlockMaskIds, "block_mask_ids", kBlockMasks, "block_masks");
  ExpectTogether(inputs, kQPositions, "q_positions", kKPositions, "k_positions");
  Expect("block_mask_ids", inputs[kBlockMaskIds], *inputs[kKvIndices]);
  if (inputs[kBlockMasks]) {
    const Shape& masks = *inputs[kBlockMasks];
    const int64_t bytes = (attributes.kv_block_size + 7) / 8;
    if (masks.size() != 3 || masks[1] != attributes.q_block_size || masks[2] != bytes) {
      Fail("block_masks has shape ", Tuple(masks), ": must be (M, ", attributes.q_block_size, ", ", bytes, ")");
    }
  }
  Expect("attn_mask", inputs[kAttnMask], {s.batch, s.seq_k});
  Expect("nonpad_kv_seqlen", inputs[kNonpadKvSeqlen], {s.batch});
  Expect("sinks", inputs[kSinks], {s.q_num_heads});
  ExpectShared("q_positions", inputs[kQPositions], {s.batch, s.q_num_heads}, {s.seq_q});
  ExpectShared("k_positions", inputs[kKPositions], {s.batch, s.kv_num_heads}, {s.seq_k});
  ExpectShared("distance_bias", inputs[kDistanceBias], {s.q_num_heads}, {std::max<int64_t>(s.seq_q + s.seq_k - 1, 0)});
  return s;
}

}  // namespace longspan::block_sparse
