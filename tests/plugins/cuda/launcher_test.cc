// The launcher on a stub of the CUDA driver: which kernels it loads and launches, with what, and what it refuses.
#include "cuda/launcher.h"

#include <limits>
#include <thread>

#include "cuda/runtime.h"
#include "cuda/workspace.h"
#include "stub_testing.h"

namespace {

using namespace longspan;
using namespace longspan::testing;

struct TestOperands : cuda::Operands {
  std::vector<std::optional<Shape>> all_shapes = std::vector<std::optional<Shape>>(15);
  std::vector<const void*> addresses = std::vector<const void*>(15);

  TestOperands(Shapes sizes, const std::vector<Shape>& given) {
    shapes = sizes;
    for (size_t i = 0; i < given.size(); ++i) {
      all_shapes[i] = given[i];
      addresses[i] = reinterpret_cast<const void*>(4096 * (i + 1));
    }
    input_shapes = all_shapes.data();
    inputs = addresses.data();
    output = reinterpret_cast<void*>(0x100000);
    lse = reinterpret_cast<float*>(0x200000);
  }
};

// B = 1, H_q = 2, H_kv = 1, D = 16, D_v = 8.
TestOperands WindowOperands(int64_t seq_q, bool split_heads = true, int64_t batch = 1) {
  const Shapes sizes{split_heads, batch, 2, 1, seq_q, 40, 16, 8};
  return {sizes, {{batch, 2, seq_q, 16}, {batch, 1, 40, 16}, {batch, 1, 40, 8}, {batch, 40}}};
}

TestOperands BlockOperands(int64_t list_heads = 1) {
  const Shapes sizes{true, 2, 3, 3, 20, 30, 16, 16};
  return {sizes,
          {{2, 3, 20, 16},
           {2, 3, 30, 16},
           {2, 3, 30, 16},
           {2, list_heads, 3},
           {2, list_heads, 3, 2},
           {1, 1, 3},
           {1, 1, 3, 1},
           {2, list_heads, 3, 2},
           {5, 8, 2}}};
}

class TestScratch : public cuda::Scratch {
 public:
  void* Allocate(size_t bytes) override {
    if (fail) throw std::bad_alloc();
    allocated = bytes;
    return reinterpret_cast<void*>(0x40000010);  // not aligned to 256
  }
  size_t allocated = 0;
  bool fail = false;
};

const CUstream kStream = reinterpret_cast<CUstream>(size_t{7});

void Run(const std::vector<std::shared_ptr<const cuda::Pack>>& packs, const cuda::Node& node,
         const cuda::Operands& operands) {
  cuda::Modules modules(LONGSPAN_STUB_DRIVER);
  const cuda::Launcher launcher(node, packs, 0, &modules);
  TakeCalls();
  TestScratch scratch;
  launcher.Launch(operands, kStream, &scratch);
}

void TestWindowValues() {
  Run({WindowPack({{"w", "90", "cubin"}})}, WindowNode(), WindowOperands(33));
  // 3 tiles; buffers of 0 and 8 elements at 0x40000100 and 0x40000200; rows 48; LEFT 7, RIGHT 33 + 40; Q in (B, H, S,
  // D); scale 1/4, ramp 32.
  ExpectEqual(TakeCalls(),
              {"memset 40000200 0 32 stream 7",
               "launch run grid 3,1,1 block 128,1,1 shared 1024 stream 7 parameters 1000 4000 40000100 40000200 100000 "
               "200000 30 50 7 420 210 10 8 0 3e800000 42000000 0 0"},
              "one launch of the path for many rows");
  Run({WindowPack({{"w", "90", "cubin"}})}, WindowNode(), WindowOperands(3, false, 2));
  // (B, S, H·D): Q's rows are 32 apart, its heads 16; V's rows 8; the mask has a batch stride of 40.
  const std::string launch =
      "launch run grid 2,1,1 block 128,1,1 shared 1024 stream 7 parameters 1000 4000 40000100 40000200 100000 "
      "200000 10 32 7 60 10 20 8 28 3e800000 42000000 0 0";
  ExpectEqual(TakeCalls(), {"memset 40000200 0 32 stream 7", launch, launch}, "two launches of the path for few rows");
  Run({WindowPack({{"w", "90", "cubin"}})}, WindowNode(), WindowOperands(0));
  ExpectEqual(TakeCalls(), {"memset 40000200 0 32 stream 7"}, "an empty grid is not launched");
}

void TestBlockValues() {
  // W 2, W_full 1, M 5; B_lists 2, H_lists 1, 3 rows; strides of kv_indices; softcap 30.
  Run({BlockPack()}, BlockNode(), BlockOperands());
  ExpectEqual(
      TakeCalls(),
      {"launch lists grid 9,2,1 block 128,1,1 shared 1024 stream 7 parameters 1000 5000 9000 100000 8 6 6 0 2 8 "
       "41f00000 0 0"},
      "block lists that heads share");
  Run({BlockPack("1")}, BlockNode(), BlockOperands(3));
  ExpectEqual(
      TakeCalls(),
      {"launch lists grid 9,2,1 block 128,1,1 shared 1024 stream 7 parameters 1000 5000 9000 100000 8 12 12 6 2 8 "
       "41f00000 0 0"},
      "block lists per head");
  Refused<cuda::NoKernel>("lists_per_head is 1, not 0", [] { Run({BlockPack()}, BlockNode(), BlockOperands(3)); });
  Run({BlockPack("1"), BlockPack("0")}, BlockNode(), BlockOperands());
  Expect(TakeCalls().size() == 1, "lists that heads share run by either kernel");
}

// Which of the kernels is loaded on a device; their names stand in their code.
std::string Chosen(int capability, const std::vector<TestKernel>& kernels, int shared_memory = 232448) {
  State().capability = capability;
  State().shared_memory = shared_memory;
  std::string chosen;
  try {
    cuda::Modules modules(LONGSPAN_STUB_DRIVER);
    const cuda::Launcher launcher(WindowNode(), {WindowPack(kernels)}, 0, &modules);
    for (const std::string& call : TakeCalls()) {
      if (call.rfind("load ", 0) == 0)
        chosen += call.substr(5, call.find(" stub") - 5) + call.substr(call.find("stub ") + 4, 5);
    }
  } catch (const cuda::NoKernel& error) {
    chosen = error.what();
  }
  State().capability = 90;
  State().shared_memory = 232448;
  return chosen;
}

void TestArchitectures() {
  const std::vector<TestKernel> all = {{"k080", "80", "cubin", "1024", "e080"},
                                       {"k080", "80", "ptx", "1024", "p080"},
                                       {"k086", "86", "cubin", "1024", "e086"},
                                       {"k087", "87", "cubin", "1024", "e087"},
                                       {"k090", "90", "cubin", "1024", "e090"}};
  Expect(Chosen(80, all) == "cubin e080", "8.0: " + Chosen(80, all));
  Expect(Chosen(86, all) == "cubin e086", "8.6: " + Chosen(86, all));
  Expect(Chosen(89, all) == "cubin e086", "8.9 runs the machine code of 8.6: " + Chosen(89, all));
  Expect(Chosen(87, all) == "cubin e087", "8.7: " + Chosen(87, all));
  Expect(Chosen(90, all) == "cubin e090", "9.0: " + Chosen(90, all));
  Expect(Chosen(100, all) == "ptx p080", "10.0 compiles PTX: " + Chosen(100, all));
  Expect(Chosen(121, all) == "ptx p080", "12.1 compiles PTX: " + Chosen(121, all));
  Expect(Chosen(87, {all[0], all[2]}).find("cubin for sm_80; cubin for sm_86") != std::string::npos,
         "8.7 stands apart");
  Expect(Chosen(100, {all[4]}).find("there is cubin for sm_90") != std::string::npos, "9.0's code is not portable");
  Expect(Chosen(80, {all[2]}).find("there is cubin for sm_86") != std::string::npos, "8.6's code does not run on 8.0");
  const std::vector<TestKernel> large = {{"k080", "80", "ptx", "1024", "p080"},
                                         {"k086", "86", "cubin", "110000", "e086"}};
  Expect(Chosen(89, large, 101376) == "ptx p080", "a recipe that needs too much shared memory is passed over");
  Expect(Chosen(89, {large[1]}, 101376).find("110000 bytes of shared memory, of which the device has 101376") !=
             std::string::npos,
         "and said to be so");
}

void TestLoading() {
  cuda::Modules modules(LONGSPAN_STUB_DRIVER);
  {
    const cuda::Launcher one(WindowNode(), {WindowPack({{"w", "90", "cubin", "100000"}})}, 0, &modules);
    ExpectEqual(TakeCalls(), {"load cubin stub run" + std::string(kWindowSizes), "prepare run", "shared run 100000"},
                "loading, with more than 48 KiB of shared memory");
    // Another pack with the same code, as another session has it.
    const cuda::Launcher two(WindowNode(), {WindowPack({{"w", "90", "cubin", "100000"}})}, 0, &modules);
    ExpectEqual(TakeCalls(), {}, "code that is loaded is not loaded again");
    const cuda::Launcher other(WindowNode(), {WindowPack({{"w", "90", "cubin", "100000"}})}, 1, &modules);
    Expect(TakeCalls().size() == 3, "another device has modules of its own");
    Expect(State().modules == 2 && State().contexts == 2, "modules and contexts while they are in use");
    TestScratch scratch;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        TestScratch own;
        for (int run = 0; run < 50; ++run) two.Launch(WindowOperands(33), kStream, &own);
        const cuda::Launcher again(WindowNode(), {WindowPack({{"w", "90", "cubin", "100000"}})}, 0, &modules);
      });
    }
    for (std::thread& thread : threads) thread.join();
    const std::vector<std::string> calls = TakeCalls();
    bool only = calls.size() == 400;
    for (const std::string& call : calls)
      only = only && (call.rfind("launch ", 0) == 0 || call.rfind("memset ", 0) == 0);
    Expect(only, "executions call nothing but launches and memsets, so a CUDA graph can capture them");
  }
  Expect(State().modules == 0 && State().contexts == 0, "the last user unloads modules and releases contexts");
}

