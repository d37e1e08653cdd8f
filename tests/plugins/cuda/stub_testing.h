// Packs, nodes and checks that the tests on the stub of the CUDA driver share.
#ifndef LONGSPAN_TESTS_CUDA_STUB_TESTING_H_
#define LONGSPAN_TESTS_CUDA_STUB_TESTING_H_

#include <dlfcn.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/node.h"
#include "cuda/pack.h"
#include "cuda/text.h"
#include "stub_driver.h"

namespace longspan::testing {

// Checks that failed.
inline int failures = 0;

inline void Expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

inline void ExpectEqual(const std::vector<std::string>& got, const std::vector<std::string>& expected,
                        const char* what) {
  Expect(got == expected, std::string(what) + "\n  got:      " + cuda::Joined(got, "\n            ") +
                              "\n  expected: " + cuda::Joined(expected, "\n            "));
}

// Whether `body` throws `Error` with `message` in it.
template <typename Error>
void Refused(const std::string& message, const std::function<void()>& body) {
  try {
    body();
    Expect(false, "not refused: " + message);
  } catch (const Error& error) {
    const std::string got = error.what();
    Expect(got.find(message) != std::string::npos, "refused otherwise: " + got + "\n  expected: " + message);
  }
}

inline Stub& State() {
  static Stub* const stub = [] {
    void* library = dlopen(LONGSPAN_STUB_DRIVER, RTLD_NOW);
    if (library == nullptr) std::printf("%s\n", dlerror());
    return reinterpret_cast<GetStubFunction>(dlsym(library, "GetStub"))();
  }();
  return *stub;
}

// A file with its hash, of an index whose k-th line "code" gets the place and the hash of the k-th code.
inline std::vector<uint8_t> Seal(const std::string& index, const std::vector<std::string>& codes) {
  const auto fill = [&](size_t size) {
    std::string text;
    size_t end = 64 + size, next = 0;
    for (const std::string_view line : cuda::Split(std::string_view(index).substr(0, index.size() - 1), '\n')) {
      text += line;
      if (line == "code") {
        const std::string& code = codes[next++];
        const size_t start = (end + 15) / 16 * 16;
        cuda::Sha256 hash;
        hash.Update(reinterpret_cast<const uint8_t*>(code.data()), code.size());
        text += "\t" + std::to_string(start) + "\t" + std::to_string(code.size()) + "\t" + cuda::Hex(hash.Finish());
        end = start + code.size();
      }
      text += "\n";
    }
    return text;
  };
  std::string text = fill(0);
  while (fill(text.size()).size() != text.size()) text = fill(text.size());
  text = fill(text.size());
  std::string body = text;
  for (const std::string& code : codes) {
    body.resize((body.size() + 15) / 16 * 16, '\0');
    body += code;
  }
  std::string head("\x89LSPACK\n", 8);
  const auto number = [&head](uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) head += static_cast<char>(value >> (8 * i));
  };
  number(cuda::kFormatVersion, 4);
  number(cuda::kContractVersion, 4);
  number(64 + body.size(), 8);
  number(text.size(), 8);
  cuda::Sha256 hash;
  hash.Update(reinterpret_cast<const uint8_t*>(head.data()), head.size());
  hash.Update(reinterpret_cast<const uint8_t*>(body.data()), body.size());
  const cuda::Digest digest = hash.Finish();
  head.append(digest.begin(), digest.end());
  const std::string file = head + body;
  return {file.begin(), file.end()};
}

struct TestKernel {
  std::string name, arch, form;
  std::string shared = "1024";
  std::string entry = "run";
};

