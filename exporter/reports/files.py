"""Write reports whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import InvalidRequest


def prepare_folder(folder: Path) -> None:
    """Make the folder of the reports before the work begins.

    Raises:
        InvalidRequest: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidRequest(
            f"{folder}: the report cannot be written there: {error.strerror or error}; next step: work on a copy of "
            "the bundle in a folder that you may write"
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
