"""What a FlexAttention ``mask_mod`` means: the pattern is read from the function's values, and then proved.

A mask_mod maps the indices of a batch entry, a head, a query and a key to whether the query sees the key. It is asked
for one row, one column and some diagonals far from the start of the text. They show the period after which it repeats,
the distance from which on all keys are alike, and how many tokens at the start are special. A pattern that follows,
with a name where one fits, else as a table, is accepted only if it agrees with the function pair by pair: on the whole
grid of a text in which all that the pattern shows occurs, or for large windows on whole rows of it, and at pairs drawn
from far beyond.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...patterns import (
    All,
    Blocked,
    Causal,
    Chunked,
    Columns,
    Empty,
    Fixed,
    Global,
    Lengths,
    Pattern,
    PerHead,
    Rows,
    Strided,
    Structure,
    Tokens,
    Window,
)
from ...patterns.tabulated import Tabulated, table_size

MaskMod = Callable[..., Any]
Seen = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

HORIZON = 131111
"""Position that is asked about as far from both ends; a prime, so that no chunk begins or ends there."""

_WHOLE = 3000
"""Tokens up to which every pair is compared."""

_LARGEST_TABLE = 2500
_SMALLEST_BLOCK = 8
_STRIP = 1 << 22
_DRAWN = 1 << 16
_DIAGONALS = 24


class Values(Protocol):
    """What can be asked which pairs it leaves."""

    def pairs(self, head: int, query: Integers, key: Integers) -> Seen:
        """Whether each query sees each key: 1-D arrays of one length."""
        ...

    def grid(self, head: int, query: Integers, key: Integers) -> Seen:
        """(queries, keys), whether each query sees each key."""
        ...


@dataclass(frozen=True)
class MaskValues:
    """A mask_mod, asked in numpy.

    Attributes:
        mask_mod: The function.
        batch: The batch entry that it is asked about.
    """

    mask_mod: MaskMod
    batch: int = 0

    def pairs(self, head: int, query: Integers, key: Integers) -> Seen:
        """Whether each query sees each key: 1-D arrays of one length."""
        seen = _vmapped(self.mask_mod, 1)(*self._of(head), _tensor(query), _tensor(key))
        return _bools(seen)

    def grid(self, head: int, query: Integers, key: Integers) -> Seen:
        """(queries, keys), whether each query sees each key, in strips of limited size."""
        function = _vmapped(self.mask_mod, 2)
        rows = max(1, _STRIP // max(1, len(key)))
        strips = [
            _bools(function(*self._of(head), _tensor(query[first : first + rows]), _tensor(key)))
            for first in range(0, len(query), rows)
        ]
        return np.concatenate(strips) if strips else np.zeros((0, len(key)), np.bool_)

    def _of(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.batch), torch.tensor(head)


@dataclass(frozen=True, eq=False)
class Grids:
    """What a mask left in one call, pair by pair.

    Attributes:
        seen: bool (1|B, 1|H, queries, keys); 1 where all are alike.
    """

    seen: Seen

    @classmethod
    def of(cls, mask_mod: MaskMod, batch: int, heads: int, lengths: tuple[int, int]) -> Grids:
        """Ask a mask_mod about everything.

        Args:
            mask_mod: The function.
            batch: Entries that differ.
            heads: Heads that differ.
            lengths: Queries and keys.
        """
        query, key = (np.arange(length) for length in lengths)
        each = [[MaskValues(mask_mod, b).grid(h, query, key) for h in range(heads)] for b in range(batch)]
        return cls(np.array(each, np.bool_).reshape(batch, heads, *lengths))

    @property
    def alike_in_batch(self) -> bool:
        """Whether all batch entries are alike."""
        return all(np.array_equal(entry, self.seen[0]) for entry in self.seen[1:])

    @property
    def alike_in_heads(self) -> bool:
        """Whether all heads are alike."""
        return all(np.array_equal(self.seen[:, head], self.seen[:, 0]) for head in range(1, self.seen.shape[1]))

    def at(self, entry: int, head: int) -> Seen:
        """(queries, keys) of one batch entry and head."""
        found: Seen = self.seen[entry % self.seen.shape[0], head % self.seen.shape[1]]
        return found

    def pairs(self, head: int, query: Integers, key: Integers) -> Seen:
        """`Values.pairs` of the first batch entry."""
        return self.at(0, head)[query, key]

    def grid(self, head: int, query: Integers, key: Integers) -> Seen:
        """`Values.grid` of the first batch entry."""
        return self.at(0, head)[np.ix_(query, key)]


@dataclass(frozen=True)
class _OfBlocks:
    """A mask of whole blocks, or the causal part of one, asked for blocks."""

    of: Values
    size: int

    def pairs(self, head: int, query: Integers, key: Integers) -> Seen:
        # The last query of a block and the first key: a causal frontier inside the block hides nothing from this pair.
        return self.of.pairs(head, query * self.size + self.size - 1, key * self.size)

    def grid(self, head: int, query: Integers, key: Integers) -> Seen:
        return self.of.grid(head, query * self.size + self.size - 1, key * self.size)


def _vmapped(function: MaskMod, levels: int) -> Callable[..., Any]:
    """The function of scalars over a 1-D array of pairs, or a grid of queries and keys, as FlexAttention maps it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def mapped(b: Any, h: Any, q: Any, k: Any) -> Any:
        if levels == 1:
            over = torch.vmap(function, in_dims=(None, None, 0, 0))
        else:
            over = torch.vmap(torch.vmap(function, in_dims=(None, None, None, 0)), in_dims=(None, None, 0, None))
        with TransformGetItemToIndex():
            return over(b, h, q, k)

    return mapped


