// An attention operator by the GPU kernels of packs, whichever operator it is.
#ifndef LONGSPAN_ORT_CUDA_ATTENTION_OP_H_
#define LONGSPAN_ORT_CUDA_ATTENTION_OP_H_

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/launcher.h"
#include "cuda/runtime.h"
#include "ort/attention_op.h"

namespace longspan::ort {

// The parts of a node's description that do not depend on the operator. `type` is T.
cuda::Node DescribeNode(const NodeReader& node, const char* op, cpu::ElementType type,
                        const CommonAttributes& attributes);

// Device memory from ONNX Runtime's allocator, in the order of the stream; given back when the call ends, which other
// work on the stream comes after.
class ContextScratch final : public cuda::Scratch {
 public:
  explicit ContextScratch(const OrtKernelContext* context);
  ~ContextScratch() override;
  ContextScratch(const ContextScratch&) = delete;
  ContextScratch& operator=(const ContextScratch&) = delete;

  void* Allocate(size_t bytes) override;

 private:
  const OrtKernelContext* context_;
  const OrtMemoryInfo* memory_info_ = nullptr;  // that of Q
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> memory_;
};

// Finds a node's packs and makes its launcher as early as they are there.
class NodeLauncher {
 public:
  // Throws when the session is created if it can be known then that no kernel is there.
  NodeLauncher(const OrtKernelInfo* info, cuda::Node node);

  // The node's launcher, which is made at the first call where the pack was not there before. Throws as cuda::Launcher.
  const cuda::Launcher& Get() const;

 private:
  // The packs that may serve the node; false where the one that it names is not there (yet).
  bool FindPacks(cuda::Packs* packs) const;
  void Make(const cuda::Packs& packs) const;

  const cuda::Node node_;
  const int device_;
  const std::string name_;                     // of the pack that the node names, or empty
  std::shared_ptr<const cuda::Pack> carried_;  // by this node, for itself and others
  mutable std::mutex mutex_;
  mutable std::unique_ptr<const cuda::Launcher> launcher_;
};

template <typename Operator>
class CudaAttentionKernel {
 public:
  CudaAttentionKernel(const OrtKernelInfo* info, cpu::ElementType type)
      : attributes_(Operator::ReadAttributes(AttributeReader(info))),
        type_(type),
        launcher_(info, Describe(info, type, attributes_)) {}

  void Compute(OrtKernelContext* context) const {
    typename Operator::Problem problem;
    problem.attributes = attributes_;
    problem.type = type_;
    ReadProblem<Operator>(context, &problem);
    const cuda::Operands operands{problem.shapes, problem.input_shapes, problem.inputs, problem.output, problem.lse};
    void* stream = nullptr;
    Check(g_api->KernelContext_GetGPUComputeStream(context, &stream));
    ContextScratch scratch(context);
    launcher_.Get().Launch(operands, static_cast<CUstream>(stream), &scratch);
  }

 private:
  static cuda::Node Describe(const OrtKernelInfo* info, cpu::ElementType type,
                             const typename Operator::Attributes& attributes) {
    const NodeReader reader(info);
    cuda::Node node = DescribeNode(reader, Operator::kName, type, attributes);
    Operator::Describe(attributes, &node);
    return node;
  }

  const typename Operator::Attributes attributes_;
  const cpu::ElementType type_;
  const NodeLauncher launcher_;
};

}  // namespace longspan::ort

#endif  // LONGSPAN_ORT_CUDA_ATTENTION_OP_H_
