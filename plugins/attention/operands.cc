#include "attention/operands.h"

#include <algorithm>
#include <cmath>

namespace longspan {
namespace {

constexpr const char* kNames[kCommonInputs] = {"Q", "K", "V"};

Shapes InferSplitHeads(const std::optional<Shape>* inputs, const CommonAttributes& attributes) {
  const Shape &q = *inputs[kQ], &k = *inputs[kK], &v = *inputs[kV];
  Shapes s;
  s.split_heads = true;
  s.batch = q[0];
  s.q_num_heads = q[1], s.kv_num_heads = k[1];
  s.seq_q = q[2], s.seq_k = k[2];
  s.head_size = q[3], s.v_head_size = v[3];
  Expect("K", inputs[kK], {s.batch, s.kv_num_heads, s.seq_k, s.head_size});
  Expect("V", inputs[kV], {s.batch, s.kv_num_heads, s.seq_k, s.v_head_size});
  if (attributes.q_num_heads != 0 && attributes.q_num_heads != s.q_num_heads) {
    Fail("q_num_heads = ", attributes.q_num_heads, ", but the 4-D input has ", s.q_num_heads, " heads");
  }
  if (attributes.kv_num_heads != 0 && attributes.kv_num_heads != s.kv_num_heads) {
    Fail("kv_num_heads = ", attributes.kv_num_heads, ", but the 4-D input has ", s.kv_num_heads, " heads");
  }
  return s;
}

Shapes InferMergedHeads(const std::optional<Shape>* inputs, const CommonAttributes& attributes) {
  const Shape &q = *inputs[kQ], &k = *inputs[kK], &v = *inputs[kV];
  Shapes s;
  s.split_heads = false;
  s.batch = q[0];
  s.q_num_heads = attributes.q_num_heads, s.kv_num_heads = attributes.kv_num_heads;
  if (s.q_num_heads < 1 || s.kv_num_heads < 1) {
    Fail("3-D inputs need q_num_heads and kv_num_heads of 1 or more");
  }
  s.seq_q = q[1], s.seq_k = k[1];
  const std::pair<CommonInput, int64_t> widths[] = {{kQ, s.q_num_heads}, {kK, s.kv_num_heads}, {kV, s.kv_num_heads}};
  for (const auto& [input, heads] : widths) {
    const int64_t width = (*inputs[input])[2];
    if (width % heads) Fail(kNames[input], " has ", width, " channels, which ", heads, " heads do not divide");
  }
  s.head_size = q[2] / s.q_num_heads, s.v_head_size = v[2] / s.kv_num_heads;
  Expect("K", inputs[kK], {s.batch, s.seq_k, s.kv_num_heads * s.head_size});
  Expect("V", inputs[kV], {s.batch, s.seq_k, s.kv_num_heads * s.v_head_size});
  return s;
}

}  // namespace

std::string Tuple(const Shape& shape) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

void CommonAttributes::CheckScores() const {
  if (scale && !std::isfinite(*scale)) Fail("scale = ", *scale, ": must be finite");
  if (!(std::isfinite(softcap) && softcap >= 0)) {
    Fail("softcap = ", softcap, ": must be 0 (off) or positive and finite");
  }
}

void CommonAttributes::CheckHeads() const {
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

void Expect(const char* name, const std::optional<Shape>& got, const Shape& expected) {
  if (got && *got != expected) Fail(name, " has shape ", Tuple(*got), ": must be ", Tuple(expected));
}

Shapes InferCommonShapes(const std::optional<Shape>* inputs, const CommonAttributes& attributes) {
  for (CommonInput input : {kQ, kK, kV}) {
    if (!inputs[input]) Fail(kNames[input], " is missing: Q, K and V are required");
  }
  const Shape &q = *inputs[kQ], &k = *inputs[kK], &v = *inputs[kV];
  if (q.size() != k.size() || k.size() != v.size() || (q.size() != 3 && q.size() != 4)) {
    Fail("Q, K, V have shapes ", Tuple(q), ", ", Tuple(k), ", ", Tuple(v), ": all must be 3-D or all 4-D");
  }
  const Shapes s = q.size() == 4 ? InferSplitHeads(inputs, attributes) : InferMergedHeads(inputs, attributes);
  if (s.kv_num_heads < 1 || s.q_num_heads % s.kv_num_heads) {
    Fail(s.q_num_heads, " query heads are not a multiple of ", s.kv_num_heads, " key heads");
  }
  return s;
}

KeyPadding ReadPadding(const Shapes& shapes, const void* nonpad_kv_seqlen, const void* attn_mask, int64_t batch) {
  KeyPadding padding;
  padding.length = shapes.seq_k;
  if (nonpad_kv_seqlen != nullptr) {
    padding.length = static_cast<const int64_t*>(nonpad_kv_seqlen)[batch];
    if (padding.length < 0 || padding.length > shapes.seq_k) {
      Fail("nonpad_kv_seqlen[", batch, "] = ", padding.length, ": must be between 0 and the number of keys, ",
           shapes.seq_k);
    }
    padding.offset = padding.length - shapes.seq_q;
  }
  if (attn_mask != nullptr) {
    const bool* valid = static_cast<const bool*>(attn_mask) + batch * shapes.seq_k;
    padding.holes = std::find(valid, valid + padding.length, false) != valid + padding.length;
  }
  return padding;
}

}  // namespace longspan
