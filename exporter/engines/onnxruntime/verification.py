"""Whether the model of an ``ort`` build computes what its bundle does, and what ran at its sites."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....plugins import LibraryMissing, ort_library_path
from ...bundle import Bundle
from ...errors import ExportFailed
from ...graph_io import save_model
from ...parity.cases import sweep_lengths
from ...parity.inputs import Feed, draw_inputs, numpy_type
from ...parity.runners import open_session, what_ran
from ...parity.tolerances import FACTOR, Scale
from ...sites.record import AttentionSite
from ...sources.base import BATCH, SEQUENCE
from .session import CPU_PROVIDER, TENSORRT_PROVIDER, ProviderPlan, SessionPlan, open_planned

if TYPE_CHECKING:
    import onnx_ir as ir

LONGEST = 512
"""Tokens beyond which nothing is compared. `ort_optimization` refuses a changed site, whatever its window is; what is
compared is the rest of the graph. ``longspan check --engine`` is the thorough test."""

_BATCH = 2
_OTHER_SIZE = 2

Outputs = list[Any]


@dataclass(frozen=True)
class Agreement:
    """Comparison of one output with the bundle's.

    Attributes:
        length: Tokens of each of `_BATCH` rows.
        output: Its name.
        difference: Largest absolute difference.
        tolerance: Largest that rounding explains.
    """

    length: int
    output: str
    difference: float
    tolerance: float


@dataclass(frozen=True)
class Verified:
    """What runs of a build showed.

    Attributes:
        agreements: Every comparison that was made; all of them passed.
        with_library: What ran at each site with the operator library: ``"kernel"`` or ``"function body"``; empty where
            the plan registers none.
        without_library: The same without.
    """

    agreements: tuple[Agreement, ...]
    with_library: dict[str, str]
    without_library: dict[str, str]


def lengths_to_verify(bundle: Bundle) -> tuple[int, ...]:
    """A few of the lengths that ``check`` sweeps, from one token to `LONGEST`.

    The one length of a graph that takes one only.
    """
    manifest = bundle.manifest
    if manifest.fixed_length is not None:
        return (manifest.fixed_length,)
    lengths = sweep_lengths(manifest.sites, manifest.max_length, LONGEST, manifest.conversion.global_tokens)
    return tuple(sorted({lengths[0], lengths[len(lengths) // 2], *lengths[-2:]}))


def verify(
    bundle: Bundle, folder: Path, plan: SessionPlan, dtype: str | None, width: int, *, on_plan: bool
) -> Verified:
    """Run a build beside its bundle and compare.

    The tolerance is that of `parity.tolerances`, with a measured difference in the place of torch's error. Where the
    type stays, it is that between the bundle's kernels and its function bodies, which compute the same in another
    order. Where the graph was converted, it is what rounding the bundle's weights to the new type does, twice: of a
    product, its other operand, its result and what is done with that are rounded as well, and errors add as squares.

    Args:
        bundle: What was built from.
        folder: Where the build is.
        plan: How its session is opened.
        dtype: Type that the graph was converted to, as numpy calls it; None where it keeps the bundle's.
        width: Channels of the widest layer.
        on_plan: Whether the plan's own providers run; else the CPU provider does, and shows what the graph computes.

    Raises:
        ExportFailed: ONNX Runtime cannot run it, it differs, or something else ran than the plan says.
    """
    manifest = bundle.manifest
    providers: Sequence[ProviderPlan] = plan.providers if on_plan else (ProviderPlan(CPU_PROVIDER),)
    sizes = {
        symbol: _OTHER_SIZE
        for record in manifest.inputs
        for symbol in record.shape
        if isinstance(symbol, str) and symbol not in (BATCH, SEQUENCE)
    }
    feeds = {
        length: draw_inputs(
            manifest.inputs, _BATCH, length, padding="right", global_tokens="several", sizes=sizes, seed=length
        )
        for length in lengths_to_verify(bundle)
    }
    with tempfile.TemporaryDirectory() as temporary:
        runs = _Runs(Path(temporary), manifest.sites)
        kernel, body = _of_bundle(bundle, feeds)
        other = body if dtype is None else _of_rounded(bundle, dtype, feeds, Path(temporary))
        registered = plan.operator_library is not None
        planned, ran = runs.of(folder, plan, feeds, True, providers)
        bare, bare_ran = (planned, ran)
        if registered:
            # A GPU's provider has kernels for nothing but its own device; the bodies are compared on the CPU.
            bare, bare_ran = runs.of(folder, plan, feeds, False, (ProviderPlan(CPU_PROVIDER),))
    found: list[Agreement] = []
    for length in feeds:
        scale = Scale.of(manifest.sites, width, length)
        for outputs in (planned[length], bare[length]):
            found += _compare(manifest.outputs, length, kernel[length], other[length], outputs, dtype, scale)
    return Verified(tuple(found), ran if registered else {}, bare_ran)


def width_of(model: ir.Model) -> int:
    """Channels of the widest layer, from the shapes of the weights; an embedding's rows are not summed."""
    sizes = [
        value.const_value.shape.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and len(value.const_value.shape) > 1
    ]
    return max((min(size[0], math.prod(map(int, size[1:]))) for size in sizes if math.prod(map(int, size))), default=1)


