"""Write reports whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ..errors import InvalidRequest


def prepare_folder(folder: Path) -> None:
    """Make sure, before the work begins, that reports can be written to a folder; nothing is left of the attempt.

    Raises:
        InvalidRequest: it cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        for path in missing:
            # Another check may have written there meanwhile.
            with contextlib.suppress(OSError):
                path.rmdir()
    except OSError as error:
        raise InvalidRequest(
            f"{folder}: the report cannot be written there: {error.strerror or error}; next step: work on a copy of "
            "the bundle in a folder that you may write"
        ) from error


def write_atomically(text: str, file: Path) -> None:
    """Write a file whole or not at all, and the folder that it is in.

    Raises:
        OSError: writing failed; `file` is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
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


def write_copy(text: str, file: str | os.PathLike[str], option: str) -> None:
    """Write a report where the user wants it.

    Args:
        text: The report.
        file: Where.
        option: The option that named the file, for the error.

    Raises:
        InvalidRequest: the file cannot be written.
    """
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{option} {file}: cannot be written: {error.strerror or error}") from error
