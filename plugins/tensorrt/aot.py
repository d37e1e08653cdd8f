"""The operators as ahead-of-time plugins of TensorRT, written in Python: no compiler, no headers, no plugin library.

A *quickly deployable plugin* (module ``tensorrt.plugin``) is a few Python functions that the builder asks for shapes,
types and, here, for the kernel itself as PTX with the expressions to launch it by. TensorRT embeds all of that in the
engine, which then runs where neither Python nor Longspan is. TensorRT launches one kernel, gives it the inputs, int32
numbers and the outputs, and no scratch memory; what a node fixes is therefore compiled into its kernel, and each
different node is a plugin of its own: `aot_plugin` makes its definition, `register` gives it to TensorRT.

    plugin = aot_plugin(site, "bhsd", architecture_for(89))    # NoKernel where one kernel is not enough
    register(tensorrt, [plugin])                               # before the ONNX parser meets ``plugin.name``
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from ..definition import DOMAIN
from ..errors import PluginError
from ..gpu.compilation import compile_variant
from ..gpu.pack_build import PTX_ARCHITECTURE
from ..gpu.variants import ARCHITECTURES, KernelSite, KernelVariant, NoKernel, Recipe
from ..registry import operator as definition_of
from . import ptx
from .aot_variants import LAYOUTS, SHARED_LIMIT, aot_recipes

OLDEST_VERSION = (11, 3)
"""First TensorRT release whose ahead-of-time plugins are sound."""

PLUGIN_VERSION = "1"
"""The version of every plugin that ``tensorrt.plugin`` registers."""

_SIZES = {"i32": 4}


class NoAotPlugin(PluginError):
    """This TensorRT cannot be given ahead-of-time plugins; the message says why."""


@dataclass(frozen=True)
class AotKernel:
    """Code of one plugin for one tactic.

    Attributes:
        entry: Name of the kernel; no two kernels have the same.
        ptx: Text of its module.
        threads: Threads per block.
        shared: Bytes of dynamic shared memory, at most `SHARED_LIMIT`.
    """

    entry: str
    ptx: str
    threads: int
    shared: int


@dataclass(frozen=True)
class AotPlugin:
    """One kind of node as an ahead-of-time plugin. Nodes that agree in everything share it.

    Attributes:
        site: What the nodes are.
        layout: Of their Q, K, V and Y: ``"bhsd"`` or ``"bsd"``.
        recipes: Ways to execute them, in the order of their tactics (1, 2, …); each is one launch without buffers.
    """

    site: KernelSite
    layout: str
    recipes: tuple[Recipe, ...]

    @property
    def kernels(self) -> tuple[KernelVariant, ...]:
        """The kernel of each recipe."""
        return tuple(recipe.variants[0] for recipe in self.recipes)

    @property
    def name(self) -> str:
        """Name of the plugin, and op_type of its nodes: the operator's with a digest of all that decides a result."""
        facts = (self.layout, self.operands, self.results, [kernel.name for kernel in self.kernels])
        return f"{self.site.operator}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"

    @property
    def plugin_id(self) -> str:
        """How ``tensorrt.plugin`` calls it: namespace and name."""
        return f"{DOMAIN}::{self.name}"

    @property
    def operands(self) -> tuple[str, ...]:
        """Formal names of the inputs, in the order of the node and of the kernel's parameters."""
        return tuple(tensor.name for tensor in definition_of(self.site.operator).inputs if self.site.has(tensor.name))

    @property
    def results(self) -> tuple[str, ...]:
        """Formal names of the outputs."""
        return ("Y", "lse") if self.site.lse else ("Y",)

    @property
    def node_attributes(self) -> dict[str, str | int]:
        """Attributes of an ONNX node for it: how the parser finds it, and that nothing else will do."""
        return {"plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION, "aot": 1}


def supported(version: str) -> str:
    """Why a TensorRT of this version must not be given ahead-of-time plugins; empty where it may.

    Args:
        version: E.g. ``"11.4.0.106"``.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    wanted = ".".join(map(str, OLDEST_VERSION))
    next_step = f"next step: install TensorRT {wanted} or later, or leave out --plugin-api aot"
    if len(numbers) == 2 and numbers >= OLDEST_VERSION:
        return ""
    if numbers >= (11,):
        return (
            f"TensorRT {version} loads the kernel of an ahead-of-time plugin again at every change of shape and never "
            f"lets go of it (NVIDIA/TensorRT #4849); {next_step}"
        )
    return f"TensorRT {version} does not run ahead-of-time plugins reliably; {next_step}"


def architecture_for(capability: int, portable: bool = False) -> int:
    """The architecture to compile for.

    Args:
        capability: Compute capability of the device that the engine is built on, 10 · major + minor.
        portable: Whether the engine shall run on other architectures too (hardware compatibility).

    Returns:
        The device's own, or the oldest one, whose PTX the driver translates for every newer device.

    Raises:
        NoKernel: the device is older than every kernel.
    """
    if capability < PTX_ARCHITECTURE:
        raise NoKernel(f"sm_{capability}: GPU kernels need sm_{PTX_ARCHITECTURE} or newer")
    return PTX_ARCHITECTURE if portable or capability not in ARCHITECTURES else capability


def aot_plugin(site: KernelSite, layout: str, architecture: int) -> AotPlugin:
    """The plugin of a node.

    Args:
        site: The node.
        layout: ``"bhsd"`` where its Q has 4 axes, ``"bsd"`` where it has 3.
        architecture: From `architecture_for`.

    Raises:
        NoKernel: the node cannot be one launch without scratch memory; the message says why.
        ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if site.has("block_masks"):
        _check_words(site)
    return AotPlugin(site, layout, aot_recipes(site, layout, architecture))


def _check_words(site: KernelSite) -> None:
    """TensorRT has no uint8 inside a network: block masks come as the same bytes in int32, so they must fill words."""
    defaults = {attribute.name: attribute.default for attribute in definition_of(site.operator).attributes}
    tall, wide = ({**defaults, **site.attributes}[name] for name in ("q_block_size", "kv_block_size"))
    size = tall * -(-wide // 8)
    if size % 4:
        raise NoKernel(
            f"a block mask of {tall} queries and {wide} keys has {size} bytes; TensorRT takes them as int32, so it "
            "must be a multiple of 4"
        )


@cache
def compile_kernel(variant: KernelVariant) -> AotKernel:
    """Compile a plugin's kernel, with exactly the parameters that TensorRT passes. Takes seconds, and no GPU.

    Raises:
        NoKernel: Triton is missing, or the kernel needs more shared memory than it gets unasked.
        UnusablePtx: the kernel reads Triton's scratch pointers.
    """
    compiled = compile_variant(variant)
    if compiled.shared > SHARED_LIMIT:
        raise NoKernel(
            f"{variant.name} needs {compiled.shared} bytes of shared memory; an ahead-of-time plugin has "
            f"{SHARED_LIMIT}; next step: leave out --plugin-api aot"
        )
    sizes = [_SIZES.get(parameter.type, 8) for parameter in variant.parameters]
    name = f"longspan_{variant.name}"
    text = ptx.drop_trailing(compiled.ptx, compiled.entry, sizes)
    return AotKernel(name, ptx.renamed(text, compiled.entry, name), compiled.threads, compiled.shared)


def register(tensorrt: ModuleType, plugins: Iterable[AotPlugin]) -> None:
    """Compile plugins and define them in ``tensorrt.plugin``, where the ONNX parser finds them by their names.

    A plugin that this process has defined before is left as it is. Nothing is defined where one fails to compile.

    Args:
        tensorrt: The module ``tensorrt``.
        plugins: From `aot_plugin`.

    Raises:
        NoAotPlugin: this TensorRT is too old, or comes without the module ``tensorrt.plugin``.
        NoKernel: a kernel cannot be compiled.
    """
    from .aot_definition import define

    reason = supported(tensorrt.__version__)
    if reason:
        raise NoAotPlugin(reason)
    different = {plugin.name: plugin for plugin in plugins}.values()
    compiled = [(plugin, [compile_kernel(kernel) for kernel in plugin.kernels]) for plugin in different]
    for plugin, kernels in compiled:
        define(tensorrt, plugin, kernels)
