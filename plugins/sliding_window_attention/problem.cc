#include "sliding_window_attention/problem.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace longspan {
namespace {

// The shape as Python writes a tuple, so that messages read the same as those of definition.py.
std::string Tuple(const Shape& shape) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

template <typename... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw InvalidOperands(text.str());
}

void Expect(const std::optional<Shape> (&inputs)[kInputCount], Input input, const Shape& expected) {
  if (inputs[input] && *inputs[input] != expected) {
    Fail(kInputNames[input], " has shape ", Tuple(*inputs[input]), ": must be ", Tuple(expected));
  }
}

void CheckOptional(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes, const Shapes& s) {
  Expect(inputs, kAttnMask, {s.batch, s.seq_k});
  Expect(inputs, kNonpadKvSeqlen, {s.batch});
  Expect(inputs, kGlobalMask, {s.batch, s.seq_k});
  Expect(inputs, kGlobalQ, *inputs[kQ]);
  Expect(inputs, kGlobalK, *inputs[kK]);
  Expect(inputs, kGlobalV, *inputs[kV]);
  Expect(inputs, kSinks, {s.q_num_heads});
  Expect(inputs, kSpans, {s.q_num_heads});
  std::string separate;
  int count = 0;
  for (Input input : {kGlobalQ, kGlobalK, kGlobalV}) {
    if (!inputs[input]) continue;
    separate += (count++ ? ", " : "") + std::string(kInputNames[input]);
  }
  if (count > 0 && (count < 3 || !inputs[kGlobalMask])) {
    Fail(separate, " present: global_Q, global_K, global_V and global_mask come together or not at all");
  }
  if (!inputs[kBandBias]) return;
  if (attributes.left_window_size < 0 || attributes.right_window_size < 0) {
    Fail("band_bias needs bounded windows: left_window_size and right_window_size of 0 or more");
  }
  const Shape& bias = *inputs[kBandBias];
  const int64_t width = attributes.left_window_size + attributes.right_window_size + 1;
  const int64_t full[] = {s.batch, s.q_num_heads, s.seq_q};
  bool fits = bias.size() == 4 && bias[3] == width;
  for (size_t i = 0; fits && i < 3; ++i) fits = bias[i] == 1 || bias[i] == full[i];
  if (!fits) {
    Fail("band_bias has shape ", Tuple(bias), ": must be (1|", full[0], ", 1|", full[1], ", 1|", full[2], ", ", width,
         ")");
  }
}

}  // namespace

const char* const kInputNames[kInputCount] = {"Q",           "K",        "V",        "attn_mask", "nonpad_kv_seqlen",
                                              "global_mask", "global_Q", "global_K", "global_V",  "band_bias",
                                              "sinks",       "spans"};

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
  if (scale && !std::isfinite(*scale)) Fail("scale = ", *scale, ": must be finite");
  if (!(std::isfinite(softcap) && softcap >= 0)) {
    Fail("softcap = ", softcap, ": must be 0 (off) or positive and finite");
  }
  if (!(std::isfinite(span_ramp) && span_ramp > 0)) Fail("span_ramp = ", span_ramp, ": must be positive and finite");
  if (q_num_heads < 0 || kv_num_heads < 0) {
    Fail("q_num_heads = ", q_num_heads, ", kv_num_heads = ", kv_num_heads, ": negative");
  }
  if (std::max(q_num_heads, kv_num_heads) > kSizeLimit) {
    Fail("q_num_heads = ", q_num_heads, ", kv_num_heads = ", kv_num_heads, ": must be at most ", kSizeLimit);
  }
  if (kv_num_heads && q_num_heads % kv_num_heads) {
    Fail("q_num_heads = ", q_num_heads, " is not a multiple of kv_num_heads = ", kv_num_heads);
  }
}

Shape Shapes::Output() const {
  if (split_heads) return {batch, q_num_heads, seq_q, v_head_size};
  return {batch, seq_q, q_num_heads * v_head_size};
}

Shapes InferShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes) {
  for (Input input : {kQ, kK, kV}) {
    if (!inputs[input]) Fail(kInputNames[input], " is missing: Q, K and V are required");
  }
  const Shape &q = *inputs[kQ], &k = *inputs[kK], &v = *inputs[kV];
  if (q.size() != k.size() || k.size() != v.size() || (q.size() != 3 && q.size() != 4)) {
    Fail("Q, K, V have shapes ", Tuple(q), ", ", Tuple(k), ", ", Tuple(v), ": all must be 3-D or all 4-D");
  }
  Shapes s;
  s.split_heads = q.size() == 4;
  s.batch = q[0];
  if (s.split_heads) {
    s.q_num_heads = q[1], s.kv_num_heads = k[1];
    s.seq_q = q[2], s.seq_k = k[2];
    s.head_size = q[3], s.v_head_size = v[3];
    Expect(inputs, kK, {s.batch, s.kv_num_heads, s.seq_k, s.head_size});
    Expect(inputs, kV, {s.batch, s.kv_num_heads, s.seq_k, s.v_head_size});
    if (attributes.q_num_heads != 0 && attributes.q_num_heads != s.q_num_heads) {
      Fail("q_num_heads = ", attributes.q_num_heads, ", but the 4-D input has ", s.q_num_heads, " heads");
    }
    if (attributes.kv_num_heads != 0 && attributes.kv_num_heads != s.kv_num_heads) {
      Fail("kv_num_heads = ", attributes.kv_num_heads, ", but the 4-D input has ", s.kv_num_heads, " heads");
    }
  } else {
    s.q_num_heads = attributes.q_num_heads, s.kv_num_heads = attributes.kv_num_heads;
    if (s.q_num_heads < 1 || s.kv_num_heads < 1) {
      Fail("3-D inputs need q_num_heads and kv_num_heads of 1 or more");
    }
    s.seq_q = q[1], s.seq_k = k[1];
    const std::pair<Input, int64_t> widths[] = {{kQ, s.q_num_heads}, {kK, s.kv_num_heads}, {kV, s.kv_num_heads}};
    for (const auto& [input, heads] : widths) {
      const int64_t width = (*inputs[input])[2];
      if (width % heads) {
        Fail(kInputNames[input], " has ", width, " channels, which ", heads, " heads do not divide");
      }
    }
    s.head_size = q[2] / s.q_num_heads, s.v_head_size = v[2] / s.kv_num_heads;
    Expect(inputs, kK, {s.batch, s.seq_k, s.kv_num_heads * s.head_size});
    Expect(inputs, kV, {s.batch, s.seq_k, s.kv_num_heads * s.v_head_size});
  }
  if (s.kv_num_heads < 1 || s.q_num_heads % s.kv_num_heads) {
    Fail(s.q_num_heads, " query heads are not a multiple of ", s.kv_num_heads, " key heads");
  }
  if (attributes.dilation.size() != 1 && static_cast<int64_t>(attributes.dilation.size()) != s.q_num_heads) {
    Fail("dilation has ", attributes.dilation.size(), " values: must be 1 or ", s.q_num_heads, " (query heads)");
  }
  CheckOptional(inputs, attributes, s);
  return s;
}

}  // namespace longspan
