// A node of either operator in a TensorRT network, as the fields of its plugin describe it.
#ifndef LONGSPAN_TENSORRT_ATTENTION_NODE_H_
#define LONGSPAN_TENSORRT_ATTENTION_NODE_H_

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attention/node.h"
#include "cuda/node.h"
#include "cuda/operators.h"
#include "cuda/runtime.h"
#include "cuda/workspace.h"
#include "tensorrt/fields.h"

namespace longspan::trt {

// Names of the fields that are no attributes of the definition; see docs/tensorrt-plugin.md.
constexpr const char* kOperandsField = "operands";
constexpr const char* kResultsField = "results";
constexpr const char* kPackField = "kernel_pack";
constexpr const char* kTypeField = "type";  // only inside engines

using OptionalShapes = std::vector<std::optional<Shape>>;
using OptionalRanges = std::vector<std::optional<cuda::ShapeRange>>;

// Empty for what T is not.
std::optional<cpu::ElementType> ElementTypeOf(nvinfer1::DataType type);
// What a network calls the type of an operand whose node's T is `element`. block_masks, which no network may hold, are
// words of INT32.
nvinfer1::DataType NetworkType(OperandType type, nvinfer1::DataType element);

// What messages call a node: operator and layer, where that has a name.
std::string Title(std::string_view op, const std::string& layer);

// Immutable, and shared by all clones of a plugin.
class AttentionNode {
 public:
  virtual ~AttentionNode() = default;
  AttentionNode(const AttentionNode&) = delete;
  AttentionNode& operator=(const AttentionNode&) = delete;

  // Of an input by its position in the definition.
  virtual OperandType InputType(size_t position) const = 0;

  // Sizes of one execution, checked against the definition. Shapes by position in the definition. Throws
  // InvalidOperands.
  virtual Shapes InferShapes(const OptionalShapes& inputs) const = 0;

  // What kernels are chosen by.
  cuda::Node Describe(cpu::ElementType type) const;

  // The shape that the definition gives an input whose shape in the network is `shape`: another one for block_masks
  // alone. Throws InvalidOperands.
  Shape DefinitionShape(size_t position, const Shape& shape) const;
  // The same for ranges, of which the network's layout of block_masks tells the first axis only.
  cuda::ShapeRange DefinitionRange(size_t position, const cuda::ShapeRange& shape) const;

  // What may hold its kernels: the packs of LONGSPAN_KERNEL_PATH, then its own. Throws cuda::InvalidPack.
  cuda::Packs AllPacks(cuda::Runtime* runtime) const;

  // The fields that make the same node again, with its T where that is known.
  void Write(std::optional<cpu::ElementType> type, FieldList* fields) const;

  const cuda::OperatorFact& op;
  const CommonAttributes common;
  const std::string layer;
  const std::vector<size_t> operands;  // positions in the definition of the network's inputs
  const bool lse;
  const std::shared_ptr<const cuda::Pack> pack;  // that the node carries; may be null

 protected:
  // Throws std::invalid_argument, and cuda::InvalidPack.
  AttentionNode(const cuda::OperatorFact& op, const CommonAttributes& common, std::string layer,
                const FieldReader& fields, cuda::Runtime* runtime);

  // The attributes that only this operator has.
  virtual void DescribeOwn(cuda::Node* node) const = 0;
};

template <typename Operator>
class NodeOf final : public AttentionNode {
 public:
  NodeOf(std::string layer, const FieldReader& fields, cuda::Runtime* runtime)
      : NodeOf(Operator::ReadAttributes(fields), std::move(layer), fields, runtime) {}

  OperandType InputType(size_t position) const override { return Operator::InputType(position); }

  Shapes InferShapes(const OptionalShapes& inputs) const override {
    std::optional<Shape> shapes[Operator::kInputCount];
    std::copy(inputs.begin(), inputs.end(), shapes);
    return Operator::CheckShapes(shapes, attributes_);
  }

 private:
  NodeOf(const typename Operator::Attributes& attributes, std::string layer, const FieldReader& fields,
         cuda::Runtime* runtime)
      : AttentionNode(*cuda::FindOperator(Operator::kName), attributes, std::move(layer), fields, runtime),
        attributes_(attributes) {}

  void DescribeOwn(cuda::Node* node) const override { Operator::Describe(attributes_, node); }

  const typename Operator::Attributes attributes_;
};

}  // namespace longspan::trt

#endif  // LONGSPAN_TENSORRT_ATTENTION_NODE_H_
