"""Rows of blocks at the ends of a text that list more blocks than all others: what a function body may rely on.

The body that TensorRT builds takes all sizes from shapes, so that every row of blocks is computed at the width of the
lists, and time is quadratic where a few rows list every block. Which rows those are no shape says, but a pattern does:
it is asked at every number of blocks, and the graph's own lists are compared with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ....plugins.block_sparse_attention.definition import BLOCK_SPARSE_ATTENTION, Attributes
from ....plugins.block_sparse_attention.long_rows import LongRows
from ....plugins.errors import InvalidOperands
from ...errors import InvalidRequest
from ...manifest import InputRecord
from ...patterns import Lengths, Pattern
from ...patterns.regimes import limits_of, rule_of
from ...sites.block_sparse import COMPUTED, FIXED
from ...sites.graph import SiteGraph
from ...sites.kind import Unknown
from ...sites.record import AttentionSite, find_sites, longspan_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

GAIN = 1.3
"""How many times as much must be computed without, at the longest length, for rows to be computed apart."""

_MOST_LENGTHS = 512
"""Lengths at which a pattern is asked that promises nothing beyond them."""

_SAMPLES = 16
"""Lengths at which others are asked beyond those after which nothing changes."""

_COMPARED = 8
"""Lengths at which lists in the graph are compared with the pattern."""

_SHAPES = ("Shape", "Size")
"""Operators whose results do not depend on what a text says."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowWidths:
    """The lists of one number of rows of blocks.

    Attributes:
        rows: Most blocks that the two lists of each row name, over all heads, (rows,).
        width: Slots of the lists, both kinds.
    """

    rows: Counts
    width: int

    @classmethod
    def of(cls, partial: npt.NDArray[np.int32], full: npt.NDArray[np.int32]) -> RowWidths:
        """Read from ``kv_num_blocks`` and ``full_kv_num_blocks``: last axis rows, the others broadcast."""
        kinds = [np.maximum(counts.astype(np.int64), 0) for counts in (partial, full)]
        listed, width = kinds[0] + kinds[1], sum(int(counts.max(initial=0)) for counts in kinds)
        return cls(listed.reshape(-1, listed.shape[-1]).max(0), width)

    def joined(self, other: RowWidths) -> RowWidths:
        """What holds for both."""
        return RowWidths(np.maximum(self.rows, other.rows), max(self.width, other.width))


def find_long_rows(model: ir.Model, longest: Mapping[str, int]) -> dict[str, LongRows]:
    """Which sites have a few long rows at the ends, where computing them apart is worth it.

    A site has lists that are constants, or that the graph computes from nothing but shapes and that agree with the
    recorded pattern. For lists that the model is given, nothing is known.

    Args:
        model: A bundle's graph.
        longest: Largest size, over all profiles, of the graph's symbolic dimensions.

    Returns:
        For each such site, by the name of its node, what its body may rely on up to those sizes.
    """
    nodes = {node.name: node for node in longspan_nodes(model) if node.op_type == BLOCK_SPARSE_ATTENTION.name}
    graph = SiteGraph(model, [_record(value) for value in model.graph.inputs])
    found: dict[str, LongRows] = {}
    for site in find_sites(model, ""):
        node = nodes.get(site.node)
        if node is None:
            continue
        try:
            apart = _of_constants(node) if site.lists == FIXED else None
            if site.lists == COMPUTED:
                apart = _of_computed(site, node, graph, longest)
        except (InvalidOperands, InvalidRequest, Unknown):
            continue
        if apart is not None:
            found[site.node] = apart
    return found


