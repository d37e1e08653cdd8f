"""Which kernels a BlockSparseAttention node takes on a GPU, and how they are launched."""

from __future__ import annotations

from dataclasses import replace

from ..gpu.build import (
    FEW_TILES,
    LARGEST_FOLD,
    ROW_STRIDES,
    Builder,
    Line,
    merge_variant,
    number_of_splits,
    partial_buffers,
    precision,
    tile_for,
    widths,
)
from ..gpu.tiles import Tile
from ..gpu.variants import Buffer, KernelSite, KernelVariant, Path, Recipe, status_buffer
from .definition import Attributes

_MODULE = "block_sparse_attention.triton_kernel"
_PREPARED_ROWS = 32
_SMALLEST_DIVISOR = 32  # fewer keys a tile cost more than gathering them from several blocks

_LISTS: tuple[Line, ...] = (
    ("kv_num_blocks", "*i32", "input:kv_num_blocks"),
    ("kv_indices", "*i32", "input:kv_indices"),
    ("full_kv_num_blocks", "*i32", "input:full_kv_num_blocks"),
    ("full_kv_indices", "*i32", "input:full_kv_indices"),
    ("block_mask_ids", "*i32", "input:block_mask_ids"),
)
_LIST_STRIDES: tuple[Line, ...] = tuple(
    (f"{prefix}{short}_{axis}", "i64", f"stride:{prefix}{name}.{number}")
    for prefix in ("", "full_")
    for short, name in (("counts", "kv_num_blocks"), ("indices", "kv_indices"))
    for number, axis in enumerate(("batch", "head"))
)
_ORDER_STRIDES: tuple[Line, ...] = (
    ("order_batch", "i32", "size:rows * H_lists * min(B_lists - 1, 1)"),
    ("order_head", "i32", "size:rows * min(H_lists - 1, 1)"),
)

_PREPARE: tuple[Line, ...] = (
    *_LISTS,
    ("nonpad_kv_seqlen", "*i64", "input:nonpad_kv_seqlen"),
    ("row_order", "*i32", "buffer:row_order"),
    ("status", "*i32", "buffer:status"),
    ("batches", "i32", "size:B"),
    ("seq_k", "i32", "size:S_k"),
    ("rows", "i32", "size:rows"),
    ("width", "i32", "size:W"),
    ("full_width", "i32", "size:W_full"),
    ("masks", "i32", "size:M"),
    ("list_heads", "i32", "size:H_lists"),
    *_ORDER_STRIDES,
    *_LIST_STRIDES,
)

_FORWARD: tuple[Line, ...] = (
    ("q", "*T", "input:Q"),
    ("k", "*T", "input:K"),
    ("v", "*T", "input:V"),
    *_LISTS,
    ("block_masks", "*u8", "input:block_masks"),
    ("attn_mask", "*u8", "input:attn_mask"),
    ("nonpad_kv_seqlen", "*i64", "input:nonpad_kv_seqlen"),
    ("sinks", "*T", "input:sinks"),
    ("q_positions", "*i32", "input:q_positions"),
    ("k_positions", "*i32", "input:k_positions"),
    ("distance_bias", "*T", "input:distance_bias"),
    ("row_order", "*i32", "buffer:row_order"),
    ("y", "*T", "output:Y"),
    ("lse", "*fp32", "output:lse"),
    ("partial_out", "*fp32", "buffer:partial_out"),
    ("partial_lse", "*fp32", "buffer:partial_lse"),
    ("batches", "i32", "size:B"),
    ("heads", "i32", "size:H_q"),
    ("seq_q", "i32", "size:S_q"),
    ("seq_k", "i32", "size:S_k"),
    ("width", "i32", "size:W"),
    ("full_width", "i32", "size:W_full"),
    ("masks", "i32", "size:M"),
    ("splits", "i32", "size:splits"),
    ("scale", "fp32", "scalar:scale"),
    ("softcap", "fp32", "scalar:softcap"),
    *_ORDER_STRIDES,
    *ROW_STRIDES,
    *_LIST_STRIDES,
    ("q_positions_batch", "i64", "stride:q_positions.0"),
    ("q_positions_head", "i64", "stride:q_positions.1"),
    ("k_positions_batch", "i64", "stride:k_positions.0"),
    ("k_positions_head", "i64", "stride:k_positions.1"),
    ("bias_head", "i64", "stride:distance_bias.0"),
)


def recipe(
    site: KernelSite, architecture: int, tiles: tuple[Tile, Tile] | None = None, few_rows: int | None = None
) -> Recipe:
    """Kernels and launches of a site.

    Args:
        site: A BlockSparseAttention node.
        architecture: Compute capability.
        tiles: Tiles for many and for few rows, instead of the tuned ones.
        few_rows: Largest S_q for which keys are split, instead of `FEW_TILES` tiles of rows.
    """
    whole, split = tiles or (tile_for(site, architecture, "whole"), tile_for(site, architecture, "split"))
    return _Recipes(site, architecture, whole, split).recipe(few_rows)


