"""A check as JSON: the evidence that every other report is made from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle import MODEL_FILE, Bundle
from ..engines.manifest import ENGINES_FOLDER, Engine
from ..errors import InvalidRequest
from ..manifest import SourceRecord, site_of
from ..reports.reading import read_report
from .cases import Case
from .errors_between import Error
from .report import (
    READABLE,
    SCHEMA_VERSION,
    CaseReport,
    CheckedEngine,
    CheckReport,
    Judged,
    OutputReport,
    PathReport,
    SitesReport,
)

REPORT_FILE = "check.json"


def to_json(report: CheckReport) -> str:
    """Indented JSON text; a number that is not finite is null, and the corners of a hull stand on one line."""
    data = dataclasses.asdict(report) | {"passed": report.passed, "failures": report.failures}
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        # A list of dozens of pairs would take hundreds of lines; a string is as easy to parse, and exact.
        return {name: _packed(item) if name == "hull" else _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _packed(hull: Any) -> str:
    return " ".join(f"{reference!r},{error!r}" for reference, error in hull)


def _unpacked(text: str) -> tuple[tuple[float, float], ...]:
    pairs = (pair.split(",") for pair in text.split())
    return tuple((float(reference), float(error)) for reference, error in pairs)


def load(path: Path) -> CheckReport:
    """Read a report.

    Raises:
        InvalidRequest: there is no such file, or it holds something else.
    """
    return read_report(path, _report, READABLE, "longspan check")


def reports_folder(bundle: Bundle, engine: str | None = None) -> Path:
    """Where the reports of a bundle are, or those of one of its engines."""
    return bundle.reports_path if engine is None else bundle.reports_path / ENGINES_FOLDER / engine


def load_for(path: Path, engine: str | None = None) -> tuple[CheckReport, Path]:
    """The report of a bundle or one of its engines, or the one in a file, and the file it is in.

    Args:
        path: A bundle, or a report.
        engine: Name of the engine; None for the bundle itself.

    Raises:
        InvalidRequest: there is none, or the bundle was exported, or the engine built, again since.
        BundleCorrupted: the files of the bundle or the engine are damaged.
    """
    if path.is_file():
        return load(path), path
    bundle = Bundle.open(path, to_run=False)
    opened = None if engine is None else Engine.open(bundle, engine)
    file = reports_folder(bundle, None if opened is None else opened.name) / REPORT_FILE
    report = load(file)
    if opened is not None and (report.engine is None or report.engine.sha256 != opened.sha256):
        raise InvalidRequest(f"{file}: is of another engine than is there now; next step: run the check again")
    if report.model_sha256 != bundle.manifest.files.get(MODEL_FILE, ""):
        raise InvalidRequest(f"{file}: is of another model than the bundle holds now; next step: run the check again")
    return report, file


def _report(data: Mapping[str, Any]) -> CheckReport:
    # Both follow from the rest.
    data = {name: value for name, value in data.items() if name not in ("passed", "failures")}
    comparison = data["site_comparison"]
    return CheckReport(
        **data
        | {
            "source": SourceRecord(**data["source"] | {"inputs": tuple(data["source"]["inputs"])}),
            "sites": tuple(site_of(site) for site in data["sites"]),
            "paths": tuple(PathReport(**path | {"notes": tuple(path.get("notes", ()))}) for path in data["paths"]),
            "engine": None
            if data.get("engine") is None
            else CheckedEngine(**data["engine"] | {"outside": tuple(data["engine"]["outside"])}),
            # Whatever version was read, this one is what the record has now.
            "schema_version": SCHEMA_VERSION,
            "cases": tuple(_case(case) for case in data["cases"]),
            "site_comparison": None
            if comparison is None
            else SitesReport(Case(**comparison["case"]), _outputs(comparison["outputs"]), comparison["notes"]),
        }
    )


def _case(data: dict[str, Any]) -> CaseReport:
    return CaseReport(**data | {"case": Case(**data["case"]), "outputs": _outputs(data["outputs"])})


def _outputs(records: list[dict[str, Any]]) -> tuple[OutputReport, ...]:
    return tuple(
        OutputReport(
            **record
            | {
                "torch_error": _number(record["torch_error"]),
                "magnitude": _number(record["magnitude"]),
                "lowering": {path: _judged(judged) for path, judged in record["lowering"].items()},
                "approximation": None if record["approximation"] is None else _judged(record["approximation"]),
            }
        )
        for record in records
    )


def _judged(data: dict[str, Any]) -> Judged:
    error = data["error"]
    return Judged(
        Error(
            max_abs=_number(error["max_abs"]),
            rms=_number(error["rms"]),
            cosine=_number(error["cosine"]),
            hull=_unpacked(error["hull"]),
            note=error["note"],
        ),
        data["tolerance"],
        data["rtol"],
    )


def _number(value: float | None) -> float:
    return math.inf if value is None else value
