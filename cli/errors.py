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


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of any error, and what to tell the user about it."""
    code = exit_code(error)
    if code is not None:
        return code, f"error: {error}"
    if isinstance(error, MemoryError):
        return EXPORT_FAILED, "error: out of memory; next step: a shorter length, a smaller batch, or more memory"
    if isinstance(error, OSError) and error.filename is not None:
        return EXPORT_FAILED, f"error: {error.filename}: {error.strerror}"
    name = f"{type(error).__name__}: {error}".rstrip(": ")
    return EXPORT_FAILED, f"internal error: {name}; this is a bug in longspan: run again with --debug and report it"
