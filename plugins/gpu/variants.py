"""What a launch of GPU kernels consists of, as data: the contract between kernels, kernel packs and launchers.

A *site* (`KernelSite`) is what is known of an operator node before it runs. `variants_for(site, architecture)` makes a
`Recipe` of it: one or more *paths*, of which an execution takes the first whose condition holds for its sizes. A path
names the buffers it needs and the kernels it launches one after another on one stream. A kernel (`KernelVariant`) is
one specialisation of one Triton function: constants are compiled in, what an absent input would need is not there.

A launcher needs nothing but this record: it evaluates the expressions (`longspan.plugins.gpu.expressions`), fills each
parameter by its meaning, and launches. It never reads anything back.

Sizes that expressions may name: ``B``, ``H_q``, ``H_kv``, ``S_q``, ``S_k``, ``D``, ``D_v``; ``SMS``, the
multiprocessors of the device, at most `MOST_MULTIPROCESSORS`; for SlidingWindowAttention ``LEFT`` and ``RIGHT``, the
window sizes (S_q + S_k where the attribute is -1; RIGHT is 0 where the node is causal), so that one recipe serves every
window; for BlockSparseAttention
``W`` and ``W_full`` (last axis of kv_indices and full_kv_indices), ``M`` (block masks; 0 without), ``B_lists`` and
``H_lists`` (the larger of the first axes, and of the second axes, of kv_num_blocks and full_kv_num_blocks); and the
sizes that the path itself defines, in order (`Path.sizes`). Each must be below 2**31, S_q + S_k below 2**30, and a grid
with a 0 is not launched.

Meaning of parameters, ``kind:what``:

=============================  =======================================================================================
``input:Q``, ``output:Y``      device pointer to the operator's operand of that formal name, contiguous
``buffer:partial_out``         device pointer to the path's buffer of that name, 16-byte aligned
``size:S_q``                   value of the size expression
``stride:Q.batch|head|row``    elements from one batch entry, head, or row of Q, K, V, Y to the next, by the layout
                               (the global inputs have those of Q, K and V); elements of a row are adjacent
``stride:kv_indices.1``        elements from one entry of that axis to the next; 0 where the axis has size 1
``attribute:name``             the node's attribute, or its default
``scalar:scale``               float attribute; `scale` is 1/sqrt(D) where the node has none
=============================  =======================================================================================

Every kernel also has the two trailing pointer parameters that Triton adds; they are null, as its scratch sizes are 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PluginError
from ..registry import operator as definition_of

MOST_MULTIPROCESSORS = 256
"""What ``SMS`` is at most, so that scratch memory has a bound that holds on every device."""

CONTRACT_VERSION = 1
"""Raised whenever a launcher written for an older version would misread these records."""

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""T of a node and Triton's name of it."""

ELEMENT_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of an element of T."""

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
"""Compute capabilities that kernels are tuned for, major * 10 + minor."""

MAX_HEAD_SIZE = 256

STATUS = ("nonpad_kv_seqlen", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "block_mask_ids")
"""What the entries of the buffer ``status`` are about: 0, or 1 + the flat index of a value out of range. Kernels clamp
such values, so nothing out of bounds is read; whoever wants the error copies the buffer after the run."""

_STATUS_ENTRIES = 8


class NoKernel(PluginError):
    """No GPU kernel covers a site; the message says why."""


@dataclass(frozen=True)
class KernelSite:
    """An operator node, as far as its kernels depend on it.

    Attributes:
        operator: Name of the operator.
        dtype: T: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        head_size: D.
        v_head_size: D_v.
        heads: H_q.
        kv_heads: H_kv.
        inputs: Formal names of the inputs that are present.
        attributes: The node's attributes, as in `AttentionSite.attributes`.
        lse: Whether the second output is wanted.
        lists_per_head: BlockSparseAttention: whether the second axis of the lists can be H_q; False where it is 1.
        allow_tf32: Whether float32 products may be rounded to tf32.
    """

    operator: str
    dtype: str
    head_size: int
    v_head_size: int
    heads: int
    kv_heads: int
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    lse: bool = False
    lists_per_head: bool = True
    allow_tf32: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise NoKernel(f"{self.operator} of {self.dtype}: GPU kernels compute in {', '.join(DTYPES)}")
        for name, size in (("head size", self.head_size), ("head size of the values", self.v_head_size)):
            if not 1 <= size <= MAX_HEAD_SIZE:
                raise NoKernel(f"{self.operator} with a {name} of {size}: GPU kernels go up to {MAX_HEAD_SIZE}")
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise NoKernel(f"{self.heads} query heads are not a multiple of {self.kv_heads} key heads")
        known = [tensor.name for tensor in definition_of(self.operator).inputs]
        strange = sorted(set(self.inputs) - set(known))
        if strange:
            raise NoKernel(f"{self.operator} has no input {', '.join(strange)}; there are: {', '.join(known)}")

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    def has(self, name: str) -> bool:
        """Whether the input of that formal name is present."""
        return name in self.inputs


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel, in the order of its ABI.

    Attributes:
        name: The Triton function's own name of it.
        type: ``"*fp16"``, ``"*bf16"``, ``"*fp32"``, ``"*u8"``, ``"*i32"``, ``"*i64"`` (pointers), ``"i32"``, ``"i64"``
            or ``"fp32"``.
        meaning: ``kind:what``; see the module's docstring.
        divisor: The value (for a pointer: its address in bytes) is a multiple of this; the launcher checks it.
    """

    name: str
    type: str
    meaning: str
    divisor: int = 1


