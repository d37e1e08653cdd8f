"""BlockSparseAttention's cases of `cpu_attention.py`: BigBird, Phi-3-small's causal layout, more and more blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from cpu_contest import (
    MUST_FLOOR,
    ONE_THREAD,
    Array,
    Floor,
    Run,
    compare_options,
    interleave,
    kernel,
    node_session,
    record,
    sgemm,
    table,
)
from longspan.exporter.patterns import BlockLists, Lengths, Pattern, RandomBlocks, build_lists
from longspan.exporter.patterns.systems import big_bird_itc, phi3_small
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention
from onnx import helper

SPARSE, FLEX = "SparseAttention", "flex_attention"
MUST_RATIO = {FLEX: 1.5, SPARSE: 3.0}
MUST_DOUBLE = 2.1


@dataclass(frozen=True)
class BlockSite:
    """Sizes and pattern of one attention layer, float32; the pattern is whole blocks, or those and causal."""

    title: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    size: int
    block: int
    pattern: Pattern
    causal: bool = False

    def __str__(self) -> str:
        sizes = (
            f"B{self.batch} H{self.heads} KVH{self.kv_heads} S{self.length} D{self.size}, "
            f"{self.lists.listed_pairs / self.block**2 / self.lists.heads:.0f} blocks of {self.block} per head"
        )
        return f"{self.title}, {sizes}"

    @cached_property
    def lists(self) -> BlockLists:
        """The block lists of all heads."""
        return build_lists(self.pattern, Lengths.of(self.length), self.block, self.block, heads=self.heads)

    def operands(self) -> dict[str, Array]:
        """Random Q, K and V."""
        rng = np.random.default_rng(0)
        heads = {"Q": self.heads, "K": self.kv_heads, "V": self.kv_heads}
        return {
            name: rng.standard_normal((self.batch, count, self.length, self.size), dtype=np.float32)
            for name, count in heads.items()
        }

    def flops(self) -> int:
        """Floating-point operations of the blocks listed, partial ones counted whole."""
        pairs = self.lists.listed_pairs * (self.heads // self.lists.heads) * self.batch
        return 4 * self.size * pairs

    def run(self, operands: Mapping[str, Array], threads: int, **attributes: Any) -> Run:
        """Our kernel; the operands may hold optional inputs."""
        attributes |= {"q_block_size": self.block, "kv_block_size": self.block}
        return kernel("BlockSparseAttention", {**operands, **self.lists.inputs()}, attributes, threads)

    def record(self) -> dict[str, Any]:
        """Sizes for JSON."""
        names = ("title", "batch", "heads", "kv_heads", "length", "size", "block")
        return {name: getattr(self, name) for name in names} | {"pattern": self.pattern.describe()}


SITES = {
    "d": BlockSite("BigBird, 3 random", 8, 12, 12, 4096, 64, 64, big_bird_itc(64, random=3, heads=12)),
    "layout": BlockSite("Phi-3-small", 1, 32, 8, 4096, 128, 64, phi3_small(heads=32), causal=True),
    # No anchors: whether this program works.
    "tiny-blocks": BlockSite("BigBird, 1 random", 1, 4, 4, 512, 32, 32, big_bird_itc(32, random=1, heads=4)),
    "tiny-layout": BlockSite(
        "Phi-3-small", 1, 4, 2, 512, 32, 32, phi3_small(32, local_blocks=4, stride=4, heads=4), causal=True
    ),
}  # fmt: skip


def flex_attention(site: BlockSite, operands: Mapping[str, Array], threads: int) -> Run:
    """Torch's block-sparse attention, compiled, with the same lists: its partial blocks are the diagonal ones."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(operands[name]) for name in ("Q", "K", "V"))

    def mask_mod(_b: Any, _h: Any, row: Any, key: Any) -> Any:
        return row >= key

    # FlexAttention wants room for every block in both lists.
    columns = -(-site.length // site.block)
    lists: list[Any] = []
    for name in BlockLists.ARRAYS[:4]:
        array = getattr(site.lists, name)
        array = np.broadcast_to(array, (1, site.heads, *array.shape[2:]))
        room = [(0, 0)] * 3 + [(0, columns - array.shape[-1])]
        lists.append(torch.from_numpy(np.pad(array, room) if name.endswith("indices") else array.copy()))
    mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=site.block, mask_mod=mask_mod, seq_lengths=(site.length, site.length)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=site.heads != site.kv_heads).numpy()


def sparse_attention(site: BlockSite, operands: Mapping[str, Array], threads: int) -> Run:
    """ONNX Runtime's own kernel: causal layouts, one per head; the keys are written to a cache first, as it wants."""
    lists = site.lists
    columns: list[list[int]] = []
    starts: list[list[int]] = []
    for head in range(lists.heads):
        columns.append([])
        starts.append([0])
        for row in range(lists.kv_num_blocks.shape[2]):
            listed = [
                *lists.kv_indices[0, head, row, : lists.kv_num_blocks[0, head, row]],
                *lists.full_kv_indices[0, head, row, : lists.full_kv_num_blocks[0, head, row]],
            ]
            columns[-1] += sorted(int(block) for block in listed)
            starts[-1].append(len(columns[-1]))
    width = max(map(len, columns))
    feeds: dict[str, Array] = {
        name: np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(site.batch, site.length, -1)
        for name, array in operands.items()
    }
    cache = (site.batch, site.kv_heads, site.length, site.size)
    feeds |= {
        "past_key": np.zeros(cache, np.float32),
        "past_value": np.zeros(cache, np.float32),
        "rows": np.array(starts, np.int32),
        "columns": np.array([own + [-1] * (width - len(own)) for own in columns], np.int32),
        "total": np.array(site.length, np.int32),
        "lengths": np.full(site.batch, site.length, np.int32),
    }
    shared = {"present_key": "past_key", "present_value": "past_value"}
    node = helper.make_node(
        SPARSE,
        list(feeds),
        ["Y", *shared],
        domain="com.microsoft",
        num_heads=site.heads,
        kv_num_heads=site.kv_heads,
        sparse_block_size=site.block,
    )
    run = node_session(node, feeds, threads, library=False, shared=shared)
    split = (site.batch, site.length, site.heads, site.size)
    return lambda: run().reshape(split).transpose(0, 2, 1, 3)  # a view