def _tensor(array: Integers) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64))


def _bools(seen: torch.Tensor) -> Seen:
    found: Seen = seen.detach().to(torch.bool).numpy()
    return found


@dataclass(frozen=True)
class Reach:
    """Where a function may be asked.

    Attributes:
        far: Position that counts as far from both ends; twice as many positions exist.
        endless: Whether positions beyond exist as well.
    """

    far: int = HORIZON
    endless: bool = True


ENDLESS = Reach()


def read_pattern(values: Values, heads: int, reach: Reach = ENDLESS) -> Pattern | None:
    """Find the pattern of a mask and prove it.

    Args:
        values: The mask.
        heads: Query heads that differ.
        reach: Where it may be asked.

    Returns:
        The pattern, by head where heads differ; None where the mask follows none that holds at every length.
    """
    found: list[Pattern] = []
    for head in range(heads):
        known = next((each for each in dict.fromkeys(found) if _proved(values, head, each, reach)), None)
        pattern = known or next(_readings(values, head, reach), None)
        if pattern is None:
            return None
        found.append(pattern)
    return found[0] if len(set(found)) == 1 else PerHead(tuple(found))


def _readings(values: Values, head: int, reach: Reach) -> Iterator[Pattern]:
    """Patterns that are proved; the first is the best."""
    structure = _structure(values, head, reach)
    if structure is None:
        return
    query, key = _samples(structure, reach)
    wanted = values.pairs(head, query, key)
    anywhere = Lengths.of(int(max(query.max(), key.max())) + 1)
    for pattern in itertools.chain(_blocked(values, head, structure, reach), _named(values, head, structure, reach)):
        if np.array_equal(pattern.allowed(query, key, anywhere), wanted) and _proved(values, head, pattern, reach):
            yield pattern
    size = table_size(structure)
    if size <= min(_LARGEST_TABLE, 2 * reach.far):
        token = np.arange(size)
        pattern = Tabulated.of(structure, values.grid(head, token, token))
        if np.array_equal(pattern.allowed(query, key, anywhere), wanted) and _proved(values, head, pattern, reach):
            yield pattern


