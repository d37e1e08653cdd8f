// An operator node and one execution of it, as far as its kernels depend on them.
#ifndef LONGSPAN_CUDA_NODE_H_
#define LONGSPAN_CUDA_NODE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "attention/operands.h"

namespace longspan::cuda {

// -1: not known yet.
struct Sizes {
  int64_t head_size = -1, v_head_size = -1, group = -1, lists_per_head = -1;
};

struct Node {
  std::string op;
  std::string dtype;                        // "float16", "bfloat16" or "float32"
  std::vector<std::string> inputs;          // formal names of those present, in the definition's order
  bool lse = false;                         // whether it has the second output
  std::map<std::string, int64_t> integers;  // every int attribute, or its default
  std::map<std::string, float> floats;      // every float attribute, or its default; no scale where the node has none
  std::vector<int64_t> dilation = {1};
  Sizes sizes;  // as far as the model says

  // What messages call it.
  std::string Describe() const;
};

struct Operands {
  Shapes shapes;
  const std::optional<Shape>* input_shapes = nullptr;  // by position on the node
  const void* const* inputs = nullptr;                 // device pointers
  void* output = nullptr;
  float* lse = nullptr;

  // What a recipe may ask of the sizes. `op` as in Node.
  Sizes Known(const std::string& op) const;
};

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_NODE_H_
