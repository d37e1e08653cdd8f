#include "tensorrt/attention_execution.h"

#include <new>

namespace longspan::trt {
namespace {

constexpr const char* kNextSteps =
    "; next step: build the engine from a bundle with kernels for this device (longspan export --gpu-arch …), or "
    "compile them (longspan kernels compile) and name them in LONGSPAN_KERNEL_PATH";

Shape ShapeOf(const nvinfer1::Dims& dims) { return Shape(dims.d, dims.d + std::max(dims.nbDims, 0)); }

void ExpectShape(const char* name, const nvinfer1::Dims& got, const Shape& expected) {
  if (ShapeOf(got) != expected) Fail(name, " has shape ", Tuple(ShapeOf(got)), ": must be ", Tuple(expected));
}

bool Same(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
  return a.nbDims == b.nbDims && std::equal(a.d, a.d + a.nbDims, b.d);
}

// Memory of a size that is known.
class FixedScratch final : public cuda::Scratch {
 public:
  FixedScratch(void* memory, size_t size) : memory_(memory), size_(size) {}

  void* Allocate(size_t bytes) override {
    if (memory_ == nullptr || bytes > size_) throw std::bad_alloc();
    return memory_;
  }

 private:
  void* const memory_;
  const size_t size_;
};

}  // namespace

ContextMemory::~ContextMemory() {
  for (void* block : blocks_) allocator_->deallocateAsync(block, nullptr);
}

void* ContextMemory::Reserve(size_t bytes) {
  if (bytes <= size_) return blocks_.back();
  if (allocator_ == nullptr) {
    throw cuda::NoKernel("the kernels of LONGSPAN_KERNEL_PATH need " + std::to_string(bytes) +
                         " bytes of memory that the engine does not provide, and the plugin is attached to no context");
  }
  blocks_.reserve(blocks_.size() + 1);  // nothing may throw once there is memory
  const size_t size = std::max(bytes, 2 * size_);
  void* const block = allocator_->allocateAsync(size, cuda::kBufferAlignment, 0, nullptr);
  if (block == nullptr) throw std::bad_alloc();
  blocks_.push_back(block);
  size_ = size;
  return block;
}

AttentionExecution::AttentionExecution(std::shared_ptr<cuda::Runtime> runtime,
                                       std::shared_ptr<const AttentionNode> node, bool built_here,
                                       nvinfer1::IGpuAllocator* allocator)
    : runtime_(std::move(runtime)), node_(std::move(node)), built_here_(built_here), memory_(allocator) {}

void AttentionExecution::Load(cpu::ElementType type) {
  const int device = runtime_->modules().CurrentDevice();
  if (launcher_ == nullptr || type != type_ || launcher_->device().ordinal != device) MakeLauncher(type, device);
  launcher_->device().ExpectPrimaryContext();
}

void AttentionExecution::MakeLauncher(cpu::ElementType type, int device) {
  ready_ = false;
  launcher_.reset();
  const cuda::Packs packs = node_->AllPacks(runtime_.get());
  try {
    launcher_ = std::make_unique<const cuda::Launcher>(node_->Describe(type), packs, device, &runtime_->modules());
  } catch (const cuda::NoKernel& error) {
    throw cuda::NoKernel(error.what() + std::string(kNextSteps));
  }
  type_ = type;
}

void AttentionExecution::SetShapes(const nvinfer1::PluginTensorDesc* in, int32_t in_count,
                                   const nvinfer1::PluginTensorDesc* out, int32_t out_count) {
  ready_ = false;
  const size_t results = node_->lse ? 2 : 1;
  if (in_count != static_cast<int32_t>(node_->operands.size()) || out_count != static_cast<int32_t>(results)) {
    Fail(in_count, " inputs and ", out_count, " outputs: the node has ", node_->operands.size(), " and ", results);
  }
  const std::optional<cpu::ElementType> type = ElementTypeOf(in[0].type);
  if (!type) Fail("Q is of another type: must be FP16, BF16 or FP32");
  dims_.clear();
  shapes_.assign(node_->op.inputs.size(), std::nullopt);
  for (size_t i = 0; i < node_->operands.size(); ++i) {
    const size_t position = node_->operands[i];
    dims_.push_back(in[i].dims);
    shapes_[position] = node_->DefinitionShape(position, ShapeOf(in[i].dims));
  }
  operands_ = {};
  operands_.shapes = node_->InferShapes(shapes_);
  operands_.input_shapes = shapes_.data();
  ExpectShape("Y", out[0].dims, operands_.shapes.Output());
  if (node_->lse) ExpectShape("lse", out[1].dims, operands_.shapes.Lse());
  Load(*type);
  const cuda::Launcher::Need need = launcher_->NeedOf(operands_);
  scratch_bytes_ = need.bytes;
  const bool covered = built_here_ || need.pack == node_->pack;
  own_scratch_ = covered || need.bytes == 0 ? nullptr : memory_.Reserve(need.bytes);
  ready_ = true;
}

void AttentionExecution::Run(const nvinfer1::PluginTensorDesc* in, const void* const* inputs, void* const* outputs,
                             void* workspace, CUstream stream) const {
  if (!ready_) Fail("an execution before its shapes were announced");
  std::vector<const void*> addresses(shapes_.size(), nullptr);
  for (size_t i = 0; i < dims_.size(); ++i) {
    const size_t position = node_->operands[i];
    if (!Same(in[i].dims, dims_[i])) {
      Fail(node_->op.inputs[position].name, " has shape ", Tuple(ShapeOf(in[i].dims)), ", and was announced with ",
           Tuple(ShapeOf(dims_[i])));
    }
    addresses[position] = inputs[i];
  }
  cuda::Operands operands = operands_;
  operands.inputs = addresses.data();
  operands.output = outputs[0];
  operands.lse = node_->lse ? static_cast<float*>(outputs[1]) : nullptr;
  FixedScratch scratch(own_scratch_ != nullptr ? own_scratch_ : workspace, scratch_bytes_);
  launcher_->Launch(operands, stream, &scratch);
}

}  // namespace longspan::trt
