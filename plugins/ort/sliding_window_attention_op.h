// SlidingWindowAttention as an ONNX Runtime custom op.
#ifndef LONGSPAN_ORT_SLIDING_WINDOW_ATTENTION_OP_H_
#define LONGSPAN_ORT_SLIDING_WINDOW_ATTENTION_OP_H_

#include "ort/attention_op.h"

namespace longspan::ort {

AttentionOps SlidingWindowAttentionOps();

// The same by the GPU kernels of packs, for the execution provider of that name.
AttentionOps SlidingWindowAttentionCudaOps(const char* provider);

}  // namespace longspan::ort

#endif  // LONGSPAN_ORT_SLIDING_WINDOW_ATTENTION_OP_H_
