"""The README of a model repository: how to start the server, how to call it, what each version is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..manifest import Manifest
from ..parity.inputs import Array, draw_inputs
from ..sources.base import BATCH, SEQUENCE
from .served_models import TENSORRT_PLATFORM, ServedModel, ServedVersion
from .triton_config import TYPES
from .warm_up import Sample

if TYPE_CHECKING:
    from .triton_repository import PackageRequest

_EXAMPLE_TOKENS = 8
_SMALL = 64


def readme(
    models: Sequence[ServedModel],
    manifest: Manifest,
    samples: Mapping[str, Sequence[Sample]],
    libraries: Mapping[str, str],
    start: Sequence[str],
    request: PackageRequest,
    *,
    writable: bool,
) -> str:
    """Content of ``README.md``.

    Args:
        models: What is served.
        manifest: Of the bundle.
        samples: Warm-up requests, by model.
        libraries: SHA-256 of each library in the repository, by name.
        start: Arguments of ``tritonserver``.
        request: What was asked for.
        writable: Whether the server writes into the repository.
    """
    parts = [
        "# A model repository for Triton Inference Server",
        "Written by `longspan package`. `models/` is what the server reads, `plugins/` what it loads beside it, "
        "`manifest.json` has the SHA-256 of every file.",
        *_start(models, start, request.mount, writable),
        *_call(models[0], manifest),
        *_models(models, manifest, samples),
        *_libraries(libraries, request.mount),
        *_batches(models, manifest, request.queue_delay_us),
    ]
    return "\n\n".join(parts) + "\n"


def _start(models: Sequence[ServedModel], start: Sequence[str], mount: str, writable: bool) -> list[str]:
    gpu = any(_needs_gpu(model) for model in models)
    lines = [
        "docker run --rm --network host" + (" --gpus all" if gpu else "") + " \\",
        f'    -v "$PWD":{mount}{"" if writable else ":ro"} "$TRITON_IMAGE" \\',
        "    tritonserver " + " \\\n        ".join(start),
    ]
    parts = [
        "## Start",
        "In this folder, with `TRITON_IMAGE` set to a container of the server:",
        _code(lines, "sh"),
        f"Without a container, let the repository be at `{mount}` (a link will do), since configurations name their "
        "libraries by absolute paths:",
        _code(["tritonserver " + " \\\n    ".join(start)], "sh"),
        "The server answers `curl -f localhost:8000/v2/health/ready` once every version is loaded and warmed up. It "
        "loads all versions of a model or none: one that this GPU cannot run keeps the others from being served.",
    ]
    if writable:
        parts.append(
            "The folder `trt_cache` must be writable: ONNX Runtime keeps there what TensorRT built, which takes "
            "minutes when a model first meets a GPU."
        )
    return parts


def _needs_gpu(model: ServedModel) -> bool:
    return model.platform == TENSORRT_PLATFORM or len(model.session.providers) > 1


def _call(model: ServedModel, manifest: Manifest) -> list[str]:
    symbols = {size for record in manifest.inputs for size in record.shape if isinstance(size, str)}
    feed = draw_inputs(
        manifest.inputs,
        1,
        min(_EXAMPLE_TOKENS, manifest.max_length or _EXAMPLE_TOKENS),
        global_tokens="first",
        sizes=dict.fromkeys(symbols - {BATCH, SEQUENCE}, 1),
    )
    small = all(value.size <= _SMALL for value in feed.values())
    parts = ["## Call"]
    if small:
        body = {
            "inputs": [
                {
                    "name": name,
                    "shape": list(value.shape),
                    "datatype": _wire(str(value.dtype)),
                    "data": value.flatten().tolist(),
                }
                for name, value in feed.items()
            ]
        }
        parts.append(_code([f"curl -s localhost:8000/v2/models/{model.name}/infer -d '{json.dumps(body)}'"], "sh"))
    lines = [
        "import numpy as np",
        "import tritonclient.grpc as triton  # pip install 'tritonclient[grpc]'",
        "",
        'client = triton.InferenceServerClient("localhost:8001")',
        "inputs = []",
        "for name, kind, value in (",
        *(f'    ("{name}", "{_wire(str(value.dtype))}", {_literal(value)}),' for name, value in feed.items()),
        "):",
        "    tensor = triton.InferInput(name, value.shape, kind)",
        "    tensor.set_data_from_numpy(value)",
        "    inputs.append(tensor)",
        f'result = client.infer("{model.name}", inputs)',
        f'print(result.as_numpy("{manifest.outputs[0].name}").shape)',
    ]
    parts.append(_code(lines, "python"))
    parts.append('A request for one version names it: `…/versions/1/infer`, or `infer(…, model_version="1")`.')
    return parts


def _literal(value: Array) -> str:
    """Python for an example's value: written out where it is small, else zeros."""
    # Clients send bfloat16 as float32.
    dtype = "float32" if str(value.dtype) == "bfloat16" else str(value.dtype)
    if value.size > _SMALL:
        return f"np.zeros({value.shape}, np.{dtype})"
    return f"np.array({value.tolist()}, np.{dtype})"


def _wire(dtype: str) -> str:
    """Name of a type in requests."""
    return TYPES[dtype].removeprefix("TYPE_")


