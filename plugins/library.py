"""Where the compiled operator libraries are, and which TensorRT a plugin library is for."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .errors import InvalidLibrary, LibraryMissing

ORT_LIBRARY_NAME = "liblongspan_ort.so"
TENSORRT_MAJOR_VERSIONS = (10, 11)
"""Major versions of TensorRT that there is a plugin library for."""

_NOTE_NAME = b"longspan\0"
_NOTE_TYPE = 1
_SEGMENT_NOTE = 4
_LARGEST_NOTES = 1 << 20


def ort_library_path() -> str:
    """File for ``onnxruntime.SessionOptions.register_custom_ops_library``.

    Raises:
        LibraryMissing: this installation was built without a C++ compiler.
    """
    return _find(
        ORT_LIBRARY_NAME,
        "so models run on their function bodies; allowed: an installation built with a C++17 compiler; next step: "
        "install g++ (apt-get install g++) and reinstall longspan",
    )


def tensorrt_library_name(major: int) -> str:
    """File name of the plugin library for a major version of TensorRT."""
    return f"liblongspan_trt{major}.so"


def tensorrt_library_path(major: int) -> str:
    """File that TensorRT's plugin registry loads.

    Args:
        major: Major version of the TensorRT that loads it.

    Raises:
        LibraryMissing: this installation was built without that version's headers, or there is no library for it.
    """
    if major not in TENSORRT_MAJOR_VERSIONS:
        raise LibraryMissing(
            f"there is no plugin library for TensorRT {major}; allowed: "
            f"{', '.join(map(str, TENSORRT_MAJOR_VERSIONS))}; next step: install one of these versions of TensorRT, or "
            "build without the plugin (--plugin-api none)"
        )
    return _find(
        tensorrt_library_name(major),
        f"because longspan was built without the headers of TensorRT {major}; next step: "
        f"{tensorrt_library_remedy()}, with the folder include of a TensorRT {major} release (and g++)",
    )


def tensorrt_loader_path(major: int) -> str:
    """File for programs that open plugin libraries with ``dlopen`` and do no more.

    It registers the plugins of `tensorrt_library_path`, which must lie beside it, in the TensorRT of the process. A
    registry loads `tensorrt_library_path` itself.

    Args:
        major: Major version of the TensorRT that the program has.

    Raises:
        LibraryMissing: this installation was built without that version's headers, or there is no library for it.
    """
    library = Path(tensorrt_library_path(major))
    name = f"{library.stem}_loader.so"
    loader = library.with_name(name)
    if not loader.is_file():
        raise LibraryMissing(f"{name} is not installed beside {library}; next step: {tensorrt_library_remedy()}")
    return str(loader)


def tensorrt_library_remedy() -> str:
    """The command that brings a plugin library."""
    return "TENSORRT_INCLUDE_DIR=… pip install --force-reinstall --no-deps longspan"


def plugin_library_major(path: str | Path) -> int:
    """Major version of TensorRT that a plugin library was built for, read from the file without loading it.

    A library of another major version can end the process that loads it, which is why this is asked first. The number
    stands in an ELF note named ``longspan`` of type 1.

    Raises:
        InvalidLibrary: the file cannot be read, is no ELF file, or is not a plugin library of longspan's.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidLibrary(f"{path} cannot be read: {error.strerror}") from error
    try:
        for name, kind, content in _notes(data):
            if name == _NOTE_NAME and kind == _NOTE_TYPE and len(content) == 4:
                return int.from_bytes(content, "little")
    except (struct.error, _NotElf) as error:
        raise InvalidLibrary(
            f"{path} is not a 64-bit ELF library; allowed: {tensorrt_library_name(10)} and the like"
        ) from error
    raise InvalidLibrary(
        f"{path} is not a plugin library of longspan's: it does not say which TensorRT it is for; allowed: "
        f"{tensorrt_library_name(10)} and the like; next step: leave the option out, or name the library of this "
        "installation"
    )


class _NotElf(Exception):
    """A file is not what the machines that TensorRT runs on load."""


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, type and content of the notes in an ELF file of 64 bits, little-endian."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise _NotElf
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, entries = struct.unpack_from("<HH", data, 54)
    for number in range(entries):
        at = table + number * entry_size
        (kind,) = struct.unpack_from("<I", data, at)
        (start,) = struct.unpack_from("<Q", data, at + 8)
        (size,) = struct.unpack_from("<Q", data, at + 32)
        if kind != _SEGMENT_NOTE or size > _LARGEST_NOTES:
            continue
        end = start + size
        while start + 12 <= end:
            name_size, content_size, note_type = struct.unpack_from("<III", data, start)
            name_end = start + 12 + name_size
            content = name_end + -name_size % 4
            yield data[start + 12 : name_end], note_type, data[content : content + content_size]
            start = content + content_size + -content_size % 4


def _find(name: str, otherwise: str) -> str:
    for candidate in _candidates(name):
        if candidate.is_file():
            return str(candidate)
    raise LibraryMissing(f"{name} is not installed, {otherwise}")


def _candidates(name: str) -> Iterator[Path]:
    """Files that may be the library: an editable install keeps it apart from the sources, in site-packages."""
    yield Path(__file__).parent / name
    try:
        distribution = metadata.distribution("longspan")
    except metadata.PackageNotFoundError:
        return
    yield Path(str(distribution.locate_file(f"longspan/plugins/{name}")))
