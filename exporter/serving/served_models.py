"""Which models, versions and files of Triton Inference Server the engines of a bundle become."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..engines.manifest import Engine, engine_names
from ..engines.onnxruntime.session import SESSION_FILE, SessionPlan
from ..engines.profiles import Profile
from ..engines.request import ORT, TENSORRT, TENSORRT_RTX
from ..errors import InvalidRequest
from ..manifest import Manifest
from ..sources.base import BATCH

TENSORRT_PLATFORM, ORT_PLATFORM = "tensorrt_plan", "onnxruntime_onnx"

PLAN_FILE = "model.plan"
"""What the server's TensorRT backend opens on a GPU for which no other file is named."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ServedFile:
    """A file of one version.

    Attributes:
        name: In the version's folder.
        source: Where it is copied from.
        engine: Whose it is.
        compute_capability: ``"sm89"``: the only GPUs that it is for, where the version has files for several; else
            empty.
    """

    name: str
    source: Path
    engine: Engine
    compute_capability: str = ""


@dataclass(frozen=True)
class ServedVersion:
    """One version of a model.

    Attributes:
        number: Name of its folder; without a number in the request the server takes the highest.
        engines: What it is made of: one engine, or one for each compute capability.
        files: Its files.
    """

    number: int
    engines: tuple[Engine, ...]
    files: tuple[ServedFile, ...]


@dataclass(frozen=True)
class ServedModel:
    """One model of the repository. All its versions share one configuration.

    Attributes:
        name: Its folder, and what clients call it.
        platform: `TENSORRT_PLATFORM` or `ORT_PLATFORM`.
        versions: At least one, ascending.
        max_batch: Rows of a batch that the server may make of requests; 0 where requests cannot be batched.
    """

    name: str
    platform: str
    versions: tuple[ServedVersion, ...]
    max_batch: int

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines of all versions."""
        return tuple(engine for version in self.versions for engine in version.engines)

    @property
    def session(self) -> SessionPlan:
        """How ONNX Runtime opens it: as the first version, with plugins where any has a use for them."""
        plans = [SessionPlan.from_dict(engine.manifest.session) for engine in self.engines]
        return dataclasses.replace(plans[0], tensorrt_plugins=any(plan.tensorrt_plugins for plan in plans))

    def admits(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether every version takes inputs of these shapes."""
        return all(
            not engine.manifest.profiles or any(profile.admits(shapes) for profile in engine.manifest.profiles)
            for engine in self.engines
        )


