// C++ views of what ONNX Runtime hands a kernel.
#ifndef LONGSPAN_ORT_WRAPPERS_H_
#define LONGSPAN_ORT_WRAPPERS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "attention/node.h"
#include "cpu/executor.h"
#include "cpu/tile_kernels.h"
#include "ort/api.h"

namespace longspan::ort {

// A status of ONNX Runtime's own, on its way back to it.
class ApiError {
 public:
  explicit ApiError(OrtStatus* status) : status_(status) {}
  ApiError(ApiError&& other) noexcept : status_(other.Release()) {}
  ~ApiError() {
    if (status_ != nullptr) g_api->ReleaseStatus(status_);
  }
  OrtStatus* Release() {
    OrtStatus* status = status_;
    status_ = nullptr;
    return status;
  }

 private:
  OrtStatus* status_;
};

// Throws ApiError unless `status` is success.
void Check(OrtStatus* status);

// ONNX's names for element types; kT has none.
ONNXTensorElementDataType OnnxType(cpu::ElementType type);
ONNXTensorElementDataType OnnxType(OperandType type);

std::vector<int64_t> TensorShape(const OrtValue* value);
const void* TensorData(const OrtValue* value);

// Allocates an output; nullptr when the node does not have it.
void* Output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape);

// Reads a node's attributes. The API reports an absent attribute and one of another type alike; since a mistyped
// attribute that silently takes its default would change the results, an attribute that is there in another type is an
// error.
class AttributeReader {
 public:
  explicit AttributeReader(const OrtKernelInfo* info) : info_(info) {}

  // Whether the node has the attribute, in any type.
  bool Has(const char* name) const;

  // Each throws std::invalid_argument when the attribute has another type.
  int64_t Int(const char* name, int64_t fallback) const;
  float Float(const char* name, float fallback) const;
  // One INT stands for a list of one.
  std::vector<int64_t> Ints(const char* name, const std::vector<int64_t>& fallback) const;
  std::string String(const char* name, const std::string& fallback) const;
  // The bytes of a tensor of uint8; none where the node has no such attribute.
  std::vector<uint8_t> Bytes(const char* name) const;

 private:
  void ExpectAbsent(const char* name, const char* type) const;

  const OrtKernelInfo* info_;
};

// A node while its kernel is created: what it has, and what the model says of the shapes.
class NodeReader {
 public:
  explicit NodeReader(const OrtKernelInfo* info) : info_(info) {}

  bool HasInput(size_t index) const;
  bool HasOutput(size_t index) const;
  // -1 for sizes that the model does not say; empty where it does not even say the rank.
  std::vector<int64_t> InputShape(size_t index) const;
  // Number of the device that the kernel runs on.
  int Device() const;

 private:
  const OrtKernelInfo* info_;
};

// One dimension while a model is loaded: a size, else a symbol, else unknown.
struct Dim {
  int64_t size = -1;
  std::string symbol = {};
};

// A node whose output shapes are asked for.
class ShapeInference {
 public:
  explicit ShapeInference(OrtShapeInferContext* context) : context_(context) {}

  // Empty for an input that is absent or of unknown rank.
  std::vector<Dim> InputShape(size_t index) const;
  ONNXTensorElementDataType InputType(size_t index) const;
  int64_t Int(const char* name, int64_t fallback) const;
  // The node must have the output. Does nothing when a dimension is unknown.
  void SetOutput(size_t index, const std::vector<Dim>& shape, ONNXTensorElementDataType type) const;

 private:
  OrtShapeInferContext* context_;
};

// ONNX Runtime's thread pool and allocator for one call of a kernel.
class ContextExecutor final : public cpu::Executor {
 public:
  explicit ContextExecutor(const OrtKernelContext* context);
  ~ContextExecutor() override;
  ContextExecutor(const ContextExecutor&) = delete;
  ContextExecutor& operator=(const ContextExecutor&) = delete;

  void ParallelFor(void (*fn)(void* context, size_t i), size_t count, void* context) override;
  void* Allocate(size_t bytes) override;
  void Free(void* memory) override;

 private:
  const OrtKernelContext* context_;
  OrtMemoryInfo* memory_info_ = nullptr;
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace longspan::ort

#endif  // LONGSPAN_ORT_WRAPPERS_H_
