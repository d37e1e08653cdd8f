"""Check a bundle: the model in torch against itself in float64, and the runtime against that."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import MODEL_FILE, Bundle
from ..errors import ExportFailed, FallbackRan, InvalidRequest
from ..manifest import Manifest, OutputRecord
from ..sources import SourceRequest
from ..sources.base import BATCH, SEQUENCE
from .cases import LONGEST, Case, single_shape, sweep, sweep_lengths
from .errors_between import Array, Error, meaningful, measure, token_mask
from .inputs import Feed, draw_inputs, load_feeds, numpy_type, parse_shapes, save_feeds, sizes_of
from .report import REPORT_FILE, CaseReport, CheckReport, Judged, OutputReport, PathReport, prepare_folder
from .report import write_atomically as write
from .tolerances import Overrides, Scale, identity_tolerance, lowering_tolerance

if TYPE_CHECKING:
    from ..pipeline import Prepared, Progress
    from .runners import RuntimePath, TorchRunners

ORIGINAL_LONGEST = LONGEST
"""The original model is run where ``batch · length²`` is at most the square of this: it may be quadratic in both."""

_FROM_FILE = "file"


@dataclass(frozen=True)
class _Plan:
    """The cases, and how to get the input of each."""

    cases: tuple[Case, ...]
    loaded: tuple[Feed, ...] | None
    sizes: dict[str, int]
    seed: int
    manifest: Manifest

    def feed(self, index: int) -> Feed:
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


def check(
    bundle: str | os.PathLike[str],
    *,
    source: str | None = None,
    lengths: Sequence[int] | None = None,
    max_length: int | None = None,
    input_shapes: Iterable[str] = (),
    load_inputs: str | os.PathLike[str] | None = None,
    save_inputs: str | os.PathLike[str] | None = None,
    seed: int = 0,
    rtol: Iterable[str] = (),
    atol: Iterable[str] = (),
    original_max_length: int = ORIGINAL_LONGEST,
    require_kernel: bool = False,
    progress: Progress = lambda stage: None,
) -> CheckReport:
    """Prove that a bundle computes what its model does, by the kernel and by the function body.

    The report is also written to ``reports/check.json`` in the bundle.

    Args:
        bundle: The bundle's folder.
        source: Where the model that was exported is now; None where the manifest says.
        lengths: Lengths to check instead of those that the windows call for.
        max_length: Longest input to check; None for the longest accepted, at most `cases.LONGEST`.
        input_shapes: ``input:[size,…]`` texts; check these shapes instead of the sweep.
        load_inputs: File of inputs to check instead of drawn ones.
        save_inputs: File to write the inputs to.
        seed: Seed of the inputs.
        rtol: ``[output:]value`` texts; judge by these instead of derived tolerances.
        atol: ``[output:]value`` texts; judge by these instead of derived tolerances.
        original_max_length: Compare with the original model where ``batch · length²`` is at most the square of this.
        require_kernel: Fail unless the kernel runs at every site.
        progress: Told each stage.

    Raises:
        InvalidRequest: an argument is wrong, or the source is not what was exported.
        BundleCorrupted: the bundle's files are damaged.
        EnvironmentLacks: a package is missing.
        ExportFailed: the model cannot be loaded, or ONNX Runtime cannot run the bundle.
        FallbackRan: `require_kernel`, and a function body ran or would have.
    """
    progress("open")
    opened = Bundle.open(bundle)
    overrides = Overrides.parse(rtol, atol)
    overrides.check([record.name for record in opened.manifest.outputs])
    plan = _plan(opened.manifest, lengths, max_length, tuple(input_shapes), load_inputs, seed)
    prepare_folder(opened.reports_path)
    if save_inputs is not None:
        save_feeds([plan.feed(index) for index in range(len(plan.cases))], Path(save_inputs))

    from .runners import KERNEL, runtime_paths, torch_runners

    progress("open in ONNX Runtime")
    paths = runtime_paths(opened, plan.feed(0))
    fallback = _fallback(paths[0]) if require_kernel else ""
    if fallback:
        report = _report(opened, plan, paths, (), require_kernel, fallback)
        _write(report, opened)
        raise FallbackRan(f"{opened.path}: --require-kernel: {fallback}")
    assert paths[0].name == KERNEL
    progress("load the model")
    runners = torch_runners(_reload(opened.manifest, source), opened.manifest)
    comparison = _Comparison(opened.manifest, runners, paths, overrides, original_max_length)
    with comparison.active():
        cases = []
        for index, case in enumerate(plan.cases):
            progress(f"case {index + 1} of {len(plan.cases)}: {case}")
            cases.append(comparison.run(case, plan.feed(index)))
    report = _report(opened, plan, paths, tuple(cases), require_kernel, fallback)
    _write(report, opened)
    return report


def _plan(
    manifest: Manifest,
    lengths: Sequence[int] | None,
    max_length: int | None,
    input_shapes: tuple[str, ...],
    load_inputs: str | os.PathLike[str] | None,
    seed: int,
) -> _Plan:
    given = {"--lengths": lengths, "--input-shapes": input_shapes, "--load-inputs": load_inputs}
    chosen = [option for option, value in given.items() if value]
    if len(chosen) > 1:
        raise InvalidRequest(f"{' and '.join(chosen)} contradict each other: each says which inputs to check; give one")
    if load_inputs is not None:
        feeds = tuple(load_feeds(Path(load_inputs), manifest.inputs))
        cases = tuple(_loaded_case(feed, manifest) for feed in feeds)
        return _Plan(cases, feeds, {}, seed, manifest)
    if input_shapes:
        sizes = sizes_of(parse_shapes(input_shapes, manifest.inputs), manifest.inputs)
        length = sizes.get(SEQUENCE, 1)
        if manifest.max_length is not None and length > manifest.max_length:
            raise InvalidRequest(f"--input-shapes: the model accepts up to {manifest.max_length} tokens, not {length}")
        return _Plan(single_shape(manifest, sizes.get(BATCH, 1), length), None, sizes, seed, manifest)
    if not lengths:
        always_global = manifest.conversion.global_tokens
        lengths = sweep_lengths(manifest.sites, manifest.max_length, max_length, always_global)
    return _Plan(sweep(manifest, sorted(set(lengths))), None, {}, seed, manifest)


def _loaded_case(feed: Feed, manifest: Manifest) -> Case:
    sizes = sizes_of({name: value.shape for name, value in feed.items()}, manifest.inputs)
    length = sizes.get(SEQUENCE, 1)
    if manifest.max_length is not None and length > manifest.max_length:
        raise InvalidRequest(f"--load-inputs: the model accepts up to {manifest.max_length} tokens, not {length}")
    return Case(sizes.get(BATCH, 1), length, _FROM_FILE, _FROM_FILE)


def _fallback(kernel: RuntimePath) -> str:
    """Why the kernel did not run at every site; empty where it did."""
    if kernel.runner is None:
        return kernel.reason
    bodies = [site for site, ran in kernel.sites.items() if ran != kernel.name]
    return f"the function body ran at {len(bodies)} of {len(kernel.sites)} sites: {', '.join(bodies)}" if bodies else ""


def _reload(manifest: Manifest, location: str | None) -> Prepared:
    """Load the model that the bundle was made from.

    Raises:
        InvalidRequest: it is not where it was, or its files are not those that were exported.
    """
    from ..pipeline import prepare

    record = manifest.source
    request = SourceRequest.again(record, location)
    # A source without hashed files was fetched from the hub under its name.
    if record.files and not Path(_file_of(request.location, record.kind)).exists():
        raise InvalidRequest(
            f"{request.location}: the model that this bundle was made from is not there; next step: say where it is "
            "now, with --source"
        )
    prepared = prepare(request, manifest.conversion)
    found = prepared.source.record.files
    differing = sorted(name for name in {*record.files, *found} if record.files.get(name) != found.get(name))
    if differing:
        raise InvalidRequest(
            f"{request.location}: {', '.join(differing)} differ from what was exported (SHA-256), so nothing can be "
            "proved about the bundle; next step: export again, or give the model as it was with --source"
        )
    if (prepared.family.name if prepared.family is not None else "") != manifest.family:
        raise ExportFailed(
            f"{request.location}: is recognised as {prepared.family.name if prepared.family else 'no family'}, was "
            f"exported as {manifest.family or 'no family'}; next step: export again"
        )
    return prepared


def _file_of(location: str, kind: str) -> str:
    return location.rpartition(":")[0] if kind == "factory" else location


@dataclass(frozen=True)
class _Comparison:
    """Everything that runs, and how it is judged."""

    manifest: Manifest
    torch: TorchRunners
    paths: Sequence[RuntimePath]
    overrides: Overrides
    original_longest: int

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Activate every runner."""
        runners = [self.torch.oracle, self.torch.own, self.torch.original, *(path.runner for path in self.paths)]
        with contextlib.ExitStack() as stack:
            for runner in runners:
                if runner is not None:
                    stack.enter_context(runner)
            stack.enter_context(_quiet_models())
            yield

    def run(self, case: Case, feed: Feed) -> CaseReport:
        """Run one case everywhere and judge it; nothing of it stays in memory."""
        original, why_not, refused = self._original(case, feed)
        try:
            oracle = _infer(self.torch.oracle, feed)
            own = _infer(self.torch.own, feed)
        except Exception as error:  # whatever the model raises for an input that it refuses
            if isinstance(error, ExportFailed):
                raise
            reason = f"the pattern in torch: {_first_line(error)}"
            return CaseReport(case, (), why_not, reason) if refused else self._broken(case, reason, why_not)
        runtime: dict[str, dict[str, Array] | str] = {}
        for path in self.paths:
            if path.runner is not None:
                try:
                    runtime[path.name] = _infer(path.runner, feed)
                except Exception as error:  # ONNX Runtime's exceptions have no common class
                    runtime[path.name] = f"ONNX Runtime: {_first_line(error)}"
        outputs = tuple(
            self._judge(record, case, feed, oracle, own, original, runtime) for record in self.manifest.outputs
        )
        return CaseReport(case, outputs, why_not)

    def _original(self, case: Case, feed: Feed) -> tuple[dict[str, Array] | None, str, bool]:
        """Outputs of the original model, or why there are none; and whether the model itself refuses the input."""
        if self.torch.original is None:
            return None, "the model calls longspan operators itself", False
        if case.batch * case.length**2 > self.original_longest**2:
            limit = f"--original-max-length {self.original_longest}"
            return None, f"{case.batch} x {case.length}² is beyond {limit} squared", False
        try:
            return _infer(self.torch.original, feed), "", False
        except Exception as error:  # whatever the model raises for an input that it refuses
            if isinstance(error, ExportFailed):
                raise
            return None, f"the original model fails: {_first_line(error)}", True

    def _broken(self, case: Case, reason: str, why_not: str) -> CaseReport:
        """The report of an input that the intercepted model fails on, and the original does not, as far as is known."""
        failure = Judged(Error.failure(reason), 0.0)
        outputs = tuple(
            OutputReport(record.name, record.dtype, 0.0, 0.0, 0, 0, {}, failure) for record in self.manifest.outputs
        )
        return CaseReport(case, outputs, why_not)

    def _judge(
        self,
        record: OutputRecord,
        case: Case,
        feed: Feed,
        oracle: dict[str, Array],
        own: dict[str, Array],
        original: dict[str, Array] | None,
        runtime: dict[str, dict[str, Array] | str],
    ) -> OutputReport:
        name, dtype = record.name, numpy_type(record.dtype)
        truth = oracle[name]
        tokens = meaningful(record, token_mask(feed, self.manifest.inputs))
        # Where torch itself has no finite value (the mean over a row of nothing but padding) there is nothing to prove.
        defined = np.isfinite(truth)
        everywhere = None
        if not defined.all():
            everywhere = defined | np.broadcast_to(True if tokens is None else tokens, truth.shape)
        magnitude = float(np.abs(truth, where=defined, out=np.zeros_like(truth)).max(initial=0.0))
        torch_error = measure(own[name], truth, everywhere)
        scale = Scale.of(self.manifest.sites, self.torch.width, case.length)
        given = self.overrides.of(name)
        rtol = given[0] if given else 0.0
        tolerance = given[1] if given else lowering_tolerance(torch_error.max_abs, magnitude, dtype, scale)
        lowering = {
            path: Judged(
                Error.failure(got) if isinstance(got, str) else measure(got[name], truth, everywhere, rtol), tolerance
            )
            for path, got in runtime.items()
        }
        approximation = None
        if original is not None:
            error = measure(truth, original[name], tokens, rtol if self._same_formula(case) else 0.0)
            identity = given[1] if given else identity_tolerance(torch_error.max_abs, magnitude, dtype, scale)
            approximation = Judged(error, identity if self._same_formula(case) else None)
        return OutputReport(
            name, record.dtype, magnitude, torch_error.max_abs, scale.terms, scale.depth, lowering, approximation
        )

    def _same_formula(self, case: Case) -> bool:
        """Whether the pattern computes what the original model does on inputs like this one.

        It does everywhere where the adapter claims so, and where a window that was cut into dense attention holds the
        whole text.
        """
        window, always_global = self.manifest.conversion.window, self.manifest.conversion.global_tokens
        return self.manifest.faithful or (window is not None and case.length <= window // 2 + 1 + always_global)


@contextlib.contextmanager
def _quiet_models() -> Iterator[None]:
    """Hold back the hints that transformers gives while its models run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _infer(runner: Any, feed: Feed) -> dict[str, Array]:
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        outputs: dict[str, Array] = dict(runner.infer(feed))
    return outputs


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _report(
    bundle: Bundle,
    plan: _Plan,
    paths: Sequence[RuntimePath],
    cases: tuple[CaseReport, ...],
    require_kernel: bool,
    fallback: str,
) -> CheckReport:
    from ..pipeline import package_versions

    manifest = bundle.manifest
    versions = package_versions()
    runtime = f"onnxruntime {_runtime_version()}"
    return CheckReport(
        bundle=str(bundle.path),
        model_sha256=manifest.files.get(MODEL_FILE, ""),
        faithful=manifest.faithful,
        approximation=manifest.approximation,
        source_verified=bool(manifest.source.files),
        max_length=manifest.max_length,
        checked_length=max((case.case.length for case in cases if case.outputs), default=0),
        seed=None if plan.loaded is not None else plan.seed,
        paths=tuple(
            PathReport(path.name, runtime, path.provider, path.runner is not None, path.reason, path.sites)
            for path in paths
        ),
        cases=cases,
        require_kernel=require_kernel,
        fallback=fallback,
        versions=versions,
        differing_versions={
            name: version for name, version in manifest.versions.items() if versions.get(name) != version
        },
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _write(report: CheckReport, bundle: Bundle) -> None:
    try:
        write(report.to_json(), bundle.reports_path / REPORT_FILE)
    except OSError as error:
        raise InvalidRequest(f"{bundle.reports_path}: the report cannot be written: {error.strerror}") from error
