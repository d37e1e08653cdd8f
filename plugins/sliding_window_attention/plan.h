// How one execution is cut into tasks that threads run independently.
#ifndef LONGSPAN_SLIDING_WINDOW_ATTENTION_PLAN_H_
#define LONGSPAN_SLIDING_WINDOW_ATTENTION_PLAN_H_

#include <cstdint>
#include <vector>

#include "attention/row_tile.h"
#include "sliding_window_attention/problem.h"

namespace longspan::sliding_window {

// What the masks say about one batch entry. `holes`: some key below length is padding or global, so that band keys must
// be picked one by one.
struct BatchMasks : KeyPadding {
  std::vector<int32_t> global_keys;  // valid global keys, ascending
  std::vector<int32_t> global_rows;  // query rows whose token is global, ascending
};

// Rows of one batch entry and of heads that share keys, with the same dilation. A local task's rows are
// residue + t * dilation for t in [first, first + count), global rows left out; a global task's rows are
// global_rows[first .. first + count).
struct Task {
  bool global = false;
  int64_t batch = 0;
  int64_t head = 0;  // first query head
  int64_t heads = 0;
  int64_t residue = 0;
  int64_t first = 0;
  int64_t count = 0;
  double cost = 0;  // query-key pairs, about
};

struct Plan {
  TileSize tile;
  std::vector<BatchMasks> batches;
  std::vector<Task> tasks;  // heaviest first
};

// Throws InvalidOperands when nonpad_kv_seqlen is out of range.
Plan MakePlan(const Problem& problem);

// The dilation of a query head.
inline int64_t Dilation(const Attributes& attributes, int64_t head) {
  return attributes.dilation.size() > 1 ? attributes.dilation[static_cast<size_t>(head)] : attributes.dilation[0];
}

}  // namespace longspan::sliding_window

#endif  // LONGSPAN_SLIDING_WINDOW_ATTENTION_PLAN_H_
