"""What the fields of a kernel pack may hold: checked before a pack is written, and again when one is read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from ..definition import Operator
from ..registry import operator, operators
from .expressions import InvalidExpression
from .pack import InvalidPack, Pack, PackedKernel, PackedPath, PackedRecipe
from .postfix import OPERATORS, check
from .variants import ARCHITECTURES, DTYPES, MAX_HEAD_SIZE, Parameter

FORMS = ("cubin", "ptx")
MAX_SHARED = 227 * 1024
MAX_STACK_BYTES = 2**20
MAX_PARAMETER_BYTES = 4096

MATCHES = {
    "SlidingWindowAttention": ("D", "D_v", "group", "is_causal", "softcap", "dilation"),
    "BlockSparseAttention": ("D", "D_v", "group", "is_causal", "exclude_self", "softcap", "q_block_size",
                             "kv_block_size", "lists_per_head"),
}  # fmt: skip
"""What a recipe says of its nodes beyond T, inputs and outputs, in order; all other attributes are parameters."""

_FLAGS = ("is_causal", "exclude_self", "softcap", "lists_per_head")
_SIZES = ("B", "H_q", "H_kv", "S_q", "S_k", "D", "D_v", "SMS")
_OWN_SIZES = {
    "SlidingWindowAttention": ("LEFT", "RIGHT"),
    "BlockSparseAttention": ("W", "W_full", "M", "B_lists", "H_lists"),
}
_BYTES = {"*fp16": 8, "*bf16": 8, "*fp32": 8, "*u8": 8, "*i32": 8, "*i64": 8, "i32": 4, "i64": 8, "fp32": 4}
_POINTERS = {"bool": "*u8", "uint8": "*u8", "int32": "*i32", "int64": "*i64", "float32": "*fp32"}
_ROW_STRIDE = re.compile(r"[QKVY]\.(batch|head|row)")
_AXIS_STRIDE = re.compile(r"([A-Za-z0-9_]+)\.([0-3])")

_NAME = re.compile(r"[A-Za-z0-9_.:+-]{1,200}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_ENTRY = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]{0,199}")
_TEXT = re.compile(r"[ -~]+")
_PTX = re.compile(rb"[\x09\x0a\x0d\x20-\x7e]+")


def check_pack(pack: Pack) -> None:
    """Check every field.

    Raises:
        InvalidPack: a field holds what the format does not allow; the message names it.
    """
    _expect(_TEXT.fullmatch(pack.compiler), "compiler", pack.compiler, "printable ASCII")
    _expect_sorted("kernels", [kernel.sort_key for kernel in pack.kernels])
    _expect_sorted("recipes", [recipe.sort_key for recipe in pack.recipes])
    for kernel in pack.kernels:
        _check_kernel(kernel)
    for recipe in pack.recipes:
        _check_recipe(recipe, pack.kernels)
    launched = {number for recipe in pack.recipes for path in recipe.paths for number in path.launches}
    for number, kernel in enumerate(pack.kernels):
        if number not in launched:
            raise InvalidPack(f"kernel {kernel.name}: nothing launches it")


def sizes_of(operator_name: str) -> frozenset[str]:
    """Names of the sizes that expressions about an operator may read."""
    return frozenset(_SIZES + _OWN_SIZES[operator_name])


def _check_kernel(kernel: PackedKernel) -> None:
    _expect(_NAME.fullmatch(kernel.name), "kernel", kernel.name, "a name of up to 200 letters, digits and _.:+-")
    where = f"kernel {kernel.name}"
    _one_of(f"{where}: architecture", kernel.architecture, ARCHITECTURES)
    _one_of(f"{where}: form", kernel.form, FORMS)
    _expect(_ENTRY.fullmatch(kernel.entry), f"{where}: entry", kernel.entry, "a symbol of up to 200 characters")
    _expect(kernel.threads in range(32, 1025, 32), f"{where}: threads", kernel.threads, "multiples of 32 up to 1024")
    _between(f"{where}: shared memory", kernel.shared, 0, MAX_SHARED)
    _between(f"{where}: registers", kernel.registers, 1, 255)
    _between(f"{where}: stack", kernel.stack, 0, MAX_STACK_BYTES)
    _one_of(f"{where}: type", kernel.dtype, tuple(DTYPES))
    _between(f"{where}: head size", kernel.head_size, 1, MAX_HEAD_SIZE)
    _between(f"{where}: head size of the values", kernel.v_head_size, 1, MAX_HEAD_SIZE)
    _between(f"{where}: stages", kernel.stages, 1, 64)
    _expect(_NAME.fullmatch(kernel.function), f"{where}: function", kernel.function, "a name")
    for feature in kernel.features:
        _expect(_NAME.fullmatch(feature), f"{where}: feature", feature, "a name")
    for name, value in kernel.constants:
        _expect(_IDENTIFIER.fullmatch(name), f"{where}: constant", name, "an identifier")
        _expect(_TEXT.fullmatch(value), f"{where}: constant {name}", value, "printable ASCII")
    _distinct(f"{where}: parameters", [parameter.name for parameter in kernel.parameters])
    _expect(kernel.parameters, f"{where}: parameters", "none", "at least one")
    for parameter in kernel.parameters:
        _check_parameter(parameter, where)
    total = sum(_BYTES[parameter.type] for parameter in kernel.parameters)
    _between(f"{where}: bytes of parameters", total, 4, MAX_PARAMETER_BYTES)
    _expect(kernel.code, f"{where}: code", "nothing", "at least one byte")
    if kernel.form == "cubin" and not kernel.code.startswith(b"\x7fELF"):
        raise InvalidPack(f"{where}: its code is not a cubin")
    if kernel.form == "ptx" and not _PTX.fullmatch(kernel.code):
        raise InvalidPack(f"{where}: its code is not the text of PTX")


def _check_parameter(parameter: Parameter, where: str) -> None:
    _expect(_IDENTIFIER.fullmatch(parameter.name), f"{where}: parameter", parameter.name, "an identifier")
    where = f"{where}: parameter {parameter.name}"
    _one_of(f"{where}: type", parameter.type, tuple(_BYTES))
    _one_of(f"{where}: divisor", parameter.divisor, (1, 2, 4, 8, 16))


def _check_recipe(recipe: PackedRecipe, kernels: Sequence[PackedKernel]) -> None:
    _one_of("recipe: operator", recipe.operator, tuple(known.name for known in operators()))
    definition = operator(recipe.operator)
    where = f"recipe of {recipe.operator}"
    _one_of(f"{where}: type", recipe.dtype, tuple(DTYPES))
    _one_of(f"{where}: architecture", recipe.architecture, ARCHITECTURES)
    _one_of(f"{where}: form", recipe.form, FORMS)
    required = [tensor.name for tensor in definition.inputs if not tensor.optional]
    in_order = tuple(tensor.name for tensor in definition.inputs if tensor.name in recipe.inputs)
    _expect(
        recipe.inputs == in_order and not set(required) - set(in_order), f"{where}: inputs", ",".join(recipe.inputs),
        f"inputs of the operator, in its order, with {','.join(required)} among them",
    )  # fmt: skip
    _one_of(f"{where}: outputs", recipe.outputs, (("Y",), ("Y", "lse")))
    names = tuple(name for name, _ in recipe.match)
    _expect(names == MATCHES[recipe.operator], f"{where}: match", ",".join(names), ",".join(MATCHES[recipe.operator]))
    for name, values in recipe.match:
        low, high = (0, 1) if name in _FLAGS else (1, MAX_HEAD_SIZE) if name in ("D", "D_v") else (1, 2**31 - 1)
        if name != "dilation":
            _expect(len(values) == 1, f"{where}: match {name}", values, "one value")
        for value in values:
            _between(f"{where}: match {name}", value, low, high)
        if len(values) > 1 and len(set(values)) == 1:
            raise InvalidPack(f"{where}: match {name} repeats one value; allowed: that value, once")
    _expect(recipe.paths, f"{where}: paths", "none", "at least one")
    for path in recipe.paths:
        _check_path(recipe, path, definition, kernels, where)
    last = recipe.paths[-1].condition
    _expect(last == "1", f"{where}: condition of the last path", last, "1")


def _check_path(
    recipe: PackedRecipe, path: PackedPath, definition: Operator, kernels: Sequence[PackedKernel], where: str
) -> None:
    _expect(_NAME.fullmatch(path.name), f"{where}: path", path.name, "a name")
    where = f"{where}: path {path.name}"
    known = set(sizes_of(recipe.operator))
    _check_expression(path.condition, known, f"{where}: condition")
    for name, expression in path.sizes:
        _check_expression(expression, known, f"{where}: size {name[:40]}")
        _expect(
            _IDENTIFIER.fullmatch(name) and name not in known and name not in OPERATORS, f"{where}: size", name,
            "an identifier that nothing else has",
        )  # fmt: skip
        known.add(name)
    _distinct(f"{where}: buffers", [buffer.name for buffer in path.buffers])
    for buffer in path.buffers:
        _expect(_IDENTIFIER.fullmatch(buffer.name), f"{where}: buffer", buffer.name, "an identifier")
        _one_of(f"{where}: buffer {buffer.name}: type", buffer.type, ("fp32", "i32"))
        _check_expression(buffer.elements, known, f"{where}: buffer {buffer.name}")
    _expect(path.launches, f"{where}: launches", "none", "at least one")
    buffers = {buffer.name: f"*{buffer.type}" for buffer in path.buffers}
    for number in path.launches:
        _expect(number < len(kernels), f"{where}: launch", number, f"numbers below {len(kernels)}")
        kernel = kernels[number]
        _expect(
            (kernel.architecture, kernel.form, kernel.dtype) == (recipe.architecture, recipe.form, recipe.dtype),
            f"{where}: launch of {kernel.name}", f"{kernel.dtype} {kernel.form} for sm_{kernel.architecture}",
            f"{recipe.dtype} {recipe.form} for sm_{recipe.architecture}",
        )  # fmt: skip
        for axis, expression in zip("xyz", kernel.grid, strict=True):
            _check_expression(expression, known, f"{where}: {kernel.name}: grid {axis}")
        for parameter in kernel.parameters:
            _check_meaning(parameter, recipe, definition, buffers, known, f"{where}: {kernel.name}: {parameter.name}")


def _check_meaning(
    parameter: Parameter,
    recipe: PackedRecipe,
    definition: Operator,
    buffers: Mapping[str, str],
    sizes: set[str],
    where: str,
) -> None:
    kind, _, what = parameter.meaning.partition(":")
    types: tuple[str, ...]
    if kind in ("input", "output"):
        tensors = definition.inputs if kind == "input" else definition.outputs
        present = recipe.inputs if kind == "input" else recipe.outputs
        _one_of(f"{where}: {kind}", what, present)
        dtype = next(tensor.dtype for tensor in tensors if tensor.name == what)
        types = (f"*{DTYPES[recipe.dtype]}" if dtype == "T" else _POINTERS[dtype],)
    elif kind == "buffer":
        _one_of(f"{where}: buffer", what, tuple(buffers))
        types = (buffers[what],)
    elif kind == "size":
        _check_expression(what, sizes, where)
        types = ("i32", "i64")
    elif kind == "stride":
        axis = _AXIS_STRIDE.fullmatch(what)
        _expect(
            _ROW_STRIDE.fullmatch(what) or (axis and axis[1] in recipe.inputs), f"{where}: stride", what,
            "Q, K, V or Y with batch, head or row, or an input that is present with an axis from 0 to 3",
        )  # fmt: skip
        types = ("i64",)
    elif kind in ("attribute", "scalar"):
        wanted = "int" if kind == "attribute" else "float"
        _one_of(f"{where}: {kind}", what, tuple(a.name for a in definition.attributes if a.kind == wanted))
        types = ("i32",) if kind == "attribute" else ("fp32",)
    else:
        raise InvalidPack(f"{where}: {kind[:40]!r} is no kind of parameter")
    _one_of(f"{where}: type", parameter.type, types)


def _check_expression(text: str, known: set[str], where: str) -> None:
    try:
        check(text, known)
    except InvalidExpression as error:
        raise InvalidPack(f"{where}: {error}") from error


def _expect(good: object, where: str, got: object, allowed: str) -> None:
    if not good:
        raise InvalidPack(f"{where}: {str(got)[:120]!r}; allowed: {allowed}")


def _one_of(where: str, got: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    _expect(got in allowed, where, got, ", ".join(map(str, allowed)) or "none")


def _between(where: str, got: int, low: int, high: int) -> None:
    _expect(low <= got <= high, where, got, f"{low} to {high}")


def _distinct(where: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    _expect(not twice, where, ", ".join(twice), "each name once")


def _expect_sorted(what: str, keys: Sequence[tuple[object, ...]]) -> None:
    for before, after in itertools.pairwise(keys):
        if not before < after:
            raise InvalidPack(f"{what}: {after[0]} is not in order, or is there twice")
