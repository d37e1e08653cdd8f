// An attention operator as an ONNX Runtime custom op: what does not depend on which operator it is.
#ifndef LONGSPAN_ORT_ATTENTION_OP_H_
#define LONGSPAN_ORT_ATTENTION_OP_H_

#include <array>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "attention/node.h"
#include "cpu/executor.h"
#include "cpu/isa.h"
#include "cpu/tile_kernels.h"
#include "ort/wrappers.h"

namespace longspan::ort {

// One op per element type; ONNX Runtime merges them into one schema. They live as long as the library.
using AttentionOps = std::array<const OrtCustomOp*, cpu::kElementTypes>;

// Shapes and addresses of the inputs present, of at most `count`.
void ReadInputs(const OrtKernelContext* context, size_t count, std::optional<Shape>* shapes, const void** data);

// Tells the session the shape of Y as far as it follows from those of Q and V, when the model is loaded.
void InferOutputs(const ShapeInference& node);

// Runs `body`; whatever it throws becomes a status, since no exception may cross the C interface.
template <typename Body>
OrtStatus* Guarded(const char* op, const Body& body) noexcept {
  const auto status = [op](OrtErrorCode code, const char* message) {
    return g_api->CreateStatus(code, (std::string(op) + ": " + message).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (ApiError& error) {
    return error.Release();
  } catch (const std::bad_alloc&) {
    return status(ORT_FAIL, "no memory for a thread's tile buffers");
  } catch (const std::runtime_error& error) {  // what is not the operands' fault: the driver's, or of kernel packs
    return status(ORT_FAIL, error.what());
  } catch (const std::exception& error) {
    return status(ORT_INVALID_ARGUMENT, error.what());
  } catch (...) {
    return status(ORT_FAIL, "unknown exception");
  }
}

// Attributes, shapes and addresses of one execution, checked against the definition, with its outputs allocated.
template <typename Operator>
void ReadProblem(OrtKernelContext* context, typename Operator::Problem* problem) {
  ReadInputs(context, Operator::kInputCount, problem->input_shapes, problem->inputs);
  problem->shapes = InferShapes(problem->input_shapes, problem->attributes);
  problem->output = Output(context, 0, problem->shapes.Output());
  size_t outputs = 0;
  Check(g_api->KernelContext_GetOutputCount(context, &outputs));
  if (outputs > 1) problem->lse = static_cast<float*>(Output(context, 1, problem->shapes.Lse()));
}

// The state of one node: its attributes and the instruction set, fixed when the session is created.
template <typename Operator>
class AttentionKernel {
 public:
  AttentionKernel(const OrtKernelInfo* info, cpu::ElementType type)
      : attributes_(Operator::ReadAttributes(AttributeReader(info))), type_(type), kernels_(cpu::SelectKernels()) {}

  void Compute(OrtKernelContext* context) const {
    typename Operator::Problem problem;
    problem.attributes = attributes_;
    problem.type = type_;
    ReadProblem<Operator>(context, &problem);
    ContextExecutor executor(context);
    Operator::Compute(problem, kernels_, executor);
  }

 private:
  const typename Operator::Attributes attributes_;
  const cpu::ElementType type_;
  const cpu::TileKernels& kernels_;
};

// `Kernel` is made of a node's OrtKernelInfo and its T, and has Compute. `Operator` is an operator's own, of its
// node.h, and has Compute.
template <typename Operator, typename Kernel>
struct AttentionOp : OrtCustomOp {
  // `provider` is that of the kernel; nullptr for the CPU's.
  AttentionOp(cpu::ElementType element, const char* provider) : OrtCustomOp{}, type(element), provider(provider) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Operator::kName; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return static_cast<const AttentionOp*>(op)->provider; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Operator::kInputCount; };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      const OperandType operand = Operator::InputType(index);
      return operand == OperandType::kT ? Element(op) : OnnxType(operand);
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return Operator::IsRequired(index) ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
    GetOutputType = [](const OrtCustomOp* op, size_t index) {
      return index == 0 ? Element(op) : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    // Older runtimes dereference a null type for every optional input that a node leaves out (fixed by onnxruntime
    // #26199).
    if (g_runtime_minor >= 24) {
      InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatus* {
        return Guarded(Operator::kName, [&] { InferOutputs(ShapeInference(context)); });
      };
    }
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return Guarded(Operator::kName, [&] { *kernel = new Kernel(info, static_cast<const AttentionOp*>(op)->type); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return Guarded(Operator::kName, [&] { static_cast<const Kernel*>(kernel)->Compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static ONNXTensorElementDataType Element(const OrtCustomOp* op) {
    return OnnxType(static_cast<const AttentionOp*>(op)->type);
  }

  const cpu::ElementType type;
  const char* const provider;
};

template <typename Operator, typename Kernel>
AttentionOps MakeAttentionOps(const char* provider) {
  using Op = AttentionOp<Operator, Kernel>;
  static const Op float32(cpu::ElementType::kFloat32, provider), float16(cpu::ElementType::kFloat16, provider),
      bfloat16(cpu::ElementType::kBFloat16, provider);
  return {&float32, &float16, &bfloat16};
}

}  // namespace longspan::ort

#endif  // LONGSPAN_ORT_ATTENTION_OP_H_
