// SlidingWindowAttention for the glue to runtimes: its attributes and the types of its operands.
#ifndef LONGSPAN_SLIDING_WINDOW_ATTENTION_NODE_H_
#define LONGSPAN_SLIDING_WINDOW_ATTENTION_NODE_H_

#include "attention/node.h"
#include "cuda/node.h"
#include "sliding_window_attention/problem.h"

namespace longspan::sliding_window {

struct Operator {
  using Attributes = sliding_window::Attributes;
  using Problem = sliding_window::Problem;
  static constexpr const char* kName = "SlidingWindowAttention";
  static constexpr size_t kInputCount = sliding_window::kInputCount;

  // Throws InvalidOperands, and what the reader throws.
  template <typename Reader>
  static Attributes ReadAttributes(const Reader& node) {
    Attributes a;
    a.left_window_size = node.Int("left_window_size", a.left_window_size);
    a.right_window_size = node.Int("right_window_size", a.right_window_size);
    a.dilation = node.Ints("dilation", a.dilation);
    a.span_ramp = node.Float("span_ramp", a.span_ramp);
    ReadCommonAttributes(node, &a);
    a.Check();
    return a;
  }

  static Shapes CheckShapes(const std::optional<Shape> (&inputs)[kInputCount], const Attributes& a) {
    return InferShapes(inputs, a);
  }

  // The attributes that only this operator has, for the choice and the parameters of GPU kernels.
  static void Describe(const Attributes& a, cuda::Node* node) {
    node->integers["left_window_size"] = a.left_window_size;
    node->integers["right_window_size"] = a.right_window_size;
    node->floats["span_ramp"] = a.span_ramp;
    node->dilation = a.dilation;
  }

  static OperandType InputType(size_t index) {
    switch (index) {
      case kAttnMask:
      case kGlobalMask:
        return OperandType::kBool;
      case kNonpadKvSeqlen:
        return OperandType::kInt64;
      case kSpans:
        return OperandType::kFloat32;
      default:
        return OperandType::kT;
    }
  }

  static bool IsRequired(size_t index) { return index < kCommonInputs; }
};

}  // namespace longspan::sliding_window

#endif  // LONGSPAN_SLIDING_WINDOW_ATTENTION_NODE_H_
