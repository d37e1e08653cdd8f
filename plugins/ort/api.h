// The part of ONNX Runtime's C API that the operators use.
#ifndef LONGSPAN_ORT_API_H_
#define LONGSPAN_ORT_API_H_

#include <onnxruntime_c_api.h>

namespace longspan::ort {

// The oldest API that has all we call: KernelContext_ParallelFor and shape inference came with 1.17. A library that
// asks for more than it needs is refused by older runtimes, and one built against newer headers than the runtime is not
// loaded at all if it asks for their ORT_API_VERSION, so we ask for this one whatever the headers are.
constexpr uint32_t kApiVersion = 17;

// Set once by RegisterCustomOps.
inline const OrtApi* g_api = nullptr;

// What the CUDA kernels use came with 1.18; null in an older runtime, for which there are only the CPU kernels.
constexpr uint32_t kCudaApiVersion = 18;
static_assert(ORT_API_VERSION >= kCudaApiVersion, "the headers are older than ONNX Runtime 1.18");
inline const OrtApi* g_cuda_api = nullptr;

// The runtime's minor version: 31 of "1.31.1".
inline int g_runtime_minor = 0;

}  // namespace longspan::ort

#endif  // LONGSPAN_ORT_API_H_
