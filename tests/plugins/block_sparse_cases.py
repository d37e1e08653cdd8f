"""Cases that every execution of BlockSparseAttention is tested with, and what the reference says to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from longspan.plugins.block_sparse_attention.definition import Attributes
from longspan.plugins.block_sparse_attention.reference import block_sparse_attention

Array = npt.NDArray[Any]

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


@dataclass(frozen=True)
class Case:
    """Sizes, attributes, optional inputs and kind of lists of one site.

    With `garbage` the keys and values that `attn_mask` and `nonpad_kv_seqlen` forbid are NaN and infinite, and the
    entries of lists that are not read are out of range. `forbidden` names inputs, `distance_bias` or `sinks`, some of
    whose values are -inf.

    Attributes:
        name: Title; also seeds the numbers.
        tall: Queries in a row of blocks.
        wide: Keys in a block.
        attributes: Further attributes.
        features: Optional inputs that are present.
        shared: Sizes of the first two axes of the lists: 1, or batch and heads.
        density: Share of blocks that are listed in each list; None lists every block full and none partial.
        repeats: How often a full block may be listed.
        bias_heads: Heads of distance_bias.
        position_heads: Heads of q_positions and k_positions, or 1.
    """

    name: str
    tall: int = 4
    wide: int = 4
    attributes: dict[str, Any] | None = None
    features: tuple[str, ...] = ()
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    seq_q: int = 19
    seq_k: int | None = None
    size: int = 8
    v_size: int | None = None
    shared: tuple[int, int] = (1, 1)
    density: float | None = 0.4
    repeats: int = 1
    masks: int = 3
    lengths: tuple[int, ...] = ()
    padded: tuple[tuple[int, int], ...] = ()
    bias_heads: int = 1
    own_positions: bool = False
    garbage: bool = False
    forbidden: tuple[str, ...] = ()

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.seq_q if self.seq_k is None else self.seq_k

    def node_attributes(self, layout: str) -> dict[str, Any]:
        """Attributes of the node in `layout`."""
        heads = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads} if layout == "bsd" else {}
        return {"q_block_size": self.tall, "kv_block_size": self.wide, **(self.attributes or {}), **heads}

    def operands(self, layout: str) -> dict[str, Array]:
        """Random float64 inputs by formal name; values are multiples of 1/64, exact in float16 and float32."""
        rng = np.random.default_rng([*self.name.encode()])

        def normal(*shape: int) -> Array:
            return np.round(rng.standard_normal(shape) * 64) / 64

        def rows(heads: int, length: int, size: int) -> Array:
            values = normal(self.batch, heads, length, size)
            return (
                values if layout == "bhsd" else values.transpose(0, 2, 1, 3).reshape(self.batch, length, heads * size)
            )

        v_size = self.size if self.v_size is None else self.v_size
        given = {
            "Q": rows(self.heads, self.seq_q, self.size),
            "K": rows(self.kv_heads, self.keys, self.size),
            "V": rows(self.kv_heads, self.keys, v_size),
            **self._lists(rng),
        }
        if "attn_mask" in self.features:
            mask = np.ones((self.batch, self.keys), bool)
            for b, (begin, end) in enumerate(self.padded):
                mask[b, begin:end] = False
            given["attn_mask"] = mask
        if "nonpad_kv_seqlen" in self.features:
            given["nonpad_kv_seqlen"] = np.array(self.lengths, np.int64)
        if "sinks" in self.features:
            given["sinks"] = normal(self.heads)
        if "q_positions" in self.features:
            shared = (self.batch, self.heads, self.kv_heads) if self.own_positions else (1, 1, 1)
            # Few values, so that some queries and keys stand at the same position.
            given["q_positions"] = rng.integers(0, self.keys, (*shared[:2], self.seq_q)).astype(np.int32)
            given["k_positions"] = rng.integers(0, self.keys, (shared[0], shared[2], self.keys)).astype(np.int32)
        if "distance_bias" in self.features:
            given["distance_bias"] = normal(self.bias_heads, max(self.seq_q + self.keys - 1, 0))
        if "sinks" in self.forbidden:
            given["sinks"][0] = -np.inf
        if "distance_bias" in self.forbidden:
            given["distance_bias"][..., ::3] = -np.inf
        if self.garbage:
            masked = ~given.get("attn_mask", np.ones((self.batch, self.keys), bool))
            if self.lengths:
                masked |= np.arange(self.keys) >= np.array(self.lengths)[:, None]
            for name in ("K", "V"):
                by_key = given[name].swapaxes(1, 2) if layout == "bhsd" else given[name]
                by_key[masked] = np.nan
                by_key[masked, ..., ::2] = np.inf
        return given

    def _lists(self, rng: np.random.Generator) -> dict[str, Array]:
        rows, columns = -(-self.seq_q // self.tall), -(-self.keys // self.wide)
        if self.density is None:
            every = np.broadcast_to(np.arange(columns, dtype=np.int32), (*self.shared, rows, columns)).copy()
            partial = np.zeros((*self.shared, rows, 0), np.int32)
            full_counts = np.full((*self.shared, rows), columns, np.int32)
            return dict(zip(LISTS, (np.zeros_like(full_counts), partial, full_counts, every), strict=True))
        listed = rng.random((2, *self.shared, rows, columns)) < self.density
        repeated = listed[1] * rng.integers(1, self.repeats + 1, listed[1].shape)
        lists = []
        for how_often in (listed[0].astype(np.int64), repeated):
            counts = how_often.sum(-1).astype(np.int32)
            width = int(counts.max(initial=0)) + 1
            filler = (-7, columns, 2**31 - 1) if self.garbage else (0,)
            indices = np.resize(np.array(filler, np.int32), (*counts.shape, width))
            for place in np.ndindex(counts.shape):
                chosen = np.repeat(np.arange(columns), how_often[place])
                indices[place][: len(chosen)] = rng.permutation(chosen)
            lists += [counts, indices]
        result: dict[str, Array] = dict(zip(LISTS, lists, strict=True))
        if "block_masks" in self.features:
            bits = rng.random((self.masks, self.tall, self.wide)) < 0.6
            bits[0] = np.tri(self.tall, self.wide, dtype=bool)  # contiguous rows
            bits[-1][0] = False  # a row without any key
            result["block_masks"] = np.packbits(bits, axis=-1, bitorder="little")
            ids = rng.integers(-1, self.masks, lists[1].shape).astype(np.int32)
            if self.garbage:
                ids[np.arange(ids.shape[-1]) >= lists[0][..., None]] = self.masks + 5
            result["block_mask_ids"] = ids
        return result


def expected(case: Case, layout: str, operands: dict[str, Array] | None = None) -> tuple[Array, Array]:
    """(Y, lse) of the float64 reference, for the case's own operands or those given."""
    given = {name.lower(): array for name, array in (operands or case.operands(layout)).items()}
    return block_sparse_attention(**given, attributes=Attributes.from_mapping(case.node_attributes(layout)))


