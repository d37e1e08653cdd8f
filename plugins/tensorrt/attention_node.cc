#include "tensorrt/attention_node.h"

#include "cuda/text.h"

namespace longspan::trt {
namespace {

using nvinfer1::DataType;

// The positions in the definition of the operands that a node names. Throws InvalidOperands.
std::vector<size_t> ReadOperands(const cuda::OperatorFact& op, const FieldReader& fields) {
  std::vector<std::string_view> known;
  for (const cuda::InputFact& input : op.inputs) known.push_back(input.name);
  if (!fields.Has(kOperandsField)) {
    Fail("field ", kOperandsField, " is missing: it names the inputs; allowed: ", cuda::Joined(known, ", "));
  }
  std::vector<size_t> operands;
  for (const std::string& name : fields.Strings(kOperandsField)) {
    const size_t position = static_cast<size_t>(std::find(known.begin(), known.end(), name) - known.begin());
    if (position == known.size()) {
      Fail("field ", kOperandsField, " names ", cuda::Quoted(name), "; allowed: ", cuda::Joined(known, ", "));
    }
    if (!operands.empty() && position <= operands.back()) {
      Fail("field ", kOperandsField, " names ", name, " after ", known[operands.back()],
           ": each once, and in the definition's order: ", cuda::Joined(known, ", "));
    }
    operands.push_back(position);
  }
  for (size_t i = 0; i < known.size(); ++i) {
    const bool given = std::find(operands.begin(), operands.end(), i) != operands.end();
    if (op.inputs[i].required && !given) Fail("field ", kOperandsField, " lacks ", known[i], ", which is required");
  }
  return operands;
}

// Whether the node has the second output.
bool ReadResults(const FieldReader& fields) {
  const std::vector<std::string> results = fields.Strings(kResultsField);
  if (results == std::vector<std::string>{"Y"}) return false;
  if (results == std::vector<std::string>{"Y", "lse"}) return true;
  Fail("field ", kResultsField, " is ", results.empty() ? "missing" : cuda::Quoted(cuda::Joined(results, ", ")),
       ": must be Y, or Y and lse");
}

std::shared_ptr<const cuda::Pack> ReadPack(const FieldReader& fields, cuda::Runtime* runtime) {
  std::vector<uint8_t> data = fields.Bytes(kPackField);
  if (data.empty()) return nullptr;
  try {
    return runtime->AddPack(std::move(data));
  } catch (const cuda::InvalidPack& error) {
    throw cuda::InvalidPack(std::string("field ") + kPackField + " " + error.what());
  }
}

}  // namespace

std::optional<cpu::ElementType> ElementTypeOf(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return cpu::ElementType::kFloat16;
    case DataType::kBF16:
      return cpu::ElementType::kBFloat16;
    case DataType::kFLOAT:
      return cpu::ElementType::kFloat32;
    default:
      return std::nullopt;
  }
}

DataType NetworkType(OperandType type, DataType element) {
  switch (type) {
    case OperandType::kBool:
      return DataType::kBOOL;
    case OperandType::kInt64:
      return DataType::kINT64;
    case OperandType::kFloat32:
      return DataType::kFLOAT;
    case OperandType::kT:
      return element;
    default:  // kInt32, and the words of block_masks
      return DataType::kINT32;
  }
}

std::string Title(std::string_view op, const std::string& layer) {
  return "longspan " + std::string(op) + (layer.empty() ? "" : " '" + layer + "'");
}

AttentionNode::AttentionNode(const cuda::OperatorFact& op, const CommonAttributes& common, std::string layer,
                             const FieldReader& fields, cuda::Runtime* runtime)
    : op(op),
      common(common),
      layer(std::move(layer)),
      operands(ReadOperands(op, fields)),
      lse(ReadResults(fields)),
      pack(ReadPack(fields, runtime)) {}

cuda::Node AttentionNode::Describe(cpu::ElementType type) const {
  std::vector<bool> present(op.inputs.size(), false);
  for (const size_t position : operands) present[position] = true;
  cuda::Node node = cuda::DescribeNode(std::string(op.name).c_str(), type, present, lse, common);
  DescribeOwn(&node);
  return node;
}

Shape AttentionNode::DefinitionShape(size_t position, const Shape& shape) const {
  if (InputType(position) != OperandType::kUint8) return shape;
  const std::map<std::string, int64_t> sizes = Describe(cpu::ElementType::kFloat32).integers;
  const int64_t rows = sizes.at("q_block_size"), bytes = (sizes.at("kv_block_size") + 7) / 8;
  if (shape.size() != 2 || rows * bytes % 4 != 0 || shape[1] != rows * bytes / 4) {
    Fail(op.inputs[position].name, " has shape ", Tuple(shape), " in the network: must be (M, ", rows, " * ", bytes,
         " / 4), the bytes of each mask as whole words of INT32");
  }
  return {shape[0], rows, bytes};
}

cuda::ShapeRange AttentionNode::DefinitionRange(size_t position, const cuda::ShapeRange& shape) const {
  if (InputType(position) != OperandType::kUint8 || shape.empty()) return shape;
  return {shape[0], {}, {}};
}

cuda::Packs AttentionNode::AllPacks(cuda::Runtime* runtime) const {
  cuda::Packs packs = runtime->PathPacks();
  if (pack != nullptr) packs.push_back(pack);
  return packs;
}

void AttentionNode::Write(std::optional<cpu::ElementType> type, FieldList* fields) const {
  const cuda::Node node = Describe(type.value_or(cpu::ElementType::kFloat32));
  for (const auto& [name, value] : node.integers) fields->AddInts(name, {value});
  for (const auto& [name, value] : node.floats) fields->AddFloat(name, value);
  for (const std::string_view name : op.list_attributes) fields->AddInts(std::string(name), node.dilation);
  fields->AddStrings(kOperandsField, node.inputs);
  fields->AddStrings(kResultsField, lse ? std::vector<std::string>{"Y", "lse"} : std::vector<std::string>{"Y"});
  if (type) fields->AddStrings(kTypeField, {node.dtype});
  if (pack != nullptr) fields->AddBytes(kPackField, pack->data());
}

}  // namespace longspan::trt
