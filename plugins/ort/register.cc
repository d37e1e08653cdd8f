// Entry point of liblongspan_ort.so: SessionOptions.register_custom_ops_library finds it by name.
#include <cstdio>
#include <mutex>
#include <vector>

#include "ort/api.h"
#include "ort/block_sparse_attention_op.h"
#include "ort/sliding_window_attention_op.h"

#define LONGSPAN_EXPORT __attribute__((visibility("default")))

namespace longspan::ort {
namespace {

constexpr const char* kCudaProvider = "CUDAExecutionProvider";

// Session options refer to the domain without owning it, so that one domain serves all and lives as long as the
// library.
OrtStatus* Domain(OrtCustomOpDomain** domain) {
  static std::mutex mutex;
  static OrtCustomOpDomain* shared = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (shared == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = g_api->CreateCustomOpDomain("longspan", &made)) return status;
    std::vector<AttentionOps> all = {SlidingWindowAttentionOps(), BlockSparseAttentionOps()};
    // A runtime without CUDA takes them too, and never asks for them.
    if (g_cuda_api != nullptr) {
      all.push_back(SlidingWindowAttentionCudaOps(kCudaProvider));
      all.push_back(BlockSparseAttentionCudaOps(kCudaProvider));
    }
    for (const AttentionOps& ops : all) {
      for (const OrtCustomOp* op : ops) {
        if (OrtStatus* status = g_api->CustomOpDomain_Add(made, op)) {
          g_api->ReleaseCustomOpDomain(made);
          return status;
        }
      }
    }
    shared = made;
  }
  *domain = shared;
  return nullptr;
}

}  // namespace
}  // namespace longspan::ort

extern "C" LONGSPAN_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                     const OrtApiBase* base) {
  using namespace longspan::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, "liblongspan_ort.so needs ONNX Runtime 1.17 or newer; next step: upgrade onnxruntime");
  }
  g_api = api;
  std::sscanf(base->GetVersionString(), "1.%d", &g_runtime_minor);
  // A runtime that is asked for an interface it lacks says so on its error stream.
  if (g_runtime_minor >= static_cast<int>(kCudaApiVersion)) g_cuda_api = base->GetApi(kCudaApiVersion);
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = Domain(&domain)) return status;
  return g_api->AddCustomOpDomain(options, domain);
}
