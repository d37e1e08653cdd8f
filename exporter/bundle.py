"""Bundles on disk: written whole or not at all, read back with their hashes checked."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleCorrupted, InvalidRequest
from .manifest import Manifest, sha256_of

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
REPORTS_FOLDER = "reports"


@dataclass(frozen=True)
class Bundle:
    """An exported model in a folder."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL_FILE

    @property
    def reports_path(self) -> Path:
        """Folder of the check and bench reports; it may not exist yet."""
        return self.path / REPORTS_FOLDER

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read the bundle in folder `path`.

        Raises:
            InvalidRequest: there is no such folder, or it holds no bundle.
            BundleCorrupted: a file is missing or differs from the hash in the manifest.
        """
        folder = Path(path)
        file = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise InvalidRequest(f"{folder}: no such folder; next step: longspan export MODEL {folder}")
        if not file.is_file():
            raise InvalidRequest(
                f"{folder}: has no {MANIFEST_FILE}, so it is not a bundle; write one with longspan export"
            )
        try:
            manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise BundleCorrupted(f"{file}: is not text; next step: export again") from error
        for name, expected in manifest.files.items():
            member = folder / name
            if not member.is_file():
                raise BundleCorrupted(f"{member}: is missing; next step: export again")
            if sha256_of(member) != expected:
                raise BundleCorrupted(f"{member}: differs from what was exported (SHA-256); next step: export again")
        return cls(folder, manifest)


def check_destination(out: Path, force: bool) -> None:
    """Refuse a destination before any work is done.

    Raises:
        InvalidRequest: `out` is a file, holds something else than a bundle, or holds a bundle and `force` is off.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InvalidRequest(f"{out}: is a file; allowed: a new folder, or with --force a bundle to replace")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise InvalidRequest(f"{out}: holds files that are not a bundle and would be lost; choose another folder")
    if not force:
        raise InvalidRequest(f"{out}: holds a bundle already; choose another folder, or replace it with --force")


def write_bundle(out: Path, write_model: Callable[[Path], Manifest]) -> Bundle:
    """Write a bundle into a temporary folder beside `out`, then put it in place.

    Args:
        out: The bundle's folder; what stands there is replaced (see `check_destination`).
        write_model: Writes the model's files into the folder it is given and returns the manifest, whose `files` are
            filled in here.

    Raises:
        OSError: writing failed; `out` is as it was before.
    """
    with _staging(out) as staging:
        manifest = write_model(staging)
        files = {file.relative_to(staging).as_posix(): sha256_of(file) for file in sorted(staging.rglob("*"))}
        manifest = dataclasses.replace(manifest, files=files)
        (staging / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        _sync(staging)
        _put_in_place(staging, out)
    return Bundle(out, manifest)


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A new folder on the same file system as `out`, gone afterwards unless it was moved."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}-"))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush the files to disk, so that a rename never makes an empty file visible after a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; an old bundle is moved aside first and put back if that fails."""
    old = Path(tempfile.mkdtemp(dir=staging.parent, prefix=f".{out.name}-old-"))
    try:
        if out.exists():
            out.rename(old / "bundle")
        try:
            staging.rename(out)
        except OSError:
            if (old / "bundle").exists():
                (old / "bundle").rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
