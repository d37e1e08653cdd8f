#include "block_sparse_attention/plan.h"

#include <algorithm>
#include <utility>

namespace longspan::block_sparse {
namespace {

// What packing a key costs, in pairs of a query and a key.
constexpr int64_t kPackCost = 8;

// Merged tasks list at most this many blocks, which bounds the memory of a thread.
constexpr int64_t kMaxMergedListings = 8192;

// Columns below `columns` whose bits are set: the first, the last, and whether some between are not.
MaskRow ReadMaskRow(const uint8_t* bits, int64_t columns) {
  MaskRow row;
  int count = 0;
  for (int64_t begin = 0; begin < columns; begin += 64) {
    const int64_t size = std::min<int64_t>(64, columns - begin);
    uint64_t word = 0;
    for (int64_t byte = 0; 8 * byte < size; ++byte) word |= uint64_t{bits[begin / 8 + byte]} << (8 * byte);
    if (size < 64) word &= (uint64_t{1} << size) - 1;
    if (word == 0) continue;
    if (count == 0) row.first = static_cast<int>(begin) + __builtin_ctzll(word);
    row.last = static_cast<int>(begin) + 64 - __builtin_clzll(word);
    count += __builtin_popcountll(word);
  }
  row.holes = row.last - row.first != count;
  return row;
}

bool SameEntries(const BlockList& list, int64_t b, int64_t h, int64_t other) {
  if (list.rows.heads == 1) return true;
  for (int64_t r = 0; r < list.rows.size; ++r) {
    const BlockList::Row x = list.At(b, h, r), y = list.At(b, other, r);
    if (x.count != y.count || !std::equal(x.indices, x.indices + x.count, y.indices)) return false;
    if (x.masks != nullptr && !std::equal(x.masks, x.masks + x.count, y.masks)) return false;
  }
  return true;
}

class Planner {
 public:
  explicit Planner(const Problem& problem)
      : problem_(problem), attributes_(problem.attributes), shapes_(problem.shapes), plan_(problem) {
    plan_.tile = ChooseTileSize(shapes_);
    blocks_ = attributes_.QBlocks(shapes_.seq_q);
    in_task_.resize(static_cast<size_t>(attributes_.KvBlocks(shapes_.seq_k)));
    in_row_.resize(in_task_.size());
  }

  Plan Make() {
    CheckLists(problem_, plan_.lists);
    for (int64_t b = 0; b < shapes_.batch; ++b) {
      plan_.batches.push_back(ReadPadding(shapes_, problem_.inputs[kNonpadKvSeqlen], problem_.inputs[kAttnMask], b));
    }
    ReadMasks();
    for (int64_t b = 0; b < shapes_.batch; ++b) {
      for (int64_t head = 0; head < shapes_.q_num_heads;) {
        // Heads that share a tile: of one group, with the same lists, and not more than the tile has rows.
        int64_t heads = 1;
        while (heads < plan_.tile.rows && (head + heads) % shapes_.Group() != 0 &&
               SameEntries(plan_.lists.partial, b, head, head + heads) &&
               SameEntries(plan_.lists.full, b, head, head + heads)) {
          ++heads;
        }
        AddTasks(b, head, heads);
        head += heads;
      }
    }
    std::stable_sort(plan_.tasks.begin(), plan_.tasks.end(),
                     [](const Task& x, const Task& y) { return x.cost > y.cost; });
    return std::move(plan_);
  }

 private:
  void ReadMasks() {
    if (!problem_.input_shapes[kBlockMasks]) return;
    const Shape& shape = *problem_.input_shapes[kBlockMasks];
    const auto* bits = static_cast<const uint8_t*>(problem_.inputs[kBlockMasks]);
    const int64_t columns = std::min(attributes_.kv_block_size, shapes_.seq_k);
    plan_.mask_rows = std::min(attributes_.q_block_size, shapes_.seq_q);
    for (int64_t mask = 0; mask < shape[0]; ++mask) {
      for (int64_t r = 0; r < plan_.mask_rows; ++r) {
        plan_.masks.push_back(ReadMaskRow(bits + (mask * shape[1] + r) * shape[2], columns));
      }
    }
  }

