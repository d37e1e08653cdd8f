// One execution of SlidingWindowAttention: attributes, shapes and pointers, checked against the definition.
#ifndef LONGSPAN_SLIDING_WINDOW_ATTENTION_PROBLEM_H_
#define LONGSPAN_SLIDING_WINDOW_ATTENTION_PROBLEM_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "attention/operands.h"

namespace longspan::sliding_window {

// Positions of the operator's inputs on a node, after kQ, kK and kV.
enum Input {
  kAttnMask = kCommonInputs,
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

struct Attributes : CommonAttributes {
  int64_t left_window_size = -1;
  int64_t right_window_size = -1;
  std::vector<int64_t> dilation = {1};
  float span_ramp = 32;

  // Throws InvalidOperands when a value is outside what the definition allows.
  void Check() const;
};

// Everything that the kernel reads and writes. Shapes and pointers of absent inputs are empty.
struct Problem : Execution {
  Attributes attributes;
  std::optional<Shape> input_shapes[kInputCount];
  const void* inputs[kInputCount] = {};
};

// Checks the shapes of all inputs present and returns the sizes. Throws InvalidOperands.
Shapes InferShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& attributes);

}  // namespace longspan::sliding_window

#endif  // LONGSPAN_SLIDING_WINDOW_ATTENTION_PROBLEM_H_
