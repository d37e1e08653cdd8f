#include "ort/sliding_window_attention_op.h"

#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/executor.h"
#include "cpu/isa.h"
#include "ort/wrappers.h"
#include "sliding_window_attention/attention.h"
#include "sliding_window_attention/problem.h"

namespace longspan::ort {
namespace {

constexpr const char* kOpName = "SlidingWindowAttention";

Attributes ReadAttributes(const AttributeReader& node) {
  Attributes a;
  a.left_window_size = node.Int("left_window_size", a.left_window_size);
  a.right_window_size = node.Int("right_window_size", a.right_window_size);
  a.dilation = node.Ints("dilation", a.dilation);
  a.is_causal = node.Int("is_causal", a.is_causal) != 0;
  if (node.Has("scale")) a.scale = node.Float("scale", 0);
  a.softcap = node.Float("softcap", a.softcap);
  a.q_num_heads = node.Int("q_num_heads", a.q_num_heads);
  a.kv_num_heads = node.Int("kv_num_heads", a.kv_num_heads);
  a.span_ramp = node.Float("span_ramp", a.span_ramp);
  a.Check();
  return a;
}

// The state of one node: its attributes and the instruction set, fixed when the session is created.
class Kernel {
 public:
  Kernel(const OrtKernelInfo* info, cpu::ElementType type)
      : attributes_(ReadAttributes(AttributeReader(info))), type_(type), kernels_(cpu::SelectKernels()) {}

  void Compute(OrtKernelContext* context) const {
    Problem problem;
    problem.attributes = attributes_;
    problem.type = type_;
    size_t present = 0;
    Check(g_api->KernelContext_GetInputCount(context, &present));
    std::optional<Shape> shapes[kInputCount];
    for (size_t i = 0; i < present && i < kInputCount; ++i) {
      const OrtValue* value = nullptr;
      Check(g_api->KernelContext_GetInput(context, i, &value));
      if (value == nullptr) continue;
      shapes[i] = TensorShape(value);
      problem.inputs[i] = TensorData(value);
    }
    problem.shapes = InferShapes(shapes, attributes_);
    if (shapes[kBandBias]) problem.band_bias_shape = *shapes[kBandBias];
    problem.output = Output(context, 0, problem.shapes.Output());
    size_t outputs = 0;
    Check(g_api->KernelContext_GetOutputCount(context, &outputs));
    if (outputs > 1) problem.lse = static_cast<float*>(Output(context, 1, problem.shapes.Lse()));
    ContextExecutor executor(context);
    SlidingWindowAttention(problem, kernels_, executor);
  }

 private:
  const Attributes attributes_;
  const cpu::ElementType type_;
  const cpu::TileKernels& kernels_;
};

// Runs `body`; whatever it throws becomes a status, since no exception may cross the C interface.
template <typename Body>
OrtStatus* Guarded(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (ApiError& error) {
    return error.Release();
  } catch (const std::bad_alloc&) {
    return g_api->CreateStatus(ORT_FAIL, "SlidingWindowAttention: no memory for a thread's tile buffers");
  } catch (const std::exception& error) {
    return g_api->CreateStatus(ORT_INVALID_ARGUMENT, (std::string(kOpName) + ": " + error.what()).c_str());
  } catch (...) {
    return g_api->CreateStatus(ORT_FAIL, "SlidingWindowAttention: unknown exception");
  }
}

// Tells the session the outputs' shapes, as far as they follow from those of Q and V, when the model is loaded. What
// they contradict is for Compute to say, which has all shapes. The type is read from Q: in the schema that ONNX Runtime
// merges from the ops of all types, it calls the function of one of them for every node.
void InferOutputs(const ShapeInference& node) {
  const std::vector<Dim> q = node.InputShape(kQ), v = node.InputShape(kV);
  if (q.size() != v.size() || (q.size() != 3 && q.size() != 4)) return;
  std::vector<Dim> output = q;
  if (q.size() == 4) {
    output[3] = v[3];
  } else {
    const int64_t heads = node.Int("q_num_heads", 0), kv_heads = node.Int("kv_num_heads", 0);
    const bool valid = heads > 0 && heads <= kSizeLimit && kv_heads > 0 && kv_heads <= kSizeLimit;
    const bool known = valid && v[2].size > 0 && v[2].size % kv_heads == 0;
    output[2] = known ? Dim{v[2].size / kv_heads * heads} : Dim{};
  }
  // Not lse: a node may lack it, this API cannot tell, and some runtimes (1.24) abort when an absent output is set.
  node.SetOutput(0, output, node.InputType(kQ));
}

struct Op : OrtCustomOp {
  explicit Op(cpu::ElementType element) : OrtCustomOp{}, type(element) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return kOpName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      switch (index) {
        case kAttnMask:
        case kGlobalMask:
          return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        case kNonpadKvSeqlen:
          return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case kSpans:
          return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        default:
          return OnnxType(static_cast<const Op*>(op)->type);
      }
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index <= kV ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
    GetOutputType = [](const OrtCustomOp* op, size_t index) {
      return index == 0 ? OnnxType(static_cast<const Op*>(op)->type) : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    // Older runtimes dereference a null type for every optional input that a node leaves out (fixed by onnxruntime
    // #26199).
    if (g_runtime_minor >= 24) {
      InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatus* {
        return Guarded([&] { InferOutputs(ShapeInference(context)); });
      };
    }
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return Guarded([&] { *kernel = new Kernel(info, static_cast<const Op*>(op)->type); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return Guarded([&] { static_cast<const Kernel*>(kernel)->Compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  const cpu::ElementType type;
};

}  // namespace

std::array<const OrtCustomOp*, cpu::kElementTypes> SlidingWindowAttentionOps() {
  static const Op float32(cpu::ElementType::kFloat32), float16(cpu::ElementType::kFloat16),
      bfloat16(cpu::ElementType::kBFloat16);
  return {&float32, &float16, &bfloat16};
}

}  // namespace longspan::ort
