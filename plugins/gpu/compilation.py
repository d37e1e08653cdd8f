"""Compile variants ahead of time, on any machine: Triton needs no GPU for it."""

from __future__ import annotations

from dataclasses import dataclass

from .launch import load
from .tuning import SHARED_MEMORY
from .variants import KernelVariant, NoKernel

PTX_VERSION = 87
"""Newest PTX version that is written (8.7, CUDA 12.8): drivers from R570 on read it, and it is the first for sm_120."""


@dataclass(frozen=True)
class CompiledKernel:
    """One variant as machine code.

    Attributes:
        variant: What was compiled.
        entry: Name of the kernel's symbol.
        cubin: Machine code for the variant's architecture.
        ptx: Its PTX, as text.
        threads: Threads per block.
        shared: Bytes of dynamic shared memory.
    """

    variant: KernelVariant
    entry: str
    cubin: bytes
    ptx: str
    threads: int
    shared: int


def compiler_version() -> str:
    """What `compile_variant` compiles with, e.g. ``"triton 3.9.0, ptxas 12.9"``."""
    import triton

    return f"triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}"


def compile_variant(variant: KernelVariant, ptx_version: int = PTX_VERSION) -> CompiledKernel:
    """Compile one variant for its architecture.

    Args:
        variant: From a `Recipe`.
        ptx_version: Newest PTX version that may be written, e.g. 87 for 8.7.

    Raises:
        NoKernel: Triton is missing or interprets, or the result needs scratch memory or more shared memory than the
            architecture has.
    """
    function = load(variant)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(function, triton.runtime.JITFunction):
        raise NoKernel("TRITON_INTERPRET is set, so kernels are interpreted; next step: unset it to compile")
    order = function.arg_names
    given = variant.signature
    if set(order) != set(given):
        odd = ", ".join(sorted(set(order) ^ set(given)))
        raise NoKernel(f"{variant.function} and its variant disagree about {odd}; this is a bug in Longspan")
    runtime = [name for name in order if given[name] != "constexpr"]
    if runtime != [parameter.name for parameter in variant.parameters]:
        raise NoKernel(f"{variant.function} lists its parameters in another order; this is a bug in Longspan")
    source = ASTSource(
        function,
        signature={name: given[name] for name in order},
        constexprs={(order.index(name),): value for name, value in variant.constexprs.items()},
        attrs={(order.index(name),): [["tt.divisibility", by]] for name, by in variant.divisibility.items()},
    )
    options = {
        "num_warps": variant.num_warps, "num_stages": variant.num_stages, "ptx_version": ptx_version,
        "enable_fp_fusion": True,
    }  # fmt: skip
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        # For 9.0 and later Triton takes a second assembler, of CUDA 13, whose machine code needs a driver of CUDA 13
        # (R580) or later. The first one, of CUDA 12, knows these architectures too, and drivers of CUDA 12 load it.
        triton.knobs.nvidia.ptxas_blackwell = triton.knobs.nvidia.ptxas.path
        # Line information would put this machine's paths into the cubin: other bytes for every installation.
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)
    metadata = compiled.metadata
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    limit = SHARED_MEMORY[variant.architecture][0] * 1024
    if scratch or metadata.shared > limit:
        raise NoKernel(
            f"{variant.name} needs {scratch} bytes of scratch memory (allowed: 0) and {metadata.shared} bytes of "
            f"shared memory (allowed on sm_{variant.architecture}: {limit}); next step: choose a smaller tile in "
            "plugins/gpu/tuning.py"
        )
    return CompiledKernel(
        variant, metadata.name, compiled.asm["cubin"], compiled.asm["ptx"], metadata.num_warps * 32, metadata.shared
    )