void TestDriverErrors() {
  const auto run = [] { Run({WindowPack({{"w", "90", "cubin", "100000"}})}, WindowNode(), WindowOperands(33)); };
  const std::pair<const char*, const char*> places[] = {{"cuInit", "cuInit"},
                                                        {"cuDeviceGet", "CUDA device 0"},
                                                        {"cuDeviceGetName", "CUDA device 0"},
                                                        {"cuDeviceGetAttribute", "attribute"},
                                                        {"cuDevicePrimaryCtxRetain", "primary context"},
                                                        {"cuCtxGetCurrent", "cuCtxGetCurrent"},
                                                        {"cuCtxPushCurrent", "cuCtxPushCurrent"},
                                                        {"cuModuleLoadDataEx cubin", "said the compiler"},
                                                        {"cuModuleGetFunction", "run"},
                                                        {"cuFuncLoad", "cuFuncLoad"},
                                                        {"cuFuncGetAttribute", "cuFuncGetAttribute"},
                                                        {"cuFuncSetAttribute", "100000 bytes of shared memory"},
                                                        {"cuMemsetD8Async", "cuMemsetD8Async"},
                                                        {"cuLaunchKernel", "launch of w"}};
  for (const auto& [function, where] : places) {
    State().failures = {{function, 2}};
    Refused<cuda::CudaError>(std::string(where), run);
    Refused<cuda::CudaError>("CUDA_ERROR_OUT_OF_MEMORY (2): out of memory", run);
    State().failures = {{function, 999}};
    Refused<cuda::CudaError>("unknown error (999): no description", run);
    State().failures.clear();
    Expect(State().modules == 0 && State().contexts == 0, std::string(function) + " leaves something behind");
  }
  State().threads = 96;
  Refused<cuda::CudaError>("needs blocks of 128 threads, and may have 96", run);
  State().threads = 1024;
  TakeCalls();
  State().failures = {{"cuModuleLoadDataEx cubin", 209}};
  Run({WindowPack({{"w", "80", "ptx"}, {"x", "90", "cubin"}})}, WindowNode(), WindowOperands(33));
  Expect(TakeCalls().size() == 2, "PTX runs where the driver refuses machine code");
  State().failures["cuModuleLoadDataEx ptx"] = 222;
  Refused<cuda::CudaError>(
      "(222)", [] { Run({WindowPack({{"w", "80", "ptx"}, {"x", "90", "cubin"}})}, WindowNode(), WindowOperands(33)); });
  State().failures.clear();
  Refused<cuda::CudaError>("CUDA device 2", [] {
    cuda::Modules modules(LONGSPAN_STUB_DRIVER);
    const cuda::Launcher launcher(WindowNode(), {WindowPack({{"w", "90", "cubin"}})}, 2, &modules);
  });
  Refused<cuda::CudaError>("no CUDA driver: ", [] { cuda::Modules("libcuda-that-is-not-there.so.1").GetDevice(0); });
  Refused<cuda::CudaError>("lacks cuInit, ", [] { cuda::Modules("libm.so.6").GetDevice(0); });
}

