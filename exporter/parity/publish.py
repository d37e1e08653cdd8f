"""Write what a check found: the evidence as JSON, and for readers JUnit XML and a page."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidRequest
from ..reports.files import write_atomically
from .junit import to_junit
from .report import CheckReport
from .saved import REPORT_FILE, to_json

JUNIT_FILE = "check.junit.xml"
PAGE_FILE = "check.html"


def publish(report: CheckReport, folder: Path) -> None:
    """Write all three into `folder`, each whole or not at all.

    Raises:
        InvalidRequest: one cannot be written.
    """
    from ..reports.check_page import check_page

    texts = {REPORT_FILE: to_json(report), JUNIT_FILE: to_junit(report), PAGE_FILE: check_page(report)}
    try:
        for name, text in texts.items():
            write_atomically(text, folder / name)
    except OSError as error:
        raise InvalidRequest(f"{folder}: the report cannot be written: {error.strerror or error}") from error
