#include "cuda/node.h"

#include "cuda/operators.h"
#include "cuda/text.h"

namespace longspan::cuda {
namespace {

const char* DtypeName(cpu::ElementType type) {
  switch (type) {
    case cpu::ElementType::kFloat16:
      return "float16";
    case cpu::ElementType::kBFloat16:
      return "bfloat16";
    default:
      return "float32";
  }
}

}  // namespace

std::string Node::Describe() const {
  return op + " of " + dtype + " with inputs " + Joined(inputs) + (lse ? " and outputs Y,lse" : "");
}

Sizes Operands::Known(const std::string& op) const {
  Sizes sizes;
  sizes.head_size = shapes.head_size;
  sizes.v_head_size = shapes.v_head_size;
  sizes.group = shapes.Group();
  if (op == "BlockSparseAttention") {
    // Inputs 3 and 5: kv_num_blocks and full_kv_num_blocks, checked to have three axes.
    sizes.lists_per_head = (*input_shapes[3])[1] > 1 || (*input_shapes[5])[1] > 1;
  }
  return sizes;
}

Node DescribeNode(const char* op, cpu::ElementType type, const std::vector<bool>& present, bool lse,
                  const CommonAttributes& attributes) {
  Node described;
  described.op = op;
  described.dtype = DtypeName(type);
  const std::vector<InputFact>& inputs = FindOperator(op)->inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (present[i]) described.inputs.emplace_back(inputs[i].name);
  }
  described.lse = lse;
  described.integers = {{"is_causal", attributes.is_causal},
                        {"q_num_heads", attributes.q_num_heads},
                        {"kv_num_heads", attributes.kv_num_heads}};
  described.floats = {{"softcap", attributes.softcap}};
  if (attributes.scale) described.floats["scale"] = *attributes.scale;
  return described;
}

Sizes KnownSizes(const Shape& q, const Shape& k, const Shape& v, const CommonAttributes& attributes) {
  Sizes sizes;
  const auto per_head = [](int64_t width, int64_t heads) { return width > 0 && heads > 0 ? width / heads : -1; };
  int64_t heads = attributes.q_num_heads, kv_heads = attributes.kv_num_heads;
  if (q.size() == 4) {
    sizes.head_size = q[3];
    heads = q[1];
    if (v.size() == 4) sizes.v_head_size = v[3];
    if (k.size() == 4) kv_heads = k[1];
  } else if (q.size() == 3) {
    sizes.head_size = per_head(q[2], heads);
    if (v.size() == 3) sizes.v_head_size = per_head(v[2], kv_heads);
  }
  if (heads > 0 && kv_heads > 0) sizes.group = heads / kv_heads;
  return sizes;
}

}  // namespace longspan::cuda
