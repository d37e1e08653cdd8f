#include "ort/sliding_window_attention_op.h"

#include "ort/cuda_attention_op.h"
#include "sliding_window_attention/attention.h"
#include "sliding_window_attention/node.h"

namespace longspan::ort {
namespace {

struct SlidingWindow : sliding_window::Operator {
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
