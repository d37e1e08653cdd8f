"""What a check runs: the sweep or what the user names, and which of it an engine takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines.profiles import Profile
from ..engines.running.reach import Reach, in_words
from ..errors import InvalidRequest
from ..manifest import Manifest
from ..shapes import parse_shapes, sizes_of
from ..sources.base import BATCH, SEQUENCE
from .cases import BATCHES, LONGEST, Case, single_shape, sweep, sweep_lengths
from .inputs import Feed, draw_inputs, load_feeds

_FROM_FILE = "file"


@dataclass(frozen=True)
class Wanted:
    """What a user asked to check; nothing of it for the sweep.

    Attributes:
        lengths: Lengths instead of those that the patterns call for.
        max_length: Longest length of the sweep; None for the longest accepted, at most `cases.LONGEST`.
        input_shapes: ``input:[size,…]`` texts instead of the sweep.
        load_inputs: File of inputs instead of drawn ones.
        seed: Seed of the inputs.
    """

    lengths: tuple[int, ...] = ()
    max_length: int | None = None
    input_shapes: tuple[str, ...] = ()
    load_inputs: str | os.PathLike[str] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The cases, and how to get the input of each.

    Attributes:
        cases: In the order in which they run.
        loaded: Inputs that were loaded, one per case; None where they are drawn.
        sizes: Sizes of dimensions that are neither the batch nor the sequence.
        seed: Seed of the inputs.
        manifest: The bundle's.
        outside: What an engine does not admit, a line each.
    """

    cases: tuple[Case, ...]
    loaded: tuple[Feed, ...] | None
    sizes: dict[str, int]
    seed: int
    manifest: Manifest
    outside: tuple[str, ...] = ()

    def feed(self, index: int) -> Feed:
        """The input of a case."""
        if self.loaded is not None:
            return self.loaded[index]
        case = self.cases[index]
        return draw_inputs(
            self.manifest.inputs,
            case.batch,
            case.length,
            padding=case.padding,
            global_tokens=case.global_tokens,
            seed=self.seed,
            sizes=self.sizes,
        )


def plan(manifest: Manifest, wanted: Wanted, profiles: Sequence[Profile] = ()) -> Plan:
    """Decide what to check.

    Args:
        manifest: The bundle's.
        wanted: What the user asked for.
        profiles: Optimization profiles of an engine; none where any shape will do.

    Raises:
        InvalidRequest: options contradict each other, or ask for what the model or the engine does not take.
    """
    given = {
        "--lengths": wanted.lengths,
        "--input-shapes": wanted.input_shapes,
        "--load-inputs": wanted.load_inputs,
    }
    chosen = [option for option, value in given.items() if value]
    if len(chosen) > 1:
        raise InvalidRequest(f"{' and '.join(chosen)} contradict each other: each says which inputs to check; give one")
    if wanted.load_inputs is not None:
        feeds = tuple(load_feeds(Path(wanted.load_inputs), manifest.inputs))
        _refuse_outside("--load-inputs", ({name: a.shape for name, a in feed.items()} for feed in feeds), profiles)
        cases = tuple(_loaded_case(feed, manifest) for feed in feeds)
        return Plan(cases, feeds, {}, wanted.seed, manifest)
    if wanted.input_shapes:
        return _one_shape(manifest, wanted, profiles)
    lengths = wanted.lengths
    if not lengths and manifest.fixed_length is not None:
        lengths = (manifest.fixed_length,)
    elif not lengths:
        always_global = manifest.conversion.global_tokens
        lengths = sweep_lengths(manifest.sites, manifest.max_length, wanted.max_length, always_global)
    lengths = tuple(sorted(set(lengths)))
    cases = sweep(manifest, lengths)  # refuses what the model does not take
    planned = Plan(cases, None, {}, wanted.seed, manifest)
    return _within(planned, lengths, wanted, [Reach.of(profile, manifest) for profile in profiles])