void TestRefusals() {
  const auto pack = WindowPack({{"w", "90", "cubin"}});
  const auto run = [&pack](const std::function<void(cuda::Node*)>& change) {
    cuda::Node node = WindowNode();
    change(&node);
    Run({pack}, node, WindowOperands(33));
  };
  using Change = std::pair<const char*, std::function<void(cuda::Node*)>>;
  const Change changes[] = {
      {"T is float32, not float16", [](cuda::Node* node) { node->dtype = "float32"; }},
      {"inputs are Q,K,V, not Q,K,V,attn_mask", [](cuda::Node* node) { node->inputs.pop_back(); }},
      {"outputs are Y, not Y,lse", [](cuda::Node* node) { node->lse = false; }},
      {"D is 64, not 16", [](cuda::Node* node) { node->sizes.head_size = 64; }},
      {"group is 1, not 2", [](cuda::Node* node) { node->sizes.group = 1; }},
      {"is_causal is 1, not 0", [](cuda::Node* node) { node->integers["is_causal"] = 1; }},
      {"softcap is 1, not 0", [](cuda::Node* node) { node->floats["softcap"] = 2; }},
      {"dilation is 1, not 1,2", [](cuda::Node* node) { node->dilation = {1, 1}; }},
      {"have none for this operator", [](cuda::Node* node) { *node = BlockNode(); }}};
  for (const auto& [message, change] : changes) {
    Refused<cuda::NoKernel>(message, [&, &change = change] { run(change); });
  }
  Refused<cuda::NoKernel>("no kernel pack is loaded", [] { Run({}, WindowNode(), WindowOperands(3)); });
  TestOperands wide = WindowOperands(33);
  wide.shapes.head_size = 32;
  Refused<cuda::NoKernel>("D is 32, not 16", [&] { Run({pack}, WindowNode(), wide); });
  TestOperands skewed = WindowOperands(33);
  skewed.addresses[0] = reinterpret_cast<const void*>(4104);
  Refused<InvalidOperands>("the address of Q is 4104: GPU kernels need a multiple of 16",
                           [&] { Run({pack}, WindowNode(), skewed); });
  Expect(TakeCalls().empty(), "nothing is launched where a parameter is wrong");
  TestOperands many = WindowOperands(1 << 30);
  Refused<InvalidOperands>("GPU kernels go up to", [&] { Run({pack}, WindowNode(), many); });
  TestOperands blocks = WindowOperands(1 << 29, true, 1 << 10);
  Refused<InvalidOperands>("grid x = ", [&] { Run({pack}, WindowNode(), blocks); });
  cuda::Modules modules(LONGSPAN_STUB_DRIVER);
  const cuda::Launcher launcher(WindowNode(), {pack}, 0, &modules);
  TestScratch scratch;
  scratch.fail = true;
  Refused<std::bad_alloc>("", [&] { launcher.Launch(WindowOperands(33), kStream, &scratch); });
}