def check_name(name: str) -> None:
    """Refuse a model's name that the server, or a shell, would not take.

    Raises:
        InvalidRequest: it is such a name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"--name {name!r}: the server names a model by its folder; allowed: letters, digits, dots, dashes and "
            "underscores, not beginning with a dot or dash"
        )


def engines_to_serve(bundle: Bundle, names: Sequence[str]) -> tuple[tuple[Engine, ...], tuple[str, ...]]:
    """Open the engines that are asked for; all that can be served where none is.

    Returns:
        The engines, and why others are left out.

    Raises:
        InvalidRequest: there is none, or one that is asked for cannot be served.
        BundleCorrupted: an engine is damaged.
    """
    if not names and not engine_names(bundle):
        raise InvalidRequest(
            f"{bundle.path}: has no engines to serve; next step: longspan build {bundle.path} --target tensorrt, or "
            "--target ort"
        )
    if len(set(names)) < len(names):
        raise InvalidRequest(f"--engine: the same engine is named twice: {', '.join(names)}")
    engines, left_out = [], []
    for name in names or engine_names(bundle):
        engine = Engine.open(bundle, name)
        reason = _not_servable(engine)
        if reason and names:
            raise InvalidRequest(f"--engine {name}: {reason}")
        if reason:
            left_out.append(f"{name}: {reason}")
        else:
            engines.append(engine)
    if not engines:
        raise InvalidRequest(f"{bundle.path}: no engine can be served: {'; '.join(left_out)}")
    return tuple(engines), tuple(left_out)


def _not_servable(engine: Engine) -> str:
    """Why the server cannot run an engine; empty where it may."""
    if engine.manifest.target == TENSORRT_RTX:
        return (
            "the server has no backend for TensorRT-RTX, and its TensorRT backend does not read such engines; next "
            "step: longspan build --target tensorrt on the GPU that serves, or --target ort"
        )
    if engine.manifest.options.get("graph_only"):
        return "is a graph, of which TensorRT has made no engine; next step: longspan build without --graph-only"
    if engine.manifest.options.get("strip"):
        return "its weights were left out, and the server refits none; next step: longspan build again without --strip"
    return ""


def models_of(
    engines: Sequence[Engine], name: str, manifest: Manifest, max_batch: int | None
) -> tuple[ServedModel, ...]:
    """Arrange engines as models and versions.

    Versions are numbered in the order of the engines. TensorRT engines that differ in nothing but their compute
    capability are one version with a file for each. Engines of different platforms or providers cannot share a
    configuration: they become models of their own, called ``NAME-tensorrt``, ``NAME-cpu`` and so on.

    Args:
        engines: What to serve.
        name: Of the model.
        manifest: Of the bundle.
        max_batch: Rows of a batch at most; None for what the engines take.

    Raises:
        InvalidRequest: engines cannot be versions of one model, or do not take such a batch.
    """
    check_name(name)
    groups: dict[str, list[Engine]] = {}
    for engine in engines:
        groups.setdefault(_kind(engine), []).append(engine)
    models = []
    for kind, members in groups.items():
        platform = TENSORRT_PLATFORM if members[0].manifest.target == TENSORRT else ORT_PLATFORM
        versions = _plan_versions(members) if platform == TENSORRT_PLATFORM else _ort_versions(members)
        models.append(
            ServedModel(
                name=name if len(groups) == 1 else f"{name}-{kind}",
                platform=platform,
                versions=versions,
                max_batch=_max_batch(members, manifest, max_batch),
            )
        )
    return tuple(models)


def _kind(engine: Engine) -> str:
    """What engines of one model share, as part of a name."""
    if engine.manifest.target == TENSORRT:
        return "tensorrt"
    assert engine.manifest.target == ORT
    provider = engine.manifest.options.get("provider", "cpu")
    library = SessionPlan.from_dict(engine.manifest.session).operator_library
    kind = {"tensorrt": "ort-tensorrt"}.get(provider, provider)
    return kind if library or provider == "tensorrt" else f"{kind}-bodies"


def _ort_versions(engines: Sequence[Engine]) -> tuple[ServedVersion, ...]:
    plans = [SessionPlan.from_dict(engine.manifest.session) for engine in engines]
    other = next(
        (engine for engine, plan in zip(engines, plans, strict=True) if plan.providers != plans[0].providers), None
    )
    if other is not None:
        raise InvalidRequest(
            f"{engines[0].name} and {other.name}: differ in the options of their providers, which all versions of a "
            "model share; next step: package one of them at a time (--engine)"
        )
    return tuple(
        ServedVersion(
            number,
            (engine,),
            tuple(
                ServedFile(name, engine.path / name, engine) for name in engine.manifest.files if name != SESSION_FILE
            ),
        )
        for number, engine in enumerate(engines, 1)
    )


def _plan_versions(engines: Sequence[Engine]) -> tuple[ServedVersion, ...]:
    groups: dict[str, list[Engine]] = {}
    for engine in engines:
        groups.setdefault(_apart_from_gpu(engine), []).append(engine)
    # Two engines of one kind for one GPU are two versions as well.
    rows: list[list[Engine]] = []
    for members in groups.values():
        for engine in members:
            row = next((row for row in rows if row[0] in members and _gpu(engine) not in map(_gpu, row)), None)
            rows.append([engine]) if row is None else row.append(engine)
    covered = [{_gpu(engine) for engine in row} for row in rows]
    profiles = {len(engine.manifest.profiles) for engine in engines}
    if any(gpus != covered[0] for gpus in covered) or len(profiles) > 1:
        described = "; ".join(", ".join(f"{engine.name} ({_gpu(engine)})" for engine in row) for row in rows)
        raise InvalidRequest(
            "engines cannot be versions of one model: the server loads all versions on a GPU or none, so each needs "
            f"engines for the same GPUs, with as many profiles; got: {described}; next step: package those that belong "
            "together (--engine)"
        )
    return tuple(ServedVersion(number, tuple(row), _plan_files(row)) for number, row in enumerate(rows, 1))


def _plan_files(row: Sequence[Engine]) -> tuple[ServedFile, ...]:
    if len(row) == 1:
        return (ServedFile(PLAN_FILE, row[0].file, row[0]),)
    return tuple(ServedFile(f"{_gpu(engine)}.plan", engine.file, engine, _gpu(engine)) for engine in row)


def _gpu(engine: Engine) -> str:
    """The compute capability that an engine is for; that of several, joined."""
    return "+".join(engine.manifest.compute_capabilities) or "any"


def _apart_from_gpu(engine: Engine) -> str:
    manifest = engine.manifest
    options = {key: value for key, value in manifest.options.items() if key not in ("name", "compute_capabilities")}
    shapes = [{name: vars(shape) for name, shape in profile.inputs.items()} for profile in manifest.profiles]
    plugin = None if manifest.plugin is None else (manifest.plugin.api, manifest.plugin.sha256)
    return json.dumps([manifest.dtype, options, shapes, plugin, manifest.versions.get("tensorrt")], sort_keys=True)


def _max_batch(engines: Sequence[Engine], manifest: Manifest, wanted: int | None) -> int:
    if wanted is not None and wanted < 0:
        raise InvalidRequest(f"--max-batch-size {wanted}: must be 0 (no batching) or more")
    shapes = [record.shape for record in manifest.inputs] + [record.shape for record in manifest.outputs]
    if any(not shape or shape[0] != BATCH for shape in shapes):
        if wanted:
            raise InvalidRequest(
                f"--max-batch-size {wanted}: not every input and output has the batch as its first dimension, so the "
                "server cannot join requests; allowed: 0"
            )
        return 0
    profiles = [engine.manifest.profiles for engine in engines if engine.manifest.profiles]
    batches = [[_batch(profile, manifest) for profile in several] for several in profiles]
    if any(min(low for low, _ in several) > 1 for several in batches):
        if wanted:
            raise InvalidRequest(
                f"--max-batch-size {wanted}: an engine takes no single row, which the server may send; allowed: 0; "
                "next step: longspan build with --min-shapes of 1 row"
            )
        return 0
    limit = min((max(high for _, high in several) for several in batches), default=None)
    if wanted is not None and limit is not None and wanted > limit:
        raise InvalidRequest(f"--max-batch-size {wanted}: the engines take {limit} rows at most")
    if wanted is not None:
        return wanted
    from ..engines.profiles import DEFAULT_MAX_BATCH

    return DEFAULT_MAX_BATCH if limit is None else limit


def _batch(profile: Profile, manifest: Manifest) -> tuple[int, int]:
    shapes = profile.inputs[manifest.inputs[0].name]
    return shapes.min[0], shapes.max[0]
