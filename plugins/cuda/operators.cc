#include "cuda/operators.h"

namespace longspan::cuda {

const std::vector<OperatorFact>& Operators() {
  static const std::vector<OperatorFact> operators = {
      {"SlidingWindowAttention",
       {{"Q", "", true},
        {"K", "", true},
        {"V", "", true},
        {"attn_mask", "*u8", false},
        {"nonpad_kv_seqlen", "*i64", false},
        {"global_mask", "*u8", false},
        {"global_Q", "", false},
        {"global_K", "", false},
        {"global_V", "", false},
        {"band_bias", "", false},
        {"sinks", "", false},
        {"spans", "*fp32", false}},
       {"left_window_size", "right_window_size", "is_causal", "q_num_heads", "kv_num_heads"},
       {"scale", "softcap", "span_ramp"},
       {"dilation"},
       {"D", "D_v", "group", "is_causal", "softcap", "dilation"},
       {kLeft, kRight}},
      {"BlockSparseAttention",
       {{"Q", "", true},
        {"K", "", true},
        {"V", "", true},
        {"kv_num_blocks", "*i32", true},
        {"kv_indices", "*i32", true},
        {"full_kv_num_blocks", "*i32", true},
        {"full_kv_indices", "*i32", true},
        {"block_mask_ids", "*i32", false},
        {"block_masks", "*u8", false},
        {"attn_mask", "*u8", false},
        {"nonpad_kv_seqlen", "*i64", false},
        {"sinks", "", false},
        {"q_positions", "*i32", false},
        {"k_positions", "*i32", false},
        {"distance_bias", "", false}},
       {"q_block_size", "kv_block_size", "is_causal", "exclude_self", "q_num_heads", "kv_num_heads"},
       {"scale", "softcap"},
       {},
       {"D", "D_v", "group", "is_causal", "exclude_self", "softcap", "q_block_size", "kv_block_size", "lists_per_head"},
       {kW, kWFull, kM, kBLists, kHLists}}};
  return operators;
}

const OperatorFact* FindOperator(std::string_view name) {
  for (const OperatorFact& known : Operators()) {
    if (known.name == name) return &known;
  }
  return nullptr;
}

}  // namespace longspan::cuda
