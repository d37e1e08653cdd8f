#include "ort/cuda_attention_op.h"

#include "cuda/operators.h"

namespace longspan::ort {
namespace {

constexpr const char* kPack = "kernel_pack";
constexpr const char* kPackId = "kernel_pack_id";

constexpr const char* kNextSteps =
    "; next step: compile kernels for this device (longspan export --gpu-arch …, or longspan kernels compile and "
    "LONGSPAN_KERNEL_PATH), or leave liblongspan_ort.so out of the session, which then runs function bodies";

const char* DtypeName(cpu::ElementType type) {
  switch (type) {
    case cpu::ElementType::kFloat16:
      return "float16";
    case cpu::ElementType::kBFloat16:
      return "bfloat16";
    default:
      return "float32";
  }
}

// Head sizes and group as far as the model says them; -1 otherwise.
cuda::Sizes KnownSizes(const NodeReader& node, const CommonAttributes& attributes) {
  const std::vector<int64_t> q = node.InputShape(kQ), k = node.InputShape(kK), v = node.InputShape(kV);
  cuda::Sizes sizes;
  const auto per_head = [](int64_t width, int64_t heads) { return width > 0 && heads > 0 ? width / heads : -1; };
  int64_t heads = attributes.q_num_heads, kv_heads = attributes.kv_num_heads;
  if (q.size() == 4) {
    sizes.head_size = q[3];
    heads = q[1];
    if (v.size() == 4) sizes.v_head_size = v[3];
    if (k.size() == 4) kv_heads = k[1];
  } else if (q.size() == 3) {
    sizes.head_size = per_head(q[2], heads);
    if (v.size() == 3) sizes.v_head_size = per_head(v[2], kv_heads);
  }
  if (heads > 0 && kv_heads > 0) sizes.group = heads / kv_heads;
  return sizes;
}

}  // namespace

cuda::Node DescribeNode(const NodeReader& node, const char* op, cpu::ElementType type,
                        const CommonAttributes& attributes) {
  cuda::Node described;
  described.op = op;
  described.dtype = DtypeName(type);
  const std::vector<cuda::InputFact>& inputs = cuda::FindOperator(op)->inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (node.HasInput(i)) described.inputs.emplace_back(inputs[i].name);
  }
  described.lse = node.HasOutput(1);
  described.integers = {{"is_causal", attributes.is_causal},
                        {"q_num_heads", attributes.q_num_heads},
                        {"kv_num_heads", attributes.kv_num_heads}};
  described.floats = {{"softcap", attributes.softcap}};
  if (attributes.scale) described.floats["scale"] = *attributes.scale;
  described.sizes = KnownSizes(node, attributes);
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
