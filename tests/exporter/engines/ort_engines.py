"""``ort`` engines made by hand, so that tests decide what they hold and what their manifests say of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from longspan.exporter.bundle import MODEL_FILE, Bundle
from longspan.exporter.engines.graphs.precision import convert_precision
from longspan.exporter.engines.manifest import ENGINES_FOLDER, NOT_RUN, BuiltSite, Engine, EngineManifest
from longspan.exporter.engines.ort_session import CPU_PROVIDER, ProviderPlan, SessionPlan
from longspan.exporter.engines.profiles import Profile, profiles_of
from longspan.exporter.engines.request import ORT
from longspan.exporter.manifest import sha256_of
from longspan.exporter.sites.record import Rung
from longspan.exporter.whole_folders import MANIFEST_FILE
from longspan.plugins.library import ORT_LIBRARY_NAME


def profile(bundle: Path, low: Sequence[int], high: Sequence[int]) -> Profile:
    """A profile from (batch, length) to (batch, length)."""
    manifest = Bundle.open(bundle).manifest
    name = manifest.inputs[0].name
    texts = ([f"{name}:[{rows},{tokens}]"] for rows, tokens in (low, high, high))
    return profiles_of(manifest, *texts)[0]


def make_ort_engine(
    bundle: Path,
    name: str = "ort",
    *,
    model: Path | None = None,
    dtype: str = "fp32",
    profiles: Sequence[Profile] = (),
    kernel: bool = True,
) -> Engine:
    """An engine of a bundle for ONNX Runtime on the CPU.

    Args:
        bundle: Where to put it.
        name: Of its folder.
        model: What it runs; None for the bundle's own model.
        dtype: What it computes in; the model is converted to it.
        profiles: Shapes that it says to take.
        kernel: Whether its session registers the kernels.
    """
    opened = Bundle.open(bundle)
    folder = bundle / ENGINES_FOLDER / name
    folder.mkdir(parents=True)
    source = model or opened.model_path
    if dtype == "fp32":
        shutil.copy(source, folder / MODEL_FILE)
    else:
        ir.save(convert_precision(ir.load(source), dtype).model, folder / MODEL_FILE)
    plan = SessionPlan(
        model=MODEL_FILE,
        providers=(ProviderPlan(CPU_PROVIDER),),
        operator_library=ORT_LIBRARY_NAME if kernel else None,
        enable_mem_pattern=False,
        offline_level="disabled",
        config_entries={"session.intra_op.allow_spinning": "0"},
    )
    lowering = "kernel" if kernel else "function body"
    ladder = (Rung("kernel", kernel, "registered" if kernel else "the library was left out"),)
    manifest = EngineManifest(
        target=ORT,
        file=MODEL_FILE,
        dtype=dtype,
        kept_in_fp32={},
        compute_capabilities=(),
        device="",
        profiles=tuple(profiles),
        options={},
        plugin=None,
        sites=tuple(BuiltSite(site.node, lowering, ladder) for site in opened.manifest.sites),
        model_sha256=opened.manifest.files[MODEL_FILE],
        versions={},
        status=NOT_RUN,
        build_s=0.0,
        created="2026-01-01T00:00:00+00:00",
        session=plan.to_dict(),
        files={MODEL_FILE: sha256_of(folder / MODEL_FILE)},
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return Engine.open(opened, name)
