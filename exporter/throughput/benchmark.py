"""Time a bundle against what it replaces."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import EnvironmentLacks, FallbackRan, InvalidRequest
from ..manifest import Manifest
from ..parity.inputs import draw_inputs
from .machine import describe_machine
from .report import OK, OUT_OF_MEMORY, OVER_LIMIT, UNAVAILABLE, WRONG_PATH, BenchReport, Row, pool
from .runner import foresee, run_trial
from .settings import BenchSettings, resolve_lengths
from .statistics import crossover
from .variants import Variant, body_variant, dense_variant, kernel_variant, stock_variant

Progress = Callable[[str], None]
"""Called with a stage's name when the stage begins."""

JSON_FILE = "bench.json"
PLOT_FILE = "bench.png"

_BUSY = 0.25
"""Share of the cores in use by other processes above which the machine counts as busy."""
_DRIFT = 0.1
"""Relative difference between rounds, and spread within a trial, that a note points out."""


def bench(
    bundle: Bundle | str | os.PathLike[str],
    settings: BenchSettings | None = None,
    *,
    source: str | None = None,
    require_kernel: bool = False,
    plot: bool = True,
    progress: Progress = lambda stage: None,
    command: str = "",
) -> BenchReport:
    """Time a bundle with its kernel, on its function bodies, with dense attention, and as the stock exporter makes it.

    Every variant at every length runs in a process of its own, the variants of a length right after each other. The
    report is written to ``reports/bench.json`` in the bundle, and with matplotlib a plot to ``reports/bench.png``.

    Args:
        bundle: A bundle or its folder.
        settings: What to measure; the defaults of `BenchSettings` when None.
        source: Where the exported model is now, for the stock export; None for where it was.
        require_kernel: Fail at once where the longspan kernels would not run, or did not.
        plot: Whether to draw the plot.
        progress: Told each stage.
        command: Command line to record.

    Returns:
        The report. A variant that cannot be had, crashes or exceeds a limit is a row of it, not an error.

    Raises:
        InvalidRequest: a setting does not fit the bundle.
        EnvironmentLacks: ONNX Runtime or one of its execution providers is not here.
        FallbackRan: `require_kernel`, and the kernels are missing or did not run.
        BundleCorrupted: the bundle's files are not what was exported.
    """
    settings = settings or BenchSettings()
    _check_runtime(settings)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    settings = _resolved(settings, bundle.manifest)
    kernel = kernel_variant(bundle)
    if require_kernel and kernel.model is None:
        raise FallbackRan(kernel.unavailable)
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder:
        variants = (kernel, *_baselines(bundle, settings, Path(folder), source, progress))
        measure = _Measurement(bundle.manifest, variants, settings, Path(folder), require_kernel, progress)
        rows = measure.run()
    rows, reference = _with_ratios(rows)
    medians = _medians(rows)
    report = BenchReport(
        model=bundle.manifest.source.model_class.rpartition(".")[2],
        attention=_attention(bundle.manifest),
        reference=reference,
        settings=settings,
        machine=describe_machine(),
        rows=rows,
        crossovers=tuple(
            crossover(variant.name, medians.get(reference, {}), medians.get(variant.name, {}))
            for variant in variants
            if variant.name not in (reference, "kernel") and variant.model is not None
        ),
        notes=(),
        command=command,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    report = dataclasses.replace(report, notes=_notes(report))
    progress("write the report")
    return _write(report, bundle.reports_path, plot)


class _Measurement:
    """All trials of one benchmark, in the order that keeps comparable ones close in time."""

    def __init__(
        self,
        manifest: Manifest,
        variants: Sequence[Variant],
        settings: BenchSettings,
        folder: Path,
        require_kernel: bool,
        progress: Progress,
    ) -> None:
        self._manifest = manifest
        self._variants = variants
        self._settings = settings
        self._folder = folder
        self._require_kernel = require_kernel
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
        return [pool(name, length, self._settings.batch, results) for name, results in outcomes.items()]

    def _trial(self, variant: Variant, length: int, inputs: Path, first: bool) -> dict[str, Any]:
        if variant.model is None:
            return {"status": UNAVAILABLE, "reason": variant.unavailable}
        total = len(self._variants) * len(self._settings.lengths) * self._settings.rounds
        self._progress(f"{variant.title}, {length:,} tokens ({self._done}/{total})")
        skipped = self._foreseen(variant, length) if first else None
        outcome = skipped or run_trial(variant, inputs, self._settings)
        if self._require_kernel and variant.name == "kernel" and outcome["status"] == WRONG_PATH:
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


def _check_runtime(settings: BenchSettings) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        raise EnvironmentLacks(
            "bench runs models in ONNX Runtime, which is not installed; next step: pip install 'longspan[cpu]'"
        )
    import onnxruntime

    available = onnxruntime.get_available_providers()
    missing = [name for name in settings.providers if name not in available]
    if missing:
        raise EnvironmentLacks(
            f"--providers {', '.join(missing)}: this ONNX Runtime has {', '.join(available)}; for CUDA, next step: "
            "pip install 'longspan[gpu]'"
        )


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
    bundle: Bundle, settings: BenchSettings, folder: Path, source: str | None, progress: Progress
) -> Iterable[Variant]:
    if "body" in settings.against:
        yield body_variant(bundle)
    if "dense" in settings.against:
        progress("build dense SDPA")
        yield dense_variant(bundle, folder)
    if "stock" in settings.against:
        progress("trace stock export")
        yield stock_variant(bundle, folder, source)


