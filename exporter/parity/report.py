"""The verdict of a check, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from .cases import Case
from .errors_between import Error

SCHEMA_VERSION = 1
REPORT_FILE = "check.json"


@dataclass(frozen=True)
class Judged:
    """An error and what it was held against.

    Attributes:
        error: What was measured.
        tolerance: Largest `Error.excess` that passes; None where the error is reported only.
    """

    error: Error
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, or is reported only."""
        return self.tolerance is None or self.error.excess <= self.tolerance


@dataclass(frozen=True)
class OutputReport:
    """One output of the model for one case.

    Attributes:
        name: Output name.
        dtype: numpy type name in the bundle.
        magnitude: Largest absolute value of the float64 oracle.
        torch_error: Largest absolute error of torch in the model's own type against the oracle.
        terms: Terms of the longest sum, and
        depth: attention sites: what the derived tolerance is made from, with the two above.
        lowering: Per path that ran, the runtime against the oracle, at every position: the operators define what
            padded rows hold, and code that averages over all of them reads it.
        approximation: The oracle against the original model, where there is a token; None where that did not run.
    """

    name: str
    dtype: str
    magnitude: float
    torch_error: float
    terms: int
    depth: int
    lowering: dict[str, Judged]
    approximation: Judged | None


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

    def failures(self) -> list[str]:
        """One line per error above its tolerance."""
        found = []
        for output in self.outputs:
            judged = {f"lowering error by {path}": error for path, error in output.lowering.items()}
            if output.approximation is not None:
                judged["pattern in torch against the original model"] = output.approximation
            found += [
                f"{self.case}: output {output.name}: {what}: {_described(error)}"
                for what, error in judged.items()
                if not error.passed
            ]
        return found


def _described(judged: Judged) -> str:
    error = judged.error
    return error.note or f"{error.max_abs:.3g} (tolerance {judged.tolerance:.3g})"


@dataclass(frozen=True)
class PathReport:
    """One way through the runtime.

    Attributes:
        name: ``"kernel"`` or ``"function body"``.
        runtime: Name and version.
        provider: Execution provider of the sites' nodes.
        ran: Whether the path was run.
        reason: Why it was not.
        sites: What was seen to run at each site, by node name.
    """

    name: str
    runtime: str
    provider: str
    ran: bool
    reason: str
    sites: dict[str, str]


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        bundle: The bundle's folder as it was given.
        model_sha256: Hash of the ONNX file that was checked.
        faithful: Whether the pattern is what the original model computes.
        approximation: Where the approximation error comes from; empty when faithful and not converted.
        source_verified: Whether the source's files have the hashes that were exported; a model from the hub has none.
        max_length: Longest input that the model accepts; None when unlimited.
        checked_length: Longest input that was checked.
        seed: Seed of the inputs; None where they were loaded.
        paths: Both paths.
        cases: Every case, shortest first.
        require_kernel: Whether the kernel had to run at every site.
        fallback: Sites where a function body ran, or why the kernel did not; empty unless `require_kernel`.
        versions: Versions of the packages that ran here.
        differing_versions: Packages whose version at export was another, with that version.
        created: UTC time, ISO 8601.
        schema_version: Version of this record.
    """

    bundle: str
    model_sha256: str
    faithful: bool
    approximation: str
    source_verified: bool
    max_length: int | None
    checked_length: int
    seed: int | None
    paths: tuple[PathReport, ...]
    cases: tuple[CaseReport, ...]
    require_kernel: bool
    fallback: str
    versions: dict[str, str]
    differing_versions: dict[str, str]
    created: str
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

    def to_json(self) -> str:
        """Indented JSON text; a number that is not finite is null."""
        data = dataclasses.asdict(self) | {"passed": self.passed, "failures": self.failures}
        return json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n"


def ratio(judged: Judged) -> float:
    """An error over its tolerance; 0 for 0 over 0."""
    if judged.error.excess <= 0:
        return 0.0
    return judged.error.excess / judged.tolerance if judged.tolerance else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_folder(folder: Path) -> None:
    """Make the folder of the reports before the work begins.

    Raises:
        InvalidRequest: it cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidRequest(
            f"{folder}: the report cannot be written there: {error.strerror or error}; next step: check a copy of the "
            "bundle in a folder that you may write"
        ) from error


def write_atomically(text: str, file: Path) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: writing failed; `file` is as it was.
    """
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
