// The kernels without ONNX Runtime: random problems against a naive implementation, on every instruction set that the
// machine has. Meant to run under the address and undefined-behaviour sanitizers as well: buffers are exactly as long
// as the tensors, so that a read or write beyond one is seen.
//
// Usage: sliding_window_attention_test [problems [seed]]
#include "sliding_window_attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "testing.h"

namespace longspan::sliding_window {
namespace {

// A random problem with its operands.
class Random : public testing::RandomProblem<Problem> {
 public:
  explicit Random(unsigned seed) : RandomProblem(seed) {
    Shapes& s = problem.shapes;
    Attributes& a = problem.attributes;
    GiveCommonInputs();
    a.left_window_size = Pick<int64_t>({-1, 0, Int(1, 30), Int(1, 400), int64_t{1} << 60});
    a.right_window_size = Pick<int64_t>({-1, 0, Int(1, 30), Int(1, 400)});
    if (Chance(0.4)) a.dilation = {Pick<int64_t>({2, 3, 7, int64_t{1} << 40})};
    if (Chance(0.3)) {
      a.dilation.clear();
      for (int64_t h = 0; h < s.q_num_heads; ++h) a.dilation.push_back(Int(1, 4));
    }
    a.span_ramp = Pick<float>({1.0f, 32.0f});

    GivePadding(kAttnMask, kNonpadKvSeqlen);
    if (Chance(0.4)) {
      const auto size = static_cast<size_t>(s.batch * s.seq_k);
      const int64_t q = s.batch * s.q_num_heads * s.seq_q, k = s.batch * s.kv_num_heads * s.seq_k;
      problem.inputs[kGlobalMask] = Flags(&global, size, Pick<double>({0.0, 0.03, 0.6, 1.0}));
      if (Chance(0.5)) {
        Give(kGlobalQ, q * s.head_size);
        Give(kGlobalK, k * s.head_size);
        Give(kGlobalV, k * s.v_head_size);
      }
    }
    const bool narrow = a.left_window_size >= 0 && a.left_window_size < 1000 && a.right_window_size >= 0;
    if (narrow && Chance(0.5)) {
      const int64_t width = a.left_window_size + a.right_window_size + 1;
      const Shape shape = {Pick<int64_t>({1, s.batch}), Pick<int64_t>({1, s.q_num_heads}), Pick<int64_t>({1, s.seq_q}),
                           width};
      problem.input_shapes[kBandBias] = shape;
      int64_t count = 1;
      for (int64_t dim : shape) count *= dim;
      Give(kBandBias, count);
    }
    if (Chance(0.4)) Give(kSinks, s.q_num_heads);
    if (Chance(0.3)) {
      for (int64_t h = 0; h < s.q_num_heads; ++h) spans.push_back(static_cast<float>(Int(-40, 200)) + 0.25f);
      problem.inputs[kSpans] = spans.data();
    }
  }

  std::unique_ptr<bool[]> global;
  std::vector<float> spans;
};

// One row by the definition, key by key, in double. Returns the log-sum-exp.
double NaiveRow(const Random& r, int64_t b, int64_t h, int64_t i, std::vector<double>* y) {
  const Shapes& s = r.problem.shapes;
  const Attributes& a = r.problem.attributes;
  const int64_t position = r.Position(b, i);
  const int64_t step = a.dilation.size() > 1 ? a.dilation[static_cast<size_t>(h)] : a.dilation[0];
  const auto is_global = [&](int64_t k) { return r.global && r.global[static_cast<size_t>(b * s.seq_k + k)]; };
  const bool row_global = position >= 0 && position < s.seq_k && is_global(position);
  const bool separate = row_global && r.problem.inputs[kGlobalQ] != nullptr;
  std::vector<testing::Term> terms;
  for (int64_t k = 0; k < s.seq_k; ++k) {
    if (!r.Valid(b, k) || (a.is_causal && k > position)) continue;
    const int64_t difference = k - position, steps = difference / step;
    const bool in_band = difference % step == 0 && (a.left_window_size < 0 || steps >= -a.left_window_size) &&
                         (a.right_window_size < 0 || steps <= a.right_window_size);
    const bool key_global = is_global(k);
    if (!row_global && !in_band && !key_global) continue;
    double score =
        r.Score(separate ? kGlobalQ : static_cast<int>(kQ), separate ? kGlobalK : static_cast<int>(kK), b, h, i, k);
    double weight = 1;
    if (!row_global && in_band && r.problem.input_shapes[kBandBias]) {
      const Shape& shape = *r.problem.input_shapes[kBandBias];
      const int64_t index =
          (((shape[0] > 1 ? b : 0) * shape[1] + (shape[1] > 1 ? h : 0)) * shape[2] + (shape[2] > 1 ? i : 0)) *
              shape[3] +
          steps + a.left_window_size;
      score += r.tensors[kBandBias].values[static_cast<size_t>(index)];
    }
    if (!row_global && !key_global && !r.spans.empty()) {
      const double ramp = static_cast<double>(a.span_ramp), span = static_cast<double>(r.spans[static_cast<size_t>(h)]);
      weight = std::clamp((ramp + span - static_cast<double>(std::abs(difference))) / ramp, 0.0, 1.0);
    }
    if (weight > 0) terms.push_back({score, weight, k});
  }
  const double sink = r.problem.inputs[kSinks] == nullptr ? -std::numeric_limits<double>::infinity()
                                                          : r.tensors[kSinks].values[static_cast<size_t>(h)];
  const auto value = [&](int64_t key, int64_t c) {
    return r.At(separate ? kGlobalV : static_cast<int>(kV), s.kv_num_heads, s.seq_k, s.v_head_size, b, h / s.Group(),
                key, c);
  };
  return testing::Softmax(terms, sink, value, y);
}

bool Check(unsigned seed, const cpu::TileKernels& kernels) {
  Random r(seed);
  testing::ThreadExecutor executor;
  Compute(r.problem, kernels, executor);
  return testing::RowsAgree(
      r, std::string(kernels.name) + ", seed " + std::to_string(seed),
      [&](int64_t b, int64_t h, int64_t i, std::vector<double>* y) { return NaiveRow(r, b, h, i, y); });
}

bool CheckFailures() {
  unsigned seed = 0;
  while (Random(seed).problem.shapes.seq_q == 0) ++seed;
  Random r(seed);
  testing::ThreadExecutor executor;
  executor.fail = true;
  try {
    Compute(r.problem, cpu::SelectKernels(), executor);
  } catch (const std::bad_alloc&) {
    return true;
  }
  std::printf("FAILED: no error without memory\n");
  return false;
}

}  // namespace
}  // namespace longspan::sliding_window

int main(int argc, char** argv) {
  using namespace longspan;
  return sliding_window::CheckFailures() ? testing::CheckRandomProblems(argc, argv, sliding_window::Check) : 1;
}
