"""What BlockSparseAttention is: inputs, attributes, shapes, cost.

Queries are cut into rows of `q_block_size`, keys into blocks of `kv_block_size`; for each row two lists name the key
blocks that it reads. Drawn for blocks of two, with a partial block ``/`` whose mask hides one key (``.``)::

            keys 0 1 2 3 4 5      partial list   full list
    query 0      / . # # . .      0              1
    query 1      / / # # . .
    query 2      # # . . / .      2              0
    query 3      # # . . / /

The lists are those of PyTorch FlexAttention's ``BlockMask``. Row r covers the queries ``r·q_block_size`` onward and
block c the keys ``c·kv_block_size`` onward, by index; neither need be full at the end of the sequence. A query has one
term ``exp(score)`` in its softmax for every *listing* of a block that holds the key and whose mask allows the pair: a
block listed twice counts twice, as BigBird's evaluation needs it (Zaheer et al. 2020; ``transformers`` draws block 0
for every random block). Only the first ``num_blocks`` entries of a list are read.

The score is ``softcap(scale · q·k) + distance_bias[k - i + S_q - 1]``. Padding (``attn_mask``, ``nonpad_kv_seqlen``),
the causal frontier (``is_causal``: key position at most the query's) and ``exclude_self`` (key position not the
query's) forbid keys in every block, full ones included. Positions are ``offset + i`` for queries, with offset
``nonpad_kv_seqlen - S_q`` where that input is present and else 0, and the index for keys; ``q_positions`` and
``k_positions`` replace them, for sequences that were sorted before (Kitaev et al. 2020, section 2). ``sinks`` adds one
logit per head to every denominator.

An index, count or mask id out of range is an error that names its place, in every execution that can raise;
a function body of standard operators clamps it. Padded keys and their values are never part of a result, whatever they
hold; a ``distance_bias`` of -inf forbids its distance, and a sink of -inf is as good as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..attention.operands import (
    ATTN_MASK,
    IS_CAUSAL,
    NONPAD_KV_SEQLEN,
    OUTPUTS,
    QKV,
    SCORE_AND_HEADS,
    SINKS,
    SIZE_LIMIT,
    Shapes,
    check_known,
    check_score_attributes,
    cost_of,
    expect_shape,
    qkv_shapes,
)
from ..definition import Attribute, Cost, Operator, Tensor
from ..errors import InvalidOperands

DEFAULT_BLOCK = 128
"""Block size of a node that does not say it; FlexAttention's too."""

_COUNTS = "(1|B, 1|H_q, n_q)"

BLOCK_SPARSE_ATTENTION = Operator(
    name="BlockSparseAttention",
    doc="Attention of each block of queries to the blocks of keys that two lists name.",
    inputs=(
        *QKV,
        Tensor("kv_num_blocks", "int32", _COUNTS, "Partial blocks of each row; n_q = ceil(S_q / q_block_size)."),
        Tensor("kv_indices", "int32", "(1|B, 1|H_q, n_q, W)", "Key blocks that block_masks and positions apply to."),
        Tensor("full_kv_num_blocks", "int32", _COUNTS, "Full blocks of each row."),
        Tensor("full_kv_indices", "int32", "(1|B, 1|H_q, n_q, W_full)", "Key blocks that no block mask applies to."),
        Tensor("block_mask_ids", "int32", "like kv_indices", "Mask of each partial block; -1 for none.", optional=True),
        Tensor(
            "block_masks",
            "uint8",
            "(M, q_block_size, ceil(kv_block_size / 8))",
            "Masks of partial blocks, shared where equal: bit c % 8 of byte c // 8 is column c.",
            optional=True,
        ),
        ATTN_MASK,
        NONPAD_KV_SEQLEN,
        SINKS,
        Tensor(
            "q_positions", "int32", "(1|B, 1|H_q, S_q)", "Positions that is_causal, exclude_self use.", optional=True
        ),
        Tensor("k_positions", "int32", "(1|B, 1|H_kv, S_k)", "The same for keys.", optional=True),
        Tensor(
            "distance_bias",
            "T",
            "(1|H_q, S_q + S_k - 1)",
            "Added to the score of query row i and key k: entry k - i + S_q - 1.",
            optional=True,
        ),
    ),
    attributes=(
        Attribute("q_block_size", "int", DEFAULT_BLOCK, "Queries in a row of blocks."),
        Attribute("kv_block_size", "int", DEFAULT_BLOCK, "Keys in a block."),
        IS_CAUSAL,
        Attribute("exclude_self", "int", 0, "1: a query never sees the key at its own position."),
        *SCORE_AND_HEADS,
    ),
    outputs=OUTPUTS,
)


