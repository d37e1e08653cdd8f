#include "cpu/vec_avx2.h"
// Vec comes first: the kernels are written over it.
#include "cpu/tile_kernels_impl.h"

namespace longspan::cpu {

const TileKernels kAvx2Kernels = MakeKernels("avx2");

}  // namespace longspan::cpu
