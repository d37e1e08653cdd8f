// What kernel packs may say of the operators: their operands, attributes and sizes by name.
#ifndef LONGSPAN_CUDA_OPERATORS_H_
#define LONGSPAN_CUDA_OPERATORS_H_

#include <string_view>
#include <vector>

#include "cuda/expression.h"

namespace longspan::cuda {

struct InputFact {
  std::string_view name;
  std::string_view type;  // of the pointer that kernels get; empty for T
  bool required;
};

struct OperatorFact {
  std::string_view name;
  std::vector<InputFact> inputs;  // in the node's order
  std::vector<std::string_view> int_attributes;
  std::vector<std::string_view> float_attributes;
  std::vector<std::string_view> list_attributes;  // of ints: "dilation" or none
  std::vector<std::string_view> matches;          // what a recipe says of its nodes, in order
  std::vector<Size> sizes;                        // of kLeft and beyond: those that its expressions may read
};

// Both operators.
const std::vector<OperatorFact>& Operators();

// nullptr where there is none of that name.
const OperatorFact* FindOperator(std::string_view name);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_OPERATORS_H_
