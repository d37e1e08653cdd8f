"""Read a saved report: one ladder of refusals for every kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidRequest

Report = TypeVar("Report")


def read_report(
    path: Path, parse: Callable[[Mapping[str, Any]], Report], versions: Sequence[int], command: str, option: str = ""
) -> Report:
    """Read a report from its JSON.

    Args:
        path: The file.
        parse: Makes the report of its JSON values; what it raises for missing and wrong values is explained.
        versions: Schema versions that `parse` understands.
        command: What writes such reports, e.g. ``"longspan check"``.
        option: What named the file, for errors; empty where it needs no name.

    Raises:
        InvalidRequest: there is no such file, or it holds something else.
    """
    name = f"{option} {path}".lstrip()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(
            f"{name}: cannot be read: {error.strerror or error}; next step: "
            f"{command} BUNDLE writes it to BUNDLE/reports"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: is not JSON: {error}") from error
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found not in versions:
        raise InvalidRequest(
            f"{name}: has schema version {found}; allowed: {', '.join(map(str, versions))}; next step: run {command} "
            "BUNDLE again"
        )
    try:
        return parse(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{name}: is not a report of {command}: {error!r}") from error
