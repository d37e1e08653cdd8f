#include "tensorrt/attention_plugin.h"

#include <cstring>

#include "cuda/sha256.h"
#include "cuda/text.h"
#include "cuda/workspace.h"
#include "tensorrt/messages.h"

namespace longspan::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginTensorDesc;

constexpr size_t kNoWorkspaceIsEnough = size_t{1} << 62;

// What builders call the operands and results by.
std::string NameOf(const AttentionNode& node, int32_t position) {
  const auto inputs = static_cast<int32_t>(node.operands.size());
  if (position >= inputs) return position == inputs ? "Y" : "lse";
  return std::string(node.op.inputs[node.operands[static_cast<size_t>(position)]].name);
}

// What the operand or result at a position must be where T is `element`.
DataType TypeAt(const AttentionNode& node, int32_t position, DataType element) {
  const auto inputs = static_cast<int32_t>(node.operands.size());
  if (position >= inputs) return position == inputs ? element : DataType::kFLOAT;
  return NetworkType(node.InputType(node.operands[static_cast<size_t>(position)]), element);
}

// The limits of an input's shape in a profile. "Any smaller problem" is to find its workspace too, so an axis that
// varies may be as short as 0.
cuda::ShapeRange RangeOf(const DynamicPluginTensorDesc& input, const std::string& name) {
  cuda::ShapeRange range;
  for (int32_t axis = 0; axis < input.desc.dims.nbDims; ++axis) {
    const int64_t low = input.min.d[axis], high = std::max(input.max.d[axis], input.desc.dims.d[axis]);
    if (high < 0) Fail(name, " has no upper bound on axis ", axis);
    range.push_back({low == high ? high : 0, high});
  }
  return range;
}

// Expressions of one builder; what it does not give is an error.
class Expressions {
 public:
  explicit Expressions(nvinfer1::IExprBuilder* builder) : builder_(*builder) {}

  const IDimensionExpr* Constant(int64_t value) { return Given(builder_.constant(value)); }
  const IDimensionExpr* Apply(DimensionOperation operation, const IDimensionExpr* a, const IDimensionExpr* b) {
    return Given(builder_.operation(operation, *a, *b));
  }

 private:
  static const IDimensionExpr* Given(const IDimensionExpr* expression) {
    if (expression == nullptr) Fail("TensorRT made no expression for a dimension");
    return expression;
  }

  nvinfer1::IExprBuilder& builder_;
};

void SetShape(std::initializer_list<const IDimensionExpr*> axes, DimsExprs* shape) {
  shape->nbDims = static_cast<int32_t>(axes.size());
  std::copy(axes.begin(), axes.end(), shape->d);
}

}  // namespace

AttentionPlugin::AttentionPlugin(Identity identity, nvinfer1::IGpuAllocator* allocator,
                                 nvinfer1::IErrorRecorder* recorder)
    : identity_(std::move(identity)),
      title_(Title(identity_.node->op.name, identity_.node->layer)),
      recorder_(recorder),
      execution_(identity_.runtime, identity_.node, identity_.built_here, allocator) {}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept {
  AttentionPlugin* made = nullptr;
  Guarded(title_, recorder_, [&] { made = new AttentionPlugin(identity_); });
  return made;
}

void AttentionPlugin::ExpectCounts(int32_t in_count, int32_t out_count) const {
  const size_t inputs = identity_.node->operands.size();
  if (in_count != static_cast<int32_t>(inputs) || out_count != OutputCount()) {
    Fail("the layer has ", in_count, " inputs and ", out_count, " outputs; its fields name ", inputs, " and ",
         OutputCount());
  }
}

int32_t AttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t in_count,
                                         const DynamicPluginTensorDesc* out, int32_t out_count) noexcept {
  return Status(title_, recorder_, [&] {
    ExpectCounts(in_count, out_count);
    const DataType element = in[kQ].desc.type;
    identity_.type = ElementTypeOf(element);
    for (int32_t i = 0; i < in_count + out_count; ++i) {
      const PluginTensorDesc& tensor = (i < in_count ? in[i] : out[i - in_count]).desc;
      if (!identity_.type || tensor.type != TypeAt(*identity_.node, i, element)) {
        Fail(NameOf(*identity_.node, i), " is of a type that it may not have here; T is FP16, BF16 or FP32");
      }
    }
    CheckStatic(in);
    serialized_.reset();
  });
}

