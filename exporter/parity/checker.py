"""Check a bundle: the model in torch against itself in float64, and the runtime against that."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import MODEL_FILE, Bundle
from ..devices import CPU, require_device
from ..errors import ExportFailed, FallbackRan, InvalidRequest
from ..manifest import Manifest
from ..reports.files import prepare_folder
from ..shapes import parse_shapes, sizes_of
from ..sources.base import BATCH, SEQUENCE
from ..sources.reload import Consent, refuse_differing, request_again
from .cases import Case, single_shape, sweep, sweep_lengths
from .comparison import ORIGINAL_LONGEST, Comparison
from .inputs import Feed, draw_inputs, load_feeds, save_feeds
from .publish import publish
from .report import CaseReport, CheckReport, PathReport, SitesReport
from .tolerances import Overrides

if TYPE_CHECKING:
    from ..pipeline import Prepared, Progress
    from .runners import RuntimePath, TorchRunners

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
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
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
    sites: bool | None = None,
    device: str = CPU,
    progress: Progress = lambda stage: None,
) -> CheckReport:
    """Prove that a bundle computes what its model does, by the kernel and by the function body.

    The report is also written to ``reports/`` in the bundle: ``check.json``, from which `judge` can judge again, and
    made of it ``check.junit.xml`` and ``check.html``.

    Args:
        bundle: The bundle's folder.
        source: Where the model that was exported is now; None where the manifest says. Giving it consents to run the
            Python file of a factory.
        allow_pickle: Read the source's pickled weights, which can run any code.
        trust_remote_code: Let the source's own Python code run.
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
        sites: Whether to compare every site in one case; None for where a path fails.
        device: Where the bundle computes: ``"cpu"`` or ``"cuda"``. The model always runs on the CPU.
        progress: Told each stage.

    Raises:
        InvalidRequest: an argument is wrong, the source is not what was exported, or it needs a permission.
        BundleCorrupted: the bundle's files are damaged.
        EnvironmentLacks: a package or the device is missing.
        ExportFailed: the model cannot be loaded, or ONNX Runtime cannot run the bundle.
        FallbackRan: `require_kernel`, and a function body ran or would have.
    """
    progress("open")
    require_device(device)
    opened = Bundle.open(bundle)
    overrides = Overrides.parse(rtol, atol)
    overrides.check([record.name for record in opened.manifest.outputs])
    plan = _plan(opened.manifest, lengths, max_length, tuple(input_shapes), load_inputs, seed)
    prepare_folder(opened.reports_path)
    if save_inputs is not None:
        save_feeds([plan.feed(index) for index in range(len(plan.cases))], Path(save_inputs))

    from .runners import KERNEL, runtime_paths, torch_runners

    progress("open in ONNX Runtime")
    paths = runtime_paths(opened, plan.feed(0), device)
    fallback = _fallback(paths[0]) if require_kernel else ""
    if fallback:
        report = _report(opened, plan, paths, (), overrides, require_kernel, fallback)
        publish(report, opened.reports_path)
        raise FallbackRan(f"{opened.path}: --require-kernel: {fallback}")
    assert paths[0].name == KERNEL
    progress("load the model")
    runners = torch_runners(_reload(opened, Consent(source, allow_pickle, trust_remote_code)), opened.manifest)
    comparison = Comparison(opened.manifest, runners, paths, overrides, original_max_length)
    with comparison.active():
        cases = []
        for index, case in enumerate(plan.cases):
            progress(f"case {index + 1} of {len(plan.cases)}: {case}")
            cases.append(comparison.run(case, plan.feed(index)))
        site_comparison = None
        chosen = _case_for_sites(cases, sites)
        if chosen is not None:
            progress(f"every site: {cases[chosen].case}")
            site_comparison = _compare_sites(opened, runners, paths, cases[chosen], plan.feed(chosen))
    report = _report(opened, plan, paths, tuple(cases), overrides, require_kernel, fallback)
    report = dataclasses.replace(report, site_comparison=site_comparison)
    progress("write the reports")
    publish(report, opened.reports_path)
    return report


def _case_for_sites(cases: Sequence[CaseReport], wanted: bool | None) -> int | None:
    """Index of the case to compare every site in; None for no such comparison.

    The shortest that fails by some path. Where none does and it was asked for, the one closest to its tolerance among
    the longer half of the cases, because short ones say little about windows.
    """
    ran = [index for index, case in enumerate(cases) if case.worst() is not None]
    if wanted is False or not ran:
        return None
    failing = [index for index in ran if cases[index].failing_paths]
    if failing:
        return min(failing, key=lambda index: (cases[index].case.length, cases[index].case.batch))
    return max(ran[len(ran) // 2 :], key=lambda index: cases[index].ratio) if wanted else None


def _compare_sites(
    bundle: Bundle, runners: TorchRunners, paths: Sequence[RuntimePath], case: CaseReport, feed: Feed
) -> SitesReport:
    from .site_comparison import compare_sites

    return compare_sites(bundle, runners, paths, case.case, feed, case.failing_paths)


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
    if not lengths and manifest.fixed_length is not None:
        lengths = (manifest.fixed_length,)
    elif not lengths:
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


def _reload(bundle: Bundle, consent: Consent) -> Prepared:
    """Load the model that the bundle was made from.

    Raises:
        InvalidRequest: it is not where it was, its files are not those that were exported, or it needs a permission.
    """
    from ..pipeline import prepare

    manifest = bundle.manifest
    request = request_again(bundle, consent)
    prepared = prepare(request, manifest.conversion)
    # Once more: the files may have changed between being hashed and being read.
    refuse_differing(request.location, manifest.source.files, prepared.source.record.files)
    if (prepared.family.name if prepared.family is not None else "") != manifest.family:
        raise ExportFailed(
            f"{request.location}: is recognised as {prepared.family.name if prepared.family else 'no family'}, was "
            f"exported as {manifest.family or 'no family'}; next step: export again"
        )
    return prepared


def _report(
    bundle: Bundle,
    plan: _Plan,
    paths: Sequence[RuntimePath],
    cases: tuple[CaseReport, ...],
    overrides: Overrides,
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
        source=manifest.source,
        exported=manifest.created,
        sites=manifest.sites,
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
        site_comparison=None,
        rtol=dict(overrides.rtol),
        atol=dict(overrides.atol),
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
