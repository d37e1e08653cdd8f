// SlidingWindowAttention as an ONNX Runtime custom op.
#ifndef LONGSPAN_ORT_SLIDING_WINDOW_ATTENTION_OP_H_
#define LONGSPAN_ORT_SLIDING_WINDOW_ATTENTION_OP_H_

#include <array>

#include "cpu/tile_kernels.h"
#include "ort/api.h"

namespace longspan::ort {

// One op per element type; ONNX Runtime merges them into one schema. They live as long as the library.
std::array<const OrtCustomOp*, cpu::kElementTypes> SlidingWindowAttentionOps();

}  // namespace longspan::ort

#endif  // LONGSPAN_ORT_SLIDING_WINDOW_ATTENTION_OP_H_
