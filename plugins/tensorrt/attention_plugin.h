// An attention operator as a TensorRT plugin, whichever operator it is.
#ifndef LONGSPAN_TENSORRT_ATTENTION_PLUGIN_H_
#define LONGSPAN_TENSORRT_ATTENTION_PLUGIN_H_

#include <NvInferRuntime.h>

#include <memory>
#include <optional>
#include <string>

#include "tensorrt/attention_execution.h"

namespace longspan::trt {

constexpr const char* kNamespace = "longspan";
constexpr const char* kVersion = "1";

// All functions that TensorRT calls report what is wrong and return what TensorRT takes for failure.
class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  // What clones have in common. `type` is T where it is known already.
  struct Identity {
    std::shared_ptr<cuda::Runtime> runtime;
    std::shared_ptr<const AttentionNode> node;
    bool built_here = false;  // by this process, not read from an engine
    std::optional<cpu::ElementType> type = std::nullopt;
  };

  // What a context has to offer may be null.
  explicit AttentionPlugin(Identity identity, nvinfer1::IGpuAllocator* allocator = nullptr,
                           nvinfer1::IErrorRecorder* recorder = nullptr);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return identity_.node->op.name.data(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // IPluginV3OneBuild
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t in_count,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t out_count) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t out_count, const nvinfer1::DataType* in_types,
                             int32_t in_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t in_count, const nvinfer1::DimsExprs* shape_inputs,
                          int32_t shape_count, nvinfer1::DimsExprs* out, int32_t out_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* all, int32_t in_count,
                                 int32_t out_count) noexcept override;
  int32_t getNbOutputs() const noexcept override { return OutputCount(); }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t in_count,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t out_count) const noexcept override;
  const char* getTimingCacheID() noexcept override;
  const char* getMetadataString() noexcept override;

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t in_count, const nvinfer1::PluginTensorDesc* out,
                        int32_t out_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  int32_t OutputCount() const { return identity_.node->lse ? 2 : 1; }
  // Throws InvalidOperands.
  void ExpectCounts(int32_t in_count, int32_t out_count) const;
  void CheckStatic(const nvinfer1::DynamicPluginTensorDesc* in) const;

  Identity identity_;
  const std::string title_;
  nvinfer1::IErrorRecorder* const recorder_;
  AttentionExecution execution_;
  std::unique_ptr<FieldList> serialized_;
  std::string timing_id_, metadata_;
};

}  // namespace longspan::trt

#endif  // LONGSPAN_TENSORRT_ATTENTION_PLUGIN_H_
