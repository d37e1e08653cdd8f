// What one execution context holds of a plugin: kernels on its device, and the shapes of the executions to come.
#ifndef LONGSPAN_TENSORRT_ATTENTION_EXECUTION_H_
#define LONGSPAN_TENSORRT_ATTENTION_EXECUTION_H_

#include <NvInferRuntime.h>

#include <memory>
#include <vector>

#include "cuda/launcher.h"
#include "tensorrt/attention_node.h"

namespace longspan::trt {

// Device memory of a context beside TensorRT's workspace. It only grows, and what it had stays until the end, since
// executions that use it may still run.
class ContextMemory {
 public:
  explicit ContextMemory(nvinfer1::IGpuAllocator* allocator) : allocator_(allocator) {}
  ~ContextMemory();
  ContextMemory(const ContextMemory&) = delete;
  ContextMemory& operator=(const ContextMemory&) = delete;

  // At least `bytes`. Throws std::bad_alloc, and cuda::NoKernel without an allocator.
  void* Reserve(size_t bytes);

 private:
  nvinfer1::IGpuAllocator* const allocator_;
  std::vector<void*> blocks_;
  size_t size_ = 0;  // of the last block
};

// Used by one thread at a time, as contexts are.
class AttentionExecution {
 public:
  // `built_here`: the engine is being built by this process, so that its workspace has room for every pack that this
  // process has loaded; that of an engine from elsewhere has room for the node's own pack. `allocator` may be null.
  AttentionExecution(std::shared_ptr<cuda::Runtime> runtime, std::shared_ptr<const AttentionNode> node, bool built_here,
                     nvinfer1::IGpuAllocator* allocator);

  // Loads kernels for T into the device of the calling thread, unless they are there. Throws cuda::NoKernel,
  // cuda::CudaError and cuda::InvalidPack.
  void Load(cpu::ElementType type);

  // Prepares executions of these shapes; all that can fail by them fails here. Throws as Load, and InvalidOperands.
  void SetShapes(const nvinfer1::PluginTensorDesc* in, int32_t in_count, const nvinfer1::PluginTensorDesc* out,
                 int32_t out_count);

  // Launches one execution of those shapes. Throws as cuda::Launcher::Launch.
  void Run(const nvinfer1::PluginTensorDesc* in, const void* const* inputs, void* const* outputs, void* workspace,
           CUstream stream) const;

 private:
  void MakeLauncher(cpu::ElementType type, int device);

  const std::shared_ptr<cuda::Runtime> runtime_;
  const std::shared_ptr<const AttentionNode> node_;
  const bool built_here_;
  ContextMemory memory_;
  std::unique_ptr<const cuda::Launcher> launcher_;
  cpu::ElementType type_ = cpu::ElementType::kFloat32;  // that the launcher is for
  bool ready_ = false;                                  // whether the following is set
  std::vector<nvinfer1::Dims> dims_;                    // as the network gave them
  OptionalShapes shapes_;                               // by position in the definition
  cuda::Operands operands_;
  size_t scratch_bytes_ = 0;
  void* own_scratch_ = nullptr;  // instead of the workspace
};

}  // namespace longspan::trt

#endif  // LONGSPAN_TENSORRT_ATTENTION_EXECUTION_H_
