#include "sliding_window_attention/plan.h"

#include <algorithm>

namespace longspan::sliding_window {
namespace {

BatchMasks ReadMasks(const Problem& problem, int64_t b) {
  const Shapes& s = problem.shapes;
  BatchMasks masks{ReadPadding(s, problem.inputs[kNonpadKvSeqlen], problem.inputs[kAttnMask], b), {}, {}};
  const auto* valid = static_cast<const bool*>(problem.inputs[kAttnMask]);
  const auto* global = static_cast<const bool*>(problem.inputs[kGlobalMask]);
  if (global != nullptr) {
    global += b * s.seq_k;
    if (valid != nullptr) valid += b * s.seq_k;
    for (int64_t k = 0; k < s.seq_k; ++k) {
      if (!global[k]) continue;
      if (k < masks.length && (valid == nullptr || valid[k])) masks.global_keys.push_back(static_cast<int32_t>(k));
      const int64_t row = k - masks.offset;
      if (row >= 0 && row < s.seq_q) masks.global_rows.push_back(static_cast<int32_t>(row));
    }
    masks.holes = masks.holes || !masks.global_keys.empty();
  }
  return masks;
}

// Keys in the band of `rows` consecutive rows from `row`, in steps of the dilation, about.
double BandKeys(const Problem& problem, const BatchMasks& masks, int64_t row, int64_t rows, int64_t step) {
  const Attributes& a = problem.attributes;
  const double position = static_cast<double>(masks.offset + row) / static_cast<double>(step);
  const double end = static_cast<double>(masks.length) / static_cast<double>(step);
  const double low = a.left_window_size < 0 ? 0 : position - static_cast<double>(a.left_window_size);
  double high = a.right_window_size < 0 ? end : position + static_cast<double>(a.right_window_size);
  if (a.is_causal) high = std::min(high, position);
  return std::max(0.0, std::min(end, high + static_cast<double>(rows)) - std::max(0.0, low));
}

class Planner {
 public:
  explicit Planner(const Problem& problem) : problem_(problem), shapes_(problem.shapes) {
    plan_.tile = ChooseTileSize(shapes_);
    rows_ = plan_.tile.rows;
  }

  Plan Make() {
    for (int64_t b = 0; b < shapes_.batch; ++b) plan_.batches.push_back(ReadMasks(problem_, b));
    const int64_t group = shapes_.Group();
    for (int64_t b = 0; b < shapes_.batch; ++b) {
      for (int64_t head = 0; head < shapes_.q_num_heads;) {
        // Heads that share a tile: of one group, with one dilation, and not more than the tile has rows.
        int64_t heads = 1;
        while (heads < rows_ && (head + heads) % group != 0 &&
               Dilation(problem_.attributes, head + heads) == Dilation(problem_.attributes, head)) {
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
  void AddTasks(int64_t b, int64_t head, int64_t heads) {
    const BatchMasks& masks = plan_.batches[static_cast<size_t>(b)];
    const int64_t step = Dilation(problem_.attributes, head);
    const int64_t queries = std::max<int64_t>(1, rows_ / heads);
    const auto global_rows = static_cast<int64_t>(masks.global_rows.size());
    for (int64_t first = 0; first < global_rows; first += queries) {
      const int64_t count = std::min(queries, global_rows - first);
      const double cost = static_cast<double>(count * heads) * static_cast<double>(masks.length);
      plan_.tasks.push_back({true, b, head, heads, 0, first, count, cost});
    }
    for (int64_t residue = 0; residue < std::min(step, shapes_.seq_q); ++residue) {
      const int64_t rows = (shapes_.seq_q - residue - 1) / step + 1;
      for (int64_t first = 0; first < rows; first += queries) {
        const int64_t count = std::min(queries, rows - first);
        const double keys = BandKeys(problem_, masks, residue + first * step, count, step) +
                            static_cast<double>(masks.global_keys.size());
        plan_.tasks.push_back(
            {false, b, head, heads, residue, first, count, static_cast<double>(count * heads) * keys});
      }
    }
  }

  const Problem& problem_;
  const Shapes& shapes_;
  int64_t rows_ = 0;
  Plan plan_;
};

}  // namespace

Plan MakePlan(const Problem& problem) { return Planner(problem).Make(); }

}  // namespace longspan::sliding_window