def _one_shape(manifest: Manifest, wanted: Wanted, profiles: Sequence[Profile]) -> Plan:
    sizes = sizes_of(parse_shapes(wanted.input_shapes, manifest.inputs), manifest.inputs)
    length = sizes.get(SEQUENCE, 1)
    if manifest.max_length is not None and length > manifest.max_length:
        raise InvalidRequest(f"--input-shapes: the model accepts up to {manifest.max_length} tokens, not {length}")
    planned = Plan(single_shape(manifest, sizes.get(BATCH, 1), length), None, sizes, wanted.seed, manifest)
    _refuse_outside("--input-shapes", [{name: a.shape for name, a in planned.feed(0).items()}], profiles)
    return planned


def _loaded_case(feed: Feed, manifest: Manifest) -> Case:
    sizes = sizes_of({name: value.shape for name, value in feed.items()}, manifest.inputs)
    length = sizes.get(SEQUENCE, 1)
    if manifest.max_length is not None and length > manifest.max_length:
        raise InvalidRequest(f"--load-inputs: the model accepts up to {manifest.max_length} tokens, not {length}")
    return Case(sizes.get(BATCH, 1), length, _FROM_FILE, _FROM_FILE)


def _refuse_outside(option: str, shapes: Iterable[dict[str, tuple[int, ...]]], profiles: Sequence[Profile]) -> None:
    for one in shapes:
        if profiles and not any(profile.admits(one) for profile in profiles):
            name = next(name for name in one if not any(profile.admits({name: one[name]}) for profile in profiles))
            ranges = " or ".join(f"{p.inputs[name].min} to {p.inputs[name].max}" for p in profiles)
            raise InvalidRequest(f"{option}: {name} of shape {one[name]}: the engine takes {ranges}")


def _within(planned: Plan, lengths: tuple[int, ...], wanted: Wanted, reaches: Sequence[Reach]) -> Plan:
    """The part of a sweep that profiles admit: each profile with the lengths that it holds, and its own bounds.

    Raises:
        InvalidRequest: the user gave a length that none of them holds, or a longest one below all of them.
    """
    if not reaches:
        return planned
    ranges = in_words(reaches, lambda reach: reach.lengths)
    beyond = tuple(length for length in lengths if not any(reach.holds(length) for reach in reaches))
    if wanted.lengths and beyond:
        raise InvalidRequest(f"--lengths {', '.join(map(str, beyond))}: the engine takes {ranges} tokens")
    cap = wanted.max_length
    if cap is not None and all(reach.lengths[0] > cap for reach in reaches):
        raise InvalidRequest(f"--max-length {cap}: the engine takes {ranges} tokens")
    cases: dict[Case, None] = {}
    for reach in reaches:
        chosen = {length for length in lengths if reach.holds(length)}
        if not wanted.lengths:
            longest = LONGEST if cap is None else cap
            bounds = reach.lengths if chosen else reach.own_lengths
            chosen |= {length for length in bounds if length <= longest or length == reach.lengths[0]}
        if chosen:
            cases |= dict.fromkeys(sweep(planned.manifest, sorted(chosen), reach.nearest(BATCHES)))
    outside = []
    if beyond:
        outside.append(f"lengths {', '.join(map(str, beyond))}: the engine takes {ranges} tokens")
    for reach in reaches:
        left_out = sorted(set(BATCHES) - set(reach.nearest(BATCHES)))
        if left_out:
            where = "" if len(reaches) == 1 else f"with {in_words([reach], lambda one: one.lengths)} tokens "
            rows, stand_ins = in_words([reach], lambda one: one.batches), reach.nearest(BATCHES)
            outside.append(
                f"batch {' and '.join(map(str, left_out))}: {where}the engine takes {rows} rows; checked instead: "
                f"{', '.join(map(str, stand_ins))}"
            )
    ordered = tuple(sorted(cases, key=lambda case: (case.length, case.batch)))
    return dataclasses.replace(planned, cases=ordered, outside=tuple(outside))
