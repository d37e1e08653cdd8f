// How much scratch memory executions of a node take.
#ifndef LONGSPAN_CUDA_WORKSPACE_H_
#define LONGSPAN_CUDA_WORKSPACE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/node.h"
#include "cuda/runtime.h"

namespace longspan::cuda {

// Where buffers begin in scratch memory.
constexpr size_t kBufferAlignment = 256;

// Elements that a buffer may have; each is of 4 bytes.
constexpr int64_t kMostElements = int64_t{1} << 48;

// Bytes from one buffer to the next; each has an address of its own.
inline size_t BufferBytes(int64_t elements) {
  const size_t bytes = static_cast<size_t>(elements) * 4;
  return std::max((bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment, kBufferAlignment);
}

// What SMS is at most, so that a bound holds on every device: work is not cut into more parts on one that has more.
constexpr int kMostMultiprocessors = 256;

// Limits of the sizes of an input, axis by axis.
using ShapeRange = std::vector<Range>;

// Bytes that no execution exceeds whose inputs' shapes lie within ranges, whichever of the packs' recipes for the node
// and device run it. Never too little; at most a sixteenth more than some combination of sizes in these ranges takes,
// where that can be found out in reasonable time. `inputs` by position on the node; Q, K and V are there, all of
// rank 3 or all of rank 4. Throws InvalidExpression where there is no bound.
size_t WorkspaceBound(const Packs& packs, const Node& node, const std::optional<ShapeRange>* inputs);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_WORKSPACE_H_