class _Recipes:
    def __init__(self, site: KernelSite, architecture: int, whole: Tile, split: Tile) -> None:
        self.site, self.architecture = site, architecture
        self.attributes = Attributes.from_mapping(site.attributes)
        self.builder = Builder(site, architecture)
        self.fold = 1 if site.lists_per_head else min(site.group, LARGEST_FOLD, split.block_m)
        self.folds = -(-site.group // self.fold)
        self.units = f"H_kv * {self.folds}" if self.folds > 1 else "H_kv"
        self.whole, self.split = self._fitted(whole), self._fitted(split)

    def _fitted(self, tile: Tile) -> Tile:
        """`tile` cut down to the rows that a block row has, and to keys that divide a block or hold several of them."""
        rows, wide = self.attributes.q_block_size * self.fold, self.attributes.kv_block_size
        block_m, block_n = tile.block_m, tile.block_n
        while block_m > 16 and block_m // 2 >= rows:
            block_m //= 2
        while block_n > _SMALLEST_DIVISOR and wide % block_n:
            block_n //= 2
        if wide % block_n:
            block_n = tile.block_n  # gathered from several blocks
        num_warps = max(4, tile.num_warps * block_m // tile.block_m)
        return replace(tile, block_m=block_m, block_n=block_n, num_warps=num_warps)

    def recipe(self, few_rows: int | None) -> Recipe:
        few = FEW_TILES * self.split.block_m // self.fold if few_rows is None else few_rows
        paths = (self._path("split", f"le(S_q, {few})", self.split), self._path("whole", "1", self.whole))
        return Recipe(self.site, self.architecture, paths)

    def _path(self, name: str, condition: str, tile: Tile) -> Path:
        split = name == "split"
        tall, wide = self.attributes.q_block_size, self.attributes.kv_block_size
        sizes = [("rows", f"cdiv(S_q, {tall})")]
        buffers = [Buffer("row_order", "i32", "B_lists * H_lists * rows"), status_buffer()]
        kernels = [self._prepare(), self._forward(tile, split)]
        if split:
            per_tile = min(tile.block_m // self.fold, tall)
            programs = f"B * {self.units} * cdiv(S_q, {per_tile})"
            keys = f"min((W + W_full) * {wide}, 2 * S_k)"
            sizes.append(("splits", number_of_splits(programs, keys, tile.block_n)))
            buffers += partial_buffers(self.site)
            kernels.append(merge_variant(self.builder, "", "S_q", "splits", scattered=False))
        return Path(name, condition, tuple(sizes), tuple(buffers), tuple(kernels))

    def _features(self, *names: str) -> list[str]:
        attributes = self.attributes
        flags = {
            "causal": attributes.is_causal, "exclude_self": attributes.exclude_self, "softcap": attributes.softcap > 0,
            "lse": self.site.lse, "lists_per_head": self.site.lists_per_head,
        }  # fmt: skip
        required = {"Q", "K", "V", *(name for name, _, _ in _LISTS[:4])}
        inputs = [name for name in self.site.inputs if name not in required]
        return [*inputs, *(name for name, given in flags.items() if given), *names]

    def _absent(self) -> list[str]:
        optional = ("block_mask_ids", "block_masks", "attn_mask", "nonpad_kv_seqlen", "sinks", "q_positions",
                    "k_positions", "distance_bias")  # fmt: skip
        absent = [name for name in optional if not self.site.has(name)]
        if "q_positions" in absent:
            absent += [name for name, _, _ in _FORWARD if name.startswith(("q_positions_", "k_positions_"))]
        if "distance_bias" in absent:
            absent.append("bias_head")
        if "block_masks" in absent:
            absent.append("masks")
        return absent

    def _prepare(self) -> KernelVariant:
        mine = {name for name, _, _ in _PREPARE}
        absent = [name for name in self._absent() if name in mine]
        if not self.site.has("nonpad_kv_seqlen"):
            absent.append("batches")
        constants = {"KV_BLOCK": self.attributes.kv_block_size, "BLOCK_R": _PREPARED_ROWS, "BLOCK_W": 64}
        grid = (f"cdiv(rows, {_PREPARED_ROWS}) * H_lists * B_lists", "1", "1")
        features = [name for name in ("block_masks", "nonpad_kv_seqlen") if self.site.has(name)]
        return self.builder.variant(
            f"{_MODULE}:prepare_lists", _PREPARE, absent, constants, Tile(_PREPARED_ROWS, 64, 4, 1), grid, features
        )

    def _forward(self, tile: Tile, split: bool) -> KernelVariant:
        site, attributes = self.site, self.attributes
        absent = self._absent()
        if not attributes.softcap:
            absent.append("softcap")
        if split or not site.lse:
            absent.append("lse")
        absent += ["y", "y_batch", "y_head", "y_row"] if split else ["partial_out", "partial_lse", "splits"]
        rows_per_tile = min(tile.block_m // self.fold, attributes.q_block_size)
        tiles_per_row = -(-attributes.q_block_size // rows_per_tile)
        constants = {
            "Q_BLOCK": attributes.q_block_size, "KV_BLOCK": attributes.kv_block_size, "GROUP": site.group,
            "FOLD": self.fold, "CAUSAL": attributes.is_causal, "EXCLUDE_SELF": attributes.exclude_self,
            "SOFTCAP": attributes.softcap > 0, **widths(site), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "PRECISION": precision(site), "SPLIT": split,
        }  # fmt: skip
        grid = (f"rows * {tiles_per_row} * {self.units} * B", "splits" if split else "1", "1")
        features = self._features(*(["split"] if split else []))
        return self.builder.variant(
            f"{_MODULE}:block_sparse_forward", _FORWARD, absent, constants, tile, grid, features
        )
