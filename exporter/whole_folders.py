"""Folders of files with a manifest: written whole or not at all, read back with their hashes checked."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from .errors import BundleCorrupted, ExportFailed, InvalidRequest
from .manifest import sha256_of

MANIFEST_FILE = "manifest.json"

# Inside the hidden folder beside one that is being written.
_LOCK, _NEW, _OLD = "lock", "new", "old"


class _Manifest(Protocol):
    """A frozen dataclass with a field `files`."""

    @property
    def files(self) -> dict[str, str]: ...

    def to_json(self) -> str: ...


_Record = TypeVar("_Record", bound=_Manifest)


@dataclass(frozen=True)
class FolderKind:
    """What a folder holds, for messages.

    Attributes:
        noun: What it holds, with its article.
        work: What writes it.
        again: How it is made anew, for the next step of an error.
    """

    noun: str
    work: str
    again: str


BUNDLE = FolderKind("a bundle", "export", "export again")
ENGINE = FolderKind("an engine", "build", "build again")


def read_manifest(folder: Path, parse: Callable[[str], _Record], kind: FolderKind) -> _Record:
    """Read the manifest of a folder.

    Args:
        folder: Where it is.
        parse: Makes a record of its text; raises BundleCorrupted.
        kind: What the folder holds.

    Raises:
        BundleCorrupted: it is not text, or not such a manifest; the message names the place.
    """
    file = folder / MANIFEST_FILE
    try:
        return parse(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleCorrupted(f"{file}: is not text; next step: {kind.again}") from error
    except BundleCorrupted as error:
        raise BundleCorrupted(f"{folder}: {error}") from error


def verify_files(folder: Path, files: Mapping[str, str], kind: FolderKind) -> None:
    """Compare files with what a manifest says of them.

    Args:
        folder: Where they are.
        files: SHA-256 of each, by name.
        kind: What the folder holds.

    Raises:
        BundleCorrupted: one is missing, is a link, or differs.
    """
    for name, expected in files.items():
        member = folder / name
        if any((folder / part).is_symlink() for part in (Path(name), *Path(name).parents[:-1])):
            raise BundleCorrupted(f"{member}: is a link, which may lead anywhere; next step: {kind.again}")
        if not member.is_file():
            raise BundleCorrupted(f"{member}: is missing; next step: {kind.again}")
        if sha256_of(member) != expected:
            raise BundleCorrupted(f"{member}: differs from what was written (SHA-256); next step: {kind.again}")


def check_destination(out: Path, force: bool, kind: FolderKind = BUNDLE) -> None:
    """Refuse a destination before any work is done.

    Raises:
        InvalidRequest: `out` is a file or a mount point, holds something of another kind, or something of this kind
            and `force` is off.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InvalidRequest(f"{out}: is a file; allowed: a new folder, or with --force {kind.noun} to replace")
    if out.is_mount():
        raise InvalidRequest(f"{out}: is a mount point, which cannot be replaced whole; choose a folder inside it")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise InvalidRequest(f"{out}: holds files that are not {kind.noun} and would be lost; choose another folder")
    if not force:
        raise InvalidRequest(f"{out}: holds {kind.noun} already; choose another folder, or replace it with --force")


@dataclass(frozen=True)
class Reservation:
    """A destination that only this process writes to.

    Attributes:
        out: The folder.
        force: Whether what stands there may be replaced.
        work: Folder on the same file system for what is not finished.
        kind: What the folder will hold.
    """

    out: Path
    force: bool
    work: Path
    kind: FolderKind = BUNDLE

    def write(self, write_files: Callable[[Path], _Record]) -> _Record:
        """Write a folder beside `out`, then put it in place with a rename.

        Args:
            write_files: Writes the files into the folder that it is given and returns the manifest, whose `files` are
                filled in here.

        Returns:
            The manifest as it was written.

        Raises:
            ExportFailed: writing failed; `out` is as it was before.
            InvalidRequest: something has come to stand at `out` meanwhile.
        """
        staging = self.work / _NEW
        try:
            staging.mkdir()
            record = write_files(staging)
            written = (file for file in sorted(staging.rglob("*")) if file.is_file())
            files = {file.relative_to(staging).as_posix(): sha256_of(file) for file in written}
            record = dataclasses.replace(record, files=files)  # type: ignore[type-var]
            (staging / MANIFEST_FILE).write_text(record.to_json(), encoding="utf-8")
            _sync(staging)
            check_destination(self.out, self.force, self.kind)
            _put_in_place(staging, Path(os.path.realpath(self.out)), self.work / _OLD)
        except OSError as error:
            raise _not_written(self.out, error) from error
        return record


@contextlib.contextmanager
def reserved(out: Path, force: bool, kind: FolderKind = BUNDLE) -> Iterator[Reservation]:
    """Keep `out` for one writer, from before its work begins until it ends.

    A hidden folder beside `out` holds what is not finished, and a lock that ends with its process, however that ends:
    what a killed writer left there is removed, or an old folder that it had moved aside put back, by the next one.

    Raises:
        InvalidRequest: `out` cannot be replaced (see `check_destination`), or another process is writing to it.
        ExportFailed: nothing can be written there.
    """
    check_destination(out, force, kind)
    target = Path(os.path.realpath(out))
    work = target.parent / f".{target.name}.{kind.work}"
    created: list[Path] = []
    try:
        try:
            created = _make_folders(target.parent)
            lock = _lock(work, out, kind)
        except OSError as error:
            raise _not_written(out, error) from error
        try:
            if (work / _OLD).exists() and not target.exists():
                (work / _OLD).rename(target)
            _clear(work)
            check_destination(out, force, kind)
            yield Reservation(out, force, work, kind)
        finally:
            _clear(work)
            # Last, so that nobody who takes a new lock finds anything of this one.
            (work / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                work.rmdir()
            os.close(lock)
    finally:
        for folder in reversed(created):
            # Fails, as it should, where something was written.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Create `folder` and its parents; return those that were not there, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _lock(work: Path, out: Path, kind: FolderKind) -> int:
    """Descriptor of the locked file in `work`; the lock lasts until it is closed.

    Raises:
        InvalidRequest: another process holds the lock.
    """
    while True:
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # The process before this one has just removed its folder.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed between opening and locking; a lock on it would then exclude nobody.
            if os.path.samestat(os.fstat(descriptor), (work / _LOCK).stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InvalidRequest(
                f"{out}: another {kind.work} is writing there; wait until it has finished, or choose another folder"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _clear(work: Path) -> None:
    """Remove everything from `work` but the lock."""
    for entry in (_NEW, _OLD):
        shutil.rmtree(work / entry, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush the files to disk, so that a rename never makes an empty file visible after a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _put_in_place(staging: Path, target: Path, old: Path) -> None:
    """Rename `staging` to `target`; an old folder is moved aside first and put back if that fails."""
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _not_written(out: Path, error: OSError) -> ExportFailed:
    text = f"{out}: could not be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = next(folder for folder in Path(os.path.realpath(out)).parents if folder.exists())
        free = shutil.disk_usage(parent).free / 2**20
        text += f" ({free:,.0f} MiB free); nothing is left of it; next step: make room, or choose another folder"
    elif error.errno == errno.EFBIG:
        text += "; nothing is left of it; next step: raise the limit on file sizes (ulimit -f)"
    return ExportFailed(text)
