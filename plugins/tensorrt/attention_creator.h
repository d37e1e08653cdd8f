// Makes the plugins of one operator, from the fields of an ONNX node or of an engine.
#ifndef LONGSPAN_TENSORRT_ATTENTION_CREATOR_H_
#define LONGSPAN_TENSORRT_ATTENTION_CREATOR_H_

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "tensorrt/attention_plugin.h"

namespace longspan::trt {

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  using MakeNode = std::shared_ptr<const AttentionNode> (*)(std::string layer, const FieldReader& fields,
                                                            cuda::Runtime* runtime);

  // `runtime` is what all plugins share: packs, and code on devices.
  AttentionCreator(const cuda::OperatorFact& op, MakeNode make_node, std::shared_ptr<cuda::Runtime> runtime);

  nvinfer1::IPluginV3* createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return announced_.Collection(); }
  const char* getPluginName() const noexcept override { return op_.name.data(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const cuda::OperatorFact& op_;
  const MakeNode make_node_;
  const std::shared_ptr<cuda::Runtime> runtime_;
  FieldList announced_;
};

// One creator for each operator.
std::vector<std::unique_ptr<AttentionCreator>> MakeCreators(std::shared_ptr<cuda::Runtime> runtime);

}  // namespace longspan::trt

#endif  // LONGSPAN_TENSORRT_ATTENTION_CREATOR_H_