def choose(widths: Mapping[int, RowWidths]) -> LongRows | None:
    """The fewest rows at the ends that leave least to compute at the longest length; None where little is gained.

    Args:
        widths: Lists of texts by their rows of blocks; where there is one length alone, it is the only one.
    """
    most = max(widths)
    later = {rows: lists for rows, lists in widths.items() if 2 * rows > most}
    # Ends of long texts do not meet, so that the two are chosen one after the other.
    ends = range(min(later) // 2 + 1)
    before = np.array([max(_most(x.rows[end : n // 2]) for n, x in later.items()) for end in ends])
    after = np.array([max(_most(x.rows[n // 2 : n - end]) for n, x in later.items()) for end in ends])
    longest = widths[most]
    best: tuple[int, LongRows] | None = None
    for width in sorted({*before.tolist(), *after.tolist()}):
        first, last = (int((side <= width).argmax()) for side in (before, after))
        if before[first] > width or after[last] > width:
            continue
        broken = [n for n, x in widths.items() if _most(x.rows[first : max(n - last, first)]) > width]
        apart = LongRows(first, last, max(width, 1), max(broken, default=0), most)
        slots = apart.slots(most, longest.width)
        if best is None or slots < best[0]:
            best = slots, apart
    if best is None or best[0] * GAIN > most * longest.width:
        return None
    return best[1]


def _most(counts: Counts) -> int:
    return int(counts.max(initial=0))


def _of_constants(node: ir.Node) -> LongRows | None:
    """What is known of lists in the file, which are for one number of rows of blocks."""
    import onnx_ir as ir

    tensors = [None if value is None else ir.convenience.get_const_tensor(value) for value in _counts(node)]
    partial, full = (None if tensor is None else tensor.numpy() for tensor in tensors)
    if partial is None or full is None or not partial.shape[-1]:
        return None
    widths = RowWidths.of(partial, full)
    return choose({len(widths.rows): widths})


def _of_computed(site: AttentionSite, node: ir.Node, graph: SiteGraph, longest: Mapping[str, int]) -> LongRows | None:
    """What is known of lists that the graph computes, for texts up to the longest one."""
    attributes, most = Attributes.from_mapping(site.attributes), _length(node, longest)
    pattern = site.recorded
    if pattern is None or most is None or not _follows_from_shapes(_counts(node)):
        return None
    if any(value is None or value.shape is None or value.shape[0] != 1 for value in _counts(node)):
        return None
    tall, wide = attributes.q_block_size, attributes.kv_block_size
    apart = _of_pattern(pattern, tall, wide, most)
    if apart is None or not _agree(site, graph, pattern, _some(pattern, tall, wide, most, apart)):
        return None
    return apart


@functools.lru_cache(maxsize=64)
def _of_pattern(pattern: Pattern, tall: int, wide: int, most: int) -> LongRows | None:
    """What is known of the lists of a pattern; layers usually share one."""
    lengths = _lengths(pattern, tall, wide, most)
    if lengths is None:
        return None
    widths: dict[int, RowWidths] = {}
    for length in lengths:
        lists = _asked(pattern, length, tall, wide)
        known = widths.get(len(lists.rows))
        widths[len(lists.rows)] = lists if known is None else known.joined(lists)
    return choose(widths)


@functools.lru_cache(maxsize=64)
def _asked(pattern: Pattern, length: int, tall: int, wide: int) -> RowWidths:
    """The lists of a pattern at one length."""
    from ...patterns import build_lists

    lists = build_lists(pattern, Lengths.of(length), tall, wide)
    return RowWidths.of(lists.kv_num_blocks, lists.full_kv_num_blocks)


def _lengths(pattern: Pattern, tall: int, wide: int, most: int) -> list[int] | None:
    """Lengths at which a pattern is asked: whole blocks and one token more, each number of blocks up to the longest.

    A pattern whose rule for long texts has a structure has finitely many kinds of blocks. Once a text has shown them
    all, a row has as many blocks of the start, of the end and of its neighbourhood as in longer texts, and if it lists
    any between, it lists the more the longer the text is; there, some lengths are enough.
    """
    every = {edge + more for size in (tall, wide) for edge in range(0, most + size, size) for more in (0, 1)}
    lengths = sorted({min(length, most) for length in every if length})
    limits = limits_of(pattern)
    structure = rule_of(pattern, most).structure
    if structure is None:
        return lengths if len(lengths) <= _MOST_LENGTHS else None
    unit = math.lcm(structure.period, structure.tail_unit, tall, wide)
    edge = max((0, *limits, *pattern.thresholds)) + structure.head + structure.tail + 2 * structure.near + 4 * unit
    known = sum(length <= edge for length in lengths)
    if known > _MOST_LENGTHS:
        return None
    beyond = lengths[known:]
    places = np.linspace(0, len(beyond) - 1, _SAMPLES).round().astype(int).tolist() if beyond else []
    last = [length for length in beyond if length > most - 2 * unit]
    return lengths[:known] + sorted({*last, *(beyond[place] for place in places)})


def _some(pattern: Pattern, tall: int, wide: int, most: int, apart: LongRows) -> list[int]:
    """Some of the lengths that were asked about: both ends, those around changes, and others between."""
    lengths = _lengths(pattern, tall, wide, most) or [most]
    edges = {apart.up_to * tall, (apart.first + apart.last + 1) * tall, *pattern.thresholds}
    near = {min(lengths, key=lambda length: (abs(length - edge), length)) for edge in edges}
    near |= {next((length for length in lengths if length > edge), lengths[-1]) for edge in edges}
    spread = [lengths[place] for place in np.linspace(0, len(lengths) - 1, 4).round().astype(int)]
    chosen = sorted(near)
    some = {chosen[place] for place in np.linspace(0, len(chosen) - 1, _COMPARED).round().astype(int)}
    return sorted({*some, *spread})


def _agree(site: AttentionSite, graph: SiteGraph, pattern: Pattern, lengths: Iterable[int]) -> bool:
    """Whether each row lists as many blocks in the graph as the pattern asks for."""
    for length in lengths:
        listed = graph.listed(site, length)
        if listed.seq_q != length or listed.seq_k != length:
            return False
        own = RowWidths.of(listed.lists["kv_num_blocks"], listed.lists["full_kv_num_blocks"])
        asked = _asked(pattern, length, listed.attributes.q_block_size, listed.attributes.kv_block_size)
        if not np.array_equal(own.rows, asked.rows):
            return False
    return True


def _length(node: ir.Node, longest: Mapping[str, int]) -> int | None:
    """Tokens of the longest text; None where there may be more keys than queries, or as many as one likes."""
    sizes: list[int | str | None] = []
    for value in node.inputs[:2]:
        if value is None or value.shape is None or len(value.shape) not in (3, 4):
            return None
        size = value.shape[len(value.shape) - 2]
        sizes.append(size if isinstance(size, int) else size.value)
    queries, keys = sizes
    if queries is None or queries != keys:
        return None
    return queries if isinstance(queries, int) else longest.get(queries)


def _counts(node: ir.Node) -> list[ir.Value | None]:
    names = [tensor.name for tensor in BLOCK_SPARSE_ATTENTION.inputs]
    return [node.inputs[names.index(name)] for name in ("kv_num_blocks", "full_kv_num_blocks")]


def _follows_from_shapes(values: Iterable[ir.Value | None]) -> bool:
    """Whether values are the same for all texts of one length."""
    seen: set[ir.Value] = set()
    waiting = [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in seen or (node is not None and node.domain == "" and node.op_type in _SHAPES):
            continue
        seen.add(value)
        if node is None:
            if value.const_value is None:
                return False
            continue
        if any(True for attribute in node.attributes.values() if attribute.type.name in ("GRAPH", "GRAPHS")):
            return False  # a nested graph may look at anything around it
        waiting += [given for given in node.inputs if given is not None]
    return True


def _record(value: ir.Value) -> InputRecord:
    """How to draw an input on which no lists depend but by its shape."""
    assert value.dtype is not None and value.shape is not None, "inputs of bundles have types and shapes"
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return InputRecord(
        value.name or "", str(value.dtype.numpy()), shape, "tokens" if value.dtype.is_integer() else "data"
    )