inline const char* const kWindowParameters =
    "param\tq\t*fp16\t16\tinput\tQ\n"
    "param\tmask\t*u8\t1\tinput\tattn_mask\n"
    "param\tparts\t*fp32\t16\tbuffer\tparts\n"
    "param\tstatus\t*i32\t16\tbuffer\tstatus\n"
    "param\ty\t*fp16\t16\toutput\tY\n"
    "param\tlse\t*fp32\t4\toutput\tlse\n"
    "param\trows\ti32\t1\tsize\ttiles 16 *\n"
    "param\treach\ti64\t1\tsize\tLEFT RIGHT +\n"
    "param\tleft\ti32\t1\tattribute\tleft_window_size\n"
    "param\tq_batch\ti64\t8\tstride\tQ.batch\n"
    "param\tq_head\ti64\t8\tstride\tQ.head\n"
    "param\tq_row\ti64\t8\tstride\tQ.row\n"
    "param\tv_row\ti64\t8\tstride\tV.row\n"
    "param\tmask_batch\ti64\t1\tstride\tattn_mask.0\n"
    "param\tscale\tfp32\t1\tscalar\tscale\n"
    "param\tramp\tfp32\t1\tscalar\tspan_ramp\n";
inline const char* const kWindowSizes = " 8 8 8 8 8 8 4 8 4 8 8 8 8 8 4 4 8 8";

inline const char* const kBlockParameters =
    "param\tq\t*bf16\t16\tinput\tQ\n"
    "param\tindices\t*i32\t16\tinput\tkv_indices\n"
    "param\tmasks\t*u8\t16\tinput\tblock_masks\n"
    "param\ty\t*bf16\t16\toutput\tY\n"
    "param\twidths\ti32\t1\tsize\tW W_full + M +\n"
    "param\tlists\ti32\t1\tsize\tB_lists H_lists * rows *\n"
    "param\tindices_batch\ti64\t1\tstride\tkv_indices.0\n"
    "param\tindices_head\ti64\t1\tstride\tkv_indices.1\n"
    "param\tindices_row\ti64\t1\tstride\tkv_indices.2\n"
    "param\ttall\ti32\t1\tattribute\tq_block_size\n"
    "param\tcap\tfp32\t1\tscalar\tsoftcap\n";
inline const char* const kBlockSizes = " 8 8 8 8 4 4 8 8 8 4 4 8 8";

inline std::string KernelText(const TestKernel& kernel, const char* dtype, const char* parameters, const char* grid) {
  return "kernel\t" + kernel.name + "\t" + kernel.arch + "\t" + kernel.form + "\t" + kernel.entry + "\t128\t" +
         kernel.shared + "\t64\t0\nabout\t" + dtype + "\t16\t8\t2\tmodule:function\nfeatures\t\nconstant\tA\t1\n" +
         parameters + "grid\t" + grid + "\ncode\n";
}

inline std::string CodeOf(const TestKernel& kernel, const char* sizes) {
  return (kernel.form == "cubin" ? "\x7f"
                                   "ELF"
                                 : "") +
         ("stub " + kernel.entry + sizes) + "\n// " + kernel.name + "\n";
}

inline const char* const kWindowPaths =
    "path\tsplit\tS_q 4 le\nsize\ttiles\tS_q 16 cdiv\nsize\tsplits\tSMS B H_kv * cdiv 3 min\n"
    "buffer\tparts\tfp32\t0\tsplits S_q *\nbuffer\tstatus\ti32\t1\t8\nlaunch\t@\nlaunch\t@\n"
    "path\twhole\t1\nsize\ttiles\tS_q 16 cdiv\nbuffer\tparts\tfp32\t0\t0\nbuffer\tstatus\ti32\t1\t8\nlaunch\t@\n";

// A path whose need is largest neither for the most batches nor for the fewest: the parts of each batch are as many as
// there are multiprocessors for it, and keys for them, which go with both lengths where a window has no end.
inline const char* const kManyParts =
    "path\tsplit\tS_q 4 le\nsize\ttiles\tS_q 16 cdiv\nsize\tsplits\tSMS B cdiv RIGHT 16 cdiv min\n"
    "buffer\tparts\tfp32\t0\tB S_q * splits * 64 *\nbuffer\tstatus\ti32\t1\t8\nlaunch\t@\n"
    "path\twhole\t1\nsize\ttiles\tS_q 16 cdiv\nbuffer\tparts\tfp32\t0\t0\nbuffer\tstatus\ti32\t1\t8\nlaunch\t@\n";

