"""Where the compiled operator library is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .errors import LibraryMissing

ORT_LIBRARY_NAME = "liblongspan_ort.so"


def ort_library_path() -> str:
    """File for ``onnxruntime.SessionOptions.register_custom_ops_library``.

    Raises:
        LibraryMissing: this installation was built without a C++ compiler.
    """
    for candidate in _candidates():
        if candidate.is_file():
            return str(candidate)
    raise LibraryMissing(
        f"{ORT_LIBRARY_NAME} is not installed, so models run on their function bodies; allowed: an installation built "
        "with a C++17 compiler; next step: install g++ (apt-get install g++) and reinstall longspan"
    )


def _candidates() -> Iterator[Path]:
    """Files that may be the library: an editable install keeps it apart from the sources, in site-packages."""
    yield Path(__file__).parent / ORT_LIBRARY_NAME
    try:
        distribution = metadata.distribution("longspan")
    except metadata.PackageNotFoundError:
        return
    yield Path(str(distribution.locate_file(f"longspan/plugins/{ORT_LIBRARY_NAME}")))