def _of_bundle(bundle: Bundle, feeds: dict[int, Feed]) -> tuple[dict[int, Outputs], dict[int, Outputs]]:
    """Outputs of the bundle by its kernels and by its function bodies; the bodies' twice without the library."""
    try:
        body = open_session(str(bundle.model_path), None)
        by_body = {length: body.run(None, feed) for length, feed in feeds.items()}
        try:
            kernel = open_session(str(bundle.model_path), ort_library_path())
        except LibraryMissing:
            return by_body, by_body
        return {length: kernel.run(None, feed) for length, feed in feeds.items()}, by_body
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ExportFailed(f"{bundle.model_path}: ONNX Runtime cannot run it: {error}") from error


def _of_rounded(bundle: Bundle, dtype: str, feeds: dict[int, Feed], folder: Path) -> dict[int, Outputs]:
    """Outputs of the bundle by its function bodies, with weights rounded to a type and everything else as it is."""
    import onnx_ir as ir

    model = ir.load(bundle.model_path)
    narrow = numpy_type(dtype)
    for value in model.graph.initializers.values():
        weight = value.const_value
        if weight is None or not weight.dtype.is_floating_point():
            continue
        exact = weight.numpy()
        with np.errstate(over="ignore"):
            rounded = exact.astype(narrow).astype(exact.dtype)
        # What the type cannot hold, such as the low number of a mask, a conversion keeps.
        value.const_value = ir.tensor(np.where(np.isfinite(rounded), rounded, exact), name=value.name)
    file = folder / "rounded.onnx"
    save_model(model, file)
    session = open_session(str(file), None)
    return {length: session.run(None, feed) for length, feed in feeds.items()}


@dataclass(frozen=True)
class _Runs:
    """Runs with a profile."""

    temporary: Path
    sites: tuple[AttentionSite, ...]

    def of(
        self,
        folder: Path,
        plan: SessionPlan,
        feeds: dict[int, Feed],
        library: bool,
        providers: Sequence[ProviderPlan],
    ) -> tuple[dict[int, Outputs], dict[str, str]]:
        """Outputs, and what ran at each site."""
        try:
            session = open_planned(
                folder, plan, library=library, profile=self.temporary / "profile", providers=providers
            )
            outputs = {length: session.run(None, feed) for length, feed in feeds.items()}
        except Exception as error:
            raise ExportFailed(f"{plan.model}: ONNX Runtime cannot run what was built: {error}") from error
        file = Path(session.end_profiling())
        events = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        # For TensorRT the functions were inlined, so no event bears a site's name.
        inlined = plan.providers[0].name == TENSORRT_PROVIDER
        return outputs, {} if inlined else what_ran(events, self.sites)[0]


def _compare(
    records: Sequence[Any],
    length: int,
    kernel: Outputs,
    others: Outputs,
    outputs: Outputs,
    dtype: str | None,
    scale: Scale,
) -> list[Agreement]:
    """Compare all outputs of one length.

    Raises:
        ExportFailed: one differs.
    """
    found = []
    for record, reference, other, value in zip(records, kernel, others, outputs, strict=True):
        if not np.issubdtype(reference.dtype, np.floating) and dtype is not None:
            continue  # which class wins may depend on the rounding that was asked for
        rounded = numpy_type(record.dtype if dtype is None else dtype)
        reference, other, value = (np.asarray(array, np.float64) for array in (reference, other, value))
        if reference.shape != value.shape or not np.array_equal(np.isfinite(reference), np.isfinite(value)):
            raise ExportFailed(
                f"the build's output {record.name} at {_BATCH} x {length} tokens has other shapes or other values that "
                "are not finite than the bundle's; next step: report it with the versions that longspan doctor prints"
            )
        finite = np.isfinite(reference)
        magnitude = float(np.abs(reference[finite]).max(initial=0.0))
        apart = float(np.abs(np.where(finite, reference, 0) - np.where(finite, other, 0)).max(initial=0.0))
        measured = apart if dtype is None else 2 * apart
        tolerance = FACTOR * measured + scale.floor(rounded, magnitude)
        difference = float(np.abs(np.where(finite, reference, 0) - np.where(finite, value, 0)).max(initial=0.0))
        if difference > tolerance:
            raise ExportFailed(
                f"the build's output {record.name} at {_BATCH} x {length} tokens differs from the bundle's by "
                f"{difference:.3g}, rounding explains {tolerance:.3g}; next step: report it with the versions that "
                "longspan doctor prints"
            )
        found.append(Agreement(length, record.name, difference, tolerance))
    return found
