#include "sliding_window_attention/plan.h"

#include <algorithm>
#include <thread>

namespace longspan {
namespace {

// A tile of rows, and a tile of keys, take at most this many floats each: together they stay within an L2 cache of 1
// MB.
constexpr int64_t kTileFloats = 65536;
// Enough rows to make packing the keys a few percent of the work.
constexpr int64_t kMaxRows = 192;
constexpr int64_t kMinRows = 32;

BatchMasks ReadMasks(const Problem& problem, int64_t b) {
  const Shapes& s = problem.shapes;
  BatchMasks masks;
  masks.length = s.seq_k;
  if (problem.inputs[kNonpadKvSeqlen] != nullptr) {
    masks.length = static_cast<const int64_t*>(problem.inputs[kNonpadKvSeqlen])[b];
    if (masks.length < 0 || masks.length > s.seq_k) {
      throw InvalidOperands("nonpad_kv_seqlen[" + std::to_string(b) + "] = " + std::to_string(masks.length) +
                            ": must be between 0 and the number of keys, " + std::to_string(s.seq_k));
    }
    masks.offset = masks.length - s.seq_q;
  }
  const auto* valid = static_cast<const bool*>(problem.inputs[kAttnMask]);
  const auto* global = static_cast<const bool*>(problem.inputs[kGlobalMask]);
  if (valid != nullptr) {
    valid += b * s.seq_k;
    masks.holes = std::find(valid, valid + masks.length, false) != valid + masks.length;
  }
  if (global != nullptr) {
    global += b * s.seq_k;
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
    const int64_t floats = shapes_.head_size + cpu::PadToLanes(shapes_.v_head_size);
    const int64_t fit =
        std::max<int64_t>(1, kTileFloats / std::max<int64_t>(1, floats)) / cpu::kMaxLanes * cpu::kMaxLanes;
    plan_.max_columns = static_cast<int>(std::clamp<int64_t>(fit, 32, cpu::kMaxTileColumns));
    rows_ = std::clamp<int64_t>(fit, kMinRows, kMaxRows);
    // Small problems: smaller tiles, so that every core gets a few.
    const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
    const int64_t total = shapes_.batch * shapes_.q_num_heads * shapes_.seq_q;
    while (rows_ >= 2 * kMinRows && total / rows_ < 4 * threads) rows_ /= 2;
    plan_.max_rows = static_cast<int>(rows_);
  }

  Plan Make() {
    for (int64_t b = 0; b < shapes_.batch; ++b) plan_.batches.push_back(ReadMasks(problem_, b));
    const int64_t group = shapes_.q_num_heads / shapes_.kv_num_heads;
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

}  // namespace longspan
