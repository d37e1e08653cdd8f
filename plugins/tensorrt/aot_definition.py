"""The functions that ``tensorrt.plugin`` asks of an ahead-of-time plugin, made from its records.

They follow the API of TensorRT 11.4. It calls them twice: at first with shapes that are placeholders (*fake*), for the
output types; then with symbolic expressions over the dimensions of the inputs, which it evaluates at run time.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import reduce
from types import GenericAlias, ModuleType
from typing import Any

from ..definition import DOMAIN
from ..errors import InvalidOperands
from ..gpu.expressions import Arithmetic, interpret
from ..gpu.launch import SIZE_LIMIT
from .aot_record import AotKernel, AotPlugin

ELEMENT_LIMIT = 2**31 - 1
"""Most elements of an operand whose strides are passed as int32: every one but Q, K, V and Y."""

_DATA_TYPES = {"FP32": "FLOAT", "FP16": "HALF"}
"""Members of its DataType that are called otherwise."""


def plugin_module(tensorrt: ModuleType) -> Any:
    """The module ``tensorrt.plugin``.

    Raises:
        NoAotPlugin: there is none, or it does not know ahead-of-time plugins.
    """
    from .aot import NoAotPlugin

    try:
        module = importlib.import_module(f"{tensorrt.__name__}.plugin")
    except ImportError as error:
        raise NoAotPlugin(
            f"{tensorrt.__name__} {tensorrt.__version__} comes without its module 'plugin' ({error}); next step: leave "
            "--plugin-api aot out"
        ) from error
    if not hasattr(module, "KernelLaunchParams"):
        raise NoAotPlugin(
            f"{module.__name__} of {tensorrt.__version__} knows no ahead-of-time plugins; next step: leave "
            "--plugin-api aot out"
        )
    return module


def define(tensorrt: ModuleType, trtp: Any, plugin: AotPlugin) -> None:
    """Register one plugin, unless this process has done so before.

    Args:
        tensorrt: The module ``tensorrt``.
        trtp: From `plugin_module`.
        plugin: What is registered.
    """
    if hasattr(trtp.op, DOMAIN) and hasattr(getattr(trtp.op, DOMAIN), plugin.name):
        return
    functions = _Functions(tensorrt, trtp, plugin)
    inputs = dict.fromkeys(plugin.operands, trtp.TensorDesc)
    several = GenericAlias(tuple, (trtp.TensorDesc,) * len(plugin.results))
    combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
    launch = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    asked = {**inputs, "outputs": several}
    trtp.register(plugin.plugin_id)(_with_signature(functions.describe, inputs, several))
    trtp.autotune(plugin.plugin_id)(_with_signature(functions.combinations, asked, combinations))
    trtp.aot_impl(plugin.plugin_id)(_with_signature(functions.launch, {**asked, "tactic": int}, launch))


def _with_signature(function: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> Callable[..., Any]:
    """`function` as if it were written with these parameters: ``tensorrt.plugin`` reads names and types from there."""

    def called(*arguments: Any) -> Any:
        return function(*arguments)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    called.__signature__ = inspect.Signature(listed, return_annotation=result)  # type: ignore[attr-defined]
    return called


class _Functions:
    """What is registered of one plugin."""

    def __init__(self, tensorrt: ModuleType, trtp: Any, plugin: AotPlugin) -> None:
        self.tensorrt, self.trtp, self.plugin = tensorrt, trtp, plugin

    def describe(self, *inputs: Any) -> tuple[Any, ...]:
        """Types and shapes of the outputs."""
        plugin = self.plugin
        operands = dict(zip(plugin.operands, inputs, strict=True))
        self._check(operands)
        q = operands["Q"].shape_expr
        y: tuple[Any, ...]
        if plugin.layout == "bhsd":
            y, rows = (q[0], q[1], q[2], self.trtp.ShapeExpr(plugin.v_head_size)), q[2]
        else:
            y, rows = (q[0], q[1], self.trtp.ShapeExpr(plugin.heads * plugin.v_head_size)), q[1]
        shapes = {"Y": y, "lse": (q[0], self.trtp.ShapeExpr(plugin.heads), rows)}
        types = plugin.types[len(inputs) :]
        return tuple(
            self.trtp.from_shape_expr(shapes[name], self._data_type(kind))
            for name, kind in zip(plugin.results, types, strict=True)
        )

    def combinations(self, *_: Any) -> list[Any]:
        """The one combination of types, in linear layout, with a tactic for each kernel."""
        tactics = list(range(1, len(self.plugin.kernels) + 1))
        return [self.trtp.AutoTuneCombination(", ".join(self.plugin.types), "LINEAR", tactics)]

    def launch(self, *arguments: Any) -> tuple[str, str, Any, Any]:
        """Kernel, code, launch parameters and numbers for the tactic, which comes last; 0 is the first one too."""
        *inputs, _, tactic = arguments
        plugin = self.plugin
        operands = dict(zip(plugin.operands, inputs, strict=True))
        self._check_range(operands)
        place = max(int(tactic or 0), 1) - 1
        kernel = plugin.kernels[place]
        sizes = _symbolic_sizes(self.trtp, plugin, kernel, operands)
        arithmetic = symbolic(self.trtp)
        params = self.trtp.KernelLaunchParams()
        params.grid_x, params.grid_y, params.grid_z = (interpret(each, sizes, arithmetic) for each in kernel.grid)
        params.block_x, params.shared_mem = kernel.threads, kernel.shared
        numbers = (_number(self.trtp, meaning, sizes, operands) for meaning in kernel.numbers)
        extra = self.trtp.SymIntExprs.from_tuple(tuple(self.trtp.SymInt32(number) for number in numbers))
        return kernel.entry, kernel.ptx, params, extra

    def _data_type(self, name: str) -> Any:
        return getattr(self.tensorrt.DataType, _DATA_TYPES.get(name, name))

    def _check(self, operands: Mapping[str, Any]) -> None:
        """Hold what is known of the inputs against the site: types, axes, and sizes that are no expressions."""
        plugin = self.plugin
        for name, kind in zip(plugin.operands, plugin.types, strict=False):
            got = operands[name].dtype
            if got != self._data_type(kind):
                raise InvalidOperands(f"{plugin.name}: {name} is {got}; its kernel was compiled for {kind}")
        known = {
            "Q": (plugin.heads, plugin.head_size), "K": (plugin.kv_heads, plugin.head_size),
            "V": (plugin.kv_heads, plugin.v_head_size),
        }  # fmt: skip
        for name, (heads, size) in known.items():
            shape = operands[name].shape_expr
            wanted = {1: heads, 3: size} if plugin.layout == "bhsd" else {2: heads * size}
            if len(shape) != (4 if plugin.layout == "bhsd" else 3):
                raise InvalidOperands(f"{plugin.name}: {name} has {len(shape)} axes; expected layout {plugin.layout}")
            for axis, expected in wanted.items():
                given = shape[axis]
                if not given.is_fake and given.is_constant and given.constant_value() != expected:
                    raise InvalidOperands(
                        f"{plugin.name}: axis {axis} of {name} is {given.constant_value()}; its kernel was compiled "
                        f"for {expected}"
                    )

    def _check_range(self, operands: Mapping[str, Any]) -> None:
        """Refuse profiles that the kernel's int32 numbers cannot count, and empty ones, which CUDA does not launch."""
        axis = 2 if self.plugin.layout == "bhsd" else 1
        least, most = _bounds(operands["Q"])
        keys = _bounds(operands["K"])[1]
        if min(least[0], least[axis]) < 1:
            raise InvalidOperands(
                f"{self.plugin.name}: a profile begins at {least[0]} sequences of {least[axis]} queries; an "
                "ahead-of-time plugin needs at least 1 of each"
            )
        if most[axis] + keys[axis] >= SIZE_LIMIT:
            raise InvalidOperands(
                f"{self.plugin.name}: a profile ends at S_q + S_k = {most[axis] + keys[axis]}; its kernel goes up to "
                f"{SIZE_LIMIT - 1}"
            )
        if "band_bias" in operands:
            elements = reduce(lambda a, b: a * b, _bounds(operands["band_bias"])[1], 1)
            if elements > ELEMENT_LIMIT:
                raise InvalidOperands(
                    f"{self.plugin.name}: a profile ends at a band_bias of {elements} elements; at most "
                    f"{ELEMENT_LIMIT} are allowed"
                )


