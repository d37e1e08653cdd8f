"""Build one engine in a process of its own: ``python -m longspan.exporter.engines.tensorrt.build_worker``.

TensorRT can end its process where a network is not to its liking, and Polygraphy decides between TensorRT and
TensorRT-RTX when it is imported. The process reads a JSON request from stdin and writes events to stdout, a JSON object
a line, the last of which says what was built or why it was not; everything that libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from ..request import TENSORRT_RTX
from ..runtimes import RUNTIMES

_PARSING = "Parsing node: "
"""What TensorRT's parser logs before each node."""

_USUAL = "has Int64 binding"
"""Part of a warning at every input of int64, which is what the manifest says of it."""

_ADVICE = {
    "FP32 GEMM is not supported": "; next step: --dtype fp16",
    "workspace": "; next step: a larger --pool-limit workspace, or smaller --max-shapes",
    "smem_limit": "; next step: a larger --pool-limit tactic-shared-memory",
    "OutOfMemory": "; next step: smaller --max-shapes, or a larger --pool-limit workspace",
}
"""What helps against a failure that TensorRT describes with these words."""

_BEYOND = "values are not self-consistent"
"""Part of a warning that TensorRT builds on after: the engine cannot run at a bound of its own profile."""

_PR_SET_PDEATHSIG = 1
"""Of ``prctl``, from ``linux/prctl.h``."""

_LOGGED_ERRORS = 20
"""Error messages that are kept; the first says what was wrong, the later ones what followed from it."""


class Refused(Exception):
    """The build cannot be made. `kind` is ``"environment"``, ``"request"`` or ``"build"``."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Events:
    """Tells the parent process what happens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def tell(self, event: str, **values: Any) -> None:
        """Write one event."""
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()


