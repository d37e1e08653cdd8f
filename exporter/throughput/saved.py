"""A benchmark as JSON, samples included, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reports.reading import read_report
from .comparison import BenchComparison, ComparedRow
from .machine import Machine
from .report import READABLE, SCHEMA_VERSION, BenchReport, Row
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
    return read_report(path, _report, READABLE, "longspan bench", option)


def _report(data: Mapping[str, Any]) -> BenchReport:
    comparison = data["comparison"]
    return BenchReport(
        **dict(data)
        | {
            "settings": BenchSettings(**_tuples(data["settings"])),
            "machine": Machine(**_tuples(data["machine"])),
            "rows": tuple(_row(row) for row in data["rows"]),
            "crossovers": tuple(Crossover(**found) for found in data["crossovers"]),
            "diagnosis": tuple(data["diagnosis"]),
            "notes": tuple(data["notes"]),
            # Whatever version was read, this one is what the record has now.
            "schema_version": SCHEMA_VERSION,
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