def _structure(values: Values, head: int, reach: Reach) -> Structure | None:
    """What the function seems to depend on."""
    far, text = reach.far, np.arange(2 * reach.far)
    middle = np.full_like(text, far)
    row, column = values.pairs(head, middle, text), values.pairs(head, text, middle)
    lines = [row[far // 8 : 5 * far // 8], row[11 * far // 8 : 15 * far // 8]]
    lines += [column[far // 8 : 5 * far // 8], column[11 * far // 8 : 15 * far // 8]]
    diagonals: list[tuple[int, Seen]] = []
    for distance in _distances(row, column, far):
        query = np.arange(max(0, -distance), far)
        diagonals.append((distance, values.pairs(head, query, query + distance)))
    lines += [diagonal[len(diagonal) // 2 :] for _, diagonal in diagonals]
    periods = [_period(line) for line in lines]
    if any(period is None for period in periods):
        return None
    period = math.lcm(*(each for each in periods if each))
    if period > far // 8:
        return None
    first = near = 0
    for line in (row, column):
        first = max(first, _last(_extended(line, far // 4, period)[: far // 2] != line[: far // 2]) + 1)
        before = _extended(line, far // 4, period)[far // 2 : far + 1] != line[far // 2 : far + 1]
        after = _extended(line, 3 * far // 2, period)[far : 3 * far // 2] != line[far : 3 * far // 2]
        near = max(near, len(before) - int(before.argmax()) if before.any() else 0, _last(after) + 1)
    for distance, diagonal in diagonals:
        unlike = _last(_extended(diagonal, len(diagonal) // 2, period) != diagonal)
        # Beside the main diagonal it cannot be told whether the query or the key is the special one.
        first = max(first, unlike + 1 + (abs(distance) == 1 and unlike >= 0))
    # One row and one column show the distances of one phase of the period each; of the others they may be longer.
    near = near + period if period > 1 and near else near
    return Structure(period, near, head=first) if max(first, near) <= far // 4 else None


def _distances(row: Seen, column: Seen, far: int) -> list[int]:
    """Distances of diagonals that are worth a look: small ones, powers of two, and where the row or column changes."""
    around = np.arange(far // 2, 3 * far // 2) - far
    changes: set[int] = set()
    for line, sign in ((row, 1), (column, -1)):
        inside = line[far // 2 : 3 * far // 2]
        at = np.flatnonzero(inside[1:] != inside[:-1])
        at = at[np.argsort(np.abs(around[at]))][: _DIAGONALS // 2]
        changes |= {int(sign * around[each + step]) for each in at for step in (0, 1)}
    small = {0, 1, 2, 3, 5, 8} | {1 << power for power in range(4, 17) if 1 << power < far // 4}
    return sorted(changes | small | {-each for each in small}, key=abs)


def _period(line: Seen) -> int | None:
    """Smallest number of steps after which a line repeats, up to a quarter of it; None where it does not."""
    if (line == line[:1]).all():
        return 1
    line = line[: 1 << 15]
    signs = np.where(line, 1.0, -1.0)
    spectrum = np.fft.rfft(signs, 2 * len(line))
    agreeing = np.fft.irfft(spectrum * spectrum.conj())[: len(line) // 4 + 1]
    repeats = np.flatnonzero(np.rint(agreeing[1:]) == len(line) - np.arange(1, len(agreeing)))
    return int(repeats[0]) + 1 if len(repeats) else None


def _extended(line: Seen, start: int, period: int) -> Seen:
    """The line as its one period from `start` on says."""
    return line[start + (np.arange(len(line)) - start) % period]


def _last(where: Seen) -> int:
    """Index of the last True; -1 without one."""
    return int(np.flatnonzero(where)[-1]) if where.any() else -1


def _named(values: Values, head: int, structure: Structure, reach: Reach) -> Iterator[Pattern]:
    """Patterns with a name that would have this structure, simple ones first."""
    far = reach.far
    row = values.pairs(head, np.full(2 * far, far), np.arange(2 * far))
    left, right = _run(row[far::-1]), _run(row[far:])
    bases: list[Pattern] = [All(), Causal()]
    if row[far]:
        bases.append(Window(*(-1 if side > far // 2 else side for side in (left, right))))
    offsets = np.flatnonzero(row[far // 2 : 3 * far // 2]) + far // 2 - far
    step = int(np.gcd.reduce(offsets)) if len(offsets) else 0
    if step > 1:
        steps = row[far % step :: step]
        middle = far // step
        left, right = (-1 if side > middle // 2 else side for side in (_run(steps[middle::-1]), _run(steps[middle:])))
        bases.append(Window(left, right, step))
    period = structure.period
    if period > 1:
        bases += [Chunked(period), Fixed(period, min(period, int(row[far // 4 :][:period].sum()))), Strided(period)]
        bases += [Chunked(period, before=count) for count in (1, 2, -1)]
        windows = [base for base in bases if isinstance(base, Window)]
        bases += [base | Strided(period) for base in windows]
        residues = tuple(residue for residue in range(period) if row[far // 4 // period * period + residue])
        if residues:
            columns = Columns(Tokens(period=period, residues=residues))
            bases += [columns, *(base | columns for base in windows)]
    bases.append(Empty())
    ends: list[Pattern | None] = [None]
    if structure.head:
        some = [Tokens(first=count) for count in (structure.head, structure.head - 1) if count]
        ends = [kind(tokens) for tokens in some for kind in (Columns, Rows, Global)]
    for base, end in itertools.product(dict.fromkeys(bases), ends):
        pattern = base if end is None else base | end
        yield pattern
        if end is not None or not isinstance(base, (All, Causal, Empty)):
            yield pattern & Causal()


def _blocked(values: Values, head: int, structure: Structure, reach: Reach) -> Iterator[Pattern]:
    """Patterns of whole blocks, all of them or the causal part of them, where the rows and columns look like it."""
    far = reach.far
    row = values.pairs(head, np.full(2 * far, far), np.arange(2 * far))
    column = values.pairs(head, np.arange(2 * far), np.full(2 * far, far))
    changes = [int(at) + 1 for line in (row, column) for at in np.flatnonzero(line[1:] != line[:-1])]
    size = int(np.gcd.reduce(np.array([at for at in changes if abs(at - far) > 1] or [1])))
    if not _SMALLEST_BLOCK <= size <= far // 64 or structure.period == size:
        return

    inner = Reach(far // size // 8 * 8 - 5, endless=reach.endless)
    for pattern in _readings(_OfBlocks(values, size), head, inner):
        yield Blocked(size, pattern)
        yield Blocked(size, pattern) & Causal()


def _run(line: Seen) -> int:
    """How many True follow the first entry without a gap."""
    return int((~line[1:]).argmax()) if (~line[1:]).any() else len(line) - 1


def _samples(structure: Structure, reach: Reach) -> tuple[Integers, Integers]:
    """Pairs to try a reading on before it is proved: close to each other, to the start, and anywhere."""
    draw = np.random.default_rng(0)
    end = 2 * reach.far
    query = np.concatenate([draw.integers(0, bound, _DRAWN // 4) for bound in (min(end, 512), end)])
    spread = 2 * structure.near + 2 * structure.period + 2
    close = np.clip(query + draw.integers(-spread, spread + 1, len(query)), 0, end - 1)
    anywhere = draw.integers(0, end, len(query))
    start = draw.integers(0, min(end, structure.head + 2 * structure.period + 2), len(query))
    return np.concatenate([query] * 4 + [start]), np.concatenate([query, close, anywhere, start, query])


def _proved(values: Values, head: int, pattern: Pattern, reach: Reach) -> bool:
    structure = pattern.structure
    assert structure is not None
    query, key = _samples(structure, reach)
    text = int(max(query.max(), key.max())) + 1
    if not np.array_equal(values.pairs(head, query, key), pattern.allowed(query, key, Lengths.of(text))):
        return False
    length = min(table_size(structure) + structure.near + 2 * structure.period + 17, 2 * reach.far)
    if not reach.endless:
        length = 2 * reach.far
    keys, queries = np.arange(length), np.arange(length)
    if length > _WHOLE:
        edges = (0, structure.head, structure.period, structure.near, structure.near + structure.head, length // 2)
        parts = [np.arange(max(0, edge - 8), min(length, edge + 9)) for edge in (*edges, length - 9)]
        queries = np.unique(np.concatenate(parts))
    wanted = pattern.allowed(queries[:, None], keys[None, :], Lengths.of(length))
    return np.array_equal(values.grid(head, queries, keys), wanted)
