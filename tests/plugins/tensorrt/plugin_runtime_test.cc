// The plugins in the hands of a runtime, on the stub of the CUDA driver: what is loaded and launched, by which context,
// on which stream, and what is said where something is wrong.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "cuda/launcher.h"
#include "nodes.h"

namespace {

using namespace longspan;
using namespace longspan::testing;

const auto kStream = reinterpret_cast<cudaStream_t>(size_t{7});
void* const kWorkspace = reinterpret_cast<void*>(size_t{0x40000010});  // not aligned

// Input number i of the definition is at 4096 · (i + 1), Y at 2^20, lse at 2^21.
const void* InputAddress(size_t position) { return reinterpret_cast<const void*>(4096 * (position + 1)); }
void* OutputAddress(size_t index) { return reinterpret_cast<void*>(size_t{0x100000} << index); }

int32_t Enqueue(const Plugin& plugin, const std::vector<Tensor>& in, const std::vector<Tensor>& out,
                void* workspace = kWorkspace) {
  const auto ins = Describe(in), outs = Describe(out);
  std::vector<const void*> inputs;
  for (size_t i = 0; i < in.size(); ++i) inputs.push_back(InputAddress(i));
  void* const outputs[] = {OutputAddress(0), OutputAddress(1)};
  return plugin.runtime->enqueue(ins.data(), outs.data(), inputs.data(), outputs, workspace, kStream);
}

class FixedScratch final : public cuda::Scratch {
 public:
  void* Allocate(size_t) override { return kWorkspace; }
};

// What the launcher itself launches for these operands.
std::vector<std::string> Launches(const cuda::Node& node, const std::shared_ptr<const cuda::Pack>& pack,
                                  const Shapes& sizes, const std::vector<Shape>& given) {
  cuda::Modules modules(LONGSPAN_STUB_DRIVER);
  std::vector<std::optional<Shape>> shapes(15);
  std::vector<const void*> inputs(15, nullptr);
  for (size_t i = 0; i < given.size(); ++i) {
    shapes[i] = given[i];
    inputs[i] = InputAddress(i);
  }
  cuda::Operands operands{sizes, shapes.data(), inputs.data(), OutputAddress(0), nullptr};
  if (node.lse) operands.lse = static_cast<float*>(OutputAddress(1));
  const cuda::Launcher launcher(node, {pack}, 0, &modules);
  TakeCalls();
  FixedScratch scratch;
  launcher.Launch(operands, reinterpret_cast<CUstream>(size_t{7}), &scratch);
  return TakeCalls();
}

std::vector<Shape> ShapesOf(const std::vector<Tensor>& tensors) {
  std::vector<Shape> shapes;
  for (const Tensor& tensor : tensors) shapes.push_back(tensor.shape);
  return shapes;
}

// The fields that an engine keeps, as they are when it is read.
Fields Saved(const Plugin& plugin) {
  const nvinfer1::PluginFieldCollection* fields = plugin.runtime->getFieldsToSerialize();
  Expect(fields != nullptr, "fields for the engine");
  return Fields::Of(*fields);
}

Plugin Configured(const Creators& creators, const char* name, Fields fields, const std::vector<Tensor>& in,
                  const std::vector<Tensor>& out) {
  Plugin plugin = creators.Build(name, std::move(fields));
  const auto ins = Profile(in, in), outs = Profile(out, out);
  ExpectFine(plugin.build->configurePlugin(ins.data(), static_cast<int32_t>(ins.size()), outs.data(),
                                           static_cast<int32_t>(outs.size())) == 0,
             "configuration");
  return plugin;
}

// A plugin of an engine that was built and read again.
Plugin Engine(const Creators& creators, const char* name, Fields fields, const std::vector<Tensor>& in,
              const std::vector<Tensor>& out) {
  return creators.Deserialize(name, Saved(Configured(creators, name, std::move(fields), in, out)));
}

void TestWindowExecutions(const Creators& creators) {
  const auto pack = WindowPack({{"w", "90", "cubin"}});
  const Plugin engine = Engine(creators, kWindow, WindowFields(), WindowInputs(33), WindowOutputs(33));
  Context context;
  const Plugin plugin = engine.Attach(&context);
  ExpectFine(static_cast<bool>(plugin), "a context");
  Expect(TakeCalls().size() == 2, "attaching loads the kernels");
  for (const int64_t seq_q : {33, 3, 1, 33, 4, 5, 0, 200}) {
    for (const int64_t batch : {1, 2}) {
      const std::vector<Tensor> in = WindowInputs(seq_q, batch), out = WindowOutputs(seq_q, batch);
      ExpectFine(plugin.Announce(in, out) == 0, "shapes");
      ExpectEqual(TakeCalls(), {}, "shapes alone call nothing");
      for (int run = 0; run < 2; ++run) {
        ExpectFine(Enqueue(plugin, in, out) == 0, "an execution");
        const std::vector<std::string> calls = TakeCalls();
        const Shapes sizes{true, batch, 2, 1, seq_q, 40, 16, 8};
        ExpectEqual(calls, Launches(WindowNode(), pack, sizes, ShapesOf(in)), "launches of a window");
      }
    }
  }
  Expect(context.allocator.calls == 0, "executions of the node's own kernels allocate nothing");
}

void TestBlockExecutions(const Creators& creators) {
  for (const int64_t heads : {1, 3}) {
    const char* const per_head = heads == 1 ? "0" : "1";
    const std::vector<Tensor> in = BlockInputs(heads), out = BlockOutputs();
    const Plugin engine = Engine(creators, kBlocks, BlockFields(per_head), in, out);
    Context context;
    const Plugin plugin = engine.Attach(&context);
    ExpectFine(plugin.Announce(in, out) == 0 && Enqueue(plugin, in, out, nullptr) == 0, "an execution of blocks");
    std::vector<std::string> calls = TakeCalls();
    Expect(calls.size() == 3, "load, prepare, launch");
    std::vector<Shape> shapes = ShapesOf(in);
    shapes[8] = {5, 8, 2};  // as the definition has it
    const Shapes sizes{true, 2, 3, 3, 20, 30, 16, 16};
    ExpectEqual({calls.back()}, Launches(BlockNode(), BlockPack(per_head), sizes, shapes), "launches of blocks");
    std::vector<Tensor> wrong = in;
    wrong[8].shape = {5, 8, 2};
    ExpectRefused(plugin.Announce(wrong, out) != 0,
                  "block_masks has shape (5, 8, 2) in the network: must be (M, 8 * 2");
    wrong[8].shape = {5, 3};
    ExpectRefused(plugin.Announce(wrong, out) != 0, "block_masks has shape (5, 3) in the network");
    const Plugin odd = creators.Build(kBlocks, BlockFields().Ints("q_block_size", {5}).Ints("kv_block_size", {8}));
    wrong[8].shape = {5, 1};
    ExpectRefused(odd.Announce(wrong, out) != 0, "must be (M, 5 * 1 / 4), the bytes of each mask as whole words");
  }
  TakeCalls();
}

// In both layouts, T's three types and through every phase, the fields say the same.
void TestEngines(const Creators& creators) {
  const std::vector<Tensor> in = WindowInputs(33), out = WindowOutputs(33);
  const Plugin fresh = creators.Build(kWindow, WindowFields().Float("scale", 0.25f));
  Expect(!Saved(fresh).Has("type"), "T is not known before it is configured");
  const Plugin built = Configured(creators, kWindow, WindowFields().Float("scale", 0.25f), in, out);
  const Fields saved = Saved(built);
  Expect(saved.Data("type") == std::vector<uint8_t>({'f', 'l', 'o', 'a', 't', '1', '6', 0}), "T is kept");
  Expect(saved.Data("kernel_pack") == WindowPack({{"w", "90", "cubin"}})->data(), "the pack is kept");
  const Plugin engine = creators.Deserialize(kWindow, saved);
  ExpectFine(static_cast<bool>(engine), "an engine is read");
  const std::string id = built.build->getTimingCacheID(), metadata = built.build->getMetadataString();
  Expect(engine.build->getTimingCacheID() == id && engine.build->getMetadataString() == metadata, "and is the same");
  const Plugin clone = engine.Clone().Clone();
  const Fields again = Saved(clone);
  for (const char* name : {"left_window_size", "right_window_size", "is_causal", "q_num_heads", "kv_num_heads",
                           "dilation", "scale", "softcap", "span_ramp", "operands", "results", "type", "kernel_pack"}) {
    Expect(again.Has(name) && again.Data(name) == saved.Data(name), std::string(name) + " through clones and engines");
  }
  const Plugin blocks = Configured(creators, kBlocks, BlockFields(), BlockInputs(), BlockOutputs());
  const Plugin read = creators.Deserialize(kBlocks, Saved(blocks));
  ExpectFine(read && read.build->getTimingCacheID() == std::string(blocks.build->getTimingCacheID()), "blocks");
  // An engine that does not tell T: kernels are loaded when the shapes are.
  const Plugin silent = creators.Deserialize(kWindow, WindowFields());
  Context context;
  const Plugin attached = silent.Attach(&context);
  ExpectEqual(TakeCalls(), {}, "nothing to load yet");
  ExpectFine(attached.Announce(in, out) == 0, "shapes");
  Expect(TakeCalls().size() == 2, "now it is loaded");
}

void TestContexts(const Creators& creators) {
  const std::vector<Tensor> in = WindowInputs(33), out = WindowOutputs(33);
  std::unique_ptr<Plugin> engine =
      std::make_unique<Plugin>(Engine(creators, kWindow, WindowFields(), WindowInputs(33), WindowOutputs(33)));
  std::vector<std::unique_ptr<Context>> contexts;
  std::vector<std::unique_ptr<Plugin>> plugins;
  for (int i = 0; i < 4; ++i) {
    contexts.push_back(std::make_unique<Context>());
    plugins.push_back(std::make_unique<Plugin>(engine->Attach(contexts.back().get())));
  }
  Expect(State().modules == 1 && State().contexts == 1, "contexts share the code that is loaded");
  TakeCalls();
  // Each context has shapes of its own.
  std::vector<std::thread> threads;
  for (size_t i = 0; i < plugins.size(); ++i) {
    threads.emplace_back([&, i] {
      const auto seq_q = static_cast<int64_t>(10 * (i + 1));
      for (int run = 0; run < 20; ++run) {
        const bool fine = plugins[i]->Announce(WindowInputs(seq_q), WindowOutputs(seq_q)) == 0 &&
                          Enqueue(*plugins[i], WindowInputs(seq_q), WindowOutputs(seq_q)) == 0;
        if (!fine) contexts[i]->recorder.reportError(nvinfer1::ErrorCode::kUNSPECIFIED_ERROR, "failed");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& context : contexts) Expect(context->recorder.errors.empty(), "contexts in threads");
  std::map<std::string, int> grids;
  for (const std::string& call : TakeCalls()) {
    if (call.rfind("launch ", 0) == 0) ++grids[call.substr(0, call.find(" block"))];
  }
  // 10, 20, 30 and 40 rows in tiles of 16.
  const std::map<std::string, int> expected = {
      {"launch run grid 1,1,1", 20}, {"launch run grid 2,1,1", 40}, {"launch run grid 3,1,1", 20}};
  Expect(grids == expected, "the shapes of one context are not another's");
  engine.reset();
  ExpectFine(Enqueue(*plugins[0], WindowInputs(10), WindowOutputs(10)) == 0, "without the plugin it came from");
  plugins.clear();
  Expect(State().modules == 0 && State().contexts == 0, "the last context unloads the code");
  TakeCalls();
}

void TestDevices(const Creators& creators) {
  const std::vector<Tensor> in = WindowInputs(33), out = WindowOutputs(33);
  const Plugin engine = Engine(creators, kWindow, WindowFields(), in, out);
  Context context;
  State().capability = 75;
  ExpectRefused(!engine.Attach(&context), "no GPU kernel for SlidingWindowAttention of float16 with inputs");
  Expect(context.recorder.errors.size() == 1 &&
             context.recorder.errors[0].second.find("compute capability 7.5): there is cubin for sm_90; next step: ") !=
                 std::string::npos,
         "a context that cannot be made says why to its recorder");
  const Plugin built = Configured(creators, kWindow, WindowFields(), in, out);
  ExpectRefused(built.Announce(in, out) != 0, "there is cubin for sm_90; next step: build the engine from a bundle");
  State().capability = 90;
  const Plugin bare = creators.Build(kWindow, WindowFields().Without("kernel_pack"));
  ExpectRefused(bare.Announce(in, out) != 0, "no kernel pack is loaded");
  std::vector<Tensor> single = in;
  for (size_t i = 0; i < 3; ++i) single[i].type = DataType::kFLOAT;
  ExpectRefused(engine.Announce(single, out) != 0, "T is float32, not float16");
  // The device is that of the thread's context.
  void* library = dlopen(LONGSPAN_STUB_DRIVER, RTLD_NOW);
  const auto retain = reinterpret_cast<CUresult (*)(CUcontext*, CUdevice)>(dlsym(library, "cuDevicePrimaryCtxRetain"));
  const auto push = reinterpret_cast<CUresult (*)(CUcontext)>(dlsym(library, "cuCtxPushCurrent_v2"));
  const auto pop = reinterpret_cast<CUresult (*)(CUcontext*)>(dlsym(library, "cuCtxPopCurrent_v2"));
  const auto release = reinterpret_cast<CUresult (*)(CUdevice)>(dlsym(library, "cuDevicePrimaryCtxRelease_v2"));
  CUcontext other = nullptr;
  retain(&other, 1);
  const Plugin here = engine.Attach(&context);
  TakeCalls();
  push(other);
  const Plugin there = engine.Attach(&context);
  Expect(TakeCalls().size() == 2 && State().modules == 2, "another device loads for itself");
  ExpectFine(here.Announce(in, out) == 0, "a context that moved");
  Expect(State().modules == 1, "loads for the device that is current");
  pop(&other);
  release(1);
  const auto create = reinterpret_cast<CUresult (*)(CUcontext*, unsigned, CUdevice)>(dlsym(library, "cuCtxCreate_v2"));
  create(&other, 0, 0);
  ExpectRefused(!engine.Attach(&context), "the current CUDA context is not the primary one of device 0 (Stub");
  pop(&other);
  ExpectFine(here.Announce(in, out) == 0, "the primary context again");
  create(&other, 0, 0);
  ExpectRefused(here.Announce(in, out) != 0, "the current CUDA context is not the primary one");
  ExpectRefused(Enqueue(here, in, out) != 0, "before its shapes were announced");
  pop(&other);
  dlclose(library);
  TakeCalls();
}

void TestMistakes(const Creators& creators) {
  const std::vector<Tensor> in = WindowInputs(33), out = WindowOutputs(33);
  const Plugin engine = Engine(creators, kWindow, WindowFields(), in, out);
  Context context;
  const Plugin plugin = engine.Attach(&context);
  TakeCalls();
  ExpectRefused(Enqueue(plugin, in, out) != 0, "an execution before its shapes were announced");
  ExpectRefused(plugin.Announce({in[0], in[1], in[2]}, out) != 0, "3 inputs and 2 outputs: the node has 4 and 2");
  std::vector<Tensor> wrong = in;
  wrong[1].shape[2] = 41;
  ExpectRefused(plugin.Announce(wrong, out) != 0, "V has shape (1, 1, 40, 8): must be (1, 1, 41, 8)");
  ExpectRefused(Enqueue(plugin, in, out) != 0, "before its shapes were announced");
  ExpectRefused(plugin.Announce(in, WindowOutputs(34)) != 0, "Y has shape (1, 2, 34, 8): must be (1, 2, 33, 8)");
  ExpectRefused(plugin.Announce(in, {out[0], WindowOutputs(34)[1]}) != 0, "lse has shape (1, 2, 34)");
  wrong = in;
  wrong[0].type = DataType::kINT8;
  ExpectRefused(plugin.Announce(wrong, out) != 0, "must be FP16, BF16 or FP32");
  ExpectFine(plugin.Announce(in, out) == 0, "what is right");
  ExpectRefused(Enqueue(plugin, WindowInputs(32), out) != 0,
                "Q has shape (1, 2, 32, 16), and was announced with (1, 2, 33, 16)");
  ExpectRefused(Enqueue(plugin, in, out, nullptr) != 0, "no memory");
  ExpectEqual(TakeCalls(), {}, "what is refused launches nothing");
  for (const char* function : {"cuMemsetD8Async", "cuLaunchKernel"}) {
    State().failures = {{function, 2}};
    ExpectRefused(Enqueue(plugin, in, out) != 0, "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory");
  }
  State().failures.clear();
  for (const char* function : {"cuModuleLoadDataEx cubin", "cuCtxGetCurrent", "cuFuncLoad"}) {
    State().failures = {{function, 2}};
    const Creators fresh;  // which has nothing loaded
    const Plugin other = fresh.Build(kWindow, WindowFields());
    ExpectRefused(other.Announce(in, out) != 0, "CUDA_ERROR_OUT_OF_MEMORY");
    State().failures.clear();
  }
  Expect(!context.recorder.errors.empty() && context.recorder.errors[0].first == nvinfer1::ErrorCode::kINVALID_ARGUMENT,
         "the recorder of a context has its errors");
  TakeCalls();
}

// Packs that LONGSPAN_KERNEL_PATH names come before the node's own. An engine built elsewhere has no workspace for
// them.
void TestPathPacks(const Creators& creators) {
  const std::string file = "trt" + std::to_string(NV_TENSORRT_MAJOR) + "_path.pack", other = "other_" + file;
  const auto added = WindowPack({{"added", "90", "cubin", "1024", "added"}});
  std::ofstream(file, std::ios::binary)
      .write(reinterpret_cast<const char*>(added->data().data()), static_cast<std::streamsize>(added->data().size()));
  const auto foreign = BlockPack();  // of the other operator
  std::ofstream(other, std::ios::binary)
      .write(reinterpret_cast<const char*>(foreign->data().data()),
             static_cast<std::streamsize>(foreign->data().size()));
  setenv("LONGSPAN_KERNEL_PATH", (other + ":" + file).c_str(), 1);
  const std::vector<Tensor> in = WindowInputs(33), out = WindowOutputs(33);
  const auto launched = [](const std::string& what) {
    const std::vector<std::string> calls = TakeCalls();
    return !calls.empty() && calls.back().find(what) != std::string::npos;
  };
  const Plugin both = Configured(creators, kWindow, WindowFields(), in, out);
  ExpectFine(both.Announce(in, out) == 0 && Enqueue(both, in, out) == 0, "a node with kernels of its own");
  Expect(launched("launch added"), "those of the path come first");
  {
    const Plugin built = Configured(creators, kWindow, WindowFields().Without("kernel_pack"), in, out);
    const auto ins = Profile(in, in), outs = Profile(out, out);
    Expect(built.build->getWorkspaceSize(ins.data(), 4, outs.data(), 2) == 768,
           "a builder's workspace is for them too");
    ExpectFine(built.Announce(in, out) == 0 && Enqueue(built, in, out) == 0, "kernels of a path");
    Expect(launched("launch added grid 3,1,1 block 128,1,1 shared 1024 stream 7 parameters 1000 4000 40000100"),
           "in the workspace of who built the engine");
    const Plugin engine = creators.Deserialize(kWindow, Saved(built));
    Context context;
    {
      const Plugin plugin = engine.Attach(&context);
      ExpectFine(plugin.Announce(in, out) == 0 && Enqueue(plugin, in, out, nullptr) == 0, "of an engine");
      Expect(launched("parameters 1000 4000 7000000100"), "in memory of the context");
      ExpectFine(plugin.Announce(WindowInputs(3), WindowOutputs(3)) == 0, "more memory");
      ExpectFine(plugin.Announce(in, out) == 0 && Enqueue(plugin, in, out, nullptr) == 0, "and less");
      Expect(context.allocator.calls == 1 && context.allocator.live.size() == 1, "which only grows");
      TakeCalls();
    }
    Expect(context.allocator.live.empty(), "and is given back");
    context.allocator.fail = true;
    const Plugin plugin = engine.Attach(&context);
    ExpectRefused(plugin.Announce(in, out) != 0, "no memory");
    const Plugin unattached = engine.Clone();
    ExpectRefused(unattached.Announce(in, out) != 0, "need 768 bytes of memory that the engine does not provide");
  }
  setenv("LONGSPAN_KERNEL_PATH", "nowhere.pack", 1);
  const Plugin engine = Engine(creators, kWindow, WindowFields(), in, out);
  ExpectRefused(engine.Announce(in, out) != 0, "LONGSPAN_KERNEL_PATH: nowhere.pack: cannot be opened");
  unsetenv("LONGSPAN_KERNEL_PATH");
  std::remove(file.c_str());
  std::remove(other.c_str());
  TakeCalls();
}

}  // namespace

int main() {
  Log::Shared();
  {
    const Creators creators;
    TestWindowExecutions(creators);
    TestBlockExecutions(creators);
    TestEngines(creators);
    TestContexts(creators);
    TestDevices(creators);
    TestMistakes(creators);
    TestPathPacks(creators);
  }
  Expect(State().modules == 0 && State().contexts == 0, "nothing is left on devices");
  if (failures == 0) std::printf("the plugins run as the launcher does\n");
  return failures == 0 ? 0 : 1;
}