int64_t Value(const char* text) {
  const cuda::SizeNames names;
  std::vector<int64_t> sizes(names.Count(), 0);
  sizes[cuda::kB] = 7;
  sizes[cuda::kHq] = int64_t{1} << 62;
  return cuda::Expression(text, names, std::vector<bool>(names.Count(), true)).Evaluate(sizes);
}

void TestExpressions() {
  Expect(Value("B 2 *") == 14 && Value("B 2 //") == 3 && Value("B 2 cdiv") == 4 && Value("B 2 %") == 1, "division");
  Expect(Value("2 B -") == -5 && Value("B 9 min") == 7 && Value("B 9 max") == 9, "subtraction, min, max");
  Expect(Value("B 7 le") == 1 && Value("B 6 le") == 0 && Value("B 3 both") == 1 && Value("B 0 both") == 0, "le, both");
  for (const char* text : {"", "B  2 +", "B +", "B 2", "B 02 +", "b", "B 4611686018427387904 +", "B -1 +", "+ B 2"}) {
    Refused<cuda::InvalidExpression>("", [text] { Value(text); });
  }
  for (const char* text : {"H_q H_q +", "H_q 4 *", "0 H_q - H_q - 1 -", "B 0 //", "0 1 - 2 %", "B 0 1 - cdiv"}) {
    Refused<cuda::InvalidExpression>("", [text] { Value(text); });
  }
  std::string deep = "1";
  for (int i = 0; i < 32; ++i) deep += " 1";
  for (int i = 0; i < 32; ++i) deep += " +";
  Refused<cuda::InvalidExpression>("more than 32", [&] { Value(deep.c_str()); });
  Expect(Value(deep.substr(2, deep.size() - 4).c_str()) == 32, "32 values on the stack are allowed");
}