@dataclass(frozen=True)
class Attributes:
    """Checked attributes of one BlockSparseAttention node; see the definition for their meaning.

    Raises:
        InvalidOperands: an attribute is out of range.
    """

    q_block_size: int = DEFAULT_BLOCK
    kv_block_size: int = DEFAULT_BLOCK
    is_causal: bool = False
    exclude_self: bool = False
    scale: float | None = None
    softcap: float = 0.0
    q_num_heads: int = 0
    kv_num_heads: int = 0

    def __post_init__(self) -> None:
        for name in ("q_block_size", "kv_block_size"):
            if not 1 <= getattr(self, name) <= SIZE_LIMIT:
                raise InvalidOperands(f"{name} = {getattr(self, name)}: must be between 1 and {SIZE_LIMIT}")
        check_score_attributes(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Attributes:
        """Build from a node's attributes.

        Raises:
            InvalidOperands: an attribute is unknown or out of range.
        """
        check_known(BLOCK_SPARSE_ATTENTION.name, BLOCK_SPARSE_ATTENTION.attributes, values)
        flags = {name: bool(values[name]) for name in ("is_causal", "exclude_self") if name in values}
        return cls(**{**values, **flags})

    def q_blocks(self, seq_q: int) -> int:
        """Rows of blocks of `seq_q` queries."""
        return -(-seq_q // self.q_block_size)

    def kv_blocks(self, seq_k: int) -> int:
        """Blocks of `seq_k` keys."""
        return -(-seq_k // self.kv_block_size)


def infer_shapes(inputs: Mapping[str, tuple[int, ...]], attributes: Attributes) -> Shapes:
    """Check the shapes of all inputs present against the definition and return the sizes.

    Args:
        inputs: Shape of each input that is present, by formal name.
        attributes: The node's attributes.

    Raises:
        InvalidOperands: a shape contradicts the definition; the message names the input.
    """
    shapes = qkv_shapes(inputs, attributes)
    batch, heads, seq_q, seq_k = shapes.batch, shapes.q_num_heads, shapes.seq_q, shapes.seq_k
    rows = attributes.q_blocks(seq_q)
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        _expect_shared(inputs, counts, (batch, heads), (rows,))
        got = inputs[indices]
        _expect_shared(inputs, indices, (batch, heads), (rows, got[-1] if got else 0))
        if got[:2] != inputs[counts][:2]:
            raise InvalidOperands(f"{indices} has shape {got} beside {counts} {inputs[counts]}: must begin alike")
    _expect_together(inputs, "block_mask_ids", "block_masks")
    _expect_together(inputs, "q_positions", "k_positions")
    expect_shape(inputs, "block_mask_ids", tuple(inputs["kv_indices"]))
    masks = inputs.get("block_masks")
    if masks is not None:
        tile = (attributes.q_block_size, -(-attributes.kv_block_size // 8))
        if len(masks) != 3 or tuple(masks[1:]) != tile:
            raise InvalidOperands(f"block_masks has shape {tuple(masks)}: must be (M, {tile[0]}, {tile[1]})")
    expect_shape(inputs, "attn_mask", (batch, seq_k))
    expect_shape(inputs, "nonpad_kv_seqlen", (batch,))
    expect_shape(inputs, "sinks", (heads,))
    _expect_shared(inputs, "q_positions", (batch, heads), (seq_q,))
    _expect_shared(inputs, "k_positions", (batch, shapes.kv_num_heads), (seq_k,))
    _expect_shared(inputs, "distance_bias", (heads,), (max(seq_q + seq_k - 1, 0),))
    return shapes


def _expect_shared(
    inputs: Mapping[str, tuple[int, ...]], name: str, shared: tuple[int, ...], own: tuple[int, ...]
) -> None:
    """Check the shape of an input, if it is present, whose first axes may be 1 and stand for all."""
    got = inputs.get(name)
    if got is None:
        return
    allowed = (*((1, size) for size in shared), *((size,) for size in own))
    if len(got) != len(allowed) or any(size not in sizes for size, sizes in zip(got, allowed, strict=True)):
        wanted = ", ".join([*(f"1|{size}" for size in shared), *map(str, own)])
        raise InvalidOperands(f"{name} has shape {tuple(got)}: must be ({wanted})")


def _expect_together(inputs: Mapping[str, tuple[int, ...]], first: str, second: str) -> None:
    if (first in inputs) != (second in inputs):
        present = first if first in inputs else second
        raise InvalidOperands(f"{present} present: {first} and {second} come together or not at all")


@dataclass(frozen=True)
class ListBounds:
    """What the values of the block lists are held against.

    Attributes:
        kv_blocks: Blocks of keys: an index is 0 to one below.
        masks: Block masks: an id is -1 to one below.
    """

    kv_blocks: int
    masks: int


def check_lists(lists: Mapping[str, Any], bounds: ListBounds) -> None:
    """Check the values of the block lists, as far as they are read.

    Args:
        lists: Integer arrays by formal name: both counts, both indices, block_mask_ids where present; anything that
            numpy can read.
        bounds: What the values are held against.

    Raises:
        InvalidOperands: a count, an index or a mask id is out of range; the message names batch, head and row.
    """
    import numpy as np

    for counts_name, indices_name in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        counts, indices = np.asarray(lists[counts_name]), np.asarray(lists[indices_name])
        width = indices.shape[-1]
        _refuse(counts_name, counts, (counts < 0) | (counts > width), 0, width)
        read = np.arange(width) < counts[..., None]
        _refuse(indices_name, indices, read & ((indices < 0) | (indices >= bounds.kv_blocks)), 0, bounds.kv_blocks - 1)
        if counts_name == "kv_num_blocks" and "block_mask_ids" in lists:
            ids = np.asarray(lists["block_mask_ids"])
            _refuse("block_mask_ids", ids, read & ((ids < -1) | (ids >= bounds.masks)), -1, bounds.masks - 1)


def _refuse(name: str, values: Any, wrong: Any, low: int, high: int) -> None:
    if not wrong.any():
        return
    place = [int(axis[0]) for axis in wrong.nonzero()]
    named = ", ".join(f"{axis} {at}" for axis, at in zip(("batch", "head", "row", "slot"), place, strict=False))
    raise InvalidOperands(f"{name}[{named}] = {int(values[tuple(place)])}: must be between {low} and {high}")


def cost(shapes: Shapes, attributes: Attributes, blocks: int, element_size: int = 4) -> Cost:
    """Work of one execution.

    Args:
        shapes: Sizes of the execution.
        attributes: The node's attributes.
        blocks: Blocks listed, over all batch entries, query heads and rows; each counts as whole, partial ones too.
        element_size: Bytes per element of T.
    """
    return cost_of(shapes, blocks * attributes.q_block_size * attributes.kv_block_size, element_size)
