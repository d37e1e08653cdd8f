#include "ort/wrappers.h"

#include <memory>
#include <stdexcept>

namespace longspan::ort {
namespace {

// Whether `status` is success; releases it.
bool Succeeded(OrtStatus* status) {
  if (status == nullptr) return true;
  g_api->ReleaseStatus(status);
  return false;
}

}  // namespace

void Check(OrtStatus* status) {
  if (status != nullptr) throw ApiError(status);
}

ONNXTensorElementDataType OnnxType(cpu::ElementType type) {
  switch (type) {
    case cpu::ElementType::kFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case cpu::ElementType::kBFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

ONNXTensorElementDataType OnnxType(OperandType type) {
  switch (type) {
    case OperandType::kBool:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case OperandType::kUint8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case OperandType::kInt32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case OperandType::kInt64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case OperandType::kFloat32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
}

std::vector<int64_t> TensorShape(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(g_api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = g_api->GetDimensionsCount(info, &rank);
  std::vector<int64_t> shape(status == nullptr ? rank : 0);
  if (status == nullptr) status = g_api->GetDimensions(info, shape.data(), rank);
  g_api->ReleaseTensorTypeAndShapeInfo(info);
  Check(status);
  return shape;
}

const void* TensorData(const OrtValue* value) {
  void* data = nullptr;
  // The API has no const variant; inputs are only read.
  Check(g_api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

void* Output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape) {
  OrtValue* value = nullptr;
  Check(g_api->KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  Check(g_api->GetTensorMutableData(value, &data));
  return data;
}

bool AttributeReader::Has(const char* name) const {
  float number = 0;
  int64_t whole = 0;
  size_t size = 0;
  return Succeeded(g_api->KernelInfoGetAttribute_int64(info_, name, &whole)) ||
         Succeeded(g_api->KernelInfoGetAttribute_float(info_, name, &number)) ||
         Succeeded(g_api->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)) ||
         Succeeded(g_api->KernelInfoGetAttributeArray_float(info_, name, nullptr, &size)) ||
         Succeeded(g_api->KernelInfoGetAttribute_string(info_, name, nullptr, &size));
}

void AttributeReader::ExpectAbsent(const char* name, const char* type) const {
  if (Has(name)) throw std::invalid_argument(std::string("attribute ") + name + " is of another type: must be " + type);
}

int64_t AttributeReader::Int(const char* name, int64_t fallback) const {
  int64_t value = 0;
  if (Succeeded(g_api->KernelInfoGetAttribute_int64(info_, name, &value))) return value;
  ExpectAbsent(name, "INT");
  return fallback;
}

float AttributeReader::Float(const char* name, float fallback) const {
  float value = 0;
  if (Succeeded(g_api->KernelInfoGetAttribute_float(info_, name, &value))) return value;
  ExpectAbsent(name, "FLOAT");
  return fallback;
}

std::vector<int64_t> AttributeReader::Ints(const char* name, const std::vector<int64_t>& fallback) const {
  int64_t value = 0;
  if (Succeeded(g_api->KernelInfoGetAttribute_int64(info_, name, &value))) return {value};
  size_t size = 0;
  // An attribute of another type reads as an empty list.
  if (Succeeded(g_api->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)) && size > 0) {
    std::vector<int64_t> values(size);
    Check(g_api->KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
    return values;
  }
  ExpectAbsent(name, "INTS or INT, and not empty");
  return fallback;
}

std::string AttributeReader::String(const char* name, const std::string& fallback) const {
  size_t size = 0;
  if (!Succeeded(g_api->KernelInfoGetAttribute_string(info_, name, nullptr, &size)) || size == 0) {
    ExpectAbsent(name, "STRING");
    return fallback;
  }
  std::string value(size, '\0');
  Check(g_api->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
  value.resize(size - 1);  // its zero
  return value;
}

std::vector<uint8_t> AttributeReader::Bytes(const char* name) const {
  OrtAllocator* allocator = nullptr;  // the runtime's own
  Check(g_api->GetAllocatorWithDefaultOptions(&allocator));
  OrtValue* value = nullptr;
  if (!Succeeded(g_api->KernelInfoGetAttribute_tensor(info_, name, allocator, &value)) || value == nullptr) {
    ExpectAbsent(name, "TENSOR");
    return {};
  }
  const std::unique_ptr<OrtValue, void (*)(OrtValue*)> owner(value,
                                                             [](OrtValue* owned) { g_api->ReleaseValue(owned); });
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(g_api->GetTensorTypeAndShape(value, &info));
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t count = 0;
  OrtStatus* status = g_api->GetTensorElementType(info, &type);
  if (status == nullptr) status = g_api->GetTensorShapeElementCount(info, &count);
  g_api->ReleaseTensorTypeAndShapeInfo(info);
  Check(status);
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
    throw std::invalid_argument(std::string("attribute ") + name + " is of another type: must be a tensor of uint8");
  }
  const auto* data = static_cast<const uint8_t*>(TensorData(value));
  return std::vector<uint8_t>(data, data + count);
}

bool NodeReader::HasInput(size_t index) const {
  size_t count = 0, size = 0;
  Check(g_api->KernelInfo_GetInputCount(info_, &count));
  if (index >= count) return false;
  Check(g_api->KernelInfo_GetInputName(info_, index, nullptr, &size));
  return size > 1;  // with its zero; an input that is left out has an empty name
}

bool NodeReader::HasOutput(size_t index) const {
  size_t count = 0, size = 0;
  Check(g_api->KernelInfo_GetOutputCount(info_, &count));
  if (index >= count) return false;
  Check(g_api->KernelInfo_GetOutputName(info_, index, nullptr, &size));
  return size > 1;
}

std::vector<int64_t> NodeReader::InputShape(size_t index) const {
  OrtTypeInfo* type = nullptr;
  if (!Succeeded(g_api->KernelInfo_GetInputTypeInfo(info_, index, &type))) return {};
  const std::unique_ptr<OrtTypeInfo, void (*)(OrtTypeInfo*)> owner(
      type, [](OrtTypeInfo* owned) { g_api->ReleaseTypeInfo(owned); });
  const OrtTensorTypeAndShapeInfo* info = nullptr;  // the type's
  Check(g_api->CastTypeInfoToTensorInfo(type, &info));
  if (info == nullptr) return {};
  size_t rank = 0;
  Check(g_api->GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  Check(g_api->GetDimensions(info, shape.data(), rank));
  return shape;
}

int NodeReader::Device() const {
  OrtAllocator* allocator = nullptr;
  Check(g_cuda_api->KernelInfoGetAllocator(info_, OrtMemTypeDefault, &allocator));
  const OrtMemoryInfo* memory = allocator->Info(allocator);
  int device = 0;
  OrtStatus* status = g_api->MemoryInfoGetId(memory, &device);
  g_api->ReleaseAllocator(allocator);
  Check(status);
  return device;
}

std::vector<Dim> ShapeInference::InputShape(size_t index) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context keeps it
  Check(g_api->ShapeInferContext_GetInputTypeShape(context_, index, &info));
  size_t rank = 0;
  Check(g_api->GetDimensionsCount(info, &rank));
  std::vector<int64_t> sizes(rank);
  std::vector<const char*> symbols(rank);
  Check(g_api->GetDimensions(info, sizes.data(), rank));
  Check(g_api->GetSymbolicDimensions(info, symbols.data(), rank));
  std::vector<Dim> shape(rank);
  for (size_t i = 0; i < rank; ++i) shape[i] = {sizes[i], symbols[i] == nullptr ? "" : symbols[i]};
  return shape;
}

ONNXTensorElementDataType ShapeInference::InputType(size_t index) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context keeps it
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Check(g_api->ShapeInferContext_GetInputTypeShape(context_, index, &info));
  Check(g_api->GetTensorElementType(info, &type));
  return type;
}

int64_t ShapeInference::Int(const char* name, int64_t fallback) const {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t size = 0;
  if (Succeeded(g_api->ShapeInferContext_GetAttribute(context_, name, &attribute)) && attribute != nullptr &&
      Succeeded(g_api->ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &size))) {
    return value;
  }
  return fallback;
}

void ShapeInference::SetOutput(size_t index, const std::vector<Dim>& shape, ONNXTensorElementDataType type) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(g_api->CreateTensorTypeAndShapeInfo(&info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
      info, [](OrtTensorTypeAndShapeInfo* owned) { g_api->ReleaseTensorTypeAndShapeInfo(owned); });
  std::vector<int64_t> sizes;
  std::vector<const char*> symbols;
  for (const Dim& dim : shape) {
    // The API has no word for an unknown dimension: it would make -1 a size. Better to say nothing of the shape.
    if (dim.size < 0 && dim.symbol.empty()) return;
    sizes.push_back(dim.size);
    symbols.push_back(dim.symbol.c_str());
  }
  Check(g_api->SetTensorElementType(info, type));
  Check(g_api->SetDimensions(info, sizes.data(), sizes.size()));
  Check(g_api->SetSymbolicDimensions(info, symbols.data(), symbols.size()));
  Check(g_api->ShapeInferContext_SetOutputTypeShape(context_, index, info));
}

ContextExecutor::ContextExecutor(const OrtKernelContext* context) : context_(context) {
  Check(g_api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_info_));
  if (OrtStatus* status = g_api->KernelContext_GetAllocator(context, memory_info_, &allocator_)) {
    g_api->ReleaseMemoryInfo(memory_info_);
    throw ApiError(status);
  }
}

ContextExecutor::~ContextExecutor() {
  g_api->ReleaseAllocator(allocator_);
  g_api->ReleaseMemoryInfo(memory_info_);
}

void ContextExecutor::ParallelFor(void (*fn)(void* context, size_t i), size_t count, void* context) {
  Check(g_api->KernelContext_ParallelFor(context_, fn, count, 0, context));
}

void* ContextExecutor::Allocate(size_t bytes) {
  try {
    return allocator_->Alloc(allocator_, bytes);
  } catch (...) {  // ONNX Runtime's arena throws when it is full
    return nullptr;
  }
}

void ContextExecutor::Free(void* memory) { allocator_->Free(allocator_, memory); }

}  // namespace longspan::ort
