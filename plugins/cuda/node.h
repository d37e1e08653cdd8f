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

// The parts of a node's description that do not depend on the operator. `present` says of each input of the definition
// whether the node has it.
Node DescribeNode(const char* op, cpu::ElementType type, const std::vector<bool>& present, bool lse,
                  const CommonAttributes& attributes);

// Head sizes and group as far as the shapes of Q, K and V say them: -1 for an unknown size, empty for an unknown rank.
Sizes KnownSizes(const Shape& q, const Shape& k, const Shape& v, const CommonAttributes& attributes);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_NODE_H_
