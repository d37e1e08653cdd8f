"""Compile the GPU kernels that sites need into a kernel pack, and put it into a model."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from ..plugins.definition import PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE
from ..plugins.gpu.pack import InvalidPack, Pack, pack_id
from ..plugins.gpu.pack_build import PTX, Target, build_pack, recipe_for
from ..plugins.gpu.variants import ARCHITECTURES, KernelSite, KernelVariant, NoKernel
from .errors import BundleCorrupted, EnvironmentLacks, ExportFailed, InvalidRequest
from .kernel_sites import graph_sites
from .manifest import KernelsRecord

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..plugins.gpu.compilation import CompiledKernel


def targets_of(text: str, ptx: bool = True) -> tuple[Target, ...]:
    """What ``--arch sm_80,sm_90`` asks for.

    Args:
        text: Architectures, separated by commas.
        ptx: Whether PTX for other devices is wanted too.

    Raises:
        InvalidRequest: an architecture is unknown, or none is named.
    """
    allowed = ", ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    numbers = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        digits = word.removeprefix("sm_")
        if not digits.isdecimal() or int(digits) not in ARCHITECTURES:
            raise InvalidRequest(f"architecture {word}: GPU kernels are not tuned for it; allowed: {allowed}")
        numbers.append(int(digits))
    if not numbers:
        raise InvalidRequest(f"no architecture is named; allowed: {allowed}")
    return (*(Target(number) for number in sorted(set(numbers))), *((PTX,) if ptx else ()))


def require_triton() -> None:
    """Refuse to start what needs the compiler.

    Raises:
        EnvironmentLacks: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise EnvironmentLacks(
            "GPU kernels are compiled with Triton, which is not installed; next step: pip install 'longspan[gpu]'"
        )


def compile_pack(
    sites: Iterable[KernelSite],
    targets: Sequence[Target],
    *,
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Pack:
    """Compile everything that the sites need, in processes of their own.

    Args:
        sites: What to execute; those that share kernels cost nothing more.
        targets: What to compile for.
        jobs: Processes; as many as there are cores by default.
        progress: Told how many kernels are done.

    Raises:
        InvalidRequest: a site has no kernel for a target.
        EnvironmentLacks: Triton is not installed.
        ExportFailed: a kernel does not compile.
    """
    require_triton()
    try:
        recipes = [(recipe_for(site, target), target) for site in sites for target in targets]
    except NoKernel as error:
        raise InvalidRequest(str(error)) from error
    variants = {variant.name: variant for recipe, _ in recipes for variant in recipe.variants}
    if not variants:
        raise InvalidRequest("there is nothing to compile: no site, or no architecture")
    compiled, compiler = _compile(list(variants.values()), jobs, progress)
    try:
        return build_pack(recipes, compiled, compiler)
    except (NoKernel, InvalidPack) as error:
        raise ExportFailed(f"kernel pack: {error}") from error


def _compile(
    variants: Sequence[KernelVariant], jobs: int | None, progress: Callable[[str], None]
) -> tuple[dict[str, CompiledKernel], str]:
    # Spawned, not forked: Triton's compiler and the threads of whoever calls do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(jobs or len(os.sched_getaffinity(0)), len(variants)))
    compiled: dict[str, CompiledKernel] = {}
    progress(f"kernel 0 of {len(variants)}")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_no_interpreter) as pool:
        try:
            version = pool.submit(_compiler)
            for done in concurrent.futures.as_completed([pool.submit(_compile_one, variant) for variant in variants]):
                kernel = done.result()
                compiled[kernel.variant.name] = kernel
                progress(f"kernel {len(compiled)} of {len(variants)}")
            return compiled, version.result()
        except BrokenProcessPool as error:
            raise ExportFailed(
                "compiling GPU kernels: a compiler process was killed, most likely for want of memory; next step: "
                "compile with fewer at a time (--jobs 1)"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _no_interpreter() -> None:
    """A process that compiles must not interpret; Triton decides when it is imported."""
    os.environ.pop("TRITON_INTERPRET", None)


def _compile_one(variant: KernelVariant) -> CompiledKernel:
    from ..plugins.gpu.compilation import compile_variant

    try:
        return compile_variant(variant)
    except Exception as error:
        # Triton's own errors do not survive the way between processes.
        text = " ".join(str(error).split())
        raise ExportFailed(f"{variant.name} does not compile: {type(error).__name__}: {text[:400]}") from None


def _compiler() -> str:
    from ..plugins.gpu.compilation import compiler_version

    return compiler_version()


def add_kernels(
    model: ir.Model, targets: Sequence[Target], progress: Callable[[str], None] = lambda stage: None
) -> KernelsRecord:
    """Compile what a graph's sites need and put it into the graph.

    Args:
        model: Changed in place; its values have shapes and types.
        targets: What to compile for.
        progress: Told how many kernels are done.

    Raises:
        InvalidRequest: no site has a GPU kernel.
        EnvironmentLacks: Triton is not installed.
        ExportFailed: a kernel does not compile.
    """
    found = graph_sites(model)
    if not found.sites:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in found.refused.items())
        raise InvalidRequest(
            f"no site has a GPU kernel ({reasons or 'there is no site'}); next step: export without them"
        )
    pack = compile_pack(found.sites.values(), targets, progress=progress)
    return embed(model, pack, found.sites, found.refused)


def embed(model: ir.Model, pack: Pack, nodes: Iterable[str], refused: dict[str, str]) -> KernelsRecord:
    """Put a pack into a model: its bytes on the first of the nodes, its id on all of them.

    Args:
        model: Changed in place; a pack that it has is replaced.
        pack: What to put in.
        nodes: Names of the nodes that it serves.
        refused: Why other nodes have no kernel, for the record.
    """
    import numpy as np
    import onnx_ir as ir

    data = pack.to_bytes()
    served = set(nodes)
    carrier: ir.Node | None = None
    for node in model.graph:
        node.attributes.pop(PACK_ATTRIBUTE, None)
        node.attributes.pop(PACK_ID_ATTRIBUTE, None)
        if node.name in served:
            carrier = carrier or node
            node.attributes[PACK_ID_ATTRIBUTE] = ir.AttrString(PACK_ID_ATTRIBUTE, pack_id(data))
    if carrier is None:
        raise InvalidRequest("the model has no node for which there are GPU kernels")
    content = ir.tensor(np.frombuffer(data, np.uint8), name=PACK_ATTRIBUTE)
    carrier.attributes[PACK_ATTRIBUTE] = ir.AttrTensor(PACK_ATTRIBUTE, content)
    names = tuple(str(Target(architecture, form)) for architecture, form in pack.architectures)
    return KernelsRecord(names, pack_id(data), len(data), len(pack.kernels), pack.compiler, refused)


def embedded_pack(model_file: Path) -> bytes | None:
    """The pack inside a model file, as bytes; None where it has none.

    Raises:
        BundleCorrupted: the file is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(model_file, load_external_data=False)
    except DecodeError as error:
        raise BundleCorrupted(f"{model_file}: is not an ONNX file ({error})") from error
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == PACK_ATTRIBUTE:
                return onnx.numpy_helper.to_array(attribute.t).tobytes()
    return None
