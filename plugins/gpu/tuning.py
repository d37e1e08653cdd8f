"""Choose tile sizes by arithmetic, and write them down in ``tuned.py``: ``python -m longspan.plugins.gpu.tuning``.

A tile must fit an architecture's shared memory (`SHARED_MEMORY`) and, in registers, its accumulator and its scores. Of
those that fit, the largest wins, where a second block per multiprocessor counts more than a deeper pipeline. Kernels
that do more to a score than scale it have kinds of their own, with smaller tiles. These are starting points that need
no GPU to find; nobody has measured them, and the table says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from .tiles import Tile

SHARED_MEMORY = {
    80: (163, 164),
    86: (99, 100),
    87: (163, 164),
    89: (99, 100),
    90: (227, 228),
    100: (227, 228),
    120: (99, 100),
}
"""KB of shared memory per block (with the opt-in) and per multiprocessor, from the CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability"; the runtime keeps 1 KB of each block's for itself."""

WIDTHS = (16, 32, 64, 128, 256)
"""Padded head sizes."""

KINDS = ("whole", "whole, edited scores", "split", "split, edited scores")
"""For many rows and for few; plain, and with a bias, a soft cap, spans, block masks, positions or global keys."""

_SHARED_OPERANDS = (90, 100)
_SLACK = 2048

_REGISTERS = 115
_REGISTERS_EDITED = 80
_REGISTERS_FLOAT32 = 60
"""Registers a thread may spend on accumulator and scores, so that the rest (pointers, operands, row state, and what is
added to the scores) does not spill, as far as compiling shows it. Products of float32 keep their operands there too."""


def shared_bytes(architecture: int, tile: Tile, width: int, element: int) -> int:
    """Shared memory that a kernel of this tile needs, about: each stage's keys and values, and what else lies there.

    wgmma and tcgen05 read the queries from shared memory, and what changes its layout between the two products passes
    through it; other products take both from registers, where mma.sync may have several warps share 16 rows.
    """
    stage = tile.block_n * 2 * width
    stages, queries, scores = tile.num_stages * stage, tile.block_m * width, tile.block_m * tile.block_n
    if architecture in _SHARED_OPERANDS and element == 2:
        elements = stages + queries + scores
    elif element == 2:
        elements = max(stages, queries) + (scores if tile.block_m < 16 * tile.num_warps else 0)
    else:
        elements = max(stages, queries + stage) + scores
    return elements * element + _SLACK


def registers(tile: Tile, width: int) -> float:
    """32-bit registers per thread for the accumulator, the scores, and their 16-bit copy."""
    return tile.block_m * (width + 1.5 * tile.block_n) / (32 * tile.num_warps)


def choose(architecture: int, kind: str, element: int, width: int, limit: int | None = None) -> Tile:
    """The tile for one line of the table.

    Args:
        architecture: Compute capability.
        kind: One of `KINDS`.
        element: Bytes of an element of T.
        width: Padded head size, the larger of D's and D_v's.
        limit: Bytes of shared memory a block may take, where that is less than the architecture allows; smaller tiles
            come into question then.

    Raises:
        ValueError: nothing fits.
    """

    def fitting_among(candidates: Iterator[Tile]) -> list[Tile]:
        return [tile for tile in candidates if _fits(tile, architecture, kind, element, width, limit)]

    fitting = fitting_among(_candidates(kind, element, width))
    if not fitting and limit is not None:
        fitting = fitting_among(_small_candidates())
    if not fitting:
        raise ValueError(f"no tile for sm_{architecture}, {kind}, {element} bytes, width {width}")
    per_sm = SHARED_MEMORY[architecture][1]

    def worth(tile: Tile) -> tuple[int, ...]:
        blocks = min(per_sm * 1024 // (shared_bytes(architecture, tile, width, element) + 1024), 2)
        pipelined = min(tile.num_stages, 2)
        return (tile.block_m, min(tile.block_n, 64), pipelined, blocks, tile.block_n, tile.num_stages, -tile.num_warps)

    return max(fitting, key=worth)


def _candidates(kind: str, element: int, width: int) -> Iterator[Tile]:
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    stages: tuple[int, ...]
    if element == 4:  # products on the plain units: a thread holds both operands too
        rows, keys, stages = (32, 16), (32, 16) if width <= 64 else (16,), (2, 1)
    elif kind.startswith("whole"):
        rows, keys, stages = (128, 64), (64, 32), (3, 2)
    else:
        rows, keys, stages = (16,), (64, 32) if kind.endswith("edited scores") else (128, 64, 32), (4, 3, 2)
    if kind.startswith("split") and element == 4:
        rows = (16,)
    # A window's ends waste half a tile of keys on each side: no more than 64 keys where there are many rows.
    for block_m, block_n, warps, num_stages in product(rows, keys, (4, 8), stages):
        yield Tile(block_m, block_n, warps, num_stages)


def _small_candidates() -> Iterator[Tile]:
    for block_m, block_n, warps in product((32, 16), (32, 16), (4, 8)):
        yield Tile(block_m, block_n, warps, 2)


def _fits(tile: Tile, architecture: int, kind: str, element: int, width: int, limit: int | None) -> bool:
    limit = min(limit or SHARED_MEMORY[architecture][0] * 1024, SHARED_MEMORY[architecture][0] * 1024)
    allowed = _REGISTERS_EDITED if kind.endswith("edited scores") else _REGISTERS
    if element == 4:
        allowed = _REGISTERS_FLOAT32
    return shared_bytes(architecture, tile, width, element) <= limit and registers(tile, width) <= allowed


def table() -> dict[tuple[int, str, int, int], Tile]:
    """Every line: (architecture, kind, element size, width) → tile."""
    keys = product(SHARED_MEMORY, KINDS, (2, 4), WIDTHS)
    return {key: choose(*key) for key in keys}


def source() -> str:
    """Text of ``tuned.py``."""
    lines = [
        '"""Tile sizes per architecture; written by ``python -m longspan.plugins.gpu.tuning``, not by hand.',
        "",
        "Chosen by shared-memory and register arithmetic, not by measurement: see ``tuning.py``.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from .tiles import Tile",
        "",
        "# (compute capability, kind, bytes of an element, padded head size): rows, keys, warps, stages",
        "TUNED: dict[tuple[int, str, int, int], Tile] = {",
    ]
    for (architecture, kind, element, width), tile in table().items():
        sizes = f"{tile.block_m}, {tile.block_n}, {tile.num_warps}, {tile.num_stages}"
        lines.append(f'    ({architecture}, "{kind}", {element}, {width}): Tile({sizes}),')
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "tuned.py").write_text(source(), encoding="utf-8")
