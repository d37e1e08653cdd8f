"""What a kernel pack holds, for people: each kernel with its resources, its work and its bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..plugins.definition import Cost
from ..plugins.gpu.pack import InvalidPack, Pack, PackedKernel, PackedRecipe, read_pack
from ..plugins.gpu.tuning import SHARED_MEMORY
from .errors import BundleCorrupted, InvalidRequest
from .kernel_costs import Bound, Execution, bound, cost_of_recipe
from .kernel_packs import embedded_pack

REGISTERS_PER_MULTIPROCESSOR = 65536
"""On every architecture that kernels are tuned for (CUDA C++ Programming Guide, technical specifications)."""

_THREADS_PER_MULTIPROCESSOR = {80: 2048, 86: 1536, 87: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_REGISTER_UNIT = 256  # a warp's registers are allocated in such units


@dataclass(frozen=True)
class KernelReport:
    """One kernel and what executions it takes part in.

    Attributes:
        kernel: The kernel.
        recipes: Those that launch it.
        blocks: Blocks that fit one multiprocessor at once, by registers, threads and shared memory.
        work: Operations and bytes of an execution of the first recipe, all its kernels together.
        bound: Least time of it.
    """

    kernel: PackedKernel
    recipes: tuple[PackedRecipe, ...]
    blocks: int
    work: Cost
    bound: Bound

    @property
    def main(self) -> bool:
        """Whether it computes attention, rather than preparing lists or merging parts."""
        return any(parameter.meaning in ("input:Q", "input:global_Q") for parameter in self.kernel.parameters)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.work.flops / self.work.bytes


def open_pack(path: Path) -> Pack:
    """The pack in a file, or the one inside a bundle's model.

    Raises:
        InvalidRequest: there is no such file, or a bundle without a pack.
        BundleCorrupted: it is damaged; the message says how.
    """
    try:
        if path.is_file():
            return read_pack(path)
        from .bundle import Bundle

        bundle = Bundle.open(path)
        data = embedded_pack(bundle.model_path)
        if data is None:
            raise InvalidRequest(
                f"{path}: has no GPU kernels; next step: export it with --gpu-arch, or longspan kernels compile {path}"
            )
        return Pack.from_bytes(data)
    except InvalidPack as error:
        prefix = "" if str(path) in str(error) else f"{path}: "
        raise BundleCorrupted(f"{prefix}{error}; next step: compile it again") from error


def kernel_reports(pack: Pack, execution: Execution, variant: str | None = None) -> list[KernelReport]:
    """Every kernel of a pack, or those whose name begins with `variant`.

    Args:
        pack: The pack.
        execution: Sizes to compute costs for.
        variant: A name, or its beginning.

    Raises:
        InvalidRequest: no kernel has such a name.
    """
    reports = [
        _report(pack, number, execution)
        for number, kernel in enumerate(pack.kernels)
        if variant is None or kernel.name.startswith(variant)
    ]
    if not reports:
        known = ", ".join(sorted({kernel.name for kernel in pack.kernels}))
        raise InvalidRequest(f"no kernel is called {variant}; there are: {known or 'none'}")
    return reports


def _report(pack: Pack, number: int, execution: Execution) -> KernelReport:
    kernel = pack.kernels[number]
    recipes = tuple(r for r in pack.recipes if any(number in path.launches for path in r.paths))
    work = cost_of_recipe(recipes[0], execution)
    tf32 = ("PRECISION", "tf32") in kernel.constants
    return KernelReport(
        kernel, recipes, resident_blocks(kernel), work, bound(recipes[0], work, kernel.architecture, tf32)
    )


def resident_blocks(kernel: PackedKernel) -> int:
    """Blocks that fit one multiprocessor at once."""
    warps = kernel.threads // 32
    per_warp = -(-kernel.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = REGISTERS_PER_MULTIPROCESSOR // (per_warp * warps)
    by_threads = _THREADS_PER_MULTIPROCESSOR[kernel.architecture] // kernel.threads
    # The runtime keeps 1 KiB of each block's shared memory for itself.
    by_shared = SHARED_MEMORY[kernel.architecture][1] * 1024 // (kernel.shared + 1024)
    return min(by_registers, by_threads, by_shared)
