"""Where the compiled operator library is."""

from __future__ import annotations

from pathlib import Path

from .errors import LibraryMissing

ORT_LIBRARY_NAME = "liblongspan_ort.so"


def ort_library_path() -> str:
    """File for ``onnxruntime.SessionOptions.register_custom_ops_library``.

    Raises:
        LibraryMissing: this installation was built without a C++ compiler.
    """
    import longspan.plugins

    for folder in longspan.plugins.__path__:
        candidate = Path(folder) / ORT_LIBRARY_NAME
        if candidate.is_file():
            return str(candidate)
    raise LibraryMissing(
        f"{ORT_LIBRARY_NAME} is not installed, so models run on their function bodies; allowed: an installation built "
        "with a C++17 compiler; next step: install g++ (apt-get install g++) and reinstall longspan"
    )
