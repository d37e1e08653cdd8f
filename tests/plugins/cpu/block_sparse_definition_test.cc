// What refuses a node or its lists before anything is read, and the planner. Meant for the sanitizers.
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "block_sparse_attention/plan.h"
#include "block_sparse_attention/problem.h"
#include "testing.h"

namespace longspan::block_sparse {
namespace {

using testing::Expect;
using testing::Refused;

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

void CheckAttributes() {
  for (int64_t value : {int64_t{-1}, int64_t{0}, kSizeLimit + 1, kHuge}) {
    Attributes a;
    a.q_block_size = value;
    Refused("q_block_size = " + std::to_string(value) + ": must be between 1 and 2147483647", [&] { a.Check(); });
    a = {};
    a.kv_block_size = value;
    Refused("kv_block_size = " + std::to_string(value), [&] { a.Check(); });
  }
  Attributes a;
  a.softcap = -1;
  Refused("softcap", [&] { a.Check(); });
  a = {};
  a.q_block_size = a.kv_block_size = a.q_num_heads = a.kv_num_heads = kSizeLimit;
  a.Check();
}

// Two batch entries, four heads on two, 10 queries and 7 keys in blocks of 4: 3 rows of 2 blocks. The lists are one
// partial and one full block wide.
struct Site {
  Site() {
    problem.attributes.q_block_size = problem.attributes.kv_block_size = 4;
    auto& shapes = problem.input_shapes;
    shapes[kQ] = Shape{2, 4, 10, 8};
    shapes[kK] = shapes[kV] = Shape{2, 2, 7, 8};
    shapes[kKvNumBlocks] = shapes[kFullKvNumBlocks] = Shape{2, 1, 3};
    shapes[kKvIndices] = shapes[kFullKvIndices] = shapes[kBlockMaskIds] = Shape{2, 1, 3, 1};
    shapes[kBlockMasks] = Shape{2, 4, 1};
    problem.inputs[kKvNumBlocks] = counts.data();
    problem.inputs[kKvIndices] = indices.data();
    problem.inputs[kBlockMaskIds] = ids.data();
    problem.inputs[kBlockMasks] = masks.data();
    problem.inputs[kFullKvNumBlocks] = full_counts.data();
    problem.inputs[kFullKvIndices] = full_indices.data();
  }

  Shapes Infer() const { return InferShapes(problem.input_shapes, problem.attributes); }
  Plan Make() {
    problem.shapes = Infer();
    return MakePlan(problem);
  }