// Limits of an expression over ranges, against all values in them.
void TestRanges() {
  const cuda::SizeNames names;
  const std::vector<bool> known(names.Count(), true);
  const std::vector<int64_t> ends = {-3, -1, 0, 1, 2, 5};
  for (const char* text : {"B M +", "B M -", "B M *", "B M //", "B M %", "B M cdiv", "B M min", "B M max", "B M le",
                           "B M both", "B 3 le M *", "B B *", "7 B cdiv M +"}) {
    const cuda::Expression expression(text, names, known);
    for (const int64_t low : ends) {
      for (const int64_t high : ends) {
        if (low > high) continue;
        bool any = false, inside = true;
        std::vector<cuda::Range> ranges(names.Count());
        ranges[cuda::kB] = {low, high};
        ranges[cuda::kM] = {-2, 4};
        const std::optional<cuda::Range> bounds = expression.Bounds(ranges);
        for (int64_t b = low; b <= high; ++b) {
          for (int64_t m = -2; m <= 4; ++m) {
            std::vector<int64_t> sizes(names.Count(), 0);
            sizes[cuda::kB] = b;
            sizes[cuda::kM] = m;
            try {
              const int64_t value = expression.Evaluate(sizes);
              any = true;
              inside = inside && bounds && bounds->low <= value && value <= bounds->high;
            } catch (const cuda::InvalidExpression&) {
            }
          }
        }
        Expect(any ? inside : true, std::string(text) + " over a range");
        if (!any) Expect(!bounds, std::string(text) + " has no value");
      }
    }
  }
  std::vector<cuda::Range> huge(names.Count(), {0, int64_t{1} << 62});
  const std::optional<cuda::Range> product = cuda::Expression("B M *", names, known).Bounds(huge);
  Expect(product && product->high == std::numeric_limits<int64_t>::max(), "what overflows is cut");
  huge[cuda::kB].low = huge[cuda::kM].low = int64_t{1} << 40;
  Expect(!cuda::Expression("B M *", names, known).Bounds(huge), "what always overflows has no value");
}

// The bound of the scratch memory against all shapes within ranges.
void TestWorkspace() {
  const std::vector<std::shared_ptr<const cuda::Pack>> packs = {BlockPack(),
                                                                WindowPack({{"w", "90", "cubin"}}, kManyParts)};
  size_t most = 0, of_the_largest = 0;
  for (const int multiprocessors : {1, 3, 132, 256, 600}) {
    State().multiprocessors = multiprocessors;
    cuda::Modules modules(LONGSPAN_STUB_DRIVER);
    const cuda::Launcher launcher(WindowNode(), packs, 0, &modules);
    for (int64_t batch = 1; batch <= 90; ++batch) {
      for (int64_t seq_q = 0; seq_q <= 6; ++seq_q) {
        TestOperands operands = WindowOperands(seq_q, true, batch);
        for (const int64_t seq_k : {0, 13, 60}) {
          operands.shapes.seq_k = seq_k;
          const size_t bytes = launcher.NeedOf(operands).bytes;
          most = std::max(most, bytes);
          if (batch == 90 && seq_q == 4) of_the_largest = std::max(of_the_largest, bytes);
        }
      }
    }
  }
  State().multiprocessors = 132;
  TakeCalls();
  std::optional<cuda::ShapeRange> ranges[4] = {
      cuda::ShapeRange{{0, 90}, {2, 2}, {0, 6}, {16, 16}}, cuda::ShapeRange{{0, 90}, {1, 1}, {0, 60}, {16, 16}},
      cuda::ShapeRange{{0, 90}, {1, 1}, {0, 60}, {8, 8}}, cuda::ShapeRange{{0, 90}, {0, 60}}};
  const size_t bound = cuda::WorkspaceBound(packs, WindowNode(), ranges);
  Expect(bound >= most && bound <= most + most / 16 && most > of_the_largest,
         "workspace " + std::to_string(bound) + " for " + std::to_string(most) + ", of the largest shape " +
             std::to_string(of_the_largest));
  cuda::Node other = WindowNode();
  other.dtype = "float32";
  Expect(cuda::WorkspaceBound(packs, other, ranges) == 0, "recipes for other nodes do not count");
}

