"""Records that define an operator once, for every backend that executes it."""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "longspan"
"""ONNX domain, and torch library namespace, of every operator."""

OPSET_VERSION = 1
"""Version of the ``longspan`` domain that the operators belong to."""

PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE = "kernel_pack", "kernel_pack_id"
"""Attributes that any node may carry beyond its definition: GPU kernels for it, and which they are. They say nothing
about what the node computes; see ``docs/kernel-packs.md``."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of an operator.

    Attributes:
        name: Formal name, as in ``docs/operators.md``.
        dtype: ``"T"`` (float16, bfloat16 or float32, one type for the node), or an ONNX type name.
        shape: Symbolic shape, e.g. ``"(B, S_k)"``.
        doc: One sentence on the meaning.
        optional: Whether a node may leave it out (an empty name).
    """

    name: str
    dtype: str
    shape: str
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """One attribute of an operator.

    Attributes:
        name: Attribute name on the node.
        kind: ``"int"``, ``"ints"`` or ``"float"``.
        default: Value when the node does not carry it; ``None`` means that it is derived.
        doc: One sentence on the meaning.
    """

    name: str
    kind: str
    default: int | float | tuple[int, ...] | None
    doc: str


@dataclass(frozen=True)
class Cost:
    """Work of one execution.

    Attributes:
        pairs: Query-key pairs that are scored, over batch and heads.
        flops: Floating-point operations of the two matrix products (a multiply-add counts two).
        bytes: Bytes of Q, K, V read once and Y written once.
    """

    pairs: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Operator:
    """The definition that the ONNX function body, the torch op and the kernels are tested against."""

    name: str
    inputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    outputs: tuple[Tensor, ...]
    doc: str
    domain: str = DOMAIN
    version: int = OPSET_VERSION
