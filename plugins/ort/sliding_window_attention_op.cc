#include "ort/sliding_window_attention_op.h"

#include "ort/cuda_attention_op.h"
#include "sliding_window_attention/attention.h"
#include "sliding_window_attention/problem.h"

namespace longspan::ort {
namespace {

struct SlidingWindow {
  using Attributes = sliding_window::Attributes;
  using Problem = sliding_window::Problem;
  static constexpr const char* kName = "SlidingWindowAttention";
  static constexpr size_t kInputCount = sliding_window::kInputCount;

  static Attributes ReadAttributes(const AttributeReader& node) {
    Attributes a;
    a.left_window_size = node.Int("left_window_size", a.left_window_size);
    a.right_window_size = node.Int("right_window_size", a.right_window_size);
    a.dilation = node.Ints("dilation", a.dilation);
    a.span_ramp = node.Float("span_ramp", a.span_ramp);
    ReadCommonAttributes(node, &a);
    a.Check();
    return a;
  }

  // The attributes that only this operator has, for the choice and the parameters of GPU kernels.
  static void Describe(const Attributes& a, cuda::Node* node) {
    node->integers["left_window_size"] = a.left_window_size;
    node->integers["right_window_size"] = a.right_window_size;
    node->floats["span_ramp"] = a.span_ramp;
    node->dilation = a.dilation;
  }

  static ONNXTensorElementDataType InputType(size_t index) {
    switch (index) {
      case sliding_window::kAttnMask:
      case sliding_window::kGlobalMask:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
      case sliding_window::kNonpadKvSeqlen:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      case sliding_window::kSpans:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      default:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }
  }

  static bool IsRequired(size_t index) { return index < kCommonInputs; }

  static void Compute(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor) {
    sliding_window::Compute(problem, kernels, executor);
  }
};

}  // namespace

AttentionOps SlidingWindowAttentionOps() {
  return MakeAttentionOps<SlidingWindow, AttentionKernel<SlidingWindow>>(nullptr);
}

AttentionOps SlidingWindowAttentionCudaOps(const char* provider) {
  return MakeAttentionOps<SlidingWindow, CudaAttentionKernel<SlidingWindow>>(provider);
}

}  // namespace longspan::ort
