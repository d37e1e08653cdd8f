"""The index of a kernel pack as text; see ``docs/kernel-packs.md``. What its fields may hold is checked elsewhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from .pack import InvalidPack, Pack, PackedKernel, PackedPath, PackedRecipe, code_offsets
from .variants import Buffer, Parameter

_TEXT = re.compile(rb"[\x20-\x7e\t\n]*")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_EMPTY_ALLOWED = ("features",)


def write_index(pack: Pack, offsets: Sequence[int]) -> bytes:
    """The index's bytes.

    Args:
        pack: The content.
        offsets: Where each kernel's code begins.
    """
    lines: list[tuple[str, ...]] = [("compiler", pack.compiler)]
    for kernel, offset in zip(pack.kernels, offsets, strict=True):
        lines += _kernel_lines(kernel, offset)
    for recipe in pack.recipes:
        lines += _recipe_lines(recipe)
    lines.append(("end",))
    return "".join("\t".join(line) + "\n" for line in lines).encode("ascii")


def _kernel_lines(kernel: PackedKernel, offset: int) -> list[tuple[str, ...]]:
    numbers = (kernel.threads, kernel.shared, kernel.registers, kernel.stack)
    lines: list[tuple[str, ...]] = [
        ("kernel", kernel.name, str(kernel.architecture), kernel.form, kernel.entry, *map(str, numbers)),
        ("about", kernel.dtype, str(kernel.head_size), str(kernel.v_head_size), str(kernel.stages), kernel.function),
        ("features", ",".join(kernel.features)),
        *(("constant", name, value) for name, value in kernel.constants),
    ]
    for parameter in kernel.parameters:
        kind, _, what = parameter.meaning.partition(":")
        lines.append(("param", parameter.name, parameter.type, str(parameter.divisor), kind, what))
    lines.append(("grid", *kernel.grid))
    lines.append(("code", str(offset), str(len(kernel.code)), hashlib.sha256(kernel.code).hexdigest()))
    return lines


def _recipe_lines(recipe: PackedRecipe) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("recipe", recipe.operator, recipe.dtype, str(recipe.architecture), recipe.form),
        ("inputs", ",".join(recipe.inputs)),
        ("outputs", ",".join(recipe.outputs)),
        *(("match", name, ",".join(map(str, values))) for name, values in recipe.match),
    ]
    for path in recipe.paths:
        lines.append(("path", path.name, path.condition))
        lines += [("size", name, expression) for name, expression in path.sizes]
        lines += [("buffer", b.name, b.type, str(int(b.zeroed)), b.elements) for b in path.buffers]
        lines += [("launch", str(number)) for number in path.launches]
    return lines


class _Lines:
    """The index's lines, taken one after another."""

    def __init__(self, text: str) -> None:
        self.lines = [line.split("\t") for line in text.split("\n")[:-1]]
        self.at = 0

    def next_is(self, keyword: str) -> bool:
        return self.at < len(self.lines) and self.lines[self.at][0] == keyword

    def take(self, keyword: str, fields: int) -> list[str]:
        """The fields of the next line, which must have that keyword and number of fields."""
        if self.at >= len(self.lines):
            raise InvalidPack(f"index: ends where a line {keyword!r} belongs")
        found, *rest = self.lines[self.at]
        self.at += 1
        if found != keyword:
            raise self.wrong(f"begins with {found[:40]!r}, expected {keyword!r}")
        if len(rest) != fields:
            raise self.wrong(f"has {len(rest)} fields after {keyword!r}, expected {fields}")
        if "" in rest and keyword not in _EMPTY_ALLOWED:
            raise self.wrong(f"has an empty field after {keyword!r}")
        return rest

    def wrong(self, what: str) -> InvalidPack:
        """An error about the line taken last."""
        return InvalidPack(f"index line {self.at}: {what}")

    def number(self, text: str) -> int:
        if not _NUMBER.fullmatch(text):
            raise self.wrong(f"{text[:40]!r} is not a whole number")
        return int(text)