// Shapes that are known while a network is built are checked then; others when they are.
void AttentionPlugin::CheckStatic(const DynamicPluginTensorDesc* in) const {
  const AttentionNode& node = *identity_.node;
  OptionalShapes shapes(node.op.inputs.size());
  for (size_t i = 0; i < node.operands.size(); ++i) {
    const nvinfer1::Dims& dims = in[i].desc.dims;
    const Shape shape(dims.d, dims.d + std::max(dims.nbDims, 0));
    if (dims.nbDims < 0 || std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; })) return;
    shapes[node.operands[i]] = node.DefinitionShape(node.operands[i], shape);
  }
  node.InferShapes(shapes);
}

int32_t AttentionPlugin::getOutputDataTypes(DataType* types, int32_t out_count, const DataType* in_types,
                                            int32_t in_count) const noexcept {
  return Status(title_, recorder_, [&] {
    ExpectCounts(in_count, out_count);
    const DataType element = in_types[kQ];
    if (!ElementTypeOf(element)) Fail("Q is of another type: must be FP16, BF16 or FP32");
    for (int32_t i = 0; i < in_count; ++i) {
      if (in_types[i] != TypeAt(*identity_.node, i, element)) {
        Fail(NameOf(*identity_.node, i), " is of another type than the definition gives it where Q is what it is");
      }
    }
    for (int32_t i = 0; i < out_count; ++i) types[i] = TypeAt(*identity_.node, in_count + i, element);
  });
}

int32_t AttentionPlugin::getOutputShapes(const DimsExprs* in, int32_t in_count, const DimsExprs*, int32_t,
                                         DimsExprs* out, int32_t out_count, nvinfer1::IExprBuilder& builder) noexcept {
  return Status(title_, recorder_, [&] {
    ExpectCounts(in_count, out_count);
    const DimsExprs &q = in[kQ], &k = in[kK], &v = in[kV];
    if (q.nbDims != k.nbDims || q.nbDims != v.nbDims || (q.nbDims != 3 && q.nbDims != 4)) {
      Fail("Q, K, V have ", q.nbDims, ", ", k.nbDims, " and ", v.nbDims, " axes: all must be 3-D or all 4-D");
    }
    if (q.nbDims == 4) {
      SetShape({q.d[0], q.d[1], q.d[2], v.d[3]}, &out[0]);
      if (out_count > 1) SetShape({q.d[0], q.d[1], q.d[2]}, &out[1]);
      return;
    }
    const int64_t heads = identity_.node->common.q_num_heads, kv_heads = identity_.node->common.kv_num_heads;
    if (heads < 1 || kv_heads < 1) Fail("3-D inputs need q_num_heads and kv_num_heads of 1 or more");
    if (v.d[2]->isConstant() && v.d[2]->getConstantValue() % kv_heads != 0) {
      Fail("V has ", v.d[2]->getConstantValue(), " channels, which ", kv_heads, " heads do not divide");
    }
    Expressions expressions(&builder);
    const IDimensionExpr* const head_size =
        expressions.Apply(DimensionOperation::kFLOOR_DIV, v.d[2], expressions.Constant(kv_heads));
    SetShape({q.d[0], q.d[1], expressions.Apply(DimensionOperation::kPROD, expressions.Constant(heads), head_size)},
             &out[0]);
    if (out_count > 1) SetShape({q.d[0], expressions.Constant(heads), q.d[1]}, &out[1]);
  });
}

bool AttentionPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* all, int32_t in_count,
                                                int32_t out_count) noexcept {
  const auto inputs = static_cast<int32_t>(identity_.node->operands.size());
  if (in_count != inputs || out_count != OutputCount() || position < 0 || position >= in_count + out_count)
    return false;
  const PluginTensorDesc& tensor = all[position].desc;
  const DataType element = all[kQ].desc.type;  // which comes first
  return tensor.format == nvinfer1::TensorFormat::kLINEAR && ElementTypeOf(element).has_value() &&
         tensor.type == TypeAt(*identity_.node, position, element);
}

