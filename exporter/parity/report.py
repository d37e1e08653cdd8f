"""The verdict of a check, as records."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

from ..manifest import SourceRecord
from ..sites.record import AttentionSite
from .cases import Case
from .errors_between import Error

SCHEMA_VERSION = 4
READABLE = (3, SCHEMA_VERSION)
"""2 added the hulls, the sites and the source, so that a report stands alone; 3 the sites' recorded patterns and where
their block lists come from; 4 engines. No release wrote version 1 or 2."""

ENGINE = "engine "
"""What the name of a path through an engine begins with; the engine's own follows."""


@dataclass(frozen=True)
class Judged:
    """An error and what it was held against.

    Attributes:
        error: What was measured.
        tolerance: Absolute tolerance; None where the error is reported only.
        rtol: Relative tolerance beside it: ``|error| <= tolerance + rtol * |reference|`` must hold for every element.
    """

    error: Error
    tolerance: float | None
    rtol: float = 0.0

    @property
    def excess(self) -> float:
        """Smallest absolute tolerance that would pass, beside the relative one."""
        return self.error.excess(self.rtol)

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, or is reported only."""
        return self.tolerance is None or self.excess <= self.tolerance

    def __str__(self) -> str:
        """The error and its tolerance, for a message."""
        if self.error.note:
            return self.error.note
        beside = f" + {self.rtol:.3g} * |value|" if self.rtol else ""
        allowed = "" if self.tolerance is None else f" (tolerance {self.tolerance:.3g}{beside})"
        return f"{self.error.max_abs:.3g}{allowed}"


@dataclass(frozen=True)
class OutputReport:
    """One output of the model for one case.

    Attributes:
        name: Output name.
        dtype: numpy's name of its type in the bundle, or of the one that an engine computes in where that is coarser.
        magnitude: Largest absolute value of the float64 oracle.
        torch_error: Largest absolute error of torch against the oracle, in the model's own type, or in an engine's.
        terms: Terms of the longest sum, and
        depth: attention sites: what the derived tolerance is made from, with the two above.
        lowering: Per path that ran, the runtime against the oracle, at every position: the operators define what
            padded rows hold, and code that averages over all of them reads it.
        approximation: The oracle against the original model, where there is a token; None where that did not run.
        explained: What rounding in an engine's type explains of `torch_error`: torch's error in the model's own type,
            times the ratio of the two roundoffs; None where both are one type.
    """

    name: str
    dtype: str
    magnitude: float
    torch_error: float
    terms: int
    depth: int
    lowering: dict[str, Judged]
    approximation: Judged | None
    explained: float | None = None


@dataclass(frozen=True)
class CaseReport:
    """One case.

    Attributes:
        case: The input.
        outputs: One report per output; empty where torch could not run the model.
        original: Why the original model was not compared with; empty where it was.
        skipped: Why nothing was compared; empty where it was.
    """

    case: Case
    outputs: tuple[OutputReport, ...]
    original: str = ""
    skipped: str = ""

    def worst(self) -> OutputReport | None:
        """The output whose lowering error comes closest to its tolerance by any path; None where nothing ran."""
        ran = [output for output in self.outputs if output.lowering]
        return max(ran, key=lambda output: max(map(ratio, output.lowering.values())), default=None)

    @property
    def ratio(self) -> float:
        """The largest lowering error of any output by any path, over its tolerance; 0 where nothing ran."""
        return max((ratio(judged) for output in self.outputs for judged in output.lowering.values()), default=0.0)

    @property
    def failing_paths(self) -> tuple[str, ...]:
        """Paths by which some output is beyond its tolerance."""
        found = [path for output in self.outputs for path, judged in output.lowering.items() if not judged.passed]
        return tuple(dict.fromkeys(found))

    def failures(self) -> list[str]:
        """One line per error above its tolerance."""
        found = []
        for output in self.outputs:
            judged = {f"lowering error by {path}": error for path, error in output.lowering.items()}
            if output.approximation is not None:
                judged["pattern in torch against the original model"] = output.approximation
            found += [
                f"{self.case}: output {output.name}: {what}: {error}"
                for what, error in judged.items()
                if not error.passed
            ]
        return found


@dataclass(frozen=True)
class PathReport:
    """One way through the runtime.

    Attributes:
        name: ``"kernel"``, ``"function body"``, or `ENGINE` and the name of an engine.
        runtime: Name and version.
        provider: Execution provider of the sites' nodes, or the GPU that an engine ran on.
        ran: Whether the path was run.
        reason: Why it was not.
        sites: What was seen to run at each site, by node name: ``"kernel"``, also where it is a plugin's,
            ``"function body"``, or ``"native layer"``.
        dtype: numpy's name of the type that an engine computes in; empty for the bundle's own.
        notes: What a reader should know about it.
    """

    name: str
    runtime: str
    provider: str
    ran: bool
    reason: str
    sites: dict[str, str]
    dtype: str = ""
    notes: tuple[str, ...] = ()

    @property
    def others(self) -> dict[str, str]:
        """Sites where something else ran than the path stands for; an engine stands for what it was built from."""
        if self.name.startswith(ENGINE):
            return {}
        return {node: ran for node, ran in self.sites.items() if ran != self.name}

    @property
    def what_ran(self) -> str:
        """What was seen at the sites, which need not be what was meant."""
        counts = collections.Counter(self.sites.values())
        if not self.name.startswith(ENGINE):
            others = f"; {', '.join(sorted(set(self.others.values())))} at the others" if self.others else ""
            return f"ran at {counts[self.name]} of {len(self.sites)} sites{others}"
        return ", ".join(f"{what} at {count} of {len(self.sites)} sites" for what, count in sorted(counts.items()))


@dataclass(frozen=True)
class CheckedEngine:
    """The engine that a check ran.

    Attributes:
        name: Of its folder.
        target: What it was built for: ``"tensorrt"``, ``"tensorrt-rtx"`` or ``"ort"``.
        dtype: What it computes in: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        sha256: Of its file.
        plugin: The plugin that it needs, in words; empty for none.
        built: When, UTC, ISO 8601.
        outside: What the sweep would have checked and the engine's optimization profiles do not admit, with their
            ranges, a line each.
    """

    name: str
    target: str
    dtype: str
    sha256: str
    plugin: str
    built: str
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class SitesReport:
    """Every attention site compared in one case: where an error begins.

    Attributes:
        case: The input.
        outputs: One report per site, in graph order, named by its node. Errors of the sites before it are in each
            site's error as they are in torch's, so each has a tolerance of its own.
        notes: By path, what a reader must know, or why nothing was compared.
    """

    case: Case
    outputs: tuple[OutputReport, ...]
    notes: dict[str, str]

    def first_off(self, path: str) -> OutputReport | None:
        """The first site in graph order whose output by `path` is beyond its tolerance; None where all are within."""
        return next((site for site in self.outputs if path in site.lowering and not site.lowering[path].passed), None)


@dataclass(frozen=True)
class CheckReport:
    """What a check found: enough to judge it again, and to write every other report, without the bundle.

    Attributes:
        bundle: The bundle's folder as it was given.
        model_sha256: Hash of the ONNX file that was checked.
        source: What the bundle was exported from.
        exported: When, UTC, ISO 8601.
        sites: The bundle's attention sites, in graph order.
        faithful: Whether the pattern is what the original model computes.
        approximation: Where the approximation error comes from; empty when faithful and not converted.
        source_verified: Whether the source's files have the hashes that were exported; a model from the hub has none.
        max_length: Longest input that the model accepts; None when unlimited.
        checked_length: Longest input that was checked.
        seed: Seed of the inputs; None where they were loaded.
        paths: Both paths; or that through an engine alone.
        cases: Every case, shortest first.
        site_comparison: Every site in one case; None where that was neither asked for nor called for by a failure.
        rtol: Relative tolerances that the user gave, by output; empty where they are derived.
        atol: Absolute tolerances that the user gave, by output; empty where they are derived.
        require_kernel: Whether the kernel had to run at every site.
        fallback: Sites where something else ran or was built, or why the kernel did not; empty unless
            `require_kernel`.
        versions: Versions of the packages that ran here.
        differing_versions: Packages whose version at export was another, with that version.
        created: UTC time, ISO 8601.
        engine: The engine that ran in place of the bundle; None where none did.
        schema_version: Version of this record.
    """

    bundle: str
    model_sha256: str
    source: SourceRecord
    exported: str
    sites: tuple[AttentionSite, ...]
    faithful: bool
    approximation: str
    source_verified: bool
    max_length: int | None
    checked_length: int
    seed: int | None
    paths: tuple[PathReport, ...]
    cases: tuple[CaseReport, ...]
    site_comparison: SitesReport | None
    rtol: dict[str, float]
    atol: dict[str, float]
    require_kernel: bool
    fallback: str
    versions: dict[str, str]
    differing_versions: dict[str, str]
    created: str
    engine: CheckedEngine | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def failures(self) -> list[str]:
        """One line per error above its tolerance, shortest case first; or why nothing was proved."""
        found = [line for case in self.cases for line in case.failures()]
        if not any(case.outputs for case in self.cases) and not self.fallback:
            reasons = {case.skipped for case in self.cases}
            found.append(f"nothing was compared: {'; '.join(sorted(reasons)) or 'there was no case'}")
        return found

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance, and the kernel ran where it was required."""
        return not self.failures and not self.fallback

    def worst(self, path: str) -> tuple[Case, OutputReport] | None:
        """Case and output whose lowering error by `path` comes closest to its tolerance, or passes it by most."""
        found = [(c.case, output) for c in self.cases for output in c.outputs if path in output.lowering]
        return max(found, key=lambda pair: ratio(pair[1].lowering[path]), default=None)

    def site(self, node: str) -> AttentionSite:
        """The site of a node.

        Raises:
            KeyError: there is none of this name.
        """
        for site in self.sites:
            if site.node == node:
                return site
        raise KeyError(node)


def ratio(judged: Judged) -> float:
    """An error over its tolerance; 0 for 0 over 0."""
    if judged.excess <= 0:
        return 0.0
    return judged.excess / judged.tolerance if judged.tolerance else math.inf


def describe_first_off(report: CheckReport, path: str) -> str:
    """What the comparison of the sites says about a path, in one sentence; empty where nothing is off."""
    comparison = report.site_comparison
    if comparison is None:
        return ""
    if path in comparison.notes:
        return f"{path}: sites at {comparison.case}: {comparison.notes[path]}"
    off = comparison.first_off(path)
    if off is None:
        return ""
    index = [site.name for site in comparison.outputs].index(off.name)
    site, judged = report.site(off.name), off.lowering[path]
    times = ratio(judged)
    before = f"; every site before it ({index}) is within its tolerance" if index else "; it is the first of all"
    beyond = f", {times:.3g} times over" if math.isfinite(times) else ""
    return (
        f"{path}: first site off at {comparison.case}: {site.layer or site.node} ({site.node}, {site.pattern}): "
        f"{judged}{beyond}{before}"
    )
