#include "cpu/vec_baseline.h"
// Vec comes first: the kernels are written over it.
#include "cpu/tile_kernels_impl.h"

namespace longspan::cpu {

const TileKernels kBaselineKernels = MakeKernels("scalar");

}  // namespace longspan::cpu
