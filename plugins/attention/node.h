// What the glue to a runtime knows of an operator's nodes, whichever runtime it is.
#ifndef LONGSPAN_ATTENTION_NODE_H_
#define LONGSPAN_ATTENTION_NODE_H_

#include "attention/operands.h"

namespace longspan {

// Element types of operands; kT is the node's T.
enum class OperandType { kT, kBool, kUint8, kInt32, kInt64, kFloat32 };

// Reads what every operator has. `Reader` has Has(name), Int(name, fallback), Float(name, fallback) and Ints(name,
// fallback), which throw std::invalid_argument where the attribute is of another type.
template <typename Reader>
void ReadCommonAttributes(const Reader& node, CommonAttributes* attributes) {
  CommonAttributes& a = *attributes;
  a.is_causal = node.Int("is_causal", a.is_causal) != 0;
  if (node.Has("scale")) a.scale = node.Float("scale", 0);
  a.softcap = node.Float("softcap", a.softcap);
  a.q_num_heads = node.Int("q_num_heads", a.q_num_heads);
  a.kv_num_heads = node.Int("kv_num_heads", a.kv_num_heads);
}

}  // namespace longspan

#endif  // LONGSPAN_ATTENTION_NODE_H_
