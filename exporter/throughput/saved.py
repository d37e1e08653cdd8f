"""A benchmark as JSON, samples included, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from .comparison import BenchComparison, ComparedRow
from .machine import Machine
from .report import SCHEMA_VERSION, BenchReport, Row
from .settings import BenchSettings
from .statistics import Crossover, Latency


def to_json(report: BenchReport) -> str:
    """Indented JSON text; latencies are in milliseconds, other units are in the names.

    Samples are one text per round, whole nanoseconds with spaces between: thousands of lines less, and exact.
    """
    data = dataclasses.asdict(report)
    for row in data["rows"]:
        row["samples_ns"] = [" ".join(map(str, samples)) for samples in row["samples_ns"]]
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def load(path: Path, option: str) -> BenchReport:
    """Read a report.

    Args:
        path: The file.
        option: What named it, for errors.

    Raises:
        InvalidRequest: there is no such file, or it holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(
            f"{option} {path}: cannot be read: {error.strerror or error}; next step: longspan bench BUNDLE writes "
            "BUNDLE/reports/bench.json"
        ) from error
    except ValueError as error:
        raise InvalidRequest(f"{option} {path}: is not JSON: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise InvalidRequest(
            f"{option} {path}: has schema version {version}; allowed: {SCHEMA_VERSION}; next step: run longspan bench "
            "again"
        )
    try:
        return _report(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{option} {path}: is not a report of longspan bench: {error!r}") from error


def _report(data: dict[str, Any]) -> BenchReport:
    comparison = data["comparison"]
    return BenchReport(
        **data
        | {
            "settings": BenchSettings(**_tuples(data["settings"])),
            "machine": Machine(**_tuples(data["machine"])),
            "rows": tuple(_row(row) for row in data["rows"]),
            "crossovers": tuple(Crossover(**found) for found in data["crossovers"]),
            "diagnosis": tuple(data["diagnosis"]),
            "notes": tuple(data["notes"]),
            "comparison": None
            if comparison is None
            else BenchComparison(**_tuples(comparison) | {"rows": tuple(ComparedRow(**r) for r in comparison["rows"])}),
        }
    )


def _row(data: dict[str, Any]) -> Row:
    latency = data["latency"]
    return Row(
        **_tuples(data)
        | {
            "latency": None if latency is None else Latency(**latency),
            "samples_ns": tuple(tuple(int(sample) for sample in text.split()) for text in data["samples_ns"]),
        }
    )


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    """Lists become tuples, as the records have them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
