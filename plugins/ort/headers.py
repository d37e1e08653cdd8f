"""Find ONNX Runtime's C headers, which its wheels do not ship; run as a script, print the folder that holds them.

The build calls this file with nothing but a Python interpreter present, so it uses the standard library only.
Sources are tried in order: ``ONNXRUNTIME_INCLUDE_DIR``, the system, Debian's development package (unpacked into a
cache, never installed), the official release archive. What is downloaded is pinned by version and SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

HEADER = "onnxruntime_c_api.h"
MINIMUM_API_VERSION = 17

# Debian 13's package. The headers are the same on every architecture ("Multi-Arch: same"), so one file serves all.
DEBIAN_PACKAGE = "pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb"
DEBIAN_SHA256 = "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"
DEBIAN_INCLUDE = "usr/include/onnxruntime"

ARCHIVE = "https://github.com/microsoft/onnxruntime/releases/download/v1.20.1/onnxruntime-linux-x64-1.20.1.tgz"
ARCHIVE_SHA256 = "67db4dc1561f1e3fd42e619575c82c601ef89849afc7ea85a003abbac1a1a105"
ARCHIVE_INCLUDE = "onnxruntime-linux-x64-1.20.1/include"

SYSTEM_FOLDERS = (
    "/usr/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include/onnxruntime",
    "/usr/local/include/onnxruntime/core/session",
    "/usr/local/include",
    "/usr/include",
)
APT_FOLDER = Path("/etc/apt")
TIMEOUT_SECONDS = 60


class Unavailable(Exception):
    """One source of headers does not work; the text says why."""


def find_headers() -> Path:
    """Folder that holds ``onnxruntime_c_api.h`` of a supported version.

    Raises:
        Unavailable: no source works; the text names each of them and why it failed.
    """
    sources: tuple[tuple[str, Callable[[], Path]], ...] = (
        ("ONNXRUNTIME_INCLUDE_DIR", _from_environment),
        ("the system", _from_system),
        ("Debian's libonnxruntime-dev", _from_debian),
        ("the official release archive", _from_release),
    )
    refusals = []
    for name, source in sources:
        try:
            return source()
        except (Unavailable, OSError, subprocess.SubprocessError) as refusal:
            refusals.append(f"  - {name}: {refusal}")
            # A folder that the user named and that does not work is a mistake to report, not to work around.
            if name == "ONNXRUNTIME_INCLUDE_DIR" and os.environ.get(name):
                break
    raise Unavailable(
        f"ONNX Runtime's C headers ({HEADER}, API {MINIMUM_API_VERSION} or newer) were not found:\n"
        + "\n".join(refusals)
        + "\nNext step, any one of: set ONNXRUNTIME_INCLUDE_DIR to a folder with the headers; install your "
        "distribution's libonnxruntime-dev; let the build reach a Debian mirror or the release archive; or unpack\n"
        f"  {ARCHIVE}\nand point ONNXRUNTIME_INCLUDE_DIR at its include folder. To install without the kernels "
        "(models then run on their function bodies), set LONGSPAN_KERNELS=OFF."
    )


def locate_headers() -> tuple[Path | None, str]:
    """Look for the headers without downloading anything.

    Returns:
        The folder that holds them, or None; and in the latter case the address that `find_headers` would try first.
    """
    for source in (_from_environment, _from_system):
        try:
            return source(), ""
        except (Unavailable, OSError):
            # As in `find_headers`: a folder that the user named is not worked around.
            if source is _from_environment and os.environ.get("ONNXRUNTIME_INCLUDE_DIR"):
                return None, ""
    for sha256, include in ((DEBIAN_SHA256, DEBIAN_INCLUDE), (ARCHIVE_SHA256, ARCHIVE_INCLUDE)):
        if _cache(sha256).is_dir():
            return _cache(sha256) / include, ""
    mirrors = _debian_mirrors() if shutil.which("dpkg-deb") is not None else []
    return None, f"{mirrors[0]}/{DEBIAN_PACKAGE}" if mirrors else ARCHIVE


def _from_environment() -> Path:
    value = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "")
    if not value:
        raise Unavailable("not set")
    return _first_with_header([value, f"{value}/onnxruntime", f"{value}/onnxruntime/core/session"])


def _from_system() -> Path:
    return _first_with_header(SYSTEM_FOLDERS)


def _from_debian() -> Path:
    def unpack(package: bytes, folder: Path) -> None:
        with tempfile.NamedTemporaryFile(suffix=".deb") as file:
            file.write(package)
            file.flush()
            subprocess.run(["dpkg-deb", "-x", file.name, str(folder)], check=True, timeout=TIMEOUT_SECONDS)

    if shutil.which("dpkg-deb") is None:
        raise Unavailable("dpkg-deb is not on this system")
    mirrors = _debian_mirrors()
    if not mirrors:
        raise Unavailable(f"no Debian mirror is configured in {APT_FOLDER}")
    refusals = []
    for mirror in mirrors:
        try:
            return _cached(f"{mirror}/{DEBIAN_PACKAGE}", DEBIAN_SHA256, unpack) / DEBIAN_INCLUDE
        except (Unavailable, OSError) as refusal:
            refusals.append(f"{mirror}: {refusal}")
    raise Unavailable("; ".join(refusals))


def _from_release() -> Path:
    def unpack(archive: bytes, folder: Path) -> None:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar.getmembers():
                # Headers only: no links, no libraries, nothing outside the include folder.
                if member.isfile() and Path(member.name).parent.as_posix().endswith(ARCHIVE_INCLUDE):
                    source = tar.extractfile(member)
                    if source is not None:
                        target = folder / ARCHIVE_INCLUDE / Path(member.name).name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(source.read())

    return _cached(ARCHIVE, ARCHIVE_SHA256, unpack) / ARCHIVE_INCLUDE


def _first_with_header(folders: Iterable[str]) -> Path:
    folders = list(folders)
    for folder in folders:
        header = Path(folder) / HEADER
        if header.is_file():
            found = re.search(r"#define\s+ORT_API_VERSION\s+(\d+)", header.read_text(errors="replace"))
            version = int(found.group(1)) if found else 0
            if version < MINIMUM_API_VERSION:
                raise Unavailable(f"{header} has API {version}, older than {MINIMUM_API_VERSION}")
            return Path(folder)
    raise Unavailable(f"no {HEADER} in {', '.join(folders)}")


def _debian_mirrors() -> list[str]:
    """Base addresses of the Debian archives that apt is configured with, in order, without duplicates."""
    mirrors: dict[str, None] = {}
    for file in [APT_FOLDER / "sources.list", *sorted((APT_FOLDER / "sources.list.d").glob("*"))]:
        if not file.is_file() or file.suffix not in (".list", ".sources"):
            continue
        for line in file.read_text(errors="replace").splitlines():
            if file.suffix == ".sources":
                words = line.split()[1:] if line.lower().startswith("uris:") else []
            else:
                words = line.split() if re.match(r"\s*deb\s", line) else []
            # An archive of Debian itself ends in /debian; third parties' repositories do not hold the package.
            mirrors.update({word.rstrip("/"): None for word in words if re.match(r"https?://.*/debian/?$", word)})
    return list(mirrors)


def _cache(sha256: str) -> Path:
    """Folder for what is unpacked from the download with that hash."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "longspan" / f"headers-{sha256[:16]}"


def _cached(url: str, sha256: str, unpack: Callable[[bytes, Path], None]) -> Path:
    """The unpacked download with that hash, from the cache or fetched into it."""
    cache = _cache(sha256)
    if cache.is_dir():
        return cache
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        content = response.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise Unavailable(f"{url} has SHA-256 {digest}, expected {sha256}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=cache.parent, prefix=".headers-"))
    try:
        unpack(content, staging)
        staging.rename(cache)
    except OSError:
        # Another build unpacked the same files first: use those.
        if not cache.is_dir():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return cache


if __name__ == "__main__":
    try:
        print(find_headers())
    except Unavailable as error:
        sys.exit(str(error))
