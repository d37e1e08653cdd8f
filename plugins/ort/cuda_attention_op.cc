#include "ort/cuda_attention_op.h"

#include "cuda/operators.h"

namespace longspan::ort {
namespace {

constexpr const char* kPack = "kernel_pack";
constexpr const char* kPackId = "kernel_pack_id";

constexpr const char* kNextSteps =
    "; next step: compile kernels for this device (longspan export --gpu-arch …, or longspan kernels compile and "
    "LONGSPAN_KERNEL_PATH), or leave liblongspan_ort.so out of the session, which then runs function bodies";

}  // namespace

cuda::Node DescribeNode(const NodeReader& node, const char* op, cpu::ElementType type,
                        const CommonAttributes& attributes) {
  std::vector<bool> present;
  for (size_t i = 0; i < cuda::FindOperator(op)->inputs.size(); ++i) present.push_back(node.HasInput(i));
  cuda::Node described = cuda::DescribeNode(op, type, present, node.HasOutput(1), attributes);
  described.sizes = cuda::KnownSizes(node.InputShape(kQ), node.InputShape(kK), node.InputShape(kV), attributes);
  return described;
}

ContextScratch::ContextScratch(const OrtKernelContext* context) : context_(context) {
  const OrtValue* q = nullptr;
  Check(g_api->KernelContext_GetInput(context, kQ, &q));
  Check(g_api->GetTensorMemoryInfo(q, &memory_info_));
  Check(g_api->KernelContext_GetAllocator(context, memory_info_, &allocator_));
}

ContextScratch::~ContextScratch() {
  for (void* memory : memory_) allocator_->Free(allocator_, memory);
  g_api->ReleaseAllocator(allocator_);
}

void* ContextScratch::Allocate(size_t bytes) {
  void* memory = nullptr;
  Check(g_cuda_api->KernelContext_GetScratchBuffer(context_, memory_info_, bytes, &memory));
  if (memory == nullptr) throw std::bad_alloc();
  memory_.push_back(memory);
  return memory;
}

NodeLauncher::NodeLauncher(const OrtKernelInfo* info, cuda::Node node)
    : node_(std::move(node)), device_(NodeReader(info).Device()), name_(AttributeReader(info).String(kPackId, "")) {
  std::vector<uint8_t> data = AttributeReader(info).Bytes(kPack);
  try {
    if (!data.empty()) carried_ = cuda::SharedRuntime().AddPack(std::move(data));
  } catch (const cuda::InvalidPack& error) {
    throw cuda::InvalidPack(std::string("attribute ") + kPack + " " + error.what() + kNextSteps);
  }
  // The node that carries the pack may come later. Kernels that are there now are loaded now, so that the first run,
  // which may be captured into a CUDA graph, has nothing to load.
  cuda::Packs packs;
  if (FindPacks(&packs)) Make(packs);
}

bool NodeLauncher::FindPacks(cuda::Packs* packs) const {
  *packs = cuda::SharedRuntime().PathPacks();
  if (name_.empty()) return true;
  std::shared_ptr<const cuda::Pack> named = cuda::SharedRuntime().FindPack(name_);
  if (named == nullptr) return false;
  packs->push_back(std::move(named));
  return true;
}

void NodeLauncher::Make(const cuda::Packs& packs) const {
  try {
    launcher_ = std::make_unique<const cuda::Launcher>(node_, packs, device_, &cuda::SharedRuntime().modules());
  } catch (const cuda::NoKernel& error) {
    throw cuda::NoKernel(error.what() + std::string(kNextSteps));
  }
}

const cuda::Launcher& NodeLauncher::Get() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (launcher_ == nullptr) {
    cuda::Packs packs;
    // Without the pack that the node names, others may do.
    if (!FindPacks(&packs) && packs.empty()) {
      throw cuda::NoKernel("no node of the session carries the kernel pack " + name_ + " that the node names" +
                           kNextSteps);
    }
    Make(packs);
  }
  return *launcher_;
}

}  // namespace longspan::ort