def _medians(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    medians: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.latency is not None:
            medians.setdefault(row.variant, {})[row.length] = row.latency.median
    return medians


def _with_ratios(rows: tuple[Row, ...]) -> tuple[tuple[Row, ...], str]:
    """Rows with their ratio to the reference, and the reference: the kernel, or the body where no kernel ran."""
    medians = _medians(rows)
    reference = "kernel" if "kernel" in medians or "body" not in medians else "body"
    base = medians.get(reference, {})
    return tuple(
        dataclasses.replace(row, ratio=row.latency.median / base[row.length])
        if row.latency is not None and row.length in base
        else row
        for row in rows
    ), reference


def _attention(manifest: Manifest) -> str:
    """The sites in words, equal ones counted."""
    counts: dict[str, int] = {}
    for site in manifest.sites:
        words = f"{site.operator} ({site.pattern})"
        counts[words] = counts.get(words, 0) + 1
    return ", ".join(f"{count} x {words}" for words, count in counts.items())


def _notes(report: BenchReport) -> tuple[str, ...]:
    """What weakens the numbers."""
    notes = []
    machine, settings = report.machine, report.settings
    measured = [row for row in report.rows if row.latency is not None]
    disturbed = [row for row in measured if (row.others_cores or 0.0) > _BUSY * machine.logical_cores]
    if disturbed:
        most = max(row.others_cores or 0.0 for row in disturbed)
        notes.append(
            f"the machine was busy: during {len(disturbed)} of {len(measured)} measurements other processes took up to "
            f"{most:.1f} of {machine.logical_cores} cores; repeat when it is idle"
        )
    unsteady = [row for row in measured if row.latency is not None and row.latency.spread > _DRIFT]
    if unsteady:
        worst = max(unsteady, key=lambda row: row.latency.spread if row.latency else 0.0)
        assert worst.latency is not None
        notes.append(
            f"{len(unsteady)} of {len(measured)} measurements spread by more than {_DRIFT:.0%} (worst: {worst.title} "
            f"at {worst.length:,} tokens, {worst.latency.spread:.0%}): differences of that size mean nothing"
        )
    drifting = [
        row
        for row in measured
        if len(row.round_medians_ms) > 1 and max(row.round_medians_ms) > (1 + _DRIFT) * min(row.round_medians_ms)
    ]
    if drifting:
        notes.append(f"medians differ between rounds by more than {_DRIFT:.0%} in {len(drifting)} measurements")
    cut = [row for row in measured if row.cut_short]
    if cut:
        notes.append(
            f"{len(cut)} measurements have fewer than {settings.iterations} runs or {settings.duration_s:g} s, because "
            "--time-limit ended them"
        )
    few = [row for row in measured if row.latency is not None and row.latency.runs < 100]
    if few:
        notes.append(f"p99 lies between the two slowest runs where there are fewer than 100 ({len(few)} measurements)")
    return tuple(notes)


def _write(report: BenchReport, folder: Path, plot: bool) -> BenchReport:
    """Write JSON and plot; what cannot be written becomes a note, because the numbers are worth keeping."""
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
        # Written whole or not at all: a reader never sees half a report.
        partial = folder / f".{JSON_FILE}.part"
        partial.write_text(report.to_json(), encoding="utf-8")
        partial.replace(folder / JSON_FILE)
    except OSError as error:
        notes.append(f"{folder}: the report could not be written: {error.strerror or error}; use --json")
        report = dataclasses.replace(report, notes=tuple(notes))
    return report
