// Nodes of the two operators for the tests of the plugins, with the packs of stub_testing.h.
#ifndef LONGSPAN_TESTS_TENSORRT_NODES_H_
#define LONGSPAN_TESTS_TENSORRT_NODES_H_

#include <cstdlib>

#include "player.h"
#include "stub_testing.h"

namespace longspan::testing {

inline Fields WindowFields() {
  Fields fields;
  fields.Ints("left_window_size", {7}).Ints("dilation", {1, 2}).Strings("operands", {"Q", "K", "V", "attn_mask"});
  return fields.Strings("results", {"Y", "lse"}).Bytes("kernel_pack", WindowPack({{"w", "90", "cubin"}})->data());
}

inline std::vector<Tensor> WindowInputs(int64_t seq_q, int64_t batch = 1) {
  const DataType half = DataType::kHALF;
  return {{half, {batch, 2, seq_q, 16}},
          {half, {batch, 1, 40, 16}},
          {half, {batch, 1, 40, 8}},
          {DataType::kBOOL, {batch, 40}}};
}

inline std::vector<Tensor> WindowOutputs(int64_t seq_q, int64_t batch = 1) {
  return {{DataType::kHALF, {batch, 2, seq_q, 8}}, {DataType::kFLOAT, {batch, 2, seq_q}}};
}

inline Fields BlockFields(const char* lists_per_head = "0") {
  Fields fields;
  fields.Ints("q_block_size", {8}).Ints("kv_block_size", {16}).Ints("is_causal", {1}).Float("softcap", 30);
  fields.Float("scale", 0.5).Strings("results", {"Y"}).Bytes("kernel_pack", BlockPack(lists_per_head)->data());
  return fields.Strings("operands", {"Q", "K", "V", "kv_num_blocks", "kv_indices", "full_kv_num_blocks",
                                     "full_kv_indices", "block_mask_ids", "block_masks"});
}

// 8 · 2 bytes of a mask are 4 words.
inline std::vector<Tensor> BlockInputs(int64_t list_heads = 1, int64_t masks = 5) {
  const DataType element = DataType::kBF16, number = DataType::kINT32;
  return {{element, {2, 3, 20, 16}},    {element, {2, 3, 30, 16}},       {element, {2, 3, 30, 16}},
          {number, {2, list_heads, 3}}, {number, {2, list_heads, 3, 2}}, {number, {1, 1, 3}},
          {number, {1, 1, 3, 1}},       {number, {2, list_heads, 3, 2}}, {number, {masks, 4}}};
}

inline std::vector<Tensor> BlockOutputs() { return {{DataType::kBF16, {2, 3, 20, 16}}}; }

// The creators of a process with the stub for a driver.
class Creators {
 public:
  Creators() : runtime(std::make_shared<cuda::Runtime>(LONGSPAN_STUB_DRIVER)), all_(trt::MakeCreators(runtime)) {}

  trt::AttentionCreator& Of(const std::string& name) const {
    for (const auto& creator : all_) {
      if (name == creator->getPluginName()) return *creator;
    }
    std::abort();
  }
  Plugin Build(const std::string& name, Fields fields) const { return Make(name, &fields, true); }
  Plugin Deserialize(const std::string& name, Fields fields) const { return Make(name, &fields, false); }

  const std::shared_ptr<cuda::Runtime> runtime;

 private:
  Plugin Make(const std::string& name, Fields* fields, bool build) const {
    const auto phase = build ? nvinfer1::TensorRTPhase::kBUILD : nvinfer1::TensorRTPhase::kRUNTIME;
    return Plugin(Of(name).createPlugin("layer", fields->Collection(), phase));
  }

  const std::vector<std::unique_ptr<trt::AttentionCreator>> all_;
};

inline const char* const kWindow = "SlidingWindowAttention";
inline const char* const kBlocks = "BlockSparseAttention";

// Whether the last call failed (`failed`), and said `message` to the logger.
inline void ExpectRefused(bool failed, const std::string& message) {
  const std::string said = Log::Shared().Take();
  Expect(failed, "not refused: " + message);
  Expect(said.find(message) != std::string::npos, "refused otherwise: " + said + "\n  expected: " + message);
}

inline void ExpectFine(bool fine, const std::string& what) {
  const std::string said = Log::Shared().Take();
  Expect(fine && said.empty(), what + ": " + said);
}

}  // namespace longspan::testing

#endif  // LONGSPAN_TESTS_TENSORRT_NODES_H_