// FIPS 180-4's examples.
void TestSha256() {
  const auto hash = [](const std::string& text) {
    cuda::Sha256 sha;
    for (const char c : text) sha.Update(reinterpret_cast<const uint8_t*>(&c), 1);
    cuda::Sha256 whole;
    whole.Update(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    const std::string digest = cuda::Hex(sha.Finish());
    Expect(digest == cuda::Hex(whole.Finish()), "byte by byte and at once");
    return digest;
  };
  Expect(hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "SHA-256 of abc");
  Expect(hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "SHA-256 of nothing");
  Expect(hash(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
         "SHA-256 of a million a");
}

// Every byte changed, every length cut: refused, and nothing is read outside the file (the sanitizers watch).
void TestDamage() {
  const TestKernel kernel{"w", "90", "cubin"};
  const std::vector<uint8_t> good =
      Seal("compiler\ttest\n" +
               KernelText({"lists", "90", "cubin", "0", "lists"}, "bfloat16", kBlockParameters, "rows\t1\t1") +
               "recipe\tBlockSparseAttention\tbfloat16\t90\tcubin\ninputs\tQ,K,V,kv_num_blocks,kv_indices,"
               "full_kv_num_blocks,full_kv_indices,block_mask_ids,block_masks\noutputs\tY\nmatch\tD\t16\n"
               "match\tD_v\t16\nmatch\tgroup\t1\nmatch\tis_causal\t1\nmatch\texclude_self\t0\nmatch\tsoftcap\t1\n"
               "match\tq_block_size\t8\nmatch\tkv_block_size\t16\nmatch\tlists_per_head\t0\npath\twhole\t1\n"
               "size\trows\tS_q 8 cdiv\nlaunch\t0\nend\n",
           {CodeOf(kernel, kBlockSizes)});
  const auto accepted = [](std::vector<uint8_t> data) {
    try {
      cuda::Pack::FromBytes(std::move(data));
      return true;
    } catch (const cuda::InvalidPack&) {
      return false;
    }
  };
  Expect(accepted(good), "the pack that is damaged next is good");
  for (size_t size = 0; size < good.size(); ++size) {
    Expect(!accepted({good.begin(), good.begin() + static_cast<ptrdiff_t>(size)}), "cut to " + std::to_string(size));
  }
  for (size_t at = 0; at < good.size(); ++at) {
    std::vector<uint8_t> bad = good;
    bad[at] ^= 1;
    Expect(!accepted(bad), "byte " + std::to_string(at) + " changed");
    // With the hash made right: it may be accepted, and must be read safely.
    cuda::Sha256 hash;
    hash.Update(bad.data(), 32);
    hash.Update(bad.data() + 64, bad.size() - 64);
    const cuda::Digest digest = hash.Finish();
    std::copy(digest.begin(), digest.end(), bad.begin() + 32);
    accepted(bad);
  }
}

void TestRuntime() {
  cuda::Runtime runtime(LONGSPAN_STUB_DRIVER);
  const std::vector<uint8_t> data = Seal("compiler\ttest\nend\n", {});
  std::string id;
  {
    const auto one = runtime.AddPack(data), two = runtime.AddPack(data);
    Expect(one == two, "equal packs are one");
    id = one->id;
    Expect(runtime.FindPack(id) == one, "a pack is found by its id");
  }
  Expect(runtime.FindPack(id) == nullptr, "and kept for as long as it is needed");
  Refused<cuda::InvalidPack>("nowhere.pack: cannot be opened", [] { cuda::ReadPackPath("nowhere.pack"); });
}

}  // namespace

int main() {
  TestSha256();
  TestExpressions();
  TestRanges();
  TestWorkspace();
  TestDamage();
  TestWindowValues();
  TestBlockValues();
  TestArchitectures();
  TestLoading();
  TestDriverErrors();
  TestRefusals();
  TestRuntime();
  if (failures == 0) std::printf("the launcher does what it should\n");
  return failures == 0 ? 0 : 1;
}
