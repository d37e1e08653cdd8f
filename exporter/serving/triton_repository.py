"""A model repository of Triton Inference Server, written whole or not at all."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...plugins import LibraryMissing, ort_library_path
from ...plugins.library import ORT_LIBRARY_NAME, TENSORRT_MAJOR_VERSIONS, tensorrt_library_path, tensorrt_loader_path
from ..bundle import MODEL_FILE, Bundle
from ..engines.manifest import Engine
from ..engines.onnxruntime.session import CACHE_FOLDER, TENSORRT_PROVIDER
from ..engines.request import PLUGIN_V3, TENSORRT
from ..errors import InvalidRequest
from ..manifest import Manifest, sha256_of
from ..versions import installed_versions
from ..whole_folders import MANIFEST_FILE, FolderKind, reserved
from .served_models import ORT_PLATFORM, ServedModel, engines_to_serve, models_of
from .triton_config import CONFIG_FILE, Placement, model_config, schema, to_text
from .triton_readme import readme
from .warm_up import FOLDER as WARM_UP_FOLDER
from .warm_up import Sample, samples_of

REPOSITORY = FolderKind("a model repository", "package", "package again")
KIND = "longspan model repository for Triton Inference Server"

MODELS_FOLDER = "models"
"""What the server is pointed at; it takes every folder in it for a model, so nothing else is there."""

PLUGINS_FOLDER = "plugins"

DEFAULT_MOUNT = "/longspan"


@dataclass(frozen=True)
class PackageRequest:
    """What to package.

    Attributes:
        name: Of the model; empty for the name of the bundle's folder.
        engines: Names of engines, in the order of the versions; empty for all that can be served.
        mount: Absolute path at which the server sees the repository.
        max_batch: Rows of a batch at most, 0 for no batching; None for what the engines take.
        queue_delay_us: How long a request may wait for others, in microseconds.
        plugin_library: TensorRT plugin library that the engines were built with; None for Longspan's own.
    """

    name: str = ""
    engines: tuple[str, ...] = ()
    mount: str = DEFAULT_MOUNT
    max_batch: int | None = None
    queue_delay_us: int = 1000
    plugin_library: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            InvalidRequest: one has none.
        """
        if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", self.mount) or ".." in PurePosixPath(self.mount).parts:
            raise InvalidRequest(
                f"--mount {self.mount}: must be an absolute path of letters, digits, dots, dashes and underscores, "
                f"e.g. {DEFAULT_MOUNT}"
            )
        if self.queue_delay_us < 0:
            raise InvalidRequest(f"--queue-delay {self.queue_delay_us}: must be 0 or more microseconds")


@dataclass(frozen=True)
class RepositoryManifest:
    """What a repository holds.

    Attributes:
        kind: `KIND`.
        models: Of each model its name, platform and versions: number, engines, files, dtype, GPUs, status.
        libraries: SHA-256 of each library in `PLUGINS_FOLDER`, by name.
        mount: Where the server sees the repository.
        model_sha256: Of the bundle's model.
        versions: Of the packages that took part.
        left_out: Engines of the bundle that are not served, with the reason.
        created: UTC time, ISO 8601.
        files: SHA-256 of each file of the folder but this one.
    """

    kind: str
    models: tuple[dict[str, Any], ...]
    libraries: dict[str, str]
    mount: str
    model_sha256: str
    versions: dict[str, str]
    left_out: tuple[str, ...]
    created: str
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Repository:
    """A repository on disk.

    Attributes:
        path: Its folder.
        manifest: What it holds.
        start: Arguments of ``tritonserver``.
    """

    path: Path
    manifest: RepositoryManifest
    start: tuple[str, ...]


@dataclass(frozen=True)
class Libraries:
    """Libraries that go into a repository, by what they are for.

    Attributes:
        operator: For ONNX Runtime.
        plugins: For TensorRT, by name: the plugins, and what registers them.
        loader: Name of the one that the server is told to load; empty for none.
        loaders: Names of those that ONNX Runtime's TensorRT provider opens.
    """

    operator: Path | None = None
    plugins: dict[str, Path] = field(default_factory=dict)
    loader: str = ""
    loaders: tuple[str, ...] = ()


