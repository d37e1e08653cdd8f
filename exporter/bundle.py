"""Bundles on disk: written whole or not at all, read back with their hashes checked."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleCorrupted, ExportFailed, InvalidRequest
from .manifest import Manifest, sha256_of

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
REPORTS_FOLDER = "reports"

# Inside the hidden folder beside a bundle that is being written.
_LOCK, _NEW, _OLD = "lock", "new", "old"


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
    def open(cls, path: str | os.PathLike[str], *, to_run: bool = True) -> Bundle:
        """Read the bundle in folder `path`.

        Args:
            path: The bundle's folder.
            to_run: Whether its model will be read, so that what the ONNX file refers to matters; needs onnx.

        Raises:
            InvalidRequest: there is no such folder, or it holds no bundle.
            BundleCorrupted: a file is missing, is a link, has no hash in the manifest or differs from it.
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
        except BundleCorrupted as error:
            raise BundleCorrupted(f"{folder}: {error}") from error
        if MODEL_FILE not in manifest.files:
            raise BundleCorrupted(f"{file}: has no hash of {MODEL_FILE}; next step: export again")
        for name, expected in manifest.files.items():
            member = folder / name
            if any((folder / part).is_symlink() for part in (Path(name), *Path(name).parents[:-1])):
                raise BundleCorrupted(f"{member}: is a link, which may lead anywhere; next step: export again")
            if not member.is_file():
                raise BundleCorrupted(f"{member}: is missing; next step: export again")
            if sha256_of(member) != expected:
                raise BundleCorrupted(f"{member}: differs from what was exported (SHA-256); next step: export again")
        references = _weight_files(folder / MODEL_FILE) if to_run else set()
        unlisted = sorted(references - {Path(name).as_posix() for name in manifest.files})
        if unlisted:
            raise BundleCorrupted(
                f"{folder / MODEL_FILE}: reads {', '.join(map(repr, unlisted))}, of which {MANIFEST_FILE} has no hash; "
                "next step: export again"
            )
        return cls(folder, manifest)


def _weight_files(model: Path) -> set[str]:
    """Files beside an ONNX file that hold weights of it; none of them is opened.

    Raises:
        BundleCorrupted: the file is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(model, load_external_data=False)
    except DecodeError as error:
        raise BundleCorrupted(f"{model}: is not an ONNX file ({error}); next step: export again") from error
    # Where a tensor may stand: initializers and attributes, of the graph, its subgraphs and the functions.
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    tensors: list[onnx.TensorProto] = []
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            tensors.extend(graph.initializer)
            tensors.extend(part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
            continue
        for attribute in nodes.pop().attribute:
            graphs.extend([attribute.g] * attribute.HasField("g") + list(attribute.graphs))
            tensors.extend([attribute.t, *attribute.tensors])
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                tensors.extend([sparse.values, sparse.indices])
    return {
        Path(entry.value).as_posix() for tensor in tensors for entry in tensor.external_data if entry.key == "location"
    }


def check_destination(out: Path, force: bool) -> None:
    """Refuse a destination before any work is done.

    Raises:
        InvalidRequest: `out` is a file or a mount point, holds something else than a bundle, or holds a bundle and
            `force` is off.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InvalidRequest(f"{out}: is a file; allowed: a new folder, or with --force a bundle to replace")
    if out.is_mount():
        raise InvalidRequest(f"{out}: is a mount point, which cannot be replaced whole; choose a folder inside it")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise InvalidRequest(f"{out}: holds files that are not a bundle and would be lost; choose another folder")
    if not force:
        raise InvalidRequest(f"{out}: holds a bundle already; choose another folder, or replace it with --force")


@dataclass(frozen=True)
class Reservation:
    """A destination that only this process writes to.

    Attributes:
        out: The bundle's folder.
        force: Whether a bundle that stands there may be replaced.
        work: Folder on the same file system for what is not finished.
    """

    out: Path
    force: bool
    work: Path

    def write(self, write_model: Callable[[Path], Manifest]) -> Bundle:
        """Write a bundle beside `out`, then put it in place with a rename.

        Args:
            write_model: Writes the model's files into the folder it is given and returns the manifest, whose `files`
                are filled in here.

        Raises:
            ExportFailed: writing failed; `out` is as it was before.
            InvalidRequest: something has come to stand at `out` meanwhile.
        """
        staging = self.work / _NEW
        try:
            staging.mkdir()
            manifest = write_model(staging)
            files = {file.relative_to(staging).as_posix(): sha256_of(file) for file in sorted(staging.rglob("*"))}
            manifest = dataclasses.replace(manifest, files=files)
            (staging / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            _sync(staging)
            check_destination(self.out, self.force)
            _put_in_place(staging, Path(os.path.realpath(self.out)), self.work / _OLD)
        except OSError as error:
            raise _not_written(self.out, error) from error
        return Bundle(self.out, manifest)


@contextlib.contextmanager
def reserved(out: Path, force: bool) -> Iterator[Reservation]:
    """Keep `out` for one export, from before its work begins until it ends.

    A hidden folder beside `out` holds what is not finished, and a lock that ends with its process, however that ends:
    what a killed export left there is removed, or an old bundle that it had moved aside put back, by the next one.

    Raises:
        InvalidRequest: `out` cannot be replaced (see `check_destination`), or another export is writing to it.
        ExportFailed: nothing can be written there.
    """
    check_destination(out, force)
    target = Path(os.path.realpath(out))
    work = target.parent / f".{target.name}.export"
    created: list[Path] = []
    try:
        try:
            created = _make_folders(target.parent)
            lock = _lock(work, out)
        except OSError as error:
            raise _not_written(out, error) from error
        try:
            if (work / _OLD).exists() and not target.exists():
                (work / _OLD).rename(target)
            _clear(work)
            check_destination(out, force)
            yield Reservation(out, force, work)
        finally:
            _clear(work)
            # Last, so that nobody who takes a new lock finds anything of this export.
            (work / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                work.rmdir()
            os.close(lock)
    finally:
        for folder in reversed(created):
            # Fails, as it should, where a bundle was written.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Create `folder` and its parents; return those that were not there, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _lock(work: Path, out: Path) -> int:
    """Descriptor of the locked file in `work`; the lock lasts until it is closed.

    Raises:
        InvalidRequest: another process holds the lock.
    """
    while True:
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # The export before this one has just removed its folder.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed between opening and locking; a lock on it would then exclude nobody.
            if os.path.samestat(os.fstat(descriptor), (work / _LOCK).stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InvalidRequest(
                f"{out}: another export is writing there; wait until it has finished, or choose another folder"
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
    """Rename `staging` to `target`; an old bundle is moved aside first and put back if that fails."""
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
