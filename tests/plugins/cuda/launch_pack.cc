// Launches one execution of a node from a kernel pack on the stub driver and prints what the driver was asked, so that
// other programs can compare it with what they expect. Reads lines "KEYWORD FIELD …" from the standard input:
//
//   device CAPABILITY MULTIPROCESSORS SHARED_MEMORY
//   pack FILE
//   node OPERATOR DTYPE HAS_LSE
//   int NAME VALUE | float NAME VALUE | dilation VALUE …
//   input NAME SIZE …
//   launch                      prints "load …", "memset …" and "launch …" lines, or "error …"; then "done"
//
// Input number i is at address 4096 · (i + 1), Y at 2^20, lse at 2^21, scratch memory at 2^30, the stream is 7.
#include <dlfcn.h>

#include <iostream>
#include <sstream>

#include "block_sparse_attention/problem.h"
#include "cuda/launcher.h"
#include "cuda/operators.h"
#include "sliding_window_attention/problem.h"
#include "stub_driver.h"

namespace {

using namespace longspan;

class FixedScratch : public cuda::Scratch {
 public:
  void* Allocate(size_t) override { return reinterpret_cast<void*>(uintptr_t{1} << 30); }
};

struct Request {
  cuda::Node node;
  std::vector<std::shared_ptr<const cuda::Pack>> packs;
  std::map<std::string, Shape> inputs;
};

void SetCommon(const cuda::Node& node, CommonAttributes* a) {
  a->is_causal = node.integers.at("is_causal") != 0;
  if (node.floats.count("scale") > 0) a->scale = node.floats.at("scale");
  a->softcap = node.floats.at("softcap");
  a->q_num_heads = node.integers.at("q_num_heads");
  a->kv_num_heads = node.integers.at("kv_num_heads");
}

void Launch(Request request, cuda::Modules* modules) {
  const cuda::OperatorFact& op = *cuda::FindOperator(request.node.op);
  std::optional<Shape> shapes[block_sparse::kInputCount];
  const void* addresses[block_sparse::kInputCount] = {};
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    const auto found = request.inputs.find(std::string(op.inputs[i].name));
    if (found == request.inputs.end()) continue;
    request.node.inputs.emplace_back(found->first);
    shapes[i] = found->second;
    addresses[i] = reinterpret_cast<const void*>(4096 * (i + 1));
  }
  cuda::Operands operands;
  if (request.node.op == "SlidingWindowAttention") {
    sliding_window::Attributes a;
    SetCommon(request.node, &a);
    a.left_window_size = request.node.integers.at("left_window_size");
    a.right_window_size = request.node.integers.at("right_window_size");
    a.dilation = request.node.dilation;
    std::optional<Shape> own[sliding_window::kInputCount];
    std::copy(shapes, shapes + sliding_window::kInputCount, own);
    operands.shapes = sliding_window::InferShapes(own, a);
  } else {
    block_sparse::Attributes a;
    SetCommon(request.node, &a);
    a.q_block_size = request.node.integers.at("q_block_size");
    a.kv_block_size = request.node.integers.at("kv_block_size");
    operands.shapes = block_sparse::InferShapes(shapes, a);
  }
  operands.input_shapes = shapes;
  operands.inputs = addresses;
  operands.output = reinterpret_cast<void*>(uintptr_t{1} << 20);
  operands.lse = request.node.lse ? reinterpret_cast<float*>(uintptr_t{1} << 21) : nullptr;
  FixedScratch scratch;
  cuda::Launcher(request.node, request.packs, 0, modules)
      .Launch(operands, reinterpret_cast<CUstream>(uintptr_t{7}), &scratch);
}

}  // namespace

int main() {
  void* library = dlopen(LONGSPAN_STUB_DRIVER, RTLD_NOW);
  if (library == nullptr) return 1;
  Stub& stub = *reinterpret_cast<GetStubFunction>(dlsym(library, "GetStub"))();
  cuda::Modules modules(LONGSPAN_STUB_DRIVER);
  Request request;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string keyword, name;
    words >> keyword;
    try {
      if (keyword == "device") {
        words >> stub.capability >> stub.multiprocessors >> stub.shared_memory;
      } else if (keyword == "pack") {
        words >> name;
        request.packs.push_back(cuda::Pack::FromFile(name));
      } else if (keyword == "node") {
        request = {};
        words >> request.node.op >> request.node.dtype >> request.node.lse;
      } else if (keyword == "int") {
        words >> name;
        words >> request.node.integers[name];
      } else if (keyword == "float") {
        words >> name;
        words >> request.node.floats[name];
      } else if (keyword == "dilation") {
        request.node.dilation.clear();
        for (int64_t step = 0; words >> step;) request.node.dilation.push_back(step);
      } else if (keyword == "input") {
        words >> name;
        Shape& shape = request.inputs[name];
        for (int64_t size = 0; words >> size;) shape.push_back(size);
      } else if (keyword == "launch") {
        Launch(request, &modules);
      }
    } catch (const std::exception& error) {
      stub.calls.push_back(std::string("error ") + error.what());
    }
    if (keyword == "launch" || keyword == "pack") {
      for (const std::string& call : stub.calls) std::cout << call << "\n";
      stub.calls.clear();
      std::cout << "done" << std::endl;
    }
  }
  return 0;
}
