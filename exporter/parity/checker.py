"""Check a bundle: the model in torch against itself in float64, and the runtime against that."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import MODEL_FILE, Bundle
from ..devices import CPU, require_device
from ..errors import ExportFailed, FallbackRan, InvalidRequest
from ..reports.files import prepare_folder
from ..sources.reload import Consent, refuse_differing, request_again
from .comparison import ORIGINAL_LONGEST, Comparison
from .inputs import Feed, save_feeds
from .judging import weak_verdicts
from .plan import Plan, Wanted, plan
from .publish import publish
from .report import CaseReport, CheckedEngine, CheckReport, PathReport, SitesReport
from .saved import reports_folder
from .tolerances import Overrides

if TYPE_CHECKING:
    from ..engines.manifest import Engine
    from ..pipeline import Prepared, Progress
    from .runners import RuntimePath, TorchRunners


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
    engine: str | None = None,
    progress: Progress = lambda stage: None,
) -> CheckReport:
    """Prove that a bundle computes what its model does, by the kernel and by the function body, or that an engine does.

    The report is also written to ``reports/`` in the bundle, or ``reports/engines/NAME`` for an engine: ``check.json``,
    from which `judge` can judge again, and made of it ``check.junit.xml`` and ``check.html``.

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
        engine: Name of an engine of the bundle to check in its place, where that computes; None for the bundle.
        progress: Told each stage.

    Raises:
        InvalidRequest: an argument is wrong, the source is not what was exported, or it needs a permission.
        BundleCorrupted: the files of the bundle or the engine are damaged.
        EnvironmentLacks: a package or the device is missing.
        ExportFailed: the model cannot be loaded, or the runtime cannot run the bundle.
        FallbackRan: `require_kernel`, and a function body ran or would have.
    """
    progress("open")
    if engine is None:
        require_device(device)
    elif device != CPU or sites:
        raise InvalidRequest(
            "--engine: an engine computes where it was built for, and its sites are no outputs of it; leave out "
            "--device and --sites"
        )
    opened = Bundle.open(bundle)
    chosen = None if engine is None else _engine(opened, engine)
    overrides = Overrides.parse(rtol, atol)
    overrides.check([record.name for record in opened.manifest.outputs])
    wanted = Wanted(tuple(lengths or ()), max_length, tuple(input_shapes), load_inputs, seed)
    planned = plan(opened.manifest, wanted, () if chosen is None else chosen.manifest.profiles)
    folder = reports_folder(opened, None if chosen is None else chosen.name)
    prepare_folder(folder)
    if save_inputs is not None:
        save_feeds([planned.feed(index) for index in range(len(planned.cases))], Path(save_inputs))

    paths = _paths(opened, chosen, planned.feed(0), device, progress)
    fallback = _fallback(paths[0], chosen) if require_kernel else ""
    if fallback:
        report = _report(opened, chosen, planned, paths, (), overrides, require_kernel, fallback)
        publish(report, folder)
        raise FallbackRan(f"{opened.path}: --require-kernel: {fallback}")

    from .runners import torch_runners

    progress("load the model")
    prepared = _reload(opened, Consent(source, allow_pickle, trust_remote_code))
    runners = torch_runners(prepared, opened.manifest, paths[0].dtype)
    comparison = Comparison(opened.manifest, runners, paths, overrides, original_max_length)
    with comparison.active():
        cases = []
        for index, case in enumerate(planned.cases):
            progress(f"case {index + 1} of {len(planned.cases)}: {case}")
            cases.append(comparison.run(case, planned.feed(index)))
        site_comparison = None
        of_sites = None if chosen is not None else _case_for_sites(cases, sites)
        if of_sites is not None:
            progress(f"every site: {cases[of_sites].case}")
            site_comparison = _compare_sites(opened, runners, paths, cases[of_sites], planned.feed(of_sites))
    report = _report(opened, chosen, planned, paths, tuple(cases), overrides, require_kernel, fallback)
    report = dataclasses.replace(report, site_comparison=site_comparison)
    progress("write the reports")
    publish(report, folder)
    if chosen is not None and report.passed:
        from ..engines.running.runners import mark_as_run

        mark_as_run(chosen, paths[0].device)
    return report


def _engine(bundle: Bundle, name: str) -> Engine:
    from ..engines.manifest import Engine

    return Engine.open(bundle, name)


def _paths(
    bundle: Bundle, engine: Engine | None, probe: Feed, device: str, progress: Progress
) -> tuple[RuntimePath, ...]:
    if engine is None:
        from .runners import runtime_paths

        progress("open in ONNX Runtime")
        return runtime_paths(bundle, probe, device)
    from ..engines.running.runners import engine_path

    progress(f"open the engine {engine.name}")
    return (engine_path(bundle, engine, probe),)


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


def _fallback(kernel: RuntimePath, engine: Engine | None) -> str:
    """Why the kernel did not run at every site; empty where it did."""
    if engine is not None:
        from ..engines.running.seen import fallback

        return fallback(engine.manifest, kernel.sites)
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
    engine: Engine | None,
    planned: Plan,
    paths: Sequence[RuntimePath],
    cases: tuple[CaseReport, ...],
    overrides: Overrides,
    require_kernel: bool,
    fallback: str,
) -> CheckReport:
    from ..pipeline import package_versions

    manifest = bundle.manifest
    versions = package_versions()
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
        seed=None if planned.loaded is not None else planned.seed,
        paths=tuple(
            PathReport(
                path.name,
                path.runtime,
                path.provider,
                path.runner is not None,
                path.reason,
                path.sites,
                path.dtype,
                (*path.notes, *weak_verdicts(cases, overrides)),
            )
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
        engine=None if engine is None else _checked(engine, planned),
    )


def _checked(engine: Engine, planned: Plan) -> CheckedEngine:
    manifest = engine.manifest
    plugin = "" if manifest.plugin is None else f"{manifest.plugin.api} {manifest.plugin.library}".strip()
    return CheckedEngine(
        engine.name, manifest.target, manifest.dtype, engine.sha256, plugin, manifest.created, planned.outside
    )
