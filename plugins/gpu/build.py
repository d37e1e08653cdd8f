"""Put variants together: parameters from a kernel's own list, constants, and what an absent input leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from .tiles import Tile, padded
from .variants import DTYPES, ELEMENT_SIZES, Buffer, Constant, KernelSite, KernelVariant, Parameter

POINTER_ALIGNMENT = 16
"""Bytes that every pointer is a multiple of; what vector loads and cp.async need."""

FEW_TILES = 4
"""Small tiles of query rows up to which keys are split over programs: with more, the large tiles fill a GPU alone."""

LARGEST_FOLD = 16
"""Query heads of a group that share a tile, at most."""

_LARGEST_SPLIT = 32

ROW_STRIDES = tuple(
    (f"{letter}_{axis}", "i64", f"stride:{name}.{axis}")
    for letter, name in (("q", "Q"), ("k", "K"), ("v", "V"), ("y", "Y"))
    for axis in ("batch", "head", "row")
)
"""The twelve strides that every attention kernel ends its parameters with: (name, type, meaning)."""

Line = tuple[str, str, str]
"""A parameter as kernels list it: name, type with ``T`` for the site's, meaning."""


def widths(site: KernelSite) -> dict[str, int]:
    """The constants of the head sizes."""
    return {
        "D": site.head_size, "D_V": site.v_head_size,
        "WIDTH": padded(site.head_size), "WIDTH_V": padded(site.v_head_size),
    }  # fmt: skip


def precision(site: KernelSite) -> str:
    """How ``tl.dot`` treats float32 operands; of no effect on others."""
    return "tf32" if site.allow_tf32 else "ieee"


_EDITED = {"band_bias", "spans", "global_mask", "block_masks", "q_positions", "distance_bias"}
"""Inputs that make the loops do more to a score than scale it."""


def tile_kind(site: KernelSite, kind: str) -> str:
    """The kind of kernel, as tiles are chosen by it, of a site's path; `kind` is ``"whole"`` or ``"split"``."""
    edited = _EDITED & set(site.inputs) or site.attributes.get("softcap", 0)
    return f"{kind}, edited scores" if edited else kind


def widest(site: KernelSite) -> int:
    """Padded head size that tiles are chosen by: the larger of D's and D_v's."""
    return max(padded(site.head_size), padded(site.v_head_size))


def tile_for(site: KernelSite, architecture: int, kind: str) -> Tile:
    """The tuned tile of a site; `kind` is ``"whole"`` or ``"split"``."""
    from .tuned import TUNED

    return TUNED[architecture, tile_kind(site, kind), ELEMENT_SIZES[site.dtype], widest(site)]


@dataclass(frozen=True)
class Builder:
    """What the variants of one site on one architecture have in common."""

    site: KernelSite
    architecture: int

    def variant(
        self,
        function: str,
        lines: Sequence[Line],
        absent: Sequence[str],
        constants: Mapping[str, Any],
        tile: Tile,
        grid: tuple[str, str, str],
        features: Sequence[str] = (),
    ) -> KernelVariant:
        """One kernel of the site.

        Args:
            function: ``"package.module:function"``.
            lines: Its parameters in the order of the function, those that may be absent included.
            absent: Names of parameters that become the constant None.
            constants: Its ``tl.constexpr`` parameters.
            tile: Warps and stages; block sizes are among the constants where the function has them.
            grid: Size expressions.
            features: For people.
        """
        present = tuple(line for line in lines if line[0] not in absent)
        nothing = tuple(Constant(name, None) for name, _, _ in lines if name in absent)
        return KernelVariant(
            operator=self.site.operator,
            function=function,
            architecture=self.architecture,
            dtype=self.site.dtype,
            head_size=self.site.head_size,
            v_head_size=self.site.v_head_size,
            features=tuple(sorted(features)),
            parameters=tuple(self._parameter(*line) for line in present),
            constants=nothing + tuple(Constant(name, value) for name, value in constants.items()),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            grid=grid,
        )

    def _parameter(self, name: str, kind: str, meaning: str) -> Parameter:
        if kind.startswith("*"):
            return Parameter(name, kind.replace("T", DTYPES[self.site.dtype]), meaning, POINTER_ALIGNMENT)
        divisor = 1
        if meaning.startswith("stride:") and meaning[7] in "QKVY":
            # Strides of both layouts are multiples of the head size.
            size = self.site.head_size if meaning[7] in "QK" else self.site.v_head_size
            divisor = gcd(size, 16)
        return Parameter(name, kind, meaning, divisor)


def number_of_splits(programs: str, keys: str, block_n: int) -> str:
    """Size expression: two programs per multiprocessor, as long as each has two tiles of keys."""
    return f"max(1, min({_LARGEST_SPLIT}, cdiv(2 * SMS, max({programs}, 1)), cdiv({keys}, {2 * block_n})))"


def partial_buffers(site: KernelSite) -> list[Buffer]:
    """What split rows write, and `merge_variant` reads."""
    return [
        Buffer("partial_out", "fp32", f"splits * B * H_q * S_q * {site.v_head_size}"),
        Buffer("partial_lse", "fp32", "splits * B * H_q * S_q"),
    ]


def merge_variant(builder: Builder, rows: str, rows_per_head: str, splits: str, scattered: bool) -> KernelVariant:
    """The kernel that merges split rows.

    Args:
        builder: Site and architecture.
        rows: Suffix of the partial buffers' names, e.g. ``""`` or ``"_global"``.
        rows_per_head: Size expression: rows of one head in the partial buffers.
        splits: Name of the size that holds the number of parts.
        scattered: Whether the rows are those of the list ``global_rows``.
    """
    lines: tuple[Line, ...] = (
        ("partial_out", "*fp32", f"buffer:partial_out{rows}"),
        ("partial_lse", "*fp32", f"buffer:partial_lse{rows}"),
        ("rows", "*i32", "buffer:global_rows"),
        ("row_counts", "*i32", "buffer:global_row_counts"),
        ("y", "*T", "output:Y"),
        ("lse", "*fp32", "output:lse"),
        ("batch_heads", "i32", "size:B * H_q"),
        ("heads", "i32", "size:H_q"),
        ("seq_q", "i32", "size:S_q"),
        ("rows_per_head", "i32", f"size:{rows_per_head}"),
        ("splits", "i32", f"size:{splits}"),
        *ROW_STRIDES[9:],
    )
    absent = [] if scattered else ["rows", "row_counts"]
    if not builder.site.lse:
        absent.append("lse")
    block = 4
    return builder.variant(
        "gpu.tile:merge_parts",
        lines,
        absent,
        {"D_V": builder.site.v_head_size, "WIDTH_V": padded(builder.site.v_head_size), "BLOCK_R": block},
        Tile(block, 1, 4, 1),
        (f"cdiv({rows_per_head}, {block}) * B * H_q", "1", "1"),
        ["lse"] if builder.site.lse else [],
    )