def _models(models: Sequence[ServedModel], manifest: Manifest, samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    parts = ["## What is served"]
    for model in models:
        rows = ["| version | engine | computes in | runs on | built by | has run |", "|---|---|---|---|---|---|"]
        rows += [_row(version, model) for version in model.versions]
        parts += [f"### {model.name} ({model.platform})", "\n".join(rows)]
        if len(model.versions) > 1:
            parts.append("A request that names no version gets the highest.")
        parts.append(_shapes(model, manifest))
        warm = ", ".join(f"{sample.batch} × {sample.length:,} tokens ({sample.name})" for sample in samples[model.name])
        parts.append(f"Warmed up with {warm}." if warm else "Not warmed up: no shape is taken by every version.")
        parts += [_runtime(model)]
    return parts


def _row(version: ServedVersion, model: ServedModel) -> str:
    engines = version.engines
    names = ", ".join(f"`{engine.name}`" for engine in engines)
    if model.platform == TENSORRT_PLATFORM:
        gpus = ", ".join(
            _gpus(engine.manifest.compute_capabilities, str(engine.manifest.options.get("hardware_compatibility", "")))
            for engine in engines
        )
        built = ", ".join(sorted({f"TensorRT {engine.manifest.versions.get('tensorrt', '?')}" for engine in engines}))
    else:
        gpus = ", ".join(provider.name.removesuffix("ExecutionProvider") for provider in model.session.providers)
        built = ", ".join(
            sorted({f"ONNX Runtime {engine.manifest.versions.get('onnxruntime', '?')}" for engine in engines})
        )
    status = ", ".join(sorted({engine.manifest.status for engine in engines}))
    return f"| {version.number} | {names} | {engines[0].manifest.dtype} | {gpus} | {built} | {status} |"


def _gpus(capabilities: Sequence[str], compatibility: str) -> str:
    if compatibility == "ampere-plus":
        return "compute capability 8.0 and later"
    named = [f"{digits[:-1]}.{digits[-1]}" for digits in (name.removeprefix("sm") for name in capabilities)]
    return "compute capability " + ", ".join(named) if named else "the GPU it was built on"


def _shapes(model: ServedModel, manifest: Manifest) -> str:
    lines = []
    for engine in model.engines:
        for profile in engine.manifest.profiles:
            sizes = profile.sizes(SEQUENCE, manifest.inputs)
            if sizes is not None:
                lines.append(f"- `{engine.name}`: {sizes[0]:,} to {sizes[2]:,} tokens, fastest at {sizes[1]:,}")
    if not lines:
        limit = f"up to {manifest.max_length:,} tokens" if manifest.max_length else "any number of tokens"
        return f"Each request has {limit}."
    return "Tokens of a request:\n\n" + "\n".join(lines)


def _runtime(model: ServedModel) -> str:
    if model.platform == TENSORRT_PLATFORM:
        if any(engine.manifest.options.get("version_compatible") for engine in model.engines):
            return "The engine can be loaded by later versions of TensorRT; the server's must not be older."
        return (
            "An engine is loaded by the version of TensorRT that built it and no other: take the container whose "
            "release notes name that version."
        )
    return (
        "The graph was optimised by the ONNX Runtime named above; the server's should not be older, since it must know "
        "every fused operator. Threads are the server's choice; set `intra_op_thread_count` in `config.pbtxt` where "
        "other models share the machine."
        + (" The accelerator `cuda` is in servers from 24.07 on." if _needs_gpu(model) else "")
    )


def _libraries(libraries: Mapping[str, str], mount: str) -> list[str]:
    if not libraries:
        return []
    rows = ["| file | SHA-256 |", "|---|---|", *(f"| `plugins/{name}` | `{sha}` |" for name, sha in libraries.items())]
    parts = ["## Libraries", "\n".join(rows)]
    if any("_loader" in name for name in libraries):
        parts.append(
            "`…_loader.so` registers the plugins, which lie beside it, in the TensorRT of the process when opened "
            "by the server's TensorRT backend, whose option `plugins=` does no more than that, or by ONNX Runtime's "
            "TensorRT provider (`trt_extra_plugin_lib_paths`). `LD_PRELOAD` is too early: TensorRT is not loaded yet."
        )
    if any("_ort" in name for name in libraries):
        parts.append(
            f"`config.pbtxt` names `{mount}/plugins/…` as the operator library (`model_operations`); ONNX Runtime 1.21 "
            "or newer takes it. Without these lines the model runs as well, on its function bodies."
        )
    return parts


def _batches(models: Sequence[ServedModel], manifest: Manifest, delay_us: int) -> list[str]:
    if all(model.max_batch < 2 for model in models):
        return ["## Batches", "Each request is run alone: see `max_batch_size` in `config.pbtxt`."]
    masks = [record.name for record in manifest.inputs if record.role == "padding_mask"]
    text = (
        f"The server joins requests that wait at the same time, for at most {delay_us:,} µs, up to `max_batch_size`, "
        "and only such whose inputs have equal shapes: a batch is one tensor. Texts of different lengths are run one "
        "after another."
    )
    if masks:
        text += (
            f" To have them joined, pad them to common lengths, say the next power of two, with 0 in `{masks[0]}` "
            "where padding stands; what comes out at these positions has no meaning. With windowed attention padding "
            "costs in proportion to its length, so a few lengths are enough."
        )
    else:
        text += " This model takes no padding mask, so only texts of one length can be joined."
    ragged = (
        "`allow_ragged_batch` is not set: the server's backends would then join texts of different lengths to a single "
        "row, and attention would look across their borders."
    )
    return ["## Batches of texts", text, ragged]


def _code(lines: Sequence[str], language: str) -> str:
    return f"```{language}\n" + "\n".join(lines) + "\n```"