def read_index(data: bytes, start: int, size: int) -> Pack:
    """Read the index, and the codes that it points to.

    Args:
        data: The whole file.
        start: Where the index begins.
        size: Its length in bytes; it ends within the file.

    Raises:
        InvalidPack: it does not follow the grammar, or a code is not where it belongs.
    """
    raw = data[start : start + size]
    if not _TEXT.fullmatch(raw) or not raw.endswith(b"\n"):
        raise InvalidPack("index: is not lines of ASCII text")
    lines = _Lines(raw.decode("ascii"))
    (compiler,) = lines.take("compiler", 1)
    kernels: list[PackedKernel] = []
    end = start + size
    while lines.next_is("kernel"):
        kernels.append(_kernel(lines, data, end))
        # The rule says where a code begins, so its end follows from the codes before it.
        end = code_offsets(end - start, (kernels[-1],))[0] + len(kernels[-1].code)
    recipes = []
    while lines.next_is("recipe"):
        recipes.append(_recipe(lines))
    lines.take("end", 0)
    if lines.at != len(lines.lines):
        raise InvalidPack(f"index line {lines.at + 1}: follows the end")
    if end != len(data):
        raise InvalidPack(f"{len(data) - end} bytes follow the last kernel's code")
    return Pack(compiler, tuple(kernels), tuple(recipes))


def _kernel(lines: _Lines, data: bytes, end: int) -> PackedKernel:
    name, architecture, form, entry, *numbers = lines.take("kernel", 8)
    head = [lines.number(field) for field in (architecture, *numbers)]
    dtype, *facts, function = lines.take("about", 5)
    head_size, v_head_size, stages = (lines.number(field) for field in facts)
    (features,) = lines.take("features", 1)
    constants = []
    while lines.next_is("constant"):
        constant, value = lines.take("constant", 2)
        constants.append((constant, value))
    parameters = []
    while lines.next_is("param"):
        parameter, kind, divisor, source, what = lines.take("param", 5)
        parameters.append(Parameter(parameter, kind, f"{source}:{what}", lines.number(divisor)))
    x, y, z = lines.take("grid", 3)
    offset, size, digest = lines.take("code", 3)
    first, length = lines.number(offset), lines.number(size)
    expected = -(-end // 16) * 16
    if first != expected or not 1 <= length <= len(data) - first:
        raise lines.wrong(
            f"{name[:80]}: code of {length} bytes at {first}; expected at {expected}, of at least one byte, and within "
            f"the file's {len(data)}"
        )
    code = data[first : first + length]
    if hashlib.sha256(code).hexdigest() != digest:
        raise lines.wrong(f"{name[:80]}: its code differs from what was written (SHA-256)")
    return PackedKernel(
        name, head[0], form, entry, head[1], head[2], head[3], head[4], dtype, head_size, v_head_size, stages, function,
        tuple(features.split(",")) if features else (), tuple(constants), tuple(parameters), (x, y, z), code,
    )  # fmt: skip


def _recipe(lines: _Lines) -> PackedRecipe:
    operator, dtype, architecture, form = lines.take("recipe", 4)
    number = lines.number(architecture)
    (inputs,) = lines.take("inputs", 1)
    (outputs,) = lines.take("outputs", 1)
    match = []
    while lines.next_is("match"):
        name, values = lines.take("match", 2)
        match.append((name, tuple(lines.number(value) for value in values.split(","))))
    paths = []
    while lines.next_is("path"):
        paths.append(_path(lines))
    return PackedRecipe(
        operator, dtype, number, form, tuple(inputs.split(",")), tuple(outputs.split(",")), tuple(match), tuple(paths)
    )


def _path(lines: _Lines) -> PackedPath:
    path, condition = lines.take("path", 2)
    sizes, buffers, launches = [], [], []
    while lines.next_is("size"):
        name, expression = lines.take("size", 2)
        sizes.append((name, expression))
    while lines.next_is("buffer"):
        name, kind, zeroed, elements = lines.take("buffer", 4)
        if zeroed not in ("0", "1"):
            raise lines.wrong(f"{zeroed[:40]!r} says whether the buffer is zeroed; allowed: 0 or 1")
        buffers.append(Buffer(name, kind, elements, zeroed == "1"))
    while lines.next_is("launch"):
        (number,) = lines.take("launch", 1)
        launches.append(lines.number(number))
    return PackedPath(path, condition, tuple(sizes), tuple(buffers), tuple(launches))