def check(site: BlockSite, operands: Mapping[str, Array], contestants: Mapping[str, Run]) -> dict[str, float]:
    """Largest error of each contestant on some rows; the reference of a row is dense attention over the keys it counts.

    Raises:
        SystemExit: an error is too large.
    """
    lengths, keys = Lengths.of(site.length), np.arange(site.length)
    rows = np.unique(np.linspace(0, site.length - 1, 8).astype(int))
    want = {}
    for head in range(site.heads):
        pattern, group = site.pattern.head(head), head * site.kv_heads // site.heads
        for row in rows:
            seen = pattern.multiplicity(row, keys, lengths) > 0
            want[head, row] = sliding_window_attention(
                operands["Q"][:, head : head + 1, row : row + 1],
                operands["K"][:, group : group + 1, seen],
                operands["V"][:, group : group + 1, seen],
                attributes=Attributes(),
            )[0][:, 0, 0]
    errors = {}
    for name, run in contestants.items():
        got = run()
        errors[name] = max(float(np.abs(got[:, head, row] - rows).max()) for (head, row), rows in want.items())
        # Scores are sums of `size` products of normals, about N(0, 1) after scaling; outputs are means of normals.
        if not errors[name] < 1e-5:
            raise SystemExit(f"{name}: error {errors[name]:.1e} against the reference, allowed 1e-5; nothing was timed")
    return errors


def run_case(name: str, threads: int, repetitions: int, quick: bool) -> dict[str, Any]:
    """Time one case of the anchors and print the ratios."""
    site = SITES[name]
    operands = site.operands()
    contestants = {"longspan": site.run(operands, threads)}
    if not quick:
        contestants[FLEX] = flex_attention(site, operands, threads)
    if site.causal:
        contestants[SPARSE] = sparse_attention(site, operands, threads)
    errors = check(site, operands, contestants)
    timings = interleave({ONE_THREAD: sgemm(1), "sgemm": sgemm(threads), **contestants}, repetitions)
    floor = Floor.of(site.flops(), timings, "longspan")
    print(f"\ncase {name}: {site}")
    table(timings, errors)
    print(floor)
    verdicts = {"floor": floor.floor_share >= MUST_FLOOR}
    ratios = {}
    for peer in contestants.keys() & MUST_RATIO.keys():
        ratios[peer] = timings[peer].best / timings["longspan"].best
        medians = timings[peer].median / timings["longspan"].median
        verdicts[peer] = ratios[peer] >= MUST_RATIO[peer]
        print(f"{ratios[peer]:.2f}x {peer}, medians {medians:.2f}x (must {MUST_RATIO[peer]}x)")
    return {
        "site": site.record(),
        "timings": record(timings),
        "errors": errors,
        **asdict(floor),
        "ratios": ratios,
        "verdicts": verdicts,
    }


def run_options(threads: int, repetitions: int) -> dict[str, Any]:
    """What sinks, a soft cap and padding add to one sequence of case d."""
    site = replace(SITES["d"], batch=1)
    operands = site.operands()
    kept = np.ones((1, site.length), bool)
    kept[:, -64:] = False
    contestants = {
        "plain": site.run(operands, threads),
        "sinks": site.run(operands | {"sinks": np.zeros(site.heads, np.float32)}, threads),
        "softcap": site.run(operands, threads, softcap=50.0),
        "padding": site.run(operands | {"attn_mask": kept}, threads),
    }
    return compare_options("case d", contestants, repetitions)


def run_doubling(threads: int, repetitions: int) -> dict[str, Any]:
    """What twice the blocks cost: 4, 8, 16 and 32 random ones in every row of 64."""
    sites = {
        str(count): BlockSite(f"{count} random", 1, 12, 12, 4096, 64, 64, RandomBlocks(64, count, 0))
        for count in (4, 8, 16, 32)
    }
    timings = interleave({name: site.run(site.operands(), threads) for name, site in sites.items()}, repetitions)
    print(f"\ncost of twice the blocks\n{'blocks per row':22}{'best ms':>9} {'median':>9} {'worst':>9} {'best CPU':>9}")
    ratios = {}
    for name, before in zip(sites, [None, *sites], strict=False):
        words = ""
        if before is not None:
            ratio = min(timings[name].cpu_seconds) / min(timings[before].cpu_seconds)
            ratios[f"{name} against {before}"] = ratio
            words = f"   {ratio:.2f}x processor time (must be at most {MUST_DOUBLE}x)"
        print(f"{name:22}{timings[name]}{words}")
    return {
        "timings": record(timings),
        "ratios": ratios,
        "verdicts": {name: ratio <= MUST_DOUBLE for name, ratio in ratios.items()},
    }
