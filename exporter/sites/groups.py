"""Fold the sites of a deep model: names that differ in a layer number, sites that differ in nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from .record import AttentionSite


@dataclass(frozen=True)
class Fold:
    """Module names that differ in one number at most.

    Attributes:
        label: The names as one, e.g. ``"encoder.layer.0–5.attention.self"``.
        numbers: The numbers that differ, e.g. ``"0–5"``; of a single name its first number; empty without any.
        skeleton: The names with ``#`` in the place of `numbers`.
        members: Positions of the names among those that were folded.
    """

    label: str
    numbers: str
    skeleton: str
    members: tuple[int, ...]

    @property
    def title(self) -> str:
        """Short words for a caption: ``"layers 0–5"``, ``"layer 3"``, or the name where it has no number."""
        if not self.numbers:
            return self.label
        return f"{'layer' if len(self.members) == 1 else 'layers'} {self.numbers}"


def fold_names(names: Sequence[str]) -> tuple[Fold, ...]:
    """Fold module names; names that differ in several numbers fold over the one that takes the most values.

    Args:
        names: Dotted module names, which need not stand side by side to be folded.

    Returns:
        The folds, in the order of their first names.
    """
    parts = [name.split(".") for name in names]
    shapes: dict[tuple[str, ...], list[int]] = {}
    for index, words in enumerate(parts):
        shapes.setdefault(tuple("#" if word.isdecimal() else word for word in words), []).append(index)
    folds = []
    for shape, indices in shapes.items():
        slots = [slot for slot, word in enumerate(shape) if word == "#"]
        if not slots:
            folds += [Fold(names[index], "", names[index], (index,)) for index in indices]
            continue
        # The leftmost of equals: the outermost list of modules.
        widest = max(slots, key=lambda slot: (len({parts[index][slot] for index in indices}), -slot))
        groups: dict[tuple[str, ...], list[int]] = {}
        for index in indices:
            groups.setdefault((*parts[index][:widest], *parts[index][widest + 1 :]), []).append(index)
        for group in groups.values():
            numbers = _ranges([int(parts[index][widest]) for index in group])
            before, after = parts[group[0]][:widest], parts[group[0]][widest + 1 :]
            label, skeleton = (".".join([*before, middle, *after]) for middle in (numbers, "#"))
            folds.append(Fold(label, numbers, skeleton, tuple(group)))
    return tuple(sorted(folds, key=lambda fold: fold.members))


def fold_alike(names: Sequence[str], keys: Sequence[Hashable]) -> tuple[Fold, ...]:
    """Fold the names that share a key, in the order of their first members."""
    alike: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        alike.setdefault(key, []).append(index)
    folds = []
    for indices in alike.values():
        folds += [
            dataclasses.replace(fold, members=tuple(indices[position] for position in fold.members))
            for fold in fold_names([names[index] for index in indices])
        ]
    return tuple(sorted(folds, key=lambda fold: fold.members))


def in_words(sites: Iterable[AttentionSite]) -> str:
    """The attention of a model, equal sites counted: ``"12 x SlidingWindowAttention (256 left, 256 right)"``."""
    counts: dict[str, int] = {}
    for site in sites:
        words = f"{site.operator} ({site.pattern})"
        counts[words] = counts.get(words, 0) + 1
    return ", ".join(f"{count} x {words}" for words, count in counts.items())


def name_of(site: AttentionSite) -> str:
    """The module that a site was traced from, or its node where that is unknown."""
    return site.layer or site.node


def _ranges(numbers: Sequence[int]) -> str:
    """``0–5``, ``0,2,…,10`` for equal steps, ``0–2,5`` otherwise."""
    ordered = sorted(set(numbers))
    step = ordered[1] - ordered[0] if len(ordered) > 1 else 0
    if step > 1 and len(ordered) > 3 and ordered == list(range(ordered[0], ordered[-1] + 1, step)):
        return f"{ordered[0]},{ordered[1]},…,{ordered[-1]}"
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
