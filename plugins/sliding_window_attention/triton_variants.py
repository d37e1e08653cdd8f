"""Which kernels a SlidingWindowAttention node takes on a GPU, and how they are launched."""

from __future__ import annotations

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

_MODULE = "sliding_window_attention.triton_kernel"

_WINDOW: tuple[Line, ...] = (
    ("q", "*T", "input:Q"),
    ("k", "*T", "input:K"),
    ("v", "*T", "input:V"),
    ("attn_mask", "*u8", "input:attn_mask"),
    ("nonpad_kv_seqlen", "*i64", "input:nonpad_kv_seqlen"),
    ("global_mask", "*u8", "input:global_mask"),
    ("global_keys", "*i32", "buffer:global_keys"),
    ("global_key_counts", "*i32", "buffer:global_key_counts"),
    ("band_bias", "*T", "input:band_bias"),
    ("sinks", "*T", "input:sinks"),
    ("spans", "*fp32", "input:spans"),
    ("y", "*T", "output:Y"),
    ("lse", "*fp32", "output:lse"),
    ("partial_out", "*fp32", "buffer:partial_out"),
    ("partial_lse", "*fp32", "buffer:partial_lse"),
    ("status", "*i32", "buffer:status"),
    ("batches", "i32", "size:B"),
    ("heads", "i32", "size:H_q"),
    ("seq_q", "i32", "size:S_q"),
    ("seq_k", "i32", "size:S_k"),
    ("tiles", "i32", "size:tiles"),
    ("splits", "i32", "size:splits"),
    ("left", "i32", "attribute:left_window_size"),
    ("right", "i32", "attribute:right_window_size"),
    ("bias_left", "i32", "attribute:left_window_size"),
    ("scale", "fp32", "scalar:scale"),
    ("softcap", "fp32", "scalar:softcap"),
    ("span_ramp", "fp32", "scalar:span_ramp"),
    *ROW_STRIDES,
    ("bias_batch", "i64", "stride:band_bias.0"),
    ("bias_head", "i64", "stride:band_bias.1"),
    ("bias_row", "i64", "stride:band_bias.2"),
)

_COLLECT: tuple[Line, ...] = (
    ("global_mask", "*u8", "input:global_mask"),
    ("attn_mask", "*u8", "input:attn_mask"),
    ("nonpad_kv_seqlen", "*i64", "input:nonpad_kv_seqlen"),
    ("status", "*i32", "buffer:status"),
    ("global_keys", "*i32", "buffer:global_keys"),
    ("global_key_counts", "*i32", "buffer:global_key_counts"),
    ("global_rows", "*i32", "buffer:global_rows"),
    ("global_row_counts", "*i32", "buffer:global_row_counts"),
    ("seq_q", "i32", "size:S_q"),
    ("seq_k", "i32", "size:S_k"),
)


def _global_rows(own: bool) -> tuple[Line, ...]:
    prefix = "global_" if own else ""
    return (
        ("q", "*T", f"input:{prefix}Q"),
        ("k", "*T", f"input:{prefix}K"),
        ("v", "*T", f"input:{prefix}V"),
        ("attn_mask", "*u8", "input:attn_mask"),
        ("nonpad_kv_seqlen", "*i64", "input:nonpad_kv_seqlen"),
        ("global_rows", "*i32", "buffer:global_rows"),
        ("global_row_counts", "*i32", "buffer:global_row_counts"),
        ("sinks", "*T", "input:sinks"),
        ("y", "*T", "output:Y"),
        ("lse", "*fp32", "output:lse"),
        ("partial_out", "*fp32", "buffer:partial_out_global"),
        ("partial_lse", "*fp32", "buffer:partial_lse_global"),
        ("status", "*i32", "buffer:status"),
        ("batches", "i32", "size:B"),
        ("heads", "i32", "size:H_q"),
        ("seq_q", "i32", "size:S_q"),
        ("seq_k", "i32", "size:S_k"),
        ("splits", "i32", "size:global_splits"),
        ("scale", "fp32", "scalar:scale"),
        ("softcap", "fp32", "scalar:softcap"),
        *ROW_STRIDES,
    )


