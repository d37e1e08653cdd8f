#include "cpu/vec_avx512.h"
// Vec comes first: the kernels are written over it.
#include "cpu/tile_kernels_impl.h"

namespace longspan::cpu {

const TileKernels kAvx512Kernels = MakeKernels("avx512");

}  // namespace longspan::cpu
