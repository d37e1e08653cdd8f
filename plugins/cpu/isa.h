// Which instruction set the tile kernels use in this process.
#ifndef LONGSPAN_CPU_ISA_H_
#define LONGSPAN_CPU_ISA_H_

#include "cpu/tile_kernels.h"

namespace longspan::cpu {

// The best kernels that this machine runs, or those that the environment variable LONGSPAN_CPU_ISA names
// ("avx512", "avx2" or "scalar"). Throws std::invalid_argument for an unknown name or one that this machine lacks.
const TileKernels& SelectKernels();

}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_ISA_H_
