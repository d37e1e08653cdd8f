"""One trial of a TensorRT engine. ``python -m longspan.exporter.throughput.engine_trial < request.json``.

Like `trial`, with the same request and result: a run enqueues the engine through Polygraphy's runner and waits for the
stream. Inputs are copied to the GPU once, and outputs stay there.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines.manifest import EngineManifest
from ..engines.running.exchange import Array
from ..engines.running.inference_worker import TensorRT, plugin_names
from ..engines.running.reach import profile_for
from ..whole_folders import MANIFEST_FILE
from .trial import START, main, outcome, peak_rss_bytes, timed


class Device:
    """A session that keeps its inputs and outputs on the GPU."""

    def __init__(self, module: str) -> None:
        self._session = TensorRT()
        self._session.hello(module)
        self._feed: dict[str, Any] = {}

    def open(self, engine: Path, library: str | None) -> list[list[str]]:
        """Load an engine; name and type of each of its layers."""
        layers: list[list[str]] = self._session.open(str(engine), library)["layers"]
        return layers

    def first(self, feed: Mapping[str, Array], profile: int) -> dict[str, Array]:
        """Run once and fetch the outputs."""
        return self._session.infer(feed, profile)[0]

    def keep(self, feed: Mapping[str, Array]) -> None:
        """Copy inputs to the GPU; inputs that TensorRT reads as shapes stay in host memory."""
        from polygraphy import cuda
        from polygraphy.common import FormattedArray

        engine = self._session.runner.engine
        for name, value in self._session.fitted(feed).items():
            array = value.array if isinstance(value, FormattedArray) else value
            if not engine.is_shape_inference_io(name):
                flat = array.reshape(-1).view("uint8")
                array = cuda.DeviceArray.raw(flat.shape).copy_from(flat)
            self._feed[name] = FormattedArray(array, shape=value.shape)

    def run(self) -> None:
        """Run on what `keep` kept, and wait for it."""
        self._session.runner.infer(self._feed, check_inputs=False, copy_outputs_to_host=False, return_raw_buffers=True)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load, prove the path, warm up, time; see `trial.run`."""
    import numpy as np

    deadline = START + request["time_limit_s"]
    folder = Path(request["engine"])
    manifest = EngineManifest.from_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    with np.load(request["inputs"]) as drawn:
        feed = {name: drawn[name] for name in drawn.files}
    profile = profile_for(manifest.profiles, {name: value.shape for name, value in feed.items()})
    if profile is None:
        return {"status": "failed", "reason": "the inputs lie outside every optimization profile of the engine"}
    device = Device(request["module"])
    memory = {"imports": peak_rss_bytes()}
    begin = time.perf_counter()
    layers = device.open(folder / manifest.file, request["library"])
    load_s = time.perf_counter() - begin
    memory["session"] = peak_rss_bytes()
    begin = time.perf_counter()
    outputs = device.first(feed, profile)
    first_s = time.perf_counter() - begin
    not_finite = [name for name, value in outputs.items() if not _finite(np, value)]
    if not_finite:
        return {"status": "failed", "reason": f"output {', '.join(not_finite)} holds values that are not finite"}
    shapes = {name: list(value.shape) for name, value in outputs.items()}
    del outputs
    device.keep(feed)
    begin = time.perf_counter()
    device.run()
    expected_s = time.perf_counter() - begin
    timing = timed(functools.partial(device.run), request, deadline, expected_s)
    memory["peak"] = peak_rss_bytes()
    return outcome(
        timing,
        request,
        expected_s,
        load_s=load_s,
        first_run_s=first_s,
        memory_bytes=memory,
        providers=[request["module"]],
        outputs=shapes,
        executed=executed(request["module"], layers, {site.node for site in manifest.sites}),
        sgemm_gflops=None,
    )


def executed(module: str, layers: list[list[str]], sites: set[str]) -> dict[str, Any]:
    """What `trial` reads from a profile, from an engine's layers: plugin layers of the sites, and layers by type."""
    counts = collections.Counter(kind or "layer" for _, kind, *_ in layers)
    return {"kernel_nodes": len(sites & plugin_names(layers)), "nodes": {module: dict(counts)}, "time_us": {}}


def _finite(np: Any, value: Array) -> bool:
    # numpy counts bfloat16 among no kind that it knows.
    return value.dtype.kind not in "fV" or bool(np.isfinite(value.astype(np.float32)).all())


if __name__ == "__main__":
    main(run)
