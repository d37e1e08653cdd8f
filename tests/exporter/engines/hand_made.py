"""Engines made by hand, so that tests decide what they hold and what their manifests say of it."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from longspan.exporter.bundle import MODEL_FILE, Bundle
from longspan.exporter.devices import Gpu
from longspan.exporter.engines.manifest import ENGINES_FOLDER, NOT_RUN, BuiltSite, Engine, EngineManifest, PluginRecord
from longspan.exporter.engines.onnxruntime.session import CPU_PROVIDER, ProviderPlan, SessionPlan
from longspan.exporter.engines.precision.conversion import convert_precision
from longspan.exporter.engines.profiles import Profile, profiles_of
from longspan.exporter.engines.request import ORT, TENSORRT
from longspan.exporter.engines.running import requirements, runners
from longspan.exporter.engines.running.inference_process import InferenceProcess
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
    return _written(
        opened,
        folder,
        target=ORT,
        dtype=dtype,
        profiles=tuple(profiles),
        sites=tuple(BuiltSite(site.node, lowering, ladder) for site in opened.manifest.sites),
        session=plan.to_dict(),
    )


GPU = Gpu("Stand-in GPU", "sm89")


def make_tensorrt_engine(bundle: Path, name: str = "trt", *, model: Path | None = None, **values: Any) -> Engine:
    """An engine whose file is an ONNX model, for `inference_stand_in`; its manifest says that it is TensorRT's.

    Args:
        bundle: Where to put it.
        name: Of its folder.
        model: What it runs; None for the bundle's own model.
        values: Fields of the manifest, where they differ from an engine of TensorRT 10.14 with the plugin at each site.
    """
    opened = Bundle.open(bundle)
    folder = bundle / ENGINES_FOLDER / name
    folder.mkdir(parents=True)
    shutil.copy(model or opened.model_path, folder / MODEL_FILE)
    ladder = (Rung("plugin", True, "kernels for sm_89"), Rung("function body", False, "not needed"))
    defaults: dict[str, Any] = {
        "target": TENSORRT,
        "compute_capabilities": (GPU.architecture,),
        "device": GPU.name,
        "plugin": PluginRecord("v3", "liblongspan_trt10.so", sha256_of(LIBRARY), ("sm_89",)),
        "sites": tuple(BuiltSite(site.node, "plugin", ladder) for site in opened.manifest.sites),
        "versions": {"tensorrt": "10.14.1.48", "tensorrt_rtx": "1.7.1.116"},
    }
    return _written(opened, folder, **defaults | values)


LIBRARY = Path(__file__)
"""Stands for a plugin library; nothing loads it."""


def _written(bundle: Bundle, folder: Path, **values: Any) -> Engine:
    defaults: dict[str, Any] = {
        "file": MODEL_FILE,
        "dtype": "fp32",
        "kept_in_fp32": {},
        "compute_capabilities": (),
        "device": "",
        "profiles": (),
        "options": {},
        "plugin": None,
        "model_sha256": bundle.manifest.files[MODEL_FILE],
        "versions": {},
        "status": NOT_RUN,
        "build_s": 0.0,
        "created": "2026-01-01T00:00:00+00:00",
        "files": {MODEL_FILE: sha256_of(folder / MODEL_FILE)},
    }
    manifest = EngineManifest(**defaults | values)
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return Engine.open(bundle, folder.name)


def stand_in(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Pretend that TensorRT, a GPU and the plugin library are here; engines run in `inference_stand_in`.

    Args:
        monkeypatch: pytest's.
        facts: ``version``, ``layers`` and ``fault`` of the stand-in, ``gpu``, and ``major`` of the plugin library.
    """
    command = (sys.executable, str(Path(__file__).with_name("inference_stand_in.py")))
    monkeypatch.setattr(runners, "InferenceProcess", functools.partial(InferenceProcess, command=command))
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(requirements, "cuda_gpu", lambda: facts.get("gpu", GPU))
    monkeypatch.setattr(requirements, "tensorrt_library_path", lambda major: str(LIBRARY))
    monkeypatch.setattr(requirements, "plugin_library_major", lambda path: facts.get("major", 10))
    monkeypatch.setenv("STAND_IN_VERSION", facts.get("version", "10.14.1.48"))
    monkeypatch.setenv("STAND_IN_LAYERS", json.dumps(facts.get("layers", [])))
    monkeypatch.setenv("STAND_IN_FAULT", facts.get("fault", ""))


def plugin_layers(bundle: Path) -> list[list[str]]:
    """What an inspector says of an engine with a plugin layer at each site, between others."""
    sites = [[site.node, "PluginV3"] for site in Bundle.open(bundle).manifest.sites]
    return [["{ForeignNode[a...b]}", "Myelin"], *sites, ["Reformatting CopyNode", "Reformat"]]
