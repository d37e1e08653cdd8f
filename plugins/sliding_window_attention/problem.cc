#include "sliding_window_attention/problem.h"

#include <cmath>
#include <string>
#include <utility>

namespace longspan::sliding_window {
namespace {

using InputShapes = std::optional<Shape>[kInputCount];

void CheckGlobal(const InputShapes& inputs, const Shapes& s) {
  Expect("global_mask", inputs[kGlobalMask], {s.batch, s.seq_k});
  Expect("global_Q", inputs[kGlobalQ], *inputs[kQ]);
  Expect("global_K", inputs[kGlobalK], *inputs[kK]);
  Expect("global_V", inputs[kGlobalV], *inputs[kV]);
}

void CheckBias(const Shape& bias, const Attributes& attributes, const Shapes& s) {
  if (attributes.left_window_size < 0 || attributes.right_window_size < 0) {
    Fail("band_bias needs bounded windows: left_window_size and right_window_size of 0 or more");
  }
  const int64_t width = attributes.left_window_size + attributes.right_window_size + 1;
  const int64_t full[] = {s.batch, s.q_num_heads, s.seq_q};
  bool fits = bias.size() == 4 && bias[3] == width;
  for (size_t i = 0; fits && i < 3; ++i) fits = bias[i] == 1 || bias[i] == full[i];
  if (!fits) {
    Fail("band_bias has shape ", Tuple(bias), ": must be (1|", full[0], ", 1|", full[1], ", 1|", full[2], ", ", width,
         ")");
  }
}

void CheckOptional(const InputShapes& inputs, const Attributes& attributes, const Shapes& s) {
  Expect("attn_mask", inputs[kAttnMask], {s.batch, s.seq_k});
  Expect("nonpad_kv_seqlen", inputs[kNonpadKvSeqlen], {s.batch});
  CheckGlobal(inputs, s);
  Expect("sinks", inputs[kSinks], {s.q_num_heads});
  Expect("spans", inputs[kSpans], {s.q_num_heads});
  const std::pair<Input, const char*> separate[] = {
      {kGlobalQ, "global_Q"}, {kGlobalK, "global_K"}, {kGlobalV, "global_V"}};
  std::string names;
  int count = 0;
  for (const auto& [input, name] : separate) {
    if (inputs[input]) names += (count++ ? ", " : "") + std::string(name);
  }
  if (count > 0 && (count < 3 || !inputs[kGlobalMask])) {
    Fail(names, " present: global_Q, global_K, global_V and global_mask come together or not at all");
  }
  if (inputs[kBandBias]) CheckBias(*inputs[kBandBias], attributes, s);
}

}  // namespace

void Attributes::Check() const {
  const std::pair<const char*, int64_t> windows[] = {{"left_window_size", left_window_size},
                                                     {"right_window_size", right_window_size}};
  for (const auto& [name, size] : windows) {
    if (size < -1) Fail(name, " = ", size, ": must be -1 (unbounded), 0 or positive");
    if (size > kSizeLimit) Fail(name, " = ", size, ": must be at most ", kSizeLimit, "; -1 means unbounded");
  }
  bool positive = !dilation.empty(), small = true;
  std::string values;
  for (int64_t step : dilation) {
    positive = positive && step >= 1;
    small = small && step <= kSizeLimit;
    values += (values.empty() ? "" : ", ") + std::to_string(step);
  }
  if (!positive) Fail("dilation = [", values, "]: every value must be 1 or more");
  if (!small) Fail("dilation = [", values, "]: every value must be at most ", kSizeLimit);
  CheckScores();
  if (!(std::isfinite(span_ramp) && span_ramp > 0)) Fail("span_ramp = ", span_ramp, ": must be positive and finite");
  CheckHeads();
}

Shapes InferShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes) {
  const Shapes s = InferCommonShapes(inputs, attributes);
  if (attributes.dilation.size() != 1 && static_cast<int64_t>(attributes.dilation.size()) != s.q_num_heads) {
    Fail("dilation has ", attributes.dilation.size(), " values: must be 1 or ", s.q_num_heads, " (query heads)");
  }
  CheckOptional(inputs, attributes, s);
  return s;
}

}  // namespace longspan::sliding_window