def _bounds(descriptor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest shape of the profile."""
    shape = descriptor.shape
    if shape.is_dynamic:
        return tuple(shape.min), tuple(shape.max)
    return tuple(shape), tuple(shape)


def symbolic(trtp: Any) -> Arithmetic[Any]:
    """Arithmetic on ``tensorrt.plugin.ShapeExpr``."""

    def no(value: Any) -> Any:
        return value == trtp.ShapeExpr(0)

    one = trtp.ShapeExpr(1)
    return Arithmetic(
        trtp.ShapeExpr,
        {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "//": lambda a, b: a // b,
            "%": lambda a, b: a - a // b * b,
        },
        {
            "cdiv": trtp.cdiv,
            "min": lambda *values: reduce(trtp.min, values),
            "max": lambda *values: reduce(trtp.max, values),
            "le": lambda a, b: one - (b < a),
            "both": lambda a, b: (one - no(a)) * (one - no(b)),
        },
    )


def _symbolic_sizes(trtp: Any, plugin: AotPlugin, kernel: AotKernel, operands: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that the kernel's expressions name, as expressions over the dimensions of the inputs."""
    axis = 2 if plugin.layout == "bhsd" else 1
    q, k = operands["Q"].shape_expr, operands["K"].shape_expr
    fixed = {"H_q": plugin.heads, "H_kv": plugin.kv_heads, "D": plugin.head_size, "D_v": plugin.v_head_size}
    sizes = {"B": q[0], "S_q": q[axis], "S_k": k[axis]}
    sizes |= {name: trtp.ShapeExpr(value) for name, value in fixed.items()}
    if "kv_indices" in operands:
        masks = operands["block_masks"].shape_expr[0] if "block_masks" in operands else trtp.ShapeExpr(0)
        sizes |= {
            "W": operands["kv_indices"].shape_expr[3], "W_full": operands["full_kv_indices"].shape_expr[3], "M": masks,
        }  # fmt: skip
    arithmetic = symbolic(trtp)
    for name, expression in kernel.sizes:
        sizes[name] = interpret(expression, sizes, arithmetic)
    return sizes


def _number(trtp: Any, meaning: str, sizes: Mapping[str, Any], operands: Mapping[str, Any]) -> Any:
    """One int32 argument of the kernel: the value of a size, or a stride, 0 along an axis of 1."""
    kind, _, what = meaning.partition(":")
    if kind == "size":
        return interpret(what, sizes, symbolic(trtp))
    name, _, axis = what.partition(".")
    shape = operands[name].shape_expr
    after = [shape[index] for index in range(int(axis) + 1, len(shape))]
    apart = trtp.ShapeExpr(1) < shape[int(axis)]
    return reduce(lambda a, b: a * b, after, apart)