  // Entries of both lists in one row.
  int64_t Listings(int64_t b, int64_t head, int64_t block) const {
    return plan_.lists.partial.At(b, head, block).count + plan_.lists.full.At(b, head, block).count;
  }

  // Marks the blocks that one row lists and that hold a key for it; returns how many were not marked before.
  int64_t Mark(std::vector<int64_t>* marks, int64_t mark, int64_t b, int64_t head, int64_t block) const {
    const int64_t last = std::min((block + 1) * attributes_.q_block_size, shapes_.seq_q);
    const int64_t end = KeyEnd(problem_, plan_.batches[static_cast<size_t>(b)], last);
    int64_t fresh = 0;
    for (const BlockList* list : {&plan_.lists.partial, &plan_.lists.full}) {
      const BlockList::Row row = list->At(b, head, block);
      for (int64_t slot = 0; slot < row.count; ++slot) {
        if (row.indices[slot] * attributes_.kv_block_size >= end) continue;
        int64_t& seen = (*marks)[static_cast<size_t>(row.indices[slot])];
        fresh += seen != mark;
        seen = mark;
      }
    }
    return fresh;
  }

  void AddTasks(int64_t b, int64_t head, int64_t heads) {
    const int64_t size = std::min(attributes_.q_block_size, shapes_.seq_q);
    for (int64_t block = 0; block < blocks_;) {
      Task task{b, head, heads, block, 1, block * size, std::min((block + 1) * size, shapes_.seq_q), 0};
      const int64_t mark = ++mark_;
      int64_t distinct = Mark(&in_task_, mark, b, head, block);
      int64_t pairs = distinct * (task.last - task.first) * heads;
      int64_t listings = Listings(b, head, block);
      // Rows of blocks that read much the same keys share a tile: packing a key once for all of them is cheaper than
      // computing it, at worst, for the rows that do not list it.
      while (task.last < shapes_.seq_q && (task.last - task.first + size) * heads <= plan_.tile.rows) {
        const int64_t last = std::min(task.last + size, shapes_.seq_q);
        const int64_t next = block + task.blocks;
        if (listings + Listings(b, head, next) > kMaxMergedListings) break;
        const int64_t own = Mark(&in_row_, ++mark_, b, head, next);
        const int64_t fresh = Mark(&in_task_, mark, b, head, next);
        const int64_t rows = (task.last - task.first) * heads, more = (last - task.last) * heads;
        const int64_t apart = distinct * (rows + kPackCost) + own * (more + kPackCost);
        if ((distinct + fresh) * (rows + more + kPackCost) > apart) break;
        distinct += fresh;
        pairs += own * more;
        listings += Listings(b, head, next);
        task.last = last;
        ++task.blocks;
      }
      Split(task, listings, static_cast<double>(pairs) * static_cast<double>(attributes_.kv_block_size));
      block += task.blocks;
    }
  }

  // Adds the task, in equal parts where it has more queries than fit a tile.
  void Split(const Task& whole, int64_t listings, double cost) {
    plan_.max_listings = std::max(plan_.max_listings, listings);
    plan_.max_blocks = std::max(plan_.max_blocks, whole.blocks);
    const int64_t most = std::max<int64_t>(1, plan_.tile.rows / whole.heads);
    const int64_t queries = whole.last - whole.first, parts = (queries + most - 1) / most;
    const int64_t part = (queries + parts - 1) / parts;
    for (int64_t first = whole.first; first < whole.last; first += part) {
      Task task = whole;
      task.first = first;
      task.last = std::min(first + part, whole.last);
      task.cost = cost * static_cast<double>(task.last - first) / static_cast<double>(queries);
      plan_.tasks.push_back(task);
    }
  }

  const Problem& problem_;
  const Attributes& attributes_;
  const Shapes& shapes_;
  int64_t blocks_ = 0;
  int64_t mark_ = 0;
  std::vector<int64_t> in_task_, in_row_;  // the mark that each key block got last
  Plan plan_;
};

}  // namespace

Plan MakePlan(const Problem& problem) { return Planner(problem).Make(); }

}  // namespace longspan::block_sparse