  Problem problem;
  std::vector<int32_t> counts = std::vector<int32_t>(6, 1), indices = std::vector<int32_t>(6),
                       ids = std::vector<int32_t>(6), full_counts = counts, full_indices = indices;
  std::vector<uint8_t> masks = std::vector<uint8_t>(8);
};

void CheckShapes() {
  Expect(Site().Infer().seq_k == 7, "the site");
  const auto refused = [](const std::string& message, int input, const std::optional<Shape>& shape) {
    Site site;
    site.problem.input_shapes[input] = shape;
    Refused(message, [&] { site.Infer(); });
  };
  for (int input = 0; input <= kFullKvIndices; ++input) refused("required", input, std::nullopt);
  refused("kv_num_blocks has shape (2, 1, 4): must be (1|2, 1|4, 3)", kKvNumBlocks, Shape{2, 1, 4});
  refused("kv_num_blocks has shape (): must be (1|2, 1|4, 3)", kKvNumBlocks, Shape{});
  refused("kv_indices has shape (): must be (1|2, 1|4, 3, 0)", kKvIndices, Shape{});
  refused("kv_indices has shape (2, 2, 3, 1): must be (1|2, 1|4, 3, 1)", kKvIndices, Shape{2, 2, 3, 1});
  refused("full_kv_indices has shape (1, 1, 3, 1) beside full_kv_num_blocks (2, 1, 3): must begin alike",
          kFullKvIndices, Shape{1, 1, 3, 1});
  refused("block_masks present: block_mask_ids and block_masks come together", kBlockMaskIds, std::nullopt);
  refused("block_mask_ids has shape (2, 1, 3, 2): must be (2, 1, 3, 1)", kBlockMaskIds, Shape{2, 1, 3, 2});
  refused("block_masks has shape (2, 4, 2): must be (M, 4, 1)", kBlockMasks, Shape{2, 4, 2});
  refused("block_masks has shape (): must be (M, 4, 1)", kBlockMasks, Shape{});
  refused("q_positions present: q_positions and k_positions come together", kQPositions, Shape{1, 1, 10});
  refused("k_positions present: q_positions and k_positions come together", kKPositions, Shape{1, 1, 7});
  refused("attn_mask has shape (2, 10): must be (2, 7)", kAttnMask, Shape{2, 10});
  refused("distance_bias has shape (2, 16): must be (1|4, 16)", kDistanceBias, Shape{2, 16});
  refused("distance_bias has shape (1, 9223372036854775807)", kDistanceBias, Shape{1, kHuge});
}

void CheckValues() {
  const auto refused = [](const std::string& message, const std::function<void(Site*)>& spoil) {
    Site site;
    spoil(&site);
    Refused(message, [&] { site.Make(); });
  };
  refused("kv_num_blocks[batch 1, head 0, row 2] = 2: must be between 0 and 1", [](Site* s) { s->counts[5] = 2; });
  refused("kv_num_blocks[batch 0, head 0, row 1] = -1: must be between 0 and 1", [](Site* s) { s->counts[1] = -1; });
  refused("kv_indices[batch 1, head 0, row 0, slot 0] = 2: must be between 0 and 1",
          [](Site* s) { s->indices[3] = 2; });
  refused("kv_indices[batch 0, head 0, row 0, slot 0] = -2147483648: must be",
          [](Site* s) { s->indices[0] = std::numeric_limits<int32_t>::min(); });
  refused("block_mask_ids[batch 0, head 0, row 2, slot 0] = -2: must be between -1 and 1",
          [](Site* s) { s->ids[2] = -2; });
  refused("block_mask_ids[batch 0, head 0, row 2, slot 0] = 2: must be", [](Site* s) { s->ids[2] = 2; });
  refused("full_kv_num_blocks[batch 0, head 0, row 0] = 2147483647: must be",
          [](Site* s) { s->full_counts[0] = std::numeric_limits<int32_t>::max(); });
  refused("full_kv_indices[batch 1, head 0, row 2, slot 0] = 2: must be", [](Site* s) { s->full_indices[5] = 2; });
  const std::vector<int64_t> lengths = {7, 8};
  refused("nonpad_kv_seqlen[1] = 8: must be between 0 and the number of keys, 7",
          [&](Site* s) { s->problem.inputs[kNonpadKvSeqlen] = lengths.data(); });
  // What no count reaches is not looked at.
  Site site;
  site.counts.assign(6, 0), site.indices.assign(6, -5), site.ids.assign(6, 99);
  Expect(!site.Make().tasks.empty(), "unread entries");
}

// Every row belongs to exactly one task, whatever the sizes of blocks, and no task is larger than a tile.
void CheckPlans() {
  for (int64_t size : {int64_t{1}, int64_t{7}, int64_t{16}, int64_t{64}, int64_t{250}, kSizeLimit}) {
    for (int64_t heads : {1, 2, 4}) {
      Problem problem;
      problem.attributes.q_block_size = size;
      problem.shapes = {true, 2, heads, 1, 301, 301, 64, 64};
      const int64_t rows = problem.attributes.QBlocks(301), width = 2;
      std::vector<int32_t> counts(static_cast<size_t>(rows), width), indices;
      for (int64_t r = 0; r < rows; ++r) indices.insert(indices.end(), {0, static_cast<int32_t>(r % 3)});
      const std::vector<int32_t> none(static_cast<size_t>(rows));
      problem.input_shapes[kKvIndices] = Shape{1, 1, rows, width};
      problem.input_shapes[kFullKvIndices] = Shape{1, 1, rows, 0};
      problem.inputs[kKvNumBlocks] = counts.data(), problem.inputs[kKvIndices] = indices.data();
      problem.inputs[kFullKvNumBlocks] = none.data(), problem.inputs[kFullKvIndices] = none.data();
      const Plan plan = MakePlan(problem);
      std::vector<int> seen(static_cast<size_t>(2 * heads * 301));
      double cost = std::numeric_limits<double>::infinity();
      for (const Task& task : plan.tasks) {
        Expect(task.cost <= cost, "heavy tasks come first");
        cost = task.cost;
        Expect((task.last - task.first) * task.heads <= plan.tile.rows, "rows of a task fit a tile");
        Expect(task.blocks <= plan.max_blocks && task.first / size == task.block &&
                   (task.last - 1) / size == task.block + task.blocks - 1,
               "rows of blocks of a task");
        for (int64_t q = task.first; q < task.last; ++q) {
          for (int64_t h = task.head; h < task.head + task.heads; ++h) {
            ++seen[static_cast<size_t>((task.batch * heads + h) * 301 + q)];
          }
        }
      }
      Expect(seen == std::vector<int>(seen.size(), 1), "rows of blocks of " + std::to_string(size));
    }
  }
}

// What is causal counts, not what is listed: with every block listed, later rows are heavier.
void CheckCosts() {
  Problem problem;
  problem.attributes.q_block_size = problem.attributes.kv_block_size = 64;
  problem.attributes.is_causal = true;
  problem.shapes = {true, 1, 1, 1, 1024, 1024, 64, 64};
  const std::vector<int32_t> counts(16, 16), none(16);
  std::vector<int32_t> indices;
  for (int32_t i = 0; i < 256; ++i) indices.push_back(i % 16);
  problem.input_shapes[kKvIndices] = Shape{1, 1, 16, 0};
  problem.input_shapes[kFullKvIndices] = Shape{1, 1, 16, 16};
  problem.inputs[kKvNumBlocks] = none.data(), problem.inputs[kKvIndices] = none.data();
  problem.inputs[kFullKvNumBlocks] = counts.data(), problem.inputs[kFullKvIndices] = indices.data();
  const auto tasks = MakePlan(problem).tasks;
  Expect(tasks.front().last == 1024 && tasks.back().first == 0, "causal rows in order of their cost");
  double cost = 0;
  for (const Task& task : tasks) cost += task.cost;
  Expect(cost == 64.0 * 64 * 17 * 8, "pairs of causal blocks");
}

}  // namespace
}  // namespace longspan::block_sparse

int main() {
  using namespace longspan;
  block_sparse::CheckAttributes();
  block_sparse::CheckShapes();
  block_sparse::CheckValues();
  block_sparse::CheckPlans();
  block_sparse::CheckCosts();
  return testing::failures != 0;
}