_EVERYTHING = (
    "block_masks",
    "attn_mask",
    "nonpad_kv_seqlen",
    "sinks",
    "q_positions",
    "distance_bias",
)
_MASKS = ("block_masks",)

CASES = (
    Case("plain"),
    Case("block masks", features=_MASKS),
    Case("every block", density=None),
    Case("no block at all", density=0.0),
    Case("length 1", seq_q=1),
    Case("one block holds everything", tall=32, wide=32, features=_MASKS, density=1.0),
    Case("whole blocks", seq_q=16, features=_MASKS),
    Case("odd blocks", tall=5, wide=3, features=_MASKS),
    Case("masks of more than a byte", tall=7, wide=20, seq_q=61, features=_MASKS),
    Case("blocks of one", tall=1, wide=1, seq_q=9, features=_MASKS),
    Case("wide blocks", tall=2, wide=40, seq_q=150, batch=1, features=_MASKS),
    Case("tall blocks", tall=40, wide=8, seq_q=150, batch=1, features=_MASKS),
    Case("large blocks", tall=128, wide=128, seq_q=300, batch=1, heads=1, kv_heads=1, features=_MASKS),
    Case("very tall blocks", tall=300, wide=64, seq_q=330, batch=1, heads=1, kv_heads=1, features=_MASKS),
    Case("listed several times", repeats=4),
    Case("listed several times, masked", repeats=3, features=_MASKS, masks=1, density=0.8),
    Case("more keys than queries", seq_q=7, seq_k=19, features=_MASKS),
    Case("more queries than keys", seq_q=19, seq_k=7, features=_MASKS),
    Case("lists per entry", shared=(2, 1), features=_MASKS),
    Case("lists per head", shared=(1, 2), features=_MASKS),
    Case("lists of their own for all", shared=(2, 6), heads=6, kv_heads=2, features=_MASKS),
    Case("grouped heads", heads=6, kv_heads=2, features=_MASKS),
    Case("one key head, sizes differ", heads=3, kv_heads=1, size=5, v_size=11),
    Case("softcap and scale", attributes={"softcap": 1.5, "scale": 0.75}),
    Case("causal", attributes={"is_causal": 1}, density=None),
    Case("causal, masked", attributes={"is_causal": 1}, features=_MASKS, tall=6, wide=4, density=0.7),
    Case("not itself", attributes={"exclude_self": 1}, density=None),
    Case("causal and not itself", attributes={"is_causal": 1, "exclude_self": 1}, features=_MASKS, density=0.8),
    Case("padding", features=("attn_mask",), padded=((12, 19), (0, 3))),
    Case("holes", features=("attn_mask", "block_masks"), padded=((5, 6), (3, 9)), density=0.7),
    Case("everything padded", features=("attn_mask",), padded=((0, 19), (5, 15))),
    Case(
        "decode", attributes={"is_causal": 1}, features=("nonpad_kv_seqlen",), seq_q=1, seq_k=23, lengths=(23, 9)
    ),
    Case(
        "offsets", attributes={"is_causal": 1}, features=("nonpad_kv_seqlen",), seq_q=6, seq_k=23, lengths=(23, 14),
        density=0.8,
    ),
    Case(
        "negative offsets", attributes={"is_causal": 1, "exclude_self": 1}, features=("nonpad_kv_seqlen",), seq_q=19,
        seq_k=23, lengths=(11, 0), density=0.8,
    ),
    Case("sinks", features=("sinks",)),
    Case("sink and nothing else", features=("sinks",), density=0.0),
    Case("sink of -inf", features=("sinks",), density=0.2, forbidden=("sinks",)),
    Case("bias by distance", features=("distance_bias",)),
    Case("bias per head", features=("distance_bias", "block_masks"), heads=4, kv_heads=2, bias_heads=4, seq_k=11),
    Case("bias of -inf", features=("distance_bias",), forbidden=("distance_bias",), repeats=2),
    Case("positions", attributes={"is_causal": 1}, features=("q_positions",), density=0.8),
    Case(
        "positions of their own", attributes={"is_causal": 1, "exclude_self": 1},
        features=("q_positions", "block_masks"), heads=4, kv_heads=2, own_positions=True, density=0.8, repeats=2,
    ),
    Case("garbage in padding", features=("attn_mask", "block_masks"), padded=((12, 19), (3, 9)), garbage=True),
    Case(
        "garbage behind the keys", features=("nonpad_kv_seqlen",), seq_q=5, seq_k=12, lengths=(8, 0), heads=4,
        density=0.8, garbage=True,
    ),
    Case(
        "everything", tall=6, wide=10,
        attributes={"is_causal": 1, "exclude_self": 1, "softcap": 3.0, "scale": 0.4}, features=_EVERYTHING,
        heads=4, kv_heads=2, seq_q=37, seq_k=41, v_size=3, shared=(2, 4), density=0.7, repeats=3,
        lengths=(41, 30), padded=((33, 36), (0, 2)), bias_heads=4, own_positions=True, garbage=True,
    ),
)  # fmt: skip
