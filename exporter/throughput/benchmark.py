"""Time a bundle against what it replaces."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..devices import CPU, require_providers
from ..errors import EnvironmentLacks, FallbackRan, InvalidRequest
from ..manifest import Manifest
from ..parity.inputs import draw_inputs
from ..reports.bench_page import bench_page
from ..reports.files import write_atomically
from ..sites.groups import in_words
from ..sources.reload import Consent
from .comparison import REGRESSION, check_comparable, compare
from .diagnosis import diagnose, weaknesses
from .engines import TimedEngine, settings_for, timed_engine
from .machine import describe_machine
from .report import OK, OUT_OF_MEMORY, OVER_LIMIT, UNAVAILABLE, WRONG_PATH, BenchReport, Row, pool
from .roofline import AttentionWork, write_sgemm
from .runner import foresee, run_trial
from .saved import load, to_json
from .settings import BenchSettings, resolve_lengths
from .statistics import crossover
from .variants import Variant, body_variant, dense_variant, kernel_variant, stock_variant

Progress = Callable[[str], None]
"""Called with a stage's name when the stage begins."""

JSON_FILE = "bench.json"
PLOT_FILE = "bench.png"
PAGE_FILE = "bench.html"


def bench(
    bundle: Bundle | str | os.PathLike[str],
    settings: BenchSettings | None = None,
    *,
    source: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    require_kernel: bool = False,
    plot: bool = True,
    against: Earlier | None = None,
    progress: Progress = lambda stage: None,
    command: str = "",
) -> BenchReport:
    """Time a bundle with its kernel, on its function bodies, with dense attention, and as the stock exporter makes it.

    An engine that the settings name is timed as well, and the others where it computes.

    Every variant at every length runs in a process of its own, the variants of a length right after each other. The
    report is written to ``reports/`` in the bundle: ``bench.json``, ``bench.html``, and with matplotlib ``bench.png``.

    Args:
        bundle: A bundle or its folder.
        settings: What to measure; the defaults of `BenchSettings` when None.
        source: Where the exported model is now, for the stock export; None for where it was. Giving it consents to
            run the Python file of a factory.
        allow_pickle: Read the source's pickled weights, which can run any code.
        trust_remote_code: Let the source's own Python code run.
        require_kernel: Fail at once where the longspan kernels would not run, or did not; of an engine, in the engine.
        plot: Whether to draw the plot.
        against: An earlier report to compare with; refused before anything is measured where it does not fit.
        progress: Told each stage.
        command: Command line to record.

    Returns:
        The report. A variant that cannot be had, crashes or exceeds a limit is a row of it, not an error.

    Raises:
        InvalidRequest: a setting does not fit the bundle.
        EnvironmentLacks: ONNX Runtime or the device is not here.
        FallbackRan: `require_kernel`, and the kernels are missing or did not run.
        BundleCorrupted: the bundle's files are not what was exported.
    """
    settings = settings or BenchSettings()
    timed: TimedEngine | None = None
    extra: tuple[str, ...] = ()
    if not settings.engine:
        require_providers(settings.providers)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if settings.engine:
        timed = timed_engine(bundle, settings.engine, require_kernel)
        settings, left_out = settings_for(settings, bundle, timed)
        extra = (*timed.notes, *([left_out] if left_out else []))
    settings = _resolved(settings, bundle.manifest)
    if against is not None:
        _check_earlier(against, bundle.manifest, settings)
    consent = Consent(source, allow_pickle, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder:
        if timed is None:
            kernel = kernel_variant(bundle, settings.device)
            if require_kernel and kernel.model is None:
                raise FallbackRan(kernel.unavailable)
            required = "kernel" if require_kernel else ""
            variants = (kernel, *_baselines(bundle, settings, Path(folder), consent, progress))
        else:
            required = "engine" if require_kernel else ""
            variants = (timed.variant, *_beside(timed, bundle, settings, Path(folder), consent, progress))
        measure = _Measurement(bundle, variants, settings, Path(folder), required, progress)
        rows = measure.run()
    rows, reference = _with_ratios(rows)
    medians = _medians(rows)
    report = BenchReport(
        model=bundle.manifest.source.model_class.rpartition(".")[2],
        attention=in_words(bundle.manifest.sites),
        identity=identity(bundle.manifest),
        reference=reference,
        settings=settings,
        machine=describe_machine(),
        rows=rows,
        crossovers=tuple(
            crossover(variant.name, medians.get(reference, {}), medians.get(variant.name, {}))
            for variant in variants
            if variant.name != reference
            and (variant.name != "kernel" or reference == "engine")
            and variant.model is not None
        ),
        diagnosis=(),
        notes=(),
        comparison=None,
        command=command,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    report = dataclasses.replace(report, diagnosis=diagnose(report), notes=(*extra, *weaknesses(report)))
    if against is not None:
        report = dataclasses.replace(
            report, comparison=compare(report, against.report, against.name, against.threshold)
        )
    progress("write the report")
    return _write(report, bundle.reports_path, plot)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """An earlier report to compare with.

    Attributes:
        report: The report.
        name: Its file, for messages.
        threshold: Slowdown that is a regression, as a fraction.
        force: Whether to compare although machine, model or settings differ.
    """

    report: BenchReport
    name: str
    threshold: float = REGRESSION
    force: bool = False

    @classmethod
    def read(cls, path: Path, threshold: float = REGRESSION, force: bool = False) -> Earlier:
        """Read the report in a file.

        Raises:
            InvalidRequest: there is none, or the threshold is out of range.
        """
        if not 0 <= threshold < float("inf"):
            raise InvalidRequest(f"--regression {threshold:g}: must be 0 or more, e.g. 5%")
        return cls(load(path, "--compare"), str(path), threshold, force)


def _check_earlier(against: Earlier, manifest: Manifest, settings: BenchSettings) -> None:
    """Refuse before the minutes of measuring what would be refused after them."""
    planned = BenchReport(
        model="",
        attention=in_words(manifest.sites),
        identity=identity(manifest),
        reference="kernel",
        settings=settings,
        machine=describe_machine(),
        rows=(),
        crossovers=(),
        diagnosis=(),
        notes=(),
        comparison=None,
        command="",
        created="",
    )
    check_comparable(planned, against.report, against.name, against.force)
    known = {row.length for row in against.report.rows if row.latency is not None}
    if against.report.settings.batch != settings.batch or not known & set(settings.lengths):
        raise InvalidRequest(
            f"--compare {against.name}: has batch {against.report.settings.batch} and lengths "
            f"{', '.join(map(str, sorted(known))) or 'none'}, of which none is measured now; next step: give the same "
            "--batch and --lengths"
        )


def compare_saved(path: Path, against: Earlier | None) -> BenchReport:
    """A saved report with its comparison; nothing is measured or written.

    Raises:
        InvalidRequest: there is nothing to compare with, or the two cannot be compared.
    """
    if against is None:
        raise InvalidRequest(
            f"{path}: is a file, so nothing can be measured; allowed: a bundle, or a report --compare FILE"
        )
    report = load(path, "BUNDLE")
    check_comparable(report, against.report, against.name, against.force)
    return dataclasses.replace(report, comparison=compare(report, against.report, against.name, against.threshold))


class _Measurement:
    """All trials of one benchmark, in the order that keeps comparable ones close in time."""

    def __init__(
        self,
        bundle: Bundle,
        variants: Sequence[Variant],
        settings: BenchSettings,
        folder: Path,
        required: str,
        progress: Progress,
    ) -> None:
        self._manifest = bundle.manifest
        self._work = AttentionWork(bundle)
        # The product says what the cores reach, which is nothing to hold a GPU to.
        self._sgemm = write_sgemm(folder) if settings.device == CPU else None
        self._variants = variants
        self._settings = settings
        self._folder = folder
        self._required = required
        self._progress = progress
        self._rows: list[Row] = []
        self._done = 0

    def run(self) -> tuple[Row, ...]:
        """Run every trial, lengths ascending, so that each length can be foreseen from the shorter ones."""
        for length in self._settings.lengths:
            self._rows += self._at(length)
        return tuple(self._rows)

    def _at(self, length: int) -> list[Row]:
        import numpy as np

        inputs = self._folder / "inputs.npz"
        np.savez(inputs, **bench_inputs(self._manifest, length, self._settings))
        outcomes: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in self._variants}
        for _ in range(self._settings.rounds):
            for variant in self._variants:
                self._done += 1
                earlier = outcomes[variant.name]
                if all(outcome["status"] == OK for outcome in earlier):
                    earlier.append(self._trial(variant, length, inputs, first=not earlier))
        batch = self._settings.batch
        flops = self._work.flops(batch, length, self._settings.global_tokens or 0)
        # The others compute more than the sites' definition asks for, or something else.
        own = {"kernel": flops, "body": flops}
        return [pool(name, length, batch, results, own.get(name)) for name, results in outcomes.items()]

    def _trial(self, variant: Variant, length: int, inputs: Path, first: bool) -> dict[str, Any]:
        if variant.model is None:
            return {"status": UNAVAILABLE, "reason": variant.unavailable}
        total = len(self._variants) * len(self._settings.lengths) * self._settings.rounds
        self._progress(f"{variant.title}, {length:,} tokens ({self._done}/{total})")
        skipped = self._foreseen(variant, length) if first else None
        sgemm = self._sgemm if variant.name in ("kernel", "body") else None
        outcome = skipped or run_trial(variant, inputs, self._settings, sgemm)
        if variant.name == self._required and outcome["status"] == WRONG_PATH:
            raise FallbackRan(f"{length} tokens: {outcome['reason']}")
        return outcome

    def _foreseen(self, variant: Variant, length: int) -> dict[str, Any] | None:
        own = [row for row in self._rows if row.variant == variant.name]
        for row in own:
            if row.status in (OVER_LIMIT, OUT_OF_MEMORY):
                return {"status": row.status, "reason": f"not started: {row.status} at {row.length:,} tokens already"}
        medians = {row.length: row.latency.median / 1e3 for row in own if row.latency is not None}
        peaks = {
            row.length: row.peak_rss_bytes - row.session_rss_bytes
            for row in own
            if row.peak_rss_bytes is not None and row.session_rss_bytes is not None
        }
        return foresee(variant, length, medians, peaks, self._settings)


def bench_inputs(manifest: Manifest, length: int, settings: BenchSettings) -> dict[str, Any]:
    """The inputs of a trial: drawn tokens, no padding, and `settings.global_tokens` first tokens that are global.

    Raises:
        InvalidRequest: an input has a dimension that is neither the batch nor the sequence.
    """
    feed = draw_inputs(manifest.inputs, settings.batch, length, seed=settings.seed)
    for record in manifest.inputs:
        if record.role == "global_mask":
            feed[record.name][:, : settings.global_tokens or 0] = 1
    return feed


def _resolved(settings: BenchSettings, manifest: Manifest) -> BenchSettings:
    """The settings with the bundle's lengths and global tokens filled in."""
    lengths = resolve_lengths(settings, manifest)
    has_global = any(record.role == "global_mask" for record in manifest.inputs)
    if settings.global_tokens and not has_global:
        raise InvalidRequest(
            f"--global-tokens {settings.global_tokens}: the bundle has no input for global tokens; those of a "
            "conversion are part of the graph"
        )
    global_tokens = settings.global_tokens if settings.global_tokens is not None else int(has_global)
    return dataclasses.replace(settings, lengths=lengths, global_tokens=global_tokens)


def _baselines(
    bundle: Bundle, settings: BenchSettings, folder: Path, consent: Consent, progress: Progress
) -> Iterable[Variant]:
    if "body" in settings.against:
        yield body_variant(bundle)
    if "dense" in settings.against:
        progress("build dense SDPA")
        yield dense_variant(bundle, folder)
    if "stock" in settings.against:
        progress("trace stock export")
        yield stock_variant(bundle, folder, consent)


def _beside(
    timed: TimedEngine, bundle: Bundle, settings: BenchSettings, folder: Path, consent: Consent, progress: Progress
) -> Iterable[Variant]:
    """The variants beside an engine, which ONNX Runtime may be unable to run where the engine does."""
    if timed.others:
        for name in ("kernel", *settings.against):
            yield Variant(name, None, unavailable=timed.others)
        return
    yield kernel_variant(bundle, settings.device)
    yield from _baselines(bundle, settings, folder, consent, progress)


def _medians(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    medians: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.latency is not None:
            medians.setdefault(row.variant, {})[row.length] = row.latency.median
    return medians


def _with_ratios(rows: tuple[Row, ...]) -> tuple[tuple[Row, ...], str]:
    """Rows with their ratio to the reference, and the reference: an engine, the kernel or the body, whichever ran."""
    medians = _medians(rows)
    reference = next((name for name in ("engine", "kernel", "body") if name in medians), "kernel")
    base = medians.get(reference, {})
    return tuple(
        dataclasses.replace(row, ratio=row.latency.median / base[row.length])
        if row.latency is not None and row.length in base
        else row
        for row in rows
    ), reference


def identity(manifest: Manifest) -> str:
    """SHA-256 of what was exported and how it was converted; another version of the exporter does not change it."""
    source = manifest.source
    what = [source.kind, source.model_class, source.files, source.random_weights, source.seed]
    # A hub id is all that names a model without hashed files.
    what += [] if source.files else [source.location]
    text = json.dumps([*what, dataclasses.asdict(manifest.conversion)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(report: BenchReport, folder: Path, plot: bool) -> BenchReport:
    """Write JSON, plot and page; what cannot be written becomes a note, because the numbers are worth keeping."""
    notes = list(report.notes)
    try:
        folder.mkdir(exist_ok=True)
        if plot:
            from .plot import draw

            try:
                draw(report, folder / PLOT_FILE)
            except EnvironmentLacks as error:
                notes.append(f"no plot: {error}")
        report = dataclasses.replace(report, notes=tuple(notes))
        write_atomically(to_json(report), folder / JSON_FILE)
        write_atomically(bench_page(report, plot), folder / PAGE_FILE)
    except OSError as error:
        notes.append(f"{folder}: the report could not be written: {error.strerror or error}; use --json")
        report = dataclasses.replace(report, notes=tuple(notes))
    return report