def recipe(
    site: KernelSite, architecture: int, tiles: tuple[Tile, Tile] | None = None, few_rows: int | None = None
) -> Recipe:
    """Kernels and launches of a site.

    Args:
        site: A SlidingWindowAttention node.
        architecture: Compute capability.
        tiles: Tiles for many and for few rows, instead of the tuned ones.
        few_rows: Largest S_q for which keys are split, instead of `FEW_TILES` tiles of rows.
    """
    whole, split = tiles or (tile_for(site, architecture, "whole"), tile_for(site, architecture, "split"))
    return _Recipes(site, architecture, whole, split).recipe(few_rows)


class _Recipes:
    def __init__(self, site: KernelSite, architecture: int, whole: Tile, split: Tile) -> None:
        self.site, self.whole, self.split = site, whole, split
        self.attributes = Attributes.from_mapping(site.attributes)
        self.builder = Builder(site, architecture)
        self.architecture = architecture
        dilation = self.attributes.dilation
        self.dilations = dilation if len(dilation) > 1 else dilation * site.heads
        groups = [self.dilations[h : h + site.group] for h in range(0, site.heads, site.group)]
        uniform = all(len(set(group)) == 1 for group in groups)
        self.fold = min(site.group, LARGEST_FOLD, split.block_m) if uniform else 1
        self.folds = -(-site.group // self.fold)
        self.units = f"H_kv * {self.folds}" if self.folds > 1 else "H_kv"

    def recipe(self, few_rows: int | None) -> Recipe:
        few = FEW_TILES * self.split.block_m // self.fold if few_rows is None else few_rows
        paths = (self._path("split", f"le(S_q, {few})", self.split), self._path("whole", "1", self.whole))
        return Recipe(self.site, self.architecture, paths)

    def _path(self, name: str, condition: str, tile: Tile) -> Path:
        site, split = self.site, name == "split"
        rows = tile.block_m // self.fold
        sizes = [("tiles", self._tiles(rows))]
        buffers: list[Buffer] = []
        if split:
            sizes.append(("splits", number_of_splits(f"B * {self.units} * tiles", self._band_keys(rows), tile.block_n)))
            buffers += partial_buffers(site)
        kernels = [self._window(tile, split)]
        if split:
            kernels.append(merge_variant(self.builder, "", "S_q", "splits", scattered=False))
        if site.has("global_mask"):
            tile_rows = str(rows)
            sizes.append(("global_splits", number_of_splits(f"B * {self.units}", "S_k", tile.block_n)))
            buffers += [
                Buffer("global_keys", "i32", "B * S_k"),
                Buffer("global_key_counts", "i32", "B"),
                Buffer("global_rows", "i32", "B * S_q"),
                Buffer("global_row_counts", "i32", "B"),
                Buffer("partial_out_global", "fp32", f"global_splits * B * H_q * {tile_rows} * {site.v_head_size}"),
                Buffer("partial_lse_global", "fp32", f"global_splits * B * H_q * {tile_rows}"),
            ]
            merge = merge_variant(self.builder, "_global", tile_rows, "global_splits", scattered=True)
            kernels = [self._collect(), *kernels, self._global_rows(tile), merge]
        if site.has("nonpad_kv_seqlen"):
            buffers.append(status_buffer())
        return Path(name, condition, tuple(sizes), tuple(buffers), tuple(kernels))

    def _tiles(self, rows: int) -> str:
        """Tiles of the head that has most of them."""
        counts = []
        for step in sorted(set(self.dilations)):
            per_class = f"cdiv(cdiv(S_q, {step}), {rows})" if step > 1 else f"cdiv(S_q, {rows})"
            counts.append(per_class if step == 1 else f"min({step}, S_q) * {per_class}")
        while len(counts) > 1:  # the grammar's max takes 16 operands
            counts = [f"max({', '.join(part)})" if len(part := counts[i : i + 16]) > 1 else part[0]
                      for i in range(0, len(counts), 16)]  # fmt: skip
        return counts[0]

    @staticmethod
    def _band_keys(rows: int) -> str:
        """Keys that a tile sees, at most."""
        return f"min(S_k, LEFT + RIGHT + {rows})"

    def _absent(self, *also: str) -> list[str]:
        optional = ("attn_mask", "nonpad_kv_seqlen", "global_mask", "band_bias", "sinks", "spans")
        absent = [name for name in optional if not self.site.has(name)]
        if "global_mask" in absent:
            absent += ["global_keys", "global_key_counts"]
        if "nonpad_kv_seqlen" in absent:
            absent.append("status")
        if "band_bias" in absent:
            absent += ["bias_batch", "bias_head", "bias_row", "bias_left"]
        if "spans" in absent:
            absent.append("span_ramp")
        if not self.attributes.softcap:
            absent.append("softcap")
        if not self.site.lse:
            absent.append("lse")
        return absent + list(also)

    def _features(self, *names: str) -> list[str]:
        attributes = self.attributes
        flags = {
            "causal": attributes.is_causal, "softcap": attributes.softcap > 0, "dilation": max(self.dilations) > 1,
            "lse": self.site.lse,
        }  # fmt: skip
        inputs = [name for name in self.site.inputs if name not in ("Q", "K", "V")]
        return [*inputs, *(name for name, given in flags.items() if given), *names]

    def _shared_constants(self, tile: Tile) -> dict[str, object]:
        return {
            "GROUP": self.site.group, "FOLD": self.fold, "CAUSAL": self.attributes.is_causal,
            "SOFTCAP": self.attributes.softcap > 0, **widths(self.site), "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n, "PRECISION": precision(self.site),
        }  # fmt: skip

    def _window(self, tile: Tile, split: bool) -> KernelVariant:
        absent = self._absent(*(("y", "lse", "y_batch", "y_head", "y_row") if split else
                                ("partial_out", "partial_lse", "splits")))  # fmt: skip
        per_unit = self.dilations[:: self.site.group] if self.fold > 1 or self.site.group == 1 else self.dilations
        per_unit = tuple(step for step in per_unit for _ in range(self.folds if self.fold > 1 else 1))
        dilations = per_unit if len(set(per_unit)) > 1 else per_unit[:1]
        constants = {**self._shared_constants(tile), "DILATIONS": dilations, "SPLIT": split}
        grid = (f"tiles * {self.units} * B", "splits" if split else "1", "1")
        features = self._features(*(["split"] if split else []))
        return self.builder.variant(f"{_MODULE}:window_forward", _WINDOW, absent, constants, tile, grid, features)

    def _collect(self) -> KernelVariant:
        absent = self._absent()
        lines = [line for line in _COLLECT if line[0] not in absent or line[0] in ("attn_mask", "nonpad_kv_seqlen")]
        absent = [name for name in absent if name in ("attn_mask", "nonpad_kv_seqlen")]
        if "nonpad_kv_seqlen" in absent:
            absent.append("status")
            lines = list(_COLLECT)
        return self.builder.variant(
            f"{_MODULE}:collect_global", lines, absent, {"BLOCK": 1024}, Tile(1, 1024, 4, 1), ("B", "1", "1"),
            [name for name in ("attn_mask", "global_mask", "nonpad_kv_seqlen") if self.site.has(name)],
        )  # fmt: skip

    def _global_rows(self, tile: Tile) -> KernelVariant:
        absent = [name for name in self._absent() if name not in ("global_keys", "global_key_counts")]
        features = [name for name in self._features() if name not in ("band_bias", "spans", "dilation")]
        return self.builder.variant(
            f"{_MODULE}:global_rows_forward", _global_rows(self.site.has("global_Q")), absent,
            self._shared_constants(tile), tile, (f"global_splits * {self.units} * B", "1", "1"), features,
        )  # fmt: skip
