#include "ort/attention_op.h"

#include <vector>

namespace longspan::ort {

void ReadInputs(const OrtKernelContext* context, size_t count, std::optional<Shape>* shapes, const void** data) {
  size_t present = 0;
  Check(g_api->KernelContext_GetInputCount(context, &present));
  for (size_t i = 0; i < present && i < count; ++i) {
    const OrtValue* value = nullptr;
    Check(g_api->KernelContext_GetInput(context, i, &value));
    if (value == nullptr) continue;
    shapes[i] = TensorShape(value);
    data[i] = TensorData(value);
  }
}

// What the shapes contradict is for Compute to say, which has all of them. The type is read from Q: in the schema that
// ONNX Runtime merges from the ops of all types, it calls the function of one of them for every node.
void InferOutputs(const ShapeInference& node) {
  const std::vector<Dim> q = node.InputShape(kQ), v = node.InputShape(kV);
  if (q.size() != v.size() || (q.size() != 3 && q.size() != 4)) return;
  std::vector<Dim> output = q;
  if (q.size() == 4) {
    output[3] = v[3];
  } else {
    const int64_t heads = node.Int("q_num_heads", 0), kv_heads = node.Int("kv_num_heads", 0);
    const bool valid = heads > 0 && heads <= kSizeLimit && kv_heads > 0 && kv_heads <= kSizeLimit;
    const bool known = valid && v[2].size > 0 && v[2].size % kv_heads == 0;
    output[2] = known ? Dim{v[2].size / kv_heads * heads} : Dim{};
  }
  // Not lse: a node may lack it, this API cannot tell, and some runtimes (1.24) abort when an absent output is set.
  node.SetOutput(0, output, node.InputType(kQ));
}

}  // namespace longspan::ort
