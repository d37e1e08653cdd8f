"""Optimization profiles: the shapes that an engine is built for, from the command line and from what a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest
from ..manifest import InputRecord, Manifest
from ..shapes import parse_shapes, sizes_of
from ..sources.base import BATCH, SEQUENCE

Shape = tuple[int, ...]

BOUNDS = ("min", "opt", "max")
"""What a profile says of each input, in this order; options are called ``--min-shapes`` and so on."""

DEFAULT_MAX_BATCH = 4
"""Rows that an engine takes where nobody says how many."""

DEFAULT_MAX_LENGTH = 8192
"""Tokens that an engine takes at most where nobody says how many, and the model takes more."""

DEFAULT_OPT_LENGTH = 2048
"""Tokens for which kernels are chosen where nobody says how many, and the engine takes more."""


@dataclass(frozen=True)
class ShapeRange:
    """Smallest shape, the one that kernels are chosen for, and largest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Profile:
    """The shapes of one optimization profile.

    Attributes:
        inputs: Range of every input, by name.
    """

    inputs: dict[str, ShapeRange]

    @property
    def in_order(self) -> bool:
        """Whether every size is a number, and min ≤ opt ≤ max."""
        return all(
            len({len(shapes.min), len(shapes.opt), len(shapes.max)}) == 1
            and all(isinstance(size, int) for shape in (shapes.min, shapes.opt, shapes.max) for size in shape)
            and all(low <= best <= high for low, best, high in zip(shapes.min, shapes.opt, shapes.max, strict=True))
            for shapes in self.inputs.values()
        )

    def sizes(self, symbol: str, records: Sequence[InputRecord]) -> tuple[int, int, int] | None:
        """Smallest, best and largest size of a symbolic dimension; None where no input has it."""
        for record in records:
            for axis, dimension in enumerate(record.shape):
                if dimension == symbol:
                    shapes = self.inputs[record.name]
                    return shapes.min[axis], shapes.opt[axis], shapes.max[axis]
        return None

    def admits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes lie within it."""
        return all(
            len(shape) == len(self.inputs[name].min)
            and all(
                low <= size <= high
                for low, size, high in zip(self.inputs[name].min, shape, self.inputs[name].max, strict=True)
            )
            for name, shape in shapes.items()
        )


def profiles_of(
    manifest: Manifest,
    min_shapes: Sequence[str] = (),
    opt_shapes: Sequence[str] = (),
    max_shapes: Sequence[str] = (),
) -> tuple[Profile, ...]:
    """The profiles that options ask for, with every input and size filled in.

    A shape of one input says how large the batch and the sequence are, and so gives the shapes of the others. What
    nobody gives is 1 row and 1 token at least, 1 row and `DEFAULT_OPT_LENGTH` tokens at best, `DEFAULT_MAX_BATCH` rows
    and `DEFAULT_MAX_LENGTH` tokens at most, and never more tokens than the model has positions.

    Args:
        manifest: The model's inputs and positions.
        min_shapes: Texts in Polygraphy's syntax, ``input:[size,size]``; one text may hold several, separated by
            spaces. An input that is named again begins the next profile.
        opt_shapes: The same.
        max_shapes: The same.

    Raises:
        InvalidRequest: a text is malformed, two inputs contradict each other, the sizes are not in order, exceed the
            model's positions, or the options describe different numbers of profiles.
    """
    given = {
        bound: _by_profile(texts, manifest.inputs, f"--{bound}-shapes")
        for bound, texts in zip(BOUNDS, (min_shapes, opt_shapes, max_shapes), strict=True)
    }
    counts = {f"--{bound}-shapes": len(sizes) for bound, sizes in given.items() if sizes}
    if len(set(counts.values())) > 1:
        described = ", ".join(f"{option} {count}" for option, count in counts.items())
        raise InvalidRequest(f"the options describe different numbers of optimization profiles: {described}")
    count = max(counts.values(), default=1)
    return tuple(
        _profile(manifest, {bound: sizes[index] if sizes else {} for bound, sizes in given.items()})
        for index in range(count)
    )


def longest_sizes(profiles: Sequence[Profile], manifest: Manifest) -> dict[str, int]:
    """Largest size of each symbolic dimension over all profiles."""
    symbols = {dimension for record in manifest.inputs for dimension in record.shape if isinstance(dimension, str)}
    ranges = {symbol: [profile.sizes(symbol, manifest.inputs) for profile in profiles] for symbol in symbols}
    return {symbol: max(sizes[2] for sizes in found if sizes is not None) for symbol, found in ranges.items() if found}


def _by_profile(texts: Sequence[str], inputs: Sequence[InputRecord], option: str) -> list[dict[str, int]]:
    """Sizes of the symbolic dimensions, a table per profile."""
    profiles: list[list[str]] = []
    names: set[str] = set()
    words = [word for text in texts for word in text.split()]
    if texts and not words:
        raise InvalidRequest(f"{option}: is empty; next step: leave it out, or give a shape, e.g. input_ids:[1,128]")
    for word in words:
        name = word.rpartition(":")[0]
        if not profiles or name in names:
            profiles.append([])
            names = set()
        names.add(name)
        profiles[-1].append(word)
    sizes = []
    for profile in profiles:
        try:
            sizes.append(sizes_of(parse_shapes(profile, inputs, option), inputs))
        except InvalidRequest as error:
            text = str(error)
            raise InvalidRequest(text if text.startswith(option) else f"{option}: {text}") from error
    return sizes


def _profile(manifest: Manifest, given: Mapping[str, Mapping[str, int]]) -> Profile:
    symbols = {dimension for record in manifest.inputs for dimension in record.shape if isinstance(dimension, str)}
    chosen = {symbol: _sizes(symbol, manifest, given) for symbol in symbols}
    ranges = {}
    for record in manifest.inputs:
        low, best, high = (
            tuple(size if isinstance(size, int) else chosen[size][bound] for size in record.shape)
            for bound in range(len(BOUNDS))
        )
        ranges[record.name] = ShapeRange(low, best, high)
    return Profile(ranges)


def _sizes(symbol: str, manifest: Manifest, given: Mapping[str, Mapping[str, int]]) -> tuple[int, int, int]:
    """Smallest, best and largest size of one symbolic dimension.

    Raises:
        InvalidRequest: they are not in order, exceed the model's positions, or nothing says what they are.
    """
    low, best, high = (given[bound].get(symbol) for bound in BOUNDS)
    limit = manifest.max_length if symbol == SEQUENCE else None
    if symbol == SEQUENCE:
        usual_best, usual_high = DEFAULT_OPT_LENGTH, min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    elif symbol == BATCH:
        usual_best, usual_high = 1, DEFAULT_MAX_BATCH
    elif high is None and best is None:
        record = next(record for record in manifest.inputs if symbol in record.shape)
        raise InvalidRequest(
            f"input {record.name} has shape {list(record.shape)}: nothing says how large {symbol!r} is; next step: "
            f"give it, e.g. --max-shapes {record.name}:[{','.join('1' for _ in record.shape)}]"
        )
    else:
        usual_best = usual_high = high or best or 1
    low = 1 if low is None else low
    high = max(usual_high, low, best or 1) if high is None else high
    best = min(max(usual_best, low), high) if best is None else best
    for smaller, larger, options in (
        (low, high, "--min-shapes and --max-shapes"),
        (low, best, "--min-shapes and --opt-shapes"),
        (best, high, "--opt-shapes and --max-shapes"),
    ):
        if smaller > larger:
            raise InvalidRequest(
                f"{options}: the {symbol} would go from {smaller:,} to {larger:,}; allowed: min ≤ opt ≤ max in every "
                "dimension"
            )
    if limit is not None and high > limit:
        raise InvalidRequest(
            f"--max-shapes: the {symbol} is {high:,}, the model has positions for {limit:,} tokens; next step: at most "
            f"{limit}, or export with --max-positions {high}"
        )
    return low, best, high
