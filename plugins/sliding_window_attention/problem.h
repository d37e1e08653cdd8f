// One execution of SlidingWindowAttention: attributes, shapes and pointers, checked against the definition.
#ifndef LONGSPAN_SLIDING_WINDOW_ATTENTION_PROBLEM_H_
#define LONGSPAN_SLIDING_WINDOW_ATTENTION_PROBLEM_H_

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/tile_kernels.h"

namespace longspan {

// Inputs or attributes contradict the definition; the message is the one that definition.py gives.
class InvalidOperands : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

using Shape = std::vector<int64_t>;

// Positions of the operator's inputs on a node.
enum Input {
  kQ,
  kK,
  kV,
  kAttnMask,
  kNonpadKvSeqlen,
  kGlobalMask,
  kGlobalQ,
  kGlobalK,
  kGlobalV,
  kBandBias,
  kSinks,
  kSpans,
  kInputCount
};
extern const char* const kInputNames[kInputCount];

// Largest window size, dilation and number of heads: products of two stay inside int64.
constexpr int64_t kSizeLimit = (int64_t{1} << 31) - 1;

struct Attributes {
  int64_t left_window_size = -1;
  int64_t right_window_size = -1;
  std::vector<int64_t> dilation = {1};
  bool is_causal = false;
  std::optional<float> scale;
  float softcap = 0;
  int64_t q_num_heads = 0;
  int64_t kv_num_heads = 0;
  float span_ramp = 32;

  // Throws InvalidOperands when a value is outside what the definition allows.
  void Check() const;
};

// Sizes of one execution, the same for both layouts.
struct Shapes {
  bool split_heads = true;  // (B, H, S, D), not (B, S, H*D)
  int64_t batch = 0, q_num_heads = 0, kv_num_heads = 0, seq_q = 0, seq_k = 0, head_size = 0, v_head_size = 0;

  Shape Output() const;
  Shape Lse() const { return {batch, q_num_heads, seq_q}; }
};

// Checks the shapes of all inputs present (nullopt: absent) and returns the sizes. Throws InvalidOperands.
Shapes InferShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes);

// Everything that the kernel reads and writes. Pointers of absent inputs and of an unwanted lse are null.
struct Problem {
  Attributes attributes;
  Shapes shapes;
  cpu::ElementType type = cpu::ElementType::kFloat32;
  const void* inputs[kInputCount] = {};
  Shape band_bias_shape;
  void* output = nullptr;
  float* lse = nullptr;
};

}  // namespace longspan

#endif  // LONGSPAN_SLIDING_WINDOW_ATTENTION_PROBLEM_H_
