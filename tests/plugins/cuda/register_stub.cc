// The library for ONNX Runtime with the stub driver: the CUDA kernels are registered as the CPU's, whose sessions hand
// them everything as a CUDA session would, except for a stream. There are no CPU kernels in it.
#include <cstdlib>
#include <cstring>

#include "block_sparse_attention/attention.h"
#include "cpu/isa.h"
#include "cuda/runtime.h"
#include "ort/block_sparse_attention_op.h"
#include "ort/sliding_window_attention_op.h"
#include "sliding_window_attention/attention.h"

namespace longspan {

namespace sliding_window {
void Compute(const Problem&, const cpu::TileKernels&, cpu::Executor&) { std::abort(); }
}  // namespace sliding_window

namespace block_sparse {
void Compute(const Problem&, const cpu::TileKernels&, cpu::Executor&) { std::abort(); }
}  // namespace block_sparse

namespace cpu {
const TileKernels& SelectKernels() { std::abort(); }
}  // namespace cpu

}  // namespace longspan

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace longspan::ort;
  g_api = base->GetApi(kApiVersion);
  g_cuda_api = base->GetApi(kCudaApiVersion);
  g_runtime_minor = 24;
  longspan::cuda::g_driver_library = LONGSPAN_STUB_DRIVER;
  static OrtCustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    if (OrtStatus* status = g_api->CreateCustomOpDomain("longspan", &domain)) return status;
    for (const AttentionOps& ops : {SlidingWindowAttentionCudaOps(nullptr), BlockSparseAttentionCudaOps(nullptr)}) {
      for (const OrtCustomOp* op : ops) {
        if (OrtStatus* status = g_api->CustomOpDomain_Add(domain, op)) return status;
      }
    }
  }
  return g_api->AddCustomOpDomain(options, domain);
}
