#include "cuda/workspace.h"

#include <cmath>
#include <queue>

#include "cuda/selection.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kSizeBound = int64_t{1} << 31;
constexpr int kMostSteps = 1000;

Range Axis(const std::optional<ShapeRange>& shape, size_t axis) {
  return shape && axis < shape->size() ? (*shape)[axis] : Range{};
}

Range Larger(Range a, Range b) { return {std::max(a.low, b.low), std::max(a.high, b.high)}; }

// The limits of the operands' sizes, in SizeNames' order.
std::vector<Range> OperandRanges(const Node& node, const std::optional<ShapeRange>* inputs) {
  const ShapeRange &q = *inputs[kQ], &k = *inputs[kK], &v = *inputs[kV];
  std::vector<Range> sizes(kOperandSizes);
  if (q.size() == 4) {
    const Range split[] = {q[0], q[1], k[1], q[2], k[2], q[3], v[3]};
    std::copy(std::begin(split), std::end(split), sizes.begin());
  } else {
    const int64_t heads = node.integers.at("q_num_heads"), kv_heads = node.integers.at("kv_num_heads");
    const auto each = [](Range width, int64_t by) { return by > 0 ? Range{width.low / by, width.high / by} : Range{}; };
    const Range merged[] = {q[0], {heads, heads},    {kv_heads, kv_heads}, q[1],
                            k[1], each(q[2], heads), each(v[2], kv_heads)};
    std::copy(std::begin(merged), std::end(merged), sizes.begin());
  }
  sizes[kSms] = {1, kMostMultiprocessors};
  if (node.op == "BlockSparseAttention") {  // positions as in launcher.cc
    sizes[kW] = Axis(inputs[4], 3);
    sizes[kWFull] = Axis(inputs[6], 3);
    sizes[kM] = Axis(inputs[8], 0);
    sizes[kBLists] = Larger(Axis(inputs[3], 0), Axis(inputs[5], 0));
    sizes[kHLists] = Larger(Axis(inputs[3], 1), Axis(inputs[5], 1));
  }
  return sizes;
}

// The largest need of one recipe, by branch and bound: ranges are cut where the bound is highest until it is reached.
class Search {
 public:
  Search(const Recipe& recipe, const Pack& pack, const Node& node) : recipe_(recipe), node_(node) {
    used_.assign(pack.size_names.Count(), false);
    for (const Path& path : recipe.paths) {
      path.condition.MarkSizes(&used_);
      for (const auto& [number, expression] : path.sizes) expression.MarkSizes(&used_);
      for (const Buffer& buffer : path.buffers) buffer.elements.MarkSizes(&used_);
    }
    // Windows without an end go with the lengths.
    if (used_[kLeft] || used_[kRight]) used_[kSq] = used_[kSk] = true;
  }

  int64_t Run(const std::vector<Range>& root) {
    Add(root);
    for (int step = 0; step < kMostSteps && boxes_.top().most > reached_ + reached_ / 16; ++step) {
      const std::vector<Range> box = boxes_.top().sizes;
      const size_t axis = Widest(box);
      if (axis == kOperandSizes) break;
      boxes_.pop();
      // Sizes matter by their proportions, so they are cut in the geometric middle.
      const Range whole = box[axis];
      const double middle = std::sqrt(static_cast<double>(whole.low + 1) * static_cast<double>(whole.high + 1)) - 1;
      const int64_t cut = std::clamp(static_cast<int64_t>(middle), whole.low, whole.high - 1);
      std::vector<Range> half = box;
      half[axis] = {whole.low, cut};
      Add(half);
      half[axis] = {cut + 1, whole.high};
      Add(half);
    }
    return boxes_.top().most;
  }

 private:
  struct Box {
    int64_t most;
    std::vector<Range> sizes;

    bool operator<(const Box& other) const { return most < other.most; }
  };

  void Add(const std::vector<Range>& box) {
    boxes_.push({Most(box), box});
    std::vector<Range> corner = box;
    for (Range& size : corner) size.low = size.high;
    reached_ = std::max(reached_, Most(corner));
    corner = box;
    for (Range& size : corner) size.high = size.low;
    reached_ = std::max(reached_, Most(corner));
  }

  // The axis that is largest in proportion; kOperandSizes where each is one number.
  size_t Widest(const std::vector<Range>& box) const {
    size_t widest = kOperandSizes;
    double most = 0;
    for (size_t axis = 0; axis < kOperandSizes; ++axis) {
      const double width = static_cast<double>(box[axis].high - box[axis].low) / static_cast<double>(box[axis].low + 1);
      if (used_[axis] && width > most) {
        most = width;
        widest = axis;
      }
    }
    return widest;
  }

  // An upper bound of the bytes for sizes within the box; of one point, the bytes. 0 where executions are refused.
  int64_t Most(const std::vector<Range>& box) const {
    std::vector<Range> sizes = box;
    sizes.resize(used_.size());
    if (node_.op == "SlidingWindowAttention") {
      const Range everything{sizes[kSq].low + sizes[kSk].low, sizes[kSq].high + sizes[kSk].high};
      const int64_t left = node_.integers.at("left_window_size"), right = node_.integers.at("right_window_size");
      const bool causal = node_.integers.at("is_causal") != 0;
      sizes[kLeft] = left < 0 ? everything : Range{left, left};
      sizes[kRight] = causal ? Range{} : right < 0 ? everything : Range{right, right};
    }
    int64_t most = 0;
    for (const Path& path : recipe_.paths) {
      const std::optional<Range> taken = path.condition.Bounds(sizes);
      if (!taken) break;
      if (taken->low != 0 || taken->high != 0) most = std::max(most, Need(path, sizes));
      if (taken->low > 0 || taken->high < 0) break;
    }
    return most;
  }

  static int64_t Need(const Path& path, std::vector<Range> sizes) {
    for (const auto& [number, expression] : path.sizes) {
      const std::optional<Range> value = Within(expression.Bounds(sizes), -kSizeBound, kSizeBound - 1);
      if (!value) return 0;
      sizes[static_cast<size_t>(number)] = *value;
    }
    size_t bytes = path.buffers.empty() ? 0 : kBufferAlignment;
    for (const Buffer& buffer : path.buffers) {
      const std::optional<Range> elements = Within(buffer.elements.Bounds(sizes), 0, kMostElements);
      if (!elements) return 0;
      bytes += BufferBytes(elements->high);
    }
    return static_cast<int64_t>(bytes);
  }

  // What a launcher does not refuse.
  static std::optional<Range> Within(std::optional<Range> value, int64_t least, int64_t most) {
    if (!value || value->low > most || value->high < least) return std::nullopt;
    return Range{std::max(value->low, least), std::min(value->high, most)};
  }

  const Recipe& recipe_;
  const Node& node_;
  std::vector<bool> used_;
  std::priority_queue<Box> boxes_;
  int64_t reached_ = 0;
};

}  // namespace

size_t WorkspaceBound(const Packs& packs, const Node& node, const std::optional<ShapeRange>* inputs) {
  const std::vector<Range> sizes = OperandRanges(node, inputs);
  int64_t most = 0;
  for (const auto& pack : packs) {
    for (const Recipe& recipe : pack->recipes) {
      if (recipe.op != node.op || !Mismatch(recipe, node, node.sizes).empty()) continue;
      most = std::max(most, Search(recipe, *pack, node).Run(sizes));
    }
  }
  return static_cast<size_t>(most);
}

}  // namespace longspan::cuda
