// The index of a kernel pack: its text becomes records. What fields may hold is pack_rules.h's, except where a record
// could not be made of it.
#ifndef LONGSPAN_CUDA_PACK_INDEX_H_
#define LONGSPAN_CUDA_PACK_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/pack.h"

namespace longspan::cuda {

// Reads the index of `size` bytes at `start`, which end within `data`, and finds the codes. The pack's records point
// into `data`. Throws InvalidPack.
void ReadIndex(const std::vector<uint8_t>& data, size_t start, size_t size, Pack* pack);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_PACK_INDEX_H_