size_t AttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t in_count,
                                         const DynamicPluginTensorDesc*, int32_t out_count) const noexcept {
  size_t bytes = kNoWorkspaceIsEnough;
  Guarded(title_, recorder_, [&] {
    ExpectCounts(in_count, out_count);
    const AttentionNode& node = *identity_.node;
    const std::optional<cpu::ElementType> type = ElementTypeOf(in[kQ].desc.type);
    if (!type) Fail("Q is of another type: must be FP16, BF16 or FP32");
    OptionalRanges ranges(node.op.inputs.size());
    for (size_t i = 0; i < node.operands.size(); ++i) {
      const size_t position = node.operands[i];
      ranges[position] = node.DefinitionRange(position, RangeOf(in[i], NameOf(node, static_cast<int32_t>(i))));
    }
    const size_t rank = ranges[kQ]->size();
    if ((rank != 3 && rank != 4) || ranges[kK]->size() != rank || ranges[kV]->size() != rank) {
      Fail("Q, K and V must be all 3-D or all 4-D");
    }
    bytes = cuda::WorkspaceBound(node.AllPacks(identity_.runtime.get()), node.Describe(*type), ranges.data());
  });
  return bytes;
}

// Of all that kernels and their times depend on; TensorRT adds shapes and types.
const char* AttentionPlugin::getTimingCacheID() noexcept {
  const bool made = Guarded(title_, recorder_, [&] {
    if (!timing_id_.empty()) return;  // whoever asked before may still read it
    const AttentionNode& node = *identity_.node;
    std::string text = node.op.name.data();
    FieldList fields;
    node.Write(std::nullopt, &fields);
    const nvinfer1::PluginFieldCollection& all = *fields.Collection();
    for (int32_t i = 0; i < all.nbFields; ++i) {
      const nvinfer1::PluginField& field = all.fields[i];
      if (std::strcmp(field.name, kPackField) == 0) continue;  // its id says the same
      const size_t size = field.type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4;
      text += '\n' + std::string(field.name) + ' ';
      text.append(static_cast<const char*>(field.data), static_cast<size_t>(field.length) * size);
    }
    for (const auto& pack : node.AllPacks(identity_.runtime.get())) text += '\n' + pack->id;
    cuda::Sha256 hash;
    hash.Update(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    timing_id_ = cuda::Hex(hash.Finish());
  });
  return made ? timing_id_.c_str() : nullptr;
}

const char* AttentionPlugin::getMetadataString() noexcept {
  const bool made = Guarded(title_, recorder_, [&] {
    if (!metadata_.empty()) return;
    const AttentionNode& node = *identity_.node;
    const cuda::Node described = node.Describe(cpu::ElementType::kFloat32);  // T is none of the fields
    std::ostringstream text;
    text << node.op.name << "(" << cuda::Joined(described.inputs) << ")";
    for (const auto& [name, value] : described.integers) text << " " << name << "=" << value;
    for (const auto& [name, value] : described.floats) text << " " << name << "=" << value;
    for (const std::string_view name : node.op.list_attributes) text << " " << name << "=" << Tuple(described.dilation);
    text << " kernel_pack=" << (node.pack != nullptr ? node.pack->id : "none");
    metadata_ = text.str();
  });
  return made ? metadata_.c_str() : nullptr;
}

int32_t AttentionPlugin::setTactic(int32_t tactic) noexcept {
  return Status(title_, recorder_, [&] {
    if (tactic != 0) Fail("tactic ", tactic, " was chosen: there is the default one only, 0");
  });
}

int32_t AttentionPlugin::onShapeChange(const PluginTensorDesc* in, int32_t in_count, const PluginTensorDesc* out,
                                       int32_t out_count) noexcept {
  return Status(title_, recorder_, [&] { execution_.SetShapes(in, in_count, out, out_count); });
}

int32_t AttentionPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                                 void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return Status(title_, recorder_, [&] { execution_.Run(in, inputs, outputs, workspace, stream); });
}

nvinfer1::IPluginV3* AttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
  nvinfer1::IGpuAllocator* const allocator = context != nullptr ? context->getGpuAllocator() : nullptr;
  nvinfer1::IErrorRecorder* const recorder = context != nullptr ? context->getErrorRecorder() : nullptr;
  std::unique_ptr<AttentionPlugin> attached;
  const bool made = Guarded(title_, recorder, [&] {
    attached = std::make_unique<AttentionPlugin>(identity_, allocator, recorder);
    if (identity_.type) attached->execution_.Load(*identity_.type);
  });
  return made ? attached.release() : nullptr;
}

const nvinfer1::PluginFieldCollection* AttentionPlugin::getFieldsToSerialize() noexcept {
  const nvinfer1::PluginFieldCollection* fields = nullptr;
  Guarded(title_, recorder_, [&] {
    if (serialized_ == nullptr) {
      auto made = std::make_unique<FieldList>();
      identity_.node->Write(identity_.type, made.get());
      serialized_ = std::move(made);
    }
    fields = serialized_->Collection();
  });
  return fields;
}

}  // namespace longspan::trt
