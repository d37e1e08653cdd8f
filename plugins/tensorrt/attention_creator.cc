#include "tensorrt/attention_creator.h"

#include "block_sparse_attention/node.h"
#include "cuda/text.h"
#include "sliding_window_attention/node.h"
#include "tensorrt/messages.h"

namespace longspan::trt {
namespace {

using nvinfer1::PluginFieldType;

template <typename Operator>
std::shared_ptr<const AttentionNode> Make(std::string layer, const FieldReader& fields, cuda::Runtime* runtime) {
  return std::make_shared<const NodeOf<Operator>>(std::move(layer), fields, runtime);
}

template <typename Operator>
std::unique_ptr<AttentionCreator> CreatorOf(const std::shared_ptr<cuda::Runtime>& runtime) {
  return std::make_unique<AttentionCreator>(*cuda::FindOperator(Operator::kName), Make<Operator>, runtime);
}

// T as an engine has noted it.
std::optional<cpu::ElementType> ReadType(const FieldReader& fields) {
  if (!fields.Has(kTypeField)) return std::nullopt;
  const std::string name = cuda::Joined(fields.Strings(kTypeField), ", ");
  if (name == "float16") return cpu::ElementType::kFloat16;
  if (name == "bfloat16") return cpu::ElementType::kBFloat16;
  if (name == "float32") return cpu::ElementType::kFloat32;
  Fail("field ", kTypeField, " is ", cuda::Quoted(name), ": must be float16, bfloat16 or float32");
}

}  // namespace

AttentionCreator::AttentionCreator(const cuda::OperatorFact& op, MakeNode make_node,
                                   std::shared_ptr<cuda::Runtime> runtime)
    : op_(op), make_node_(make_node), runtime_(std::move(runtime)) {
  for (const std::string_view name : op.int_attributes) announced_.Announce(std::string(name), PluginFieldType::kINT32);
  for (const std::string_view name : op.list_attributes) {
    announced_.Announce(std::string(name), PluginFieldType::kINT32);
  }
  for (const std::string_view name : op.float_attributes) {
    announced_.Announce(std::string(name), PluginFieldType::kFLOAT32);
  }
  announced_.Announce(kOperandsField, PluginFieldType::kCHAR);
  announced_.Announce(kResultsField, PluginFieldType::kCHAR);
  announced_.Announce(kPackField, PluginFieldType::kINT8);
}

nvinfer1::IPluginV3* AttentionCreator::createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                                    nvinfer1::TensorRTPhase phase) noexcept {
  const bool building = phase == nvinfer1::TensorRTPhase::kBUILD;
  const std::string name = layer != nullptr ? layer : "";
  AttentionPlugin* made = nullptr;
  Guarded(Title(op_.name, name), nullptr, [&] {
    std::vector<std::string> allowed;
    const nvinfer1::PluginFieldCollection& announced = *announced_.Collection();
    for (int32_t i = 0; i < announced.nbFields; ++i) allowed.emplace_back(announced.fields[i].name);
    if (!building) allowed.emplace_back(kTypeField);
    const FieldReader reader(fields, allowed);
    std::shared_ptr<const AttentionNode> node = make_node_(name, reader, runtime_.get());
    made = new AttentionPlugin({runtime_, std::move(node), building, ReadType(reader)});
  });
  return made;
}

std::vector<std::unique_ptr<AttentionCreator>> MakeCreators(std::shared_ptr<cuda::Runtime> runtime) {
  std::vector<std::unique_ptr<AttentionCreator>> creators;
  creators.push_back(CreatorOf<sliding_window::Operator>(runtime));
  creators.push_back(CreatorOf<block_sparse::Operator>(runtime));
  return creators;
}

}  // namespace longspan::trt
