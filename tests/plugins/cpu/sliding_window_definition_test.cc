// What refuses a node before any kernel runs, and the planner, with sizes that would overflow. Meant for the
// sanitizers.
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "sliding_window_attention/plan.h"
#include "sliding_window_attention/problem.h"
#include "testing.h"

namespace longspan::sliding_window {
namespace {

using testing::Expect;
using testing::Refused;

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
void CheckAttributes() {
  for (int64_t value : {kSizeLimit + 1, int64_t{1} << 62, kHuge}) {
    Attributes a;
    a.left_window_size = value;
    Refused("left_window_size = ", [&] { a.Check(); });
    a = {};
    a.right_window_size = value;
    Refused("right_window_size = ", [&] { a.Check(); });
    a = {};
    a.dilation = {1, value};
    Refused("dilation = [1, ", [&] { a.Check(); });
    a = {};
    a.q_num_heads = value;
    Refused("must be at most", [&] { a.Check(); });
    a = {};
    a.kv_num_heads = value;
    Refused("must be at most", [&] { a.Check(); });
  }
  for (int64_t value : {int64_t{-2}, std::numeric_limits<int64_t>::min()}) {
    Attributes a;
    a.left_window_size = value;
    Refused("must be -1", [&] { a.Check(); });
    a = {};
    a.dilation = {value};
    Refused("every value must be 1 or more", [&] { a.Check(); });
    a = {};
    a.q_num_heads = value;
    Refused("negative", [&] { a.Check(); });
  }
  Attributes a;
  a.dilation = {};
  Refused("dilation = []", [&] { a.Check(); });
  a = {};
  a.scale = std::numeric_limits<float>::quiet_NaN();
  Refused("must be finite", [&] { a.Check(); });
  a = {};
  a.left_window_size = a.right_window_size = a.q_num_heads = a.kv_num_heads = kSizeLimit;
  a.dilation = {kSizeLimit};
  a.Check();
}

Shapes Infer(const Shape& q, const Shape& k, const Shape& v, const Attributes& attributes,
             const std::optional<Shape>& bias = std::nullopt) {
  std::optional<Shape> inputs[kInputCount];
  inputs[kQ] = q, inputs[kK] = k, inputs[kV] = v, inputs[kBandBias] = bias;
  return InferShapes(inputs, attributes);
}

void CheckShapes() {
  Attributes a;
  Refused("required", [&] { InferShapes({}, a); });
  Refused("all must be 3-D or all 4-D", [&] { Infer({}, {}, {}, a); });
  Refused("0 key heads", [&] { Infer({1, 0, 4, 8}, {1, 0, 4, 8}, {1, 0, 4, 8}, a); });
  Refused("q_num_heads and kv_num_heads of 1 or more", [&] { Infer({1, 4, 8}, {1, 4, 8}, {1, 4, 8}, a); });
  for (const Shape& shape : {Shape{0, 2, 4, 8}, Shape{1, 2, 0, 8}, Shape{1, 2, 4, 0}}) {
    Expect(Infer(shape, shape, shape, a).Output() == shape, "empty 4-D");
  }
  // No channels: any number of heads divides them.
  a.q_num_heads = a.kv_num_heads = kSizeLimit;
  Expect(Infer({1, 4, 0}, {1, 4, 0}, {1, 4, 0}, a).Output() == Shape({1, 4, 0}), "3-D without channels");
  a.kv_num_heads = 1;
  const Shape wide = Infer({1, 4, 0}, {1, 4, 0}, {1, 4, kSizeLimit}, a).Output();
  Expect(wide == Shape({1, 4, kSizeLimit * kSizeLimit}), "3-D with the largest sizes");
  a = {};
  a.left_window_size = a.right_window_size = kSizeLimit;
  const Shape one = {1, 1, 4, 8};
  Expect(Infer(one, one, one, a, Shape{1, 1, 1, 2 * kSizeLimit + 1}).seq_q == 4, "widest bias");
  Refused("band_bias has shape", [&] { Infer(one, one, one, a, Shape{1, 1, 1, kHuge}); });
  Refused("band_bias has shape", [&] { Infer(one, one, one, a, Shape{}); });
}

// Every row belongs to exactly one task, whatever the dilation and the window.
void CheckPlans() {
  for (int64_t step : {int64_t{1}, int64_t{3}, int64_t{1000}, kSizeLimit}) {
    for (int64_t window : {int64_t{-1}, int64_t{0}, kSizeLimit}) {
      Problem problem;
      problem.attributes.dilation = {step};
      problem.attributes.left_window_size = problem.attributes.right_window_size = window;
      problem.shapes = {true, 2, 4, 2, 301, 301, 8, 8};
      std::vector<int> seen(2 * 4 * 301);
      for (const Task& task : MakePlan(problem).tasks) {
        for (int64_t t = task.first; t < task.first + task.count; ++t) {
          for (int64_t h = task.head; h < task.head + task.heads; ++h) {
            const int64_t row = task.residue + t * step;
            Expect(row >= 0 && row < 301, "row of a task");
            ++seen[static_cast<size_t>((task.batch * 4 + h) * 301 + row)];
          }
        }
      }
      Expect(seen == std::vector<int>(seen.size(), 1), "rows of dilation " + std::to_string(step));
    }
  }
}

}  // namespace
}  // namespace longspan::sliding_window

int main() {
  using namespace longspan;
  sliding_window::CheckAttributes();
  sliding_window::CheckShapes();
  sliding_window::CheckPlans();
  return testing::failures != 0;
}