// A pack of SlidingWindowAttention in float16 with attn_mask and lse, one recipe for each kernel.
inline std::shared_ptr<const cuda::Pack> WindowPack(std::vector<TestKernel> kernels,
                                                    const char* all_paths = kWindowPaths) {
  std::string index = "compiler\ttest\n", recipes;
  std::vector<std::string> codes;
  for (size_t i = 0; i < kernels.size(); ++i) {
    index += KernelText(kernels[i], "float16", kWindowParameters, "tiles H_kv * B *\t1\tS_k 0 min 1 +");
    codes.push_back(CodeOf(kernels[i], kWindowSizes));
    std::string paths = all_paths;
    for (size_t at; (at = paths.find('@')) != std::string::npos;) paths.replace(at, 1, std::to_string(i));
    recipes += "recipe\tSlidingWindowAttention\tfloat16\t" + kernels[i].arch + "\t" + kernels[i].form +
               "\ninputs\tQ,K,V,attn_mask\noutputs\tY,lse\nmatch\tD\t16\nmatch\tD_v\t8\nmatch\tgroup\t2\n"
               "match\tis_causal\t0\nmatch\tsoftcap\t0\nmatch\tdilation\t1,2\n" +
               paths;
  }
  return cuda::Pack::FromBytes(Seal(index + recipes + "end\n", codes));
}

inline std::shared_ptr<const cuda::Pack> BlockPack(const char* lists_per_head = "0") {
  const TestKernel kernel{"lists", "90", "cubin", "1024", "lists"};
  const std::string recipe =
      std::string(
          "recipe\tBlockSparseAttention\tbfloat16\t90\tcubin\n"
          "inputs\tQ,K,V,kv_num_blocks,kv_indices,full_kv_num_blocks,full_kv_indices,block_mask_ids,block_masks\n"
          "outputs\tY\nmatch\tD\t16\nmatch\tD_v\t16\nmatch\tgroup\t1\nmatch\tis_causal\t1\n"
          "match\texclude_self\t0\nmatch\tsoftcap\t1\nmatch\tq_block_size\t8\nmatch\tkv_block_size\t16\n"
          "match\tlists_per_head\t") +
      lists_per_head + "\npath\twhole\t1\nsize\trows\tS_q 8 cdiv\nlaunch\t0\n";
  return cuda::Pack::FromBytes(
      Seal("compiler\ttest\n" + KernelText(kernel, "bfloat16", kBlockParameters, "rows H_q *\tB\t1") + recipe + "end\n",
           {CodeOf(kernel, kBlockSizes)}));
}

inline std::vector<std::string> TakeCalls() {
  std::vector<std::string> calls;
  calls.swap(State().calls);
  return calls;
}

inline cuda::Node WindowNode() {
  cuda::Node node;
  node.op = "SlidingWindowAttention";
  node.dtype = "float16";
  node.inputs = {"Q", "K", "V", "attn_mask"};
  node.lse = true;
  node.integers = {
      {"left_window_size", 7}, {"right_window_size", -1}, {"is_causal", 0}, {"q_num_heads", 0}, {"kv_num_heads", 0}};
  node.floats = {{"softcap", 0.0f}, {"span_ramp", 32.0f}};
  node.dilation = {1, 2};
  return node;
}

inline cuda::Node BlockNode() {
  cuda::Node node;
  node.op = "BlockSparseAttention";
  node.dtype = "bfloat16";
  node.inputs = {
      "Q",          "K", "V", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "block_mask_ids",
      "block_masks"};
  node.integers = {{"q_block_size", 8}, {"kv_block_size", 16}, {"is_causal", 1},
                   {"exclude_self", 0}, {"q_num_heads", 0},    {"kv_num_heads", 0}};
  node.floats = {{"softcap", 30.0f}, {"scale", 0.5f}};
  return node;
}

}  // namespace longspan::testing

#endif  // LONGSPAN_TESTS_CUDA_STUB_TESTING_H_