def main() -> None:
    """Build the engine that stdin asks for."""
    _end_with_parent()
    request = json.load(sys.stdin)
    # Native libraries may print; the events must stand alone on the real stdout.
    events = Events(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    if request["target"] == TENSORRT_RTX:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    try:
        events.tell("built", **build(request, events))
    except Refused as error:
        events.tell("failed", kind=error.kind, reason=str(error))
    except ImportError as error:
        events.tell("failed", kind="environment", reason=f"{type(error).__name__}: {error}")
    except MemoryError as error:
        events.tell("failed", kind="build", reason=f"out of memory: {error}")
    except Exception as error:
        events.tell("failed", kind="build", reason=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent is killed: the next build writes to the same folder."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def build(request: dict[str, Any], events: Events) -> dict[str, Any]:
    """Parse, configure, build, and write the engine.

    Args:
        request: ``target``, ``model`` (an ONNX file), ``engine`` (the file to write), ``profiles`` (per profile and
            input the ``min``, ``opt`` and ``max`` shape), ``capabilities`` (``"89"``, …; TensorRT-RTX only), ``plugin``
            (``"v3"``, ``"aot"`` or ``"none"``), ``library`` (of the plugin; None for Longspan's own), ``timing_cache``
            (a file or None), ``hardware_compatibility``, ``version_compatible``, ``weight_streaming``, ``strip``,
            ``refit``, ``pool_limits`` (bytes by pool), ``optimization_level`` (or None).
        events: Told stages, nodes, progress and warnings.

    Returns:
        ``version`` of TensorRT, ``library`` that was loaded (or None), ``seconds``, ``device`` (or ``""``).

    Raises:
        Refused: it cannot be built.
    """
    import importlib

    trt = importlib.import_module(RUNTIMES[request["target"]].module)
    events.tell("version", version=trt.__version__)
    logger = _logger(trt, events)
    library = _load_plugins(trt, logger, request)
    builder = trt.Builder(logger)
    if request["timing_cache"]:
        _require_timing_cache(builder, Path(request["timing_cache"]))
    network = builder.create_network(0 if request["target"] == TENSORRT_RTX else _strongly_typed(trt))
    events.tell("stage", text="parse")
    parser = _parse(trt, logger, network, request["model"])
    logger.parsing = False
    events.tell("stage", text="build")
    begin = time.perf_counter()
    config = _config(trt, builder, network, request, events)
    _build(builder, network, parser, config, request, logger)
    seconds = time.perf_counter() - begin
    return {"version": trt.__version__, "library": library, "seconds": seconds}


def _strongly_typed(trt: Any) -> int:
    """Network flags: TensorRT 11 has no other networks and no such flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _logger(trt: Any, events: Events) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, and tells which node is being parsed: the last one, should the process end."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.beyond: list[str] = []
            self.parsing = True

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                if len(self.errors) < _LOGGED_ERRORS:
                    self.errors.append(" ".join(message.split()))
            elif severity == trt.ILogger.WARNING and _BEYOND in message:
                self.beyond.append(" ".join(message.split()))
            elif severity == trt.ILogger.WARNING and _USUAL not in message:
                events.tell("warning", text=" ".join(message.split()))
            elif self.parsing and _PARSING in message:
                events.tell("node", text=message.partition(_PARSING)[2])

    return Logger()


def _load_plugins(trt: Any, logger: Any, request: dict[str, Any]) -> str | None:
    """Load the plugin library, or register the Python plugins; the library's path, None where there is none."""
    if request["plugin"] == "none":
        return None
    trt.init_libnvinfer_plugins(logger, "")
    from ....plugins.errors import PluginError

    if request["plugin"] == "aot":
        from ....plugins.tensorrt.aot import register_plugins

        try:
            register_plugins(trt, request["model"])
        except PluginError as error:
            raise Refused("environment", f"--plugin-api aot: {error}") from error
        return None
    from ....plugins.library import plugin_library_major, tensorrt_library_path

    major = int(trt.__version__.split(".")[0])
    try:
        library = request["library"] or tensorrt_library_path(major)
        built_for = plugin_library_major(library)
    except PluginError as error:
        raise Refused("environment", str(error)) from error
    if built_for != major:
        raise Refused(
            "environment",
            f"{library}: was built for TensorRT {built_for}, here is {trt.__version__}; next step: build the library "
            f"with the headers of TensorRT {major}, see docs/tensorrt-plugin.md",
        )
    if trt.get_plugin_registry().load_library(library) is None:
        raise Refused("environment", f"{library}: cannot be loaded: {_first(logger, 'TensorRT gives no reason')}")
    return str(library)


def _require_timing_cache(builder: Any, file: Path) -> None:
    """Refuse a file that TensorRT would take for an empty cache, and that the cache would be written over."""
    data = file.read_bytes() if file.is_file() else b""
    if not data:
        return
    config = builder.create_builder_config()
    empty = bytes(config.create_timing_cache(b"").serialize())
    cache = config.create_timing_cache(data)
    ignored = cache is None or (data != empty and bytes(cache.serialize()) == empty)
    if ignored or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise Refused(
            "request",
            f"--timing-cache {file}: is not a timing cache of this version and GPU; it was left as it is; next step: "
            "name another file, or remove it",
        )


def _parse(trt: Any, logger: Any, network: Any, model: str) -> Any:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(model):
        return parser
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else "the model"
        reasons.append(f"{where}: {' '.join(error.desc().split())}")
    more = f"; and {len(reasons) - 1} more nodes" if len(reasons) > 1 else ""
    raise Refused("build", f"TensorRT's parser refuses {reasons[0] if reasons else _first(logger, model)}{more}")


def _config(trt: Any, builder: Any, network: Any, request: dict[str, Any], events: Events) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for shapes in request["profiles"]:
        profile = Profile()
        for name, bounds in shapes.items():
            profile.add(name, min=bounds["min"], opt=bounds["opt"], max=bounds["max"])
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "memory_pool_limits": {
            _member(trt.MemoryPoolType, pool, "--pool-limit"): size for pool, size in request["pool_limits"].items()
        },
        "refittable": request["refit"],
        "strip_plan": request["strip"],
        "weight_streaming": request["weight_streaming"],
        "builder_optimization_level": request["optimization_level"],
        "progress_monitor": _monitor(trt, events),
    }
    if request["target"] == TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [(int(digits[:-1]), int(digits[-1])) for digits in request["capabilities"]]
        config = CreateConfigRTX(compute_capabilities=capabilities, **options)(builder, network)
    else:
        level = request["hardware_compatibility"]
        config = CreateConfig(
            load_timing_cache=request["timing_cache"],
            version_compatible=request["version_compatible"],
            hardware_compatibility_level=None
            if level == "none"
            else _member(trt.HardwareCompatibilityLevel, level, "--hardware-compatibility-level"),
            **options,
        )(builder, network)
    # fp32 means fp32: matrix products are not rounded to 10 bits behind a user's back.
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _member(names: Any, name: str, option: str) -> Any:
    """What TensorRT calls the value of an option."""
    member = getattr(names, name.upper().replace("-", "_"), None)
    if member is None:
        raise Refused("request", f"{option} {name}: this version has no such value")
    return member


def _monitor(trt: Any, events: Events) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells how far each phase is, the outer ones first."""

        _LEAST_S = 0.1

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}
            self._told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [0, num_steps]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][0] = step + 1
            if time.monotonic() - self._told > self._LEAST_S:
                self._told = time.monotonic()
                events.tell("progress", phases=[[name, *steps] for name, steps in self._phases.items()])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

    return Monitor()


def _build(builder: Any, network: Any, parser: Any, config: Any, request: dict[str, Any], logger: Any) -> None:
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    # Polygraphy says on stdout what TensorRT's logger has said already.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            loader = EngineBytesFromNetwork(
                (builder, network, parser), config=config, save_timing_cache=request["timing_cache"]
            )
            Path(request["engine"]).write_bytes(loader())
        except PolygraphyException as error:
            reason = _first(logger, str(error))
            advice = next((advice for part, advice in _ADVICE.items() if part in reason), "")
            raise Refused("build", reason + advice) from error
    if logger.beyond:
        raise Refused("build", f"{logger.beyond[0]}; next step: smaller --max-shapes, or a larger --min-shapes")


def _first(logger: Any, otherwise: str) -> str:
    """The first error that was logged, which the later ones follow from."""
    return logger.errors[0] if logger.errors else otherwise


if __name__ == "__main__":
    main()
