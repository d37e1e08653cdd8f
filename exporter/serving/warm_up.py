"""Requests that the server runs before it says that a model is ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engines.profiles import Profile, profiles_of
from ..errors import InvalidRequest
from ..manifest import Manifest
from ..parity.inputs import Array, draw_inputs
from ..sources.base import BATCH, SEQUENCE
from .served_models import ServedModel

FOLDER = "warmup"
"""Where the server looks for the data of samples, in the folder of a model."""


@dataclass(frozen=True)
class Sample:
    """One request, or as many equal ones as a batch has rows.

    Attributes:
        name: Of the sample.
        batch: Rows; the server repeats one.
        length: Tokens.
        inputs: Values of one request, by name. Their first dimension is 1 where the server makes batches.
    """

    name: str
    batch: int
    length: int
    inputs: dict[str, Array]

    def file(self, name: str) -> str:
        """Name of the file with an input's data, in `FOLDER`."""
        return f"{self.name}.{name}.bin"


def samples_of(model: ServedModel, manifest: Manifest) -> tuple[Sample, ...]:
    """The shapes that kernels were chosen for, then the largest, for which the most memory is needed.

    Tokens are drawn from the vocabulary: random bytes, which the server can make itself, would lie outside of it.
    Shapes that a version does not take are left out, since it could not be loaded then. Engines without profiles take
    any shape; the largest of theirs is left out, because nothing says that it will ever be asked for.

    Args:
        model: What is served.
        manifest: Of the bundle.
    """
    own = next((engine.manifest.profiles for engine in model.engines if engine.manifest.profiles), ())
    profiles: Sequence[Profile] = own or _usual(manifest)
    samples: list[Sample] = []
    for number, profile in enumerate(profiles):
        suffix = f"_{number}" if len(profiles) > 1 else ""
        for bound in ("opt", "max") if own else ("opt",):
            sample = _sample(f"{bound}{suffix}", profile, ("min", "opt", "max").index(bound), model, manifest)
            if sample is not None and all((sample.batch, sample.length) != (s.batch, s.length) for s in samples):
                samples.append(sample)
    return tuple(samples)


def _usual(manifest: Manifest) -> tuple[Profile, ...]:
    """The default profile; none where nothing says how large a dimension is."""
    try:
        return profiles_of(manifest)
    except InvalidRequest:
        return ()


def _sample(name: str, profile: Profile, bound: int, model: ServedModel, manifest: Manifest) -> Sample | None:
    symbols = {size for record in manifest.inputs for size in record.shape if isinstance(size, str)}
    sizes = {
        symbol: found[bound] for symbol in symbols if (found := profile.sizes(symbol, manifest.inputs)) is not None
    }
    batch = sizes.get(BATCH, 1)
    if model.max_batch:
        batch = min(batch, model.max_batch)
    length = sizes.get(SEQUENCE, manifest.fixed_length or 1)
    rows = 1 if model.max_batch else batch
    others = {symbol: size for symbol, size in sizes.items() if symbol not in (BATCH, SEQUENCE)}
    inputs = draw_inputs(manifest.inputs, rows, length, global_tokens="first", sizes=others)
    shapes = {key: value.shape for key, value in inputs.items()}
    if model.max_batch:
        shapes = {key: (batch, *shape[1:]) for key, shape in shapes.items()}
    return Sample(name, batch if model.max_batch else 1, length, inputs) if model.admits(shapes) else None