def package(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    request: PackageRequest | None = None,
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Repository:
    """Write engines of a bundle as a model repository.

    Args:
        bundle: Folder of the bundle.
        out: Folder to write.
        request: What to package.
        force: Replace a repository that stands at `out`.
        progress: Told each stage.

    Raises:
        InvalidRequest: an argument is wrong, there is no engine to serve, or `out` holds something else.
        BundleCorrupted: the bundle or an engine is damaged.
        EnvironmentLacks: the server's schema is not here.
        LibraryMissing: a library that an engine needs is not here.
        ExportFailed: the repository cannot be written.
    """
    request = request or PackageRequest()
    destination = Path(out)
    _refuse_other_folders(destination)
    schema()
    progress("open")
    opened = Bundle.open(bundle)
    engines, left_out = engines_to_serve(opened, request.engines)
    models = models_of(engines, request.name or opened.path.resolve().name, opened.manifest, request.max_batch)
    libraries = _libraries(models, request)
    job = _Job(opened, request, models, libraries, left_out, progress)
    with reserved(destination, force, REPOSITORY) as reservation:
        manifest = reservation.write(job.write)
    return Repository(destination, manifest, start_arguments(models, libraries, request.mount))


def start_arguments(models: tuple[ServedModel, ...], libraries: Libraries, mount: str) -> tuple[str, ...]:
    """Arguments of ``tritonserver`` that serve a repository."""
    arguments = [f"--model-repository={mount}/{MODELS_FOLDER}"]
    if libraries.loader:
        arguments.append(f"--backend-config=tensorrt,plugins={mount}/{PLUGINS_FOLDER}/{libraries.loader}")
    if any(engine.manifest.options.get("version_compatible") for model in models for engine in model.engines):
        arguments.append("--backend-config=tensorrt,version-compatible=true")
    return tuple(arguments)


def _refuse_other_folders(out: Path) -> None:
    """Bundles and engines have a manifest as well; none of them is replaced.

    Raises:
        InvalidRequest: `out` holds one.
    """
    file = out / MANIFEST_FILE
    if not file.is_file():
        return
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("kind")
    except (ValueError, AttributeError):
        kind = None
    if kind != KIND:
        raise InvalidRequest(
            f"{out}: holds a bundle or an engine, which would be lost; next step: choose another folder"
        )


def _libraries(models: tuple[ServedModel, ...], request: PackageRequest) -> Libraries:
    """Find what the engines need, and make sure that it is what they were built with.

    Raises:
        LibraryMissing: one is not here.
        InvalidRequest: the plugin library is another than an engine was built with.
    """
    operator = None
    if any(model.session.operator_library for model in models if model.platform == ORT_PLATFORM):
        operator = Path(ort_library_path())
    need = [
        engine
        for model in models
        for engine in model.engines
        if engine.manifest.plugin is not None and engine.manifest.plugin.api == PLUGIN_V3
    ]
    if not need:
        if request.plugin_library is not None:
            raise InvalidRequest(
                f"--plugin-library {request.plugin_library}: no served engine of TensorRT needs a plugin; next step: "
                "leave the option out"
            )
        return Libraries(operator, *_provider_plugins(models))
    majors = {_major(engine) for engine in need}
    if len(majors) > 1:
        raise InvalidRequest(
            f"engines of TensorRT {' and '.join(map(str, sorted(majors)))}: a server has one TensorRT; next step: "
            "package those of one version (--engine)"
        )
    major = majors.pop()
    library = request.plugin_library or Path(tensorrt_library_path(major))
    if not library.is_file():
        raise LibraryMissing(f"--plugin-library {library}: no such file")
    for engine in need:
        assert engine.manifest.plugin is not None
        if sha256_of(library) != engine.manifest.plugin.sha256:
            raise InvalidRequest(
                f"{engine.name}: was built with another {engine.manifest.plugin.library} than {library} (SHA-256 "
                f"{engine.manifest.plugin.sha256[:12]}…); next step: --plugin-library with that file, or longspan "
                "build again"
            )
    loader = Path(tensorrt_loader_path(major))
    # The loader finds the plugins by the name that they have beside it.
    others, _, loaders = _provider_plugins(models)
    plugins = {**others, Path(tensorrt_library_path(major)).name: library, loader.name: loader}
    return Libraries(operator, plugins, loader.name, loaders)


def _provider_plugins(models: tuple[ServedModel, ...]) -> tuple[dict[str, Path], str, tuple[str, ...]]:
    """Libraries that plugins in ONNX Runtime need, as `Libraries` has them.

    Which TensorRT the server's ONNX Runtime has, nothing here says; a loader does nothing where it is another.

    Raises:
        LibraryMissing: there is none for any version.
    """
    if not any(model.session.tensorrt_plugins for model in models if model.platform == ORT_PLATFORM):
        return {}, "", ()
    found: dict[int, Path] = {}
    missing: list[LibraryMissing] = []
    for major in TENSORRT_MAJOR_VERSIONS:
        try:
            found[major] = Path(tensorrt_loader_path(major))
        except LibraryMissing as error:
            missing.append(error)
    if not found:
        raise missing[0]
    files = {path.name: path for major, path in found.items()}
    files |= {path.name: path for path in (Path(tensorrt_library_path(major)) for major in found)}
    return files, "", tuple(path.name for path in found.values())


def _major(engine: Engine) -> int:
    version = engine.manifest.versions.get(TENSORRT, "")
    if not re.match(r"\d+\.", version):
        raise InvalidRequest(
            f"{engine.name}: its manifest does not say which TensorRT built it; next step: build again"
        )
    return int(version.split(".")[0])


@dataclass(frozen=True)
class _Job:
    """One repository, after everything that can be refused was."""

    bundle: Bundle
    request: PackageRequest
    models: tuple[ServedModel, ...]
    libraries: Libraries
    left_out: tuple[str, ...]
    progress: Callable[[str], None]

    def write(self, folder: Path) -> RepositoryManifest:
        """Write into a folder; `files` of the manifest is left to whoever puts it in place."""
        manifest = self.bundle.manifest
        samples: dict[str, tuple[Sample, ...]] = {}
        for model in self.models:
            self.progress(f"write {model.name}")
            samples[model.name] = samples_of(model, manifest)
            self._write_model(folder / MODELS_FOLDER / model.name, model, manifest, samples[model.name])
        hashes = self._copy_libraries(folder)
        record = RepositoryManifest(
            kind=KIND,
            models=tuple(_record(model) for model in self.models),
            libraries=hashes,
            mount=self.request.mount,
            model_sha256=self.bundle.manifest.files[MODEL_FILE],
            versions=installed_versions(("longspan", "tritonclient")),
            left_out=self.left_out,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        start = start_arguments(self.models, self.libraries, self.request.mount)
        cache = any(
            provider.name == TENSORRT_PROVIDER
            for model in self.models
            if model.platform == ORT_PLATFORM
            for provider in model.session.providers
        )
        if cache:
            # A file keeps the folder in archives, and says what it is for.
            (folder / CACHE_FOLDER).mkdir()
            (folder / CACHE_FOLDER / "README").write_text("ONNX Runtime keeps TensorRT's engines here.\n")
        text = readme(self.models, manifest, samples, hashes, start, self.request, writable=cache)
        (folder / "README.md").write_text(text, encoding="utf-8")
        return record

    def _write_model(self, folder: Path, model: ServedModel, manifest: Manifest, samples: tuple[Sample, ...]) -> None:
        for version in model.versions:
            (folder / str(version.number)).mkdir(parents=True)
            for file in version.files:
                shutil.copyfile(file.source, folder / str(version.number) / file.name)
        registered = model.platform == ORT_PLATFORM and model.session.operator_library
        placement = Placement(
            PurePosixPath(self.request.mount),
            f"{PLUGINS_FOLDER}/{ORT_LIBRARY_NAME}" if registered else "",
            tuple(f"{PLUGINS_FOLDER}/{name}" for name in self.libraries.loaders),
        )
        config = model_config(model, manifest, samples, placement, self.request.queue_delay_us)
        (folder / CONFIG_FILE).write_text(to_text(config), encoding="utf-8")
        if samples:
            (folder / WARM_UP_FOLDER).mkdir()
        for sample in samples:
            for name, value in sample.inputs.items():
                (folder / WARM_UP_FOLDER / sample.file(name)).write_bytes(value.tobytes())

    def _copy_libraries(self, folder: Path) -> dict[str, str]:
        wanted = dict(self.libraries.plugins)
        if self.libraries.operator is not None:
            wanted[ORT_LIBRARY_NAME] = self.libraries.operator
        hashes = {}
        for name, source in sorted(wanted.items()):
            (folder / PLUGINS_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(source, folder / PLUGINS_FOLDER / name)
            hashes[name] = sha256_of(folder / PLUGINS_FOLDER / name)
        return hashes


def _record(model: ServedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "platform": model.platform,
        "max_batch_size": model.max_batch,
        "versions": [
            {
                "number": version.number,
                "engines": [engine.name for engine in version.engines],
                "files": {file.name: file.engine.name for file in version.files},
                "dtype": version.engines[0].manifest.dtype,
                "compute_capabilities": sorted(
                    {gpu for engine in version.engines for gpu in engine.manifest.compute_capabilities}
                ),
                "status": sorted({engine.manifest.status for engine in version.engines}),
            }
            for version in model.versions
        ],
    }
