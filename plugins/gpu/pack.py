"""Kernel packs: one file with compiled kernels and everything a launcher must know to run them.

The layout is specified in ``docs/kernel-packs.md``. Writing is deterministic; reading checks every field, so that a
damaged or tampered file is refused with a reason instead of being launched.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import PluginError
from .variants import CONTRACT_VERSION, Buffer, Parameter

MAGIC = b"\x89LSPACK\n"
FORMAT_VERSION = 1
MAX_INDEX_BYTES = 16 * 2**20
ALIGNMENT = 16
SUFFIX = ".pack"

_HEADER = struct.Struct("<8sIIQQ")
_INDEX_START = 64


class InvalidPack(PluginError, ValueError):
    """A file is not a kernel pack, or one that may not be launched; the message says why and where."""


@dataclass(frozen=True)
class PackedKernel:
    """One kernel, compiled for one architecture.

    Attributes:
        name: Name of the variant.
        architecture: Compute capability, e.g. 90.
        form: ``"cubin"`` (machine code) or ``"ptx"`` (text that the driver compiles).
        entry: Name of the function in the code.
        threads: Threads per block.
        shared: Bytes of dynamic shared memory.
        registers: Per thread.
        stack: Bytes of local memory per thread; spilled registers are there.
        dtype: T of the node.
        head_size: D.
        v_head_size: D_v.
        stages: Stages of software pipelining.
        function: The Triton function, ``"module:name"``.
        features: What is compiled in.
        constants: Name and value of everything that was compiled in, as text.
        parameters: The ABI, less the two trailing null pointers; size expressions are in postfix.
        grid: Postfix expressions.
        code: Machine code or text.
    """

    name: str
    architecture: int
    form: str
    entry: str
    threads: int
    shared: int
    registers: int
    stack: int
    dtype: str
    head_size: int
    v_head_size: int
    stages: int
    function: str
    features: tuple[str, ...]
    constants: tuple[tuple[str, str], ...]
    parameters: tuple[Parameter, ...]
    grid: tuple[str, str, str]
    code: bytes

    @property
    def sort_key(self) -> tuple[str, str]:
        """What kernels are sorted by, and distinguished by."""
        return self.name, self.form


@dataclass(frozen=True)
class PackedPath:
    """One way to execute a recipe; see `longspan.plugins.gpu.variants.Path`. Expressions are in postfix.

    Attributes:
        name: For people.
        condition: The path is taken where this is not 0.
        sizes: Further sizes by name.
        buffers: Scratch memory.
        launches: Numbers of the kernels, in order.
    """

    name: str
    condition: str
    sizes: tuple[tuple[str, str], ...]
    buffers: tuple[Buffer, ...]
    launches: tuple[int, ...]


@dataclass(frozen=True)
class PackedRecipe:
    """How nodes of one kind are executed on one architecture.

    Attributes:
        operator: Name of the operator.
        dtype: T.
        architecture: Compute capability of its kernels.
        form: Form of its kernels.
        inputs: Formal names of the inputs that the node has, in the definition's order.
        outputs: ``("Y",)`` or ``("Y", "lse")``.
        match: What else must be so; see ``docs/kernel-packs.md``.
        paths: An execution takes the first whose condition holds.
    """

    operator: str
    dtype: str
    architecture: int
    form: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    match: tuple[tuple[str, tuple[int, ...]], ...]
    paths: tuple[PackedPath, ...]

    @property
    def sort_key(self) -> tuple[object, ...]:
        """What recipes are sorted by, and distinguished by."""
        return self.operator, self.dtype, self.architecture, self.form, self.inputs, self.outputs, self.match


@dataclass(frozen=True)
class Pack:
    """The content of a kernel pack.

    Attributes:
        compiler: What made the code.
        kernels: Sorted by name and form.
        recipes: Sorted by `PackedRecipe.sort_key`.
    """

    compiler: str
    kernels: tuple[PackedKernel, ...]
    recipes: tuple[PackedRecipe, ...]

    @property
    def architectures(self) -> tuple[tuple[int, str], ...]:
        """(architecture, form) of every recipe, machine code first."""
        found = {(recipe.architecture, recipe.form) for recipe in self.recipes}
        return tuple(sorted(found, key=lambda target: (target[1], target[0])))

    def to_bytes(self) -> bytes:
        """The file.

        Raises:
            InvalidPack: the content breaks a rule of the format.
        """
        from .pack_index import write_index
        from .pack_rules import check_pack

        check_pack(self)
        # Offsets stand in the index and depend on its length: written once with offsets from 0 to learn how long it is,
        # and again until the number of their digits no longer changes that.
        size = 0
        while len(index := write_index(self, code_offsets(size, self.kernels))) != size:
            size = len(index)
        if size > MAX_INDEX_BYTES:
            raise InvalidPack(
                f"the index has {size} bytes; allowed: {MAX_INDEX_BYTES}; next step: fewer variants a pack"
            )
        body = bytearray(index)
        for offset, kernel in zip(code_offsets(size, self.kernels), self.kernels, strict=True):
            body += bytes(offset - _INDEX_START - len(body)) + kernel.code
        start = _HEADER.pack(MAGIC, FORMAT_VERSION, CONTRACT_VERSION, _INDEX_START + len(body), size)
        return start + hashlib.sha256(start + body).digest() + bytes(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Pack:
        """Read a file's content.

        Raises:
            InvalidPack: it breaks a rule of the format; the message says which, and where.
        """
        from .pack_index import read_index

        if len(data) < _INDEX_START:
            raise InvalidPack(f"is {len(data)} bytes long, less than the header of a kernel pack ({_INDEX_START})")
        magic, version, contract, size, index_size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise InvalidPack("is not a kernel pack: it begins otherwise")
        if version != FORMAT_VERSION:
            raise InvalidPack(f"has format version {version}; this Longspan reads {FORMAT_VERSION}; compile it again")
        if contract != CONTRACT_VERSION:
            raise InvalidPack(
                f"has contract version {contract}; this Longspan launches {CONTRACT_VERSION}; compile it again"
            )
        if size != len(data):
            raise InvalidPack(f"is {len(data)} bytes long, and was written with {size}: it is truncated, or has more")
        if index_size > min(MAX_INDEX_BYTES, size - _INDEX_START):
            raise InvalidPack(
                f"has an index of {index_size} bytes; allowed: {min(MAX_INDEX_BYTES, size - _INDEX_START)}"
            )
        start = data[: _HEADER.size]
        if hashlib.sha256(start + data[_INDEX_START:]).digest() != data[_HEADER.size : _INDEX_START]:
            raise InvalidPack("differs from what was written (SHA-256)")
        pack = read_index(data, _INDEX_START, index_size)
        if pack.to_bytes() != data:  # which checks the content first
            raise InvalidPack("is not written as the format says: the same content has other bytes")
        return pack


def code_offsets(index_size: int, kernels: tuple[PackedKernel, ...]) -> list[int]:
    """Where each kernel's code begins, from the start of the file."""
    offsets = []
    end = _INDEX_START + index_size
    for kernel in kernels:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + len(kernel.code)
    return offsets


def pack_id(data: bytes) -> str:
    """What nodes call a pack by: the SHA-256 in its header, as hexadecimal digits."""
    return data[_HEADER.size : _INDEX_START].hex()


def read_pack(path: Path) -> Pack:
    """Read a pack from a file.

    Raises:
        InvalidPack: it breaks a rule of the format; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return Pack.from_bytes(path.read_bytes())
    except InvalidPack as error:
        raise InvalidPack(f"{path}: {error}") from error


def write_pack(pack: Pack, path: Path) -> None:
    """Write a pack to a file, whole or not at all.

    Raises:
        InvalidPack: the content breaks a rule of the format.
        OSError: it cannot be written.
    """
    data = pack.to_bytes()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
