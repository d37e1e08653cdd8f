"""Find TensorRT's C++ headers; run as a script, print a line ``MAJOR FOLDER`` for each major version found.

The build calls this file with nothing but a Python interpreter present, so it uses the standard library only. Sources
are tried in order, and the first with a major version is taken for it: the folders that ``TENSORRT_INCLUDE_DIR`` names
(separated by ``:``), the system, and the copy that the package ``kernel-lens`` brings along. Nothing is downloaded, and
nothing but the headers is needed: a library of plugins is not linked to TensorRT.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

HEADER = "NvInferRuntime.h"
VERSION_HEADER = "NvInferVersion.h"
MAJOR_VERSIONS = (10, 11)
"""Major versions of TensorRT that the plugins are written for."""

SYSTEM_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/include",
    "/usr/local/tensorrt/include",
    "/usr/src/tensorrt/include",
    "/opt/tensorrt/include",
)


class Unavailable(Exception):
    """A folder that the user named does not hold TensorRT's headers; the text says why."""


def find_headers() -> dict[int, Path]:
    """Folders with TensorRT's headers, by major version; empty where there are none.

    Raises:
        Unavailable: ``TENSORRT_INCLUDE_DIR`` names a folder without them, or of a version that is not supported.
    """
    found: dict[int, Path] = {}
    for folder in filter(None, os.environ.get("TENSORRT_INCLUDE_DIR", "").split(":")):
        version = _version(Path(folder))
        if version is None:
            raise Unavailable(
                f"TENSORRT_INCLUDE_DIR names {folder}, which has no {HEADER} with a {VERSION_HEADER}; "
                "next step: name the folder include of a TensorRT release"
            )
        if version not in MAJOR_VERSIONS:
            raise Unavailable(
                f"TENSORRT_INCLUDE_DIR names {folder}, which has TensorRT {version}; "
                f"allowed: {', '.join(map(str, MAJOR_VERSIONS))}"
            )
        found.setdefault(version, Path(folder))
    for place in (*map(Path, SYSTEM_FOLDERS), *_packaged()):
        version = _version(place)
        if version in MAJOR_VERSIONS:
            found.setdefault(version, place)
    return dict(sorted(found.items()))


def _packaged() -> Iterator[Path]:
    """The folder in the package kernel-lens, which is not imported."""
    try:
        spec = importlib.util.find_spec("kernel_lens")
    except (ImportError, ValueError):
        return
    locations: Iterable[str] = (spec.submodule_search_locations or ()) if spec is not None else ()
    for location in locations:
        yield Path(location) / "include" / "tensorrt"


def _version(folder: Path) -> int | None:
    """Major version of the headers in a folder; None where there are none that are whole."""
    if not (folder / HEADER).is_file() or not (folder / VERSION_HEADER).is_file():
        return None
    text = (folder / VERSION_HEADER).read_text(errors="replace")
    numbers: dict[str, str] = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", text))
    value = numbers.get("NV_TENSORRT_MAJOR", "")
    value = numbers.get(value, value)  # newer headers name the number first
    return int(value) if value.isdecimal() else None


if __name__ == "__main__":
    try:
        for major, include in find_headers().items():
            print(major, include)
    except Unavailable as error:
        sys.exit(str(error))
