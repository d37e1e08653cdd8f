"""The operators as ahead-of-time plugins of TensorRT, written in Python: no compiler, no headers, no plugin library.

A *quickly deployable plugin* (module ``tensorrt.plugin``) is a few Python functions that the builder asks for shapes,
types and, here, for the kernel itself as PTX with the expressions to launch it by. TensorRT embeds all of that in the
engine, which then runs where neither Python nor Longspan is. TensorRT launches one kernel, gives it the inputs, int32
numbers and the outputs, and no scratch memory; what a node fixes is therefore compiled into its kernel, and each
different node is a plugin of its own.

    plugin = compile_plugin(site, "bhsd", 89)            # NoKernel where one kernel is not enough
    node.op_type = plugin.name                           # and the attributes that `node_attributes` gives
    register_plugins(tensorrt, "model.onnx")             # before TensorRT's parser reads the model
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from ..definition import DOMAIN
from ..errors import PluginError
from ..gpu.variants import KernelSite, KernelVariant, NoKernel, Recipe
from ..registry import operator as definition_of
from . import ptx
from .aot_record import AotKernel, AotPlugin
from .aot_variants import SHARED_LIMIT, aot_recipes, operands_of, results_of

OLDEST_VERSION = (11, 3)
"""First TensorRT release whose ahead-of-time plugins are sound."""

PLUGIN_VERSION = "1"
"""The version of every plugin that ``tensorrt.plugin`` registers."""

RECORD_ATTRIBUTE = "longspan_aot"
"""Attribute of a node with the record of its plugin. TensorRT's parser looks for the fields that a plugin declares, and
these declare none, so it passes over this one."""

_TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64", "bool": "BOOL",
    "uint8": "INT32",
}  # fmt: skip
"""TensorRT's names of the operators' types; uint8 as the same bytes in int32."""


class NoAotPlugin(PluginError):
    """This TensorRT cannot be given ahead-of-time plugins; the message says why."""


def unsupported(version: str) -> str:
    """Why a TensorRT of this version must not be given ahead-of-time plugins; empty where it may.

    Args:
        version: E.g. ``"11.4.0.106"``.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if len(numbers) == 2 and numbers >= OLDEST_VERSION:
        return ""
    wanted = ".".join(map(str, OLDEST_VERSION))
    next_step = f"next step: install TensorRT {wanted} or later, or leave --plugin-api aot out"
    if numbers >= (11,):
        return (
            f"TensorRT {version} loads the kernel of an ahead-of-time plugin again whenever a shape changes, and never "
            f"lets go of it (NVIDIA/TensorRT issue 4849); {next_step}"
        )
    return f"TensorRT {version} does not run ahead-of-time plugins reliably; {next_step}"


def plugin_name(site: KernelSite, layout: str, architecture: int) -> str:
    """Name of a node's plugin, without compiling it: the operator's, with a digest of all that decides a result.

    Raises:
        NoKernel: the node cannot be one launch without scratch memory.
    """
    ways = aot_recipes(site, layout, architecture)
    kernels = [[recipe.variants[0].name for recipe in recipes] for recipes in ways]
    facts = (layout, operands_of(site), results_of(site), kernels)
    return f"{site.operator}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def compile_plugin(site: KernelSite, layout: str, architecture: int) -> AotPlugin:
    """The plugin of a node, with its kernels. Takes seconds, and no GPU.

    Args:
        site: The node.
        layout: ``"bhsd"`` where its Q has 4 axes, ``"bsd"`` where it has 3.
        architecture: Compute capability to compile for; 80 for PTX that the driver translates for every newer device.

    Raises:
        NoKernel: the node cannot be one launch without scratch memory (`aot_recipes` says so without compiling), or
            Triton is missing.
    """
    kernels = {kernel.entry: kernel for kernel in map(_first_that_fits, aot_recipes(site, layout, architecture))}
    inputs, outputs = operands_of(site), results_of(site)
    definition = definition_of(site.operator)
    types = {tensor.name: tensor.dtype for tensor in (*definition.inputs, *definition.outputs)}
    return AotPlugin(
        name=plugin_name(site, layout, architecture), layout=layout, heads=site.heads, kv_heads=site.kv_heads,
        head_size=site.head_size, v_head_size=site.v_head_size, operands=inputs, results=outputs,
        types=tuple(
            _TYPES[site.dtype if types[name] == "T" else types[name]] for name in (*inputs, *outputs)
        ),
        kernels=tuple(kernels.values()),
    )  # fmt: skip


