"""Exit codes, and which error leads to which."""

from __future__ import annotations

PASS = 0
THRESHOLD_FAILED = 1
USAGE = 2
EXPORT_FAILED = 3
ENVIRONMENT_LACKS = 4
FALLBACK_RAN = 5
INTERRUPTED = 130


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that Longspan raised on purpose; None for any other."""
    from ..exporter import errors
    from ..plugins.errors import InvalidOperands, LibraryMissing

    codes: tuple[tuple[type[Exception], int], ...] = (
        (errors.InvalidRequest, USAGE),
        (errors.FallbackRan, FALLBACK_RAN),
        (errors.EnvironmentLacks, ENVIRONMENT_LACKS),
        (LibraryMissing, ENVIRONMENT_LACKS),
        (InvalidOperands, USAGE),
        (errors.ExporterError, EXPORT_FAILED),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), None)