@dataclass(frozen=True)
class Constant:
    """A ``tl.constexpr`` parameter with its value: a number, a bool, a string, a tuple of numbers, or None."""

    name: str
    value: int | float | bool | str | tuple[int, ...] | None


@dataclass(frozen=True)
class Buffer:
    """Scratch memory of one execution, from the runtime's allocator.

    Attributes:
        name: What ``buffer:`` parameters call it.
        type: ``"fp32"`` or ``"i32"``; both have 4 bytes.
        elements: Size expression.
        zeroed: Whether it must be filled with zeros, on the stream, before the first kernel.
    """

    name: str
    type: str
    elements: str
    zeroed: bool = False


@dataclass(frozen=True)
class KernelVariant:
    """One Triton function with its constants: what is compiled to one cubin.

    Attributes:
        operator: Name of the operator it belongs to.
        function: ``"package.module:function"``, relative to ``longspan.plugins``.
        architecture: Compute capability that the tiles were chosen for, e.g. 90.
        dtype: T.
        head_size: D.
        v_head_size: D_v.
        features: What is compiled in, sorted: inputs beyond Q, K, V and flags, for people.
        parameters: The ABI, in order, without Triton's two trailing pointers.
        constants: Everything else that the function takes.
        num_warps: Warps per block; a block has 32 times as many threads.
        num_stages: Stages of software pipelining.
        grid: Size expressions of the three grid dimensions.
    """

    operator: str
    function: str
    architecture: int
    dtype: str
    head_size: int
    v_head_size: int
    features: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    constants: tuple[Constant, ...]
    num_warps: int
    num_stages: int
    grid: tuple[str, str, str]

    @property
    def name(self) -> str:
        """Unique among variants, stable, and a valid file name."""
        facts = (self.function, self.architecture, self.dtype, self.parameters, self.constants, self.num_warps,
                 self.num_stages, self.grid)  # fmt: skip
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        kernel = self.function.partition(":")[2]
        return f"{kernel}_{DTYPES[self.dtype]}_d{self.head_size}x{self.v_head_size}_sm{self.architecture}_{digest}"

    @property
    def signature(self) -> dict[str, str]:
        """Signature for ``triton.compiler.ASTSource``, less the order: compilation puts it into the function's own."""
        return {parameter.name: parameter.type for parameter in self.parameters} | {
            constant.name: "constexpr" for constant in self.constants
        }

    @property
    def constexprs(self) -> dict[str, Any]:
        """Constants by name."""
        return {constant.name: constant.value for constant in self.constants}

    @property
    def divisibility(self) -> dict[str, int]:
        """Parameters whose value is known to be a multiple of something."""
        return {parameter.name: parameter.divisor for parameter in self.parameters if parameter.divisor > 1}


@dataclass(frozen=True)
class Path:
    """One way to execute a site.

    Attributes:
        name: For people: ``"whole"``, ``"split"``.
        condition: Size expression; the path is taken where it is not 0.
        sizes: Further sizes by name, each an expression over those before it.
        buffers: Scratch memory.
        kernels: Launched in this order on one stream.
    """

    name: str
    condition: str
    sizes: tuple[tuple[str, str], ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[KernelVariant, ...]


@dataclass(frozen=True)
class Recipe:
    """Every way to execute a site on one architecture; the last path's condition always holds.

    Attributes:
        site: What it is for.
        architecture: Compute capability.
        paths: An execution takes the first whose condition holds.
    """

    site: KernelSite
    architecture: int
    paths: tuple[Path, ...]

    @property
    def variants(self) -> tuple[KernelVariant, ...]:
        """Every kernel of the recipe once, in order of first use."""
        return tuple({kernel.name: kernel for path in self.paths for kernel in path.kernels}.values())


def variants_for(site: KernelSite, architecture: int) -> Recipe:
    """The kernels that execute `site` on devices of compute capability `architecture`, and how they are launched.

    Raises:
        NoKernel: the architecture or something about the site is not covered.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise NoKernel(f"sm_{architecture} is not among the architectures that kernels are tuned for: {known}")
    if site.operator == "SlidingWindowAttention":
        from ..sliding_window_attention import triton_variants as window

        return window.recipe(site, architecture)
    if site.operator == "BlockSparseAttention":
        from ..block_sparse_attention import triton_variants as lists

        return lists.recipe(site, architecture)
    raise NoKernel(f"{site.operator} has no GPU kernel")


def status_buffer() -> Buffer:
    """The buffer that kernels report values out of range in; see `STATUS`."""
    return Buffer("status", "i32", str(_STATUS_ENTRIES), zeroed=True)