def node_attributes(plugin: AotPlugin) -> dict[str, str | int]:
    """Attributes of an ONNX node for a plugin: how the parser finds it, that nothing else will do, and its record."""
    return {
        "plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION, "aot": 1, RECORD_ATTRIBUTE: plugin.to_json(),
    }  # fmt: skip


def register_plugins(tensorrt: ModuleType, model: str | Path) -> tuple[AotPlugin, ...]:
    """Define the ahead-of-time plugins of a model in ``tensorrt.plugin``, where the ONNX parser finds them.

    To be called in the process that parses the model, before it does. A plugin that the process has defined before is
    left as it is.

    Args:
        tensorrt: The module ``tensorrt``.
        model: An ONNX file whose nodes have `node_attributes`.

    Returns:
        The plugins that the model has.

    Raises:
        NoAotPlugin: this TensorRT is too old, or comes without the module ``tensorrt.plugin``.
        InvalidRecord: a node's record is damaged.
    """
    plugins = {plugin.name: plugin for plugin in _records(Path(model))}
    register(tensorrt, plugins.values())
    return tuple(plugins.values())


def register(tensorrt: ModuleType, plugins: Iterable[AotPlugin]) -> None:
    """Define plugins in ``tensorrt.plugin``; see `register_plugins`.

    Raises:
        NoAotPlugin: this TensorRT is too old, or comes without the module ``tensorrt.plugin``.
    """
    from .aot_definition import define, plugin_module

    reason = unsupported(tensorrt.__version__)
    if reason:
        raise NoAotPlugin(reason)
    module = plugin_module(tensorrt)
    for plugin in plugins:
        define(tensorrt, module, plugin)


def _records(model: Path) -> Iterator[AotPlugin]:
    import onnx

    for node in onnx.load_model(model, load_external_data=False).graph.node:
        for attribute in node.attribute:
            if node.domain == DOMAIN and attribute.name == RECORD_ATTRIBUTE:
                yield AotPlugin.from_json(attribute.s.decode())


def _first_that_fits(recipes: tuple[Recipe, ...]) -> AotKernel:
    for recipe in recipes:
        variant = recipe.variants[0]
        entry, text, threads, shared = _compiled(variant)
        if shared <= SHARED_LIMIT:
            numbers = tuple(p.meaning for p in variant.parameters if not p.type.startswith("*"))
            return AotKernel(entry, text, threads, shared, recipe.paths[0].sizes, variant.grid, numbers)
    raise NoKernel(
        f"{entry} needs {shared} bytes of shared memory; an ahead-of-time plugin has {SHARED_LIMIT}; next step: leave "
        "--plugin-api aot out"
    )


@cache
def _compiled(variant: KernelVariant) -> tuple[str, str, int, int]:
    """(entry, PTX, threads, shared memory), with exactly the parameters that TensorRT passes."""
    from ..gpu.compilation import compile_variant

    compiled = compile_variant(variant)
    sizes = [4 if parameter.type == "i32" else 8 for parameter in variant.parameters]
    name = entry_name(variant)
    text = ptx.drop_trailing(compiled.ptx, compiled.entry, sizes)
    return name, ptx.renamed(text, compiled.entry, name), compiled.threads, compiled.shared


def entry_name(variant: KernelVariant) -> str:
    """Name of a variant's kernel in its PTX; no two have the same."""
    return f"longspan_{variant.name}"
