// What the attention operators have in common before anything runs: attributes, layouts, sizes, key padding, errors.
#ifndef LONGSPAN_ATTENTION_OPERANDS_H_
#define LONGSPAN_ATTENTION_OPERANDS_H_

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/tile_kernels.h"

namespace longspan {

// Inputs or attributes contradict the definition; the message is the one that the operator's definition.py gives.
class InvalidOperands : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Throws InvalidOperands with the parts as one text.
template <typename... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw InvalidOperands(text.str());
}

using Shape = std::vector<int64_t>;

// The shape as Python writes a tuple, so that messages read the same as those of definition.py.
std::string Tuple(const Shape& shape);

// The inputs that every operator starts with.
enum CommonInput { kQ, kK, kV, kCommonInputs };

// Largest size in an attribute: products of two stay inside int64.
constexpr int64_t kSizeLimit = (int64_t{1} << 31) - 1;

// The attributes that every operator has.
struct CommonAttributes {
  bool is_causal = false;
  std::optional<float> scale;
  float softcap = 0;
  int64_t q_num_heads = 0;
  int64_t kv_num_heads = 0;

  // Each throws InvalidOperands when a value is outside what the definitions allow.
  void CheckScores() const;
  void CheckHeads() const;
};

// Sizes of one execution, the same for both layouts.
struct Shapes {
  bool split_heads = true;  // (B, H, S, D), not (B, S, H*D)
  int64_t batch = 0, q_num_heads = 0, kv_num_heads = 0, seq_q = 0, seq_k = 0, head_size = 0, v_head_size = 0;

  Shape Output() const;
  Shape Lse() const { return {batch, q_num_heads, seq_q}; }
  int64_t Group() const { return q_num_heads / kv_num_heads; }  // query heads per key head
};

// Throws InvalidOperands unless `got` is absent or `expected`.
void Expect(const char* name, const std::optional<Shape>& got, const Shape& expected);

// Sizes from the shapes of Q, K and V, the first of `inputs`. Throws InvalidOperands.
Shapes InferCommonShapes(const std::optional<Shape>* inputs, const CommonAttributes& attributes);

// Sizes, storage and outputs of one execution, whatever the operator. An unwanted lse is null.
struct Execution {
  Shapes shapes;
  cpu::ElementType type = cpu::ElementType::kFloat32;
  void* output = nullptr;
  float* lse = nullptr;
};

// Which keys of one batch entry exist.
struct KeyPadding {
  int64_t length = 0;  // keys [0, length)
  int64_t offset = 0;  // absolute position of query row 0
  bool holes = false;  // some key below length is padding
};

// Reads nonpad_kv_seqlen and attn_mask (each may be null). Throws InvalidOperands when a length is out of range.
KeyPadding ReadPadding(const Shapes& shapes, const void* nonpad_kv_seqlen, const void* attn_mask, int64_t batch);

}  // namespace longspan

#endif  // LONGSPAN_ATTENTION_OPERANDS_H_
