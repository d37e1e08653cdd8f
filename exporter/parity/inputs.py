"""Values for a bundle's inputs: drawn from what the manifest says about each, or read from and written to files.

Nothing here imports torch, so that benchmarks draw the same inputs without it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from ..manifest import InputRecord
from ..shapes import sizes_of
from ..sources.base import BATCH, SEQUENCE

Array = npt.NDArray[Any]
Feed = dict[str, Array]
"""One value per graph input, by name."""

PADDINGS = ("none", "right", "left", "mixed")
"""Kinds of padding. ``right`` and ``left`` pad each row by a different amount, the first one not at all (unless it is
the only row); ``mixed`` punches holes into the first row, pads the others on the right, and, where there are several,
leaves nothing of the last."""

GLOBALS = ("none", "first", "several")
"""Kinds of global tokens: none, the first, or a few scattered ones, different in each row."""

_HOLES = 7
"""``mixed``: one token in this many of the first row is padding."""


def draw_inputs(
    inputs: Sequence[InputRecord],
    batch: int,
    length: int,
    *,
    padding: str = "none",
    global_tokens: str = "none",
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> Feed:
    """Draw a value for every input; the same arguments give the same values.

    Tokens and data stand at padded positions as well: a model that lets them leak into the others then differs from
    one that does not.

    Args:
        inputs: The manifest's inputs.
        batch: Rows.
        length: Tokens per row.
        padding: One of `PADDINGS`; without effect on a model that takes no padding mask.
        global_tokens: One of `GLOBALS`; without effect on a model that takes no mask of global tokens.
        seed: Seed of the values.
        sizes: Sizes of dimensions that are called neither ``batch`` nor ``sequence``.

    Raises:
        InvalidRequest: a dimension has no size.
    """
    if padding not in PADDINGS or global_tokens not in GLOBALS:
        raise InvalidRequest(
            f"padding {padding!r}, global tokens {global_tokens!r}; allowed: {', '.join(PADDINGS)}, and "
            f"{', '.join(GLOBALS)}"
        )
    known = {BATCH: batch, SEQUENCE: length, **(sizes or {})}
    feed = {}
    for record in inputs:
        generator = np.random.default_rng([seed, batch, length, zlib.crc32(record.name.encode())])
        shape = tuple(_size(record, dimension, known) for dimension in record.shape)
        feed[record.name] = _value(record, shape, padding, global_tokens, generator)
    return feed


def _size(record: InputRecord, dimension: int | str, known: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    if dimension not in known:
        raise InvalidRequest(
            f"input {record.name} has shape {list(record.shape)}: nothing says how large {dimension!r} is; next step: "
            f"give its shape, e.g. --input-shapes {record.name}:[1,128]"
        )
    return known[dimension]


def _value(
    record: InputRecord, shape: tuple[int, ...], padding: str, global_tokens: str, generator: np.random.Generator
) -> Array:
    dtype = numpy_type(record.dtype)
    if record.role == "padding_mask" and len(shape) == 2:
        return _padding_mask(shape, padding, generator).astype(dtype)
    if record.role == "global_mask" and len(shape) == 2:
        return _global_mask(shape, global_tokens, generator).astype(dtype)
    if dtype == np.bool_ or np.issubdtype(dtype, np.integer):
        return generator.integers(record.low, record.high, shape, endpoint=True).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _padding_mask(shape: tuple[int, int], padding: str, generator: np.random.Generator) -> Array:
    """1 where there is a token; every row keeps one, but the last row of several under ``mixed``."""
    batch, length = shape
    mask = np.ones(shape, np.int64)
    if padding == "none":
        return mask
    for row in range(batch):
        # Thirds of the length, so that rows differ and padding begins inside a block of every common size.
        missing = min(length - 1, (row + (batch == 1)) * max(length // 3, 1) + int(generator.integers(0, 3)))
        if row == 0 and batch > 1:
            missing = 0
        if padding == "left":
            mask[row, :missing] = 0
        elif padding == "right" or row:
            mask[row, length - missing :] = 0
    if padding == "mixed":
        mask[0, _HOLES // 2 :: _HOLES] = 0
        if batch > 1:
            mask[-1] = 0
    return mask


def _global_mask(shape: tuple[int, int], global_tokens: str, generator: np.random.Generator) -> Array:
    batch, length = shape
    mask = np.zeros(shape, np.int64)
    if global_tokens == "first":
        mask[:, 0] = 1
    elif global_tokens == "several":
        for row in range(batch):
            # Row r has r + 2 of them, as far as its length allows; rows with different counts are the hard case.
            mask[row, generator.choice(length, size=min(row + 2, length), replace=False)] = 1
    return mask


def numpy_type(name: str) -> np.dtype[Any]:
    """The numpy type called `name`, ``bfloat16`` and its like included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def load_feeds(path: Path, inputs: Sequence[InputRecord]) -> list[Feed]:
    """Read inputs that `save_feeds` or ``polygraphy run --save-inputs`` wrote.

    Raises:
        InvalidRequest: there is no such file, it holds something else, or its tensors do not fit the inputs.
    """
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    if not path.is_file():
        raise InvalidRequest(f"--load-inputs {path}: no such file")
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            loaded = load_json(str(path))
        feeds = [{str(name): np.asarray(value) for name, value in feed.items()} for feed in loaded]
    except Exception as error:  # Polygraphy raises whatever json, base64 or numpy do
        raise InvalidRequest(f"--load-inputs {path}: is not a list of inputs in Polygraphy's JSON ({error})") from error
    if not feeds:
        raise InvalidRequest(f"--load-inputs {path}: is empty")
    return [_fitted(f"--load-inputs {path}[{index}]", feed, inputs) for index, feed in enumerate(feeds)]


def _fitted(where: str, feed: Feed, inputs: Sequence[InputRecord]) -> Feed:
    """The inputs of the model in their order, checked."""
    missing = [record.name for record in inputs if record.name not in feed]
    if missing:
        raise InvalidRequest(f"{where}: lacks {', '.join(missing)}; it has {', '.join(feed) or 'nothing'}")
    for record in inputs:
        value = feed[record.name]
        fits = value.ndim == len(record.shape) and all(
            isinstance(wanted, str) or wanted == got for wanted, got in zip(record.shape, value.shape, strict=True)
        )
        if not fits or value.dtype != numpy_type(record.dtype):
            raise InvalidRequest(
                f"{where}: {record.name} is {value.dtype} {list(value.shape)}; the model takes {record.dtype} "
                f"{list(record.shape)}"
            )
    sizes_of({name: value.shape for name, value in feed.items()}, inputs)
    return {record.name: feed[record.name] for record in inputs}


def save_feeds(feeds: Sequence[Feed], path: Path) -> None:
    """Write inputs for `load_feeds` and ``polygraphy run --load-inputs``.

    Raises:
        InvalidRequest: the file cannot be written.
    """
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            save_json([dict(feed) for feed in feeds], str(path))
    except OSError as error:
        raise InvalidRequest(f"--save-inputs {path}: cannot be written: {error.strerror or error}") from error
