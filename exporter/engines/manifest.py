"""What was built: the manifest of an engine, and engines on disk."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import MODEL_FILE, Bundle
from ..errors import BundleCorrupted, InvalidRequest
from ..sites.record import Rung
from ..whole_folders import ENGINE, MANIFEST_FILE, read_manifest, verify_files
from .profiles import Profile, ShapeRange
from .request import DTYPES, TARGETS

SCHEMA_VERSION = 1

ENGINES_FOLDER = "engines"
ENGINE_FILE = "model.engine"
"""The engine of TensorRT and TensorRT-RTX in its folder."""

NOT_RUN = "built, not run"
NOT_BUILT = "a graph, not built"


@dataclass(frozen=True)
class PluginRecord:
    """The plugin that an engine needs.

    Attributes:
        api: ``"v3"`` or ``"aot"``.
        library: File name of the library; empty where the engine holds everything itself.
        sha256: Of the library.
        kernels: What its kernels are for: ``"sm_90"``, …, ``"ptx"``.
    """

    api: str
    library: str
    sha256: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class BuiltSite:
    """How one attention site was built.

    Attributes:
        node: Its node in the bundle's graph.
        lowering: ``"plugin"``, ``"native layer"``, ``"function body"`` or ``"kernel"`` (ONNX Runtime's).
        ladder: Every rung that was considered, with the reason.
    """

    node: str
    lowering: str
    ladder: tuple[Rung, ...]


@dataclass(frozen=True)
class EngineManifest:
    """Everything about an engine but its content.

    Attributes:
        target: One of `request.TARGETS`.
        file: The engine, or the model of an ``ort`` build.
        dtype: What matrix products and attention compute in: one of `request.DTYPES`.
        kept_in_fp32: How many nodes stay in fp32, by the reason.
        compute_capabilities: What it runs on, ``"sm89"``, …; empty where that is not bound.
        device: Name of the GPU that it was built on; empty where none was there.
        profiles: Shapes that it takes; empty where any will do.
        options: Of the request, those that are not the default.
        plugin: What it needs to run; None for nothing.
        sites: How each attention site was built.
        model_sha256: Of the bundle's model that it was built from.
        versions: Versions of the packages that took part.
        status: `NOT_RUN`, `NOT_BUILT`, or on what it has run.
        build_s: Seconds that the build took.
        created: UTC time, ISO 8601.
        session: For an ``ort`` build, what to open the session with: see `onnxruntime.session`.
        files: SHA-256 of each file of the folder but this one.
        schema_version: Version of this record.
    """

    target: str
    file: str
    dtype: str
    kept_in_fp32: dict[str, int]
    compute_capabilities: tuple[str, ...]
    device: str
    profiles: tuple[Profile, ...]
    options: dict[str, Any]
    plugin: PluginRecord | None
    sites: tuple[BuiltSite, ...]
    model_sha256: str
    versions: dict[str, str]
    status: str
    build_s: float
    created: str
    session: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def _require_values(self) -> None:
        """Look at what the types of a dataclass do not hold JSON to.

        Raises:
            ValueError: a value is none that `to_json` writes.
        """
        texts = [self.file, self.model_sha256, self.status, self.created, self.device, *self.compute_capabilities]
        for name, good in (
            ("target", self.target in TARGETS),
            ("dtype", self.dtype in DTYPES),
            ("compute_capabilities", all(re.fullmatch(r"sm\d{2,3}", str(one)) for one in self.compute_capabilities)),
            ("a text", all(isinstance(text, str) for text in texts)),
            ("kept_in_fp32", isinstance(self.kept_in_fp32, dict)),
            ("options", isinstance(self.options, dict)),
            (
                "versions",
                isinstance(self.versions, dict) and all(isinstance(one, str) for one in self.versions.values()),
            ),
            ("build_s", isinstance(self.build_s, (int, float))),
            ("a profile", all(profile.in_order for profile in self.profiles)),
        ):
            if not good:
                raise ValueError(f"{name} is none that longspan build writes")

    @classmethod
    def from_json(cls, text: str) -> EngineManifest:
        """Parse what `to_json` wrote.

        Raises:
            BundleCorrupted: the text is not a manifest of a supported version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise BundleCorrupted(
                    f"{MANIFEST_FILE} has schema version {version}; allowed: {SCHEMA_VERSION}; next step: build again"
                )
            data["profiles"] = tuple(_profile(record) for record in data["profiles"])
            data["compute_capabilities"] = tuple(data["compute_capabilities"])
            if data["plugin"] is not None:
                data["plugin"]["kernels"] = tuple(data["plugin"]["kernels"])
                data["plugin"] = PluginRecord(**data["plugin"])
            data["sites"] = tuple(_site(record) for record in data["sites"])
            names = [data["file"], *data["files"]]
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise TypeError("a file's name is no plain name")
            manifest = cls(**data)
            manifest._require_values()
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleCorrupted(
                f"{MANIFEST_FILE} is not the manifest of an engine ({type(error).__name__}: {error}); next step: build "
                "again"
            ) from error


def _profile(record: dict[str, Any]) -> Profile:
    return Profile(
        {
            name: ShapeRange(**{bound: tuple(shape) for bound, shape in shapes.items()})
            for name, shapes in record["inputs"].items()
        }
    )


def _site(record: dict[str, Any]) -> BuiltSite:
    return BuiltSite(record["node"], record["lowering"], tuple(Rung(**rung) for rung in record["ladder"]))


@dataclass(frozen=True)
class Engine:
    """An engine in the folder of its bundle.

    Attributes:
        path: Its folder.
        manifest: What it is.
    """

    path: Path
    manifest: EngineManifest

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def sha256(self) -> str:
        """Of the engine's file."""
        return self.manifest.files[self.manifest.file]

    @property
    def file(self) -> Path:
        """The engine, or the model of an ``ort`` build, or the graph of one that was not built."""
        return self.path / self.manifest.file

    @classmethod
    def open(cls, bundle: Bundle, name: str) -> Engine:
        """Read an engine of a bundle.

        Args:
            bundle: The bundle that it was built from.
            name: Of its folder in the bundle's `ENGINES_FOLDER`, or the path of that folder.

        Raises:
            InvalidRequest: there is no such engine.
            BundleCorrupted: a file is missing, is a link, or differs from the manifest, or the engine was built from
                another model than the bundle has now.
        """
        folder = next((path for path in (bundle.path / ENGINES_FOLDER / name, Path(name)) if path.is_dir()), None)
        if folder is None or not (folder / MANIFEST_FILE).is_file():
            raise InvalidRequest(
                f"--engine {name}: the bundle has no such engine; it has: {', '.join(engine_names(bundle)) or 'none'}; "
                f"next step: longspan build {bundle.path} --target …"
            )
        manifest = read_manifest(folder, EngineManifest.from_json, ENGINE)
        if manifest.file not in manifest.files:
            raise BundleCorrupted(f"{folder / MANIFEST_FILE}: has no hash of {manifest.file}; next step: build again")
        inputs = {record.name: len(record.shape) for record in bundle.manifest.inputs}
        for profile in manifest.profiles:
            if {name: len(shapes.min) for name, shapes in profile.inputs.items()} != inputs:
                raise BundleCorrupted(
                    f"{folder / MANIFEST_FILE}: a profile has other inputs than the bundle; next step: build again"
                )
        verify_files(folder, manifest.files, ENGINE)
        if manifest.model_sha256 != bundle.manifest.files[MODEL_FILE]:
            raise BundleCorrupted(
                f"{folder}: was built from another {MODEL_FILE} than {bundle.path} has now; next step: build again"
            )
        return cls(folder, manifest)


def engine_names(bundle: Bundle) -> list[str]:
    """Names of the engines that a bundle has, sorted."""
    folder = bundle.path / ENGINES_FOLDER
    return sorted(file.parent.name for file in folder.glob(f"*/{MANIFEST_FILE}"))
