"""Run an engine in a process of its own. ``python -m longspan.exporter.engines.running.inference_worker``.

TensorRT can end its process, and Polygraphy decides between TensorRT and TensorRT-RTX when it is imported; a checker
must survive both. The process reads requests from stdin and answers each on stdout, a line of JSON either way, until
stdin is closed; arrays lie in files, see `exchange`. What libraries print goes to stderr.

====== ============================================================== ================================================
``do`` request                                                        answer
====== ============================================================== ================================================
hello  ``module``: ``tensorrt`` or ``tensorrt_rtx``                   ``version`` of it
open   ``engine``: file; ``library``: plugin library or None          ``layers``, see `layers_of`; ``provider``
infer  ``profile``: its index; ``file``, ``inputs``: see `exchange`;  ``outputs``, ``seconds``
       ``out``: file for the outputs
====== ============================================================== ================================================

An answer with ``error`` instead has ``kind`` too: ``environment``, ``corrupted`` or ``failed``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from .exchange import Array, read_arrays, write_arrays

ENVIRONMENT, CORRUPTED, FAILED = "environment", "corrupted", "failed"
"""Kinds of errors: something is missing here; the engine's file is damaged; anything else."""

_LOGGED_ERRORS = 20

# How an inspector calls layers of plugins of any version, in lower case.
_PLUGIN_LAYER = "plugin"

# How TensorRT says that bytes are no engine, or not a whole one.
_NO_ENGINE = ("serialization", "magictag", "readheader", "empty memory buffer", "stream.read")


class Refused(Exception):
    """The request cannot be met; `kind` is one of `ENVIRONMENT`, `CORRUPTED` and `FAILED`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Session(Protocol):
    """What answers requests."""

    def hello(self, module: str) -> dict[str, Any]:
        """Import the module and say which version it has."""

    def open(self, engine: str, library: str | None) -> dict[str, Any]:
        """Load an engine and say what is in it."""

    def infer(self, feed: Mapping[str, Array], profile: int) -> tuple[dict[str, Array], float]:
        """Outputs by name, and the seconds that the runtime took."""


def main() -> None:
    """Answer requests with TensorRT or TensorRT-RTX."""
    serve(TensorRT)


def serve(make: Callable[[], Session]) -> None:
    """Answer requests until stdin ends.

    Args:
        make: Makes what answers them.
    """
    # Native libraries may print; answers must stand alone on the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # An interrupt from the keyboard reaches the whole group; the parent closes stdin when it is done with this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    session = make()
    for line in sys.stdin:
        _answer(answers, session, json.loads(line))


def _answer(answers: TextIO, session: Session, request: dict[str, Any]) -> None:
    try:
        result = _meet(session, request)
    except Refused as error:
        result = {"error": str(error), "kind": error.kind}
    except ImportError as error:
        result = {"error": f"{type(error).__name__}: {error}", "kind": ENVIRONMENT}
    except MemoryError as error:
        result = {"error": f"out of memory: {error}".rstrip(": "), "kind": FAILED}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {_line(str(error))}", "kind": FAILED}
    answers.write(json.dumps(result) + "\n")
    answers.flush()


def _meet(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "hello":
        return session.hello(request["module"])
    if request["do"] == "open":
        return session.open(request["engine"], request["library"])
    feed = read_arrays(Path(request["file"]), request["inputs"])
    outputs, seconds = session.infer(feed, request["profile"])
    return {"outputs": write_arrays(Path(request["out"]), outputs), "seconds": seconds}


class TensorRT:
    """A session of TensorRT or TensorRT-RTX, by Polygraphy's runner."""

    def __init__(self) -> None:
        self._trt: Any = None
        self._logger: Any = None
        self._profile: int | None = None
        self.runner: Any = None
        """Polygraphy's runner, active once an engine is open."""

    def hello(self, module: str) -> dict[str, Any]:
        """See `Session`."""
        self._trt = importlib.import_module(module)
        self._logger = _logger(self._trt)
        return {"version": self._trt.__version__}

    def open(self, engine: str, library: str | None) -> dict[str, Any]:
        """See `Session`; the provider is the engine's runtime.

        Raises:
            Refused: the library or the engine cannot be loaded.
        """
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        self._logger.errors.clear()
        if library is not None and self._trt.get_plugin_registry().load_library(library) is None:
            raise Refused(ENVIRONMENT, f"{library}: cannot be loaded: {self._first('TensorRT gives no reason')}")
        with _quiet():
            try:
                runtime = self._trt.Runtime(self._logger)
                loaded = EngineFromBytes(Path(engine).read_bytes(), runtime=runtime)()
                self.runner = TrtRunner(loaded)
                self.runner.activate()
            except PolygraphyException as error:
                raise self._refusal(engine, str(error)) from error
        return {"layers": layers_of(self._trt, loaded), "provider": self._trt.__name__}

    def infer(self, feed: Mapping[str, Array], profile: int) -> tuple[dict[str, Array], float]:
        """See `Session`."""
        from polygraphy.exception import PolygraphyException

        self._logger.errors.clear()
        with _quiet():
            try:
                self.set_profile(profile)
                raw = self.runner.infer(self.fitted(feed), check_inputs=False, return_raw_buffers=True)
            except PolygraphyException as error:
                raise Refused(FAILED, self._first(str(error))) from error
        outputs = {name: _typed(self._trt, self.runner.engine, name, value) for name, value in raw.items()}
        return outputs, float(self.runner.last_inference_time())

    def set_profile(self, profile: int) -> None:
        """Choose an optimization profile, where it is not chosen already."""
        if profile != self._profile:
            self.runner.set_profile(profile)
            self._profile = profile

    def fitted(self, feed: Mapping[str, Array]) -> dict[str, Any]:
        """The inputs that the engine has, floating-point ones in its own types, as bytes with a shape.

        TensorRT leaves inputs out that nothing in the network reads.
        """
        from polygraphy.common import FormattedArray

        engine = self.runner.engine
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        fitted = {}
        for name, value in feed.items():
            if name not in names:
                continue
            wanted = numpy_type(self._trt, engine.get_tensor_dtype(name))
            if wanted != value.dtype and value.dtype.kind in "fV" and wanted.kind in "fV":
                value = value.astype(wanted)
            if wanted != value.dtype:
                raise Refused(FAILED, f"input {name} is {value.dtype}, the engine takes {wanted}")
            # Polygraphy has numpy arrays of numpy's own types only.
            flat = value.reshape(-1).view("uint8")
            fitted[name] = value if value.dtype.kind != "V" else FormattedArray(flat, shape=value.shape)
        return fitted

    def _refusal(self, engine: str, otherwise: str) -> Refused:
        """Whether the engine's bytes are damaged, or it cannot be loaded here."""
        reason = self._first(otherwise)
        found = reason.lower()
        if "cudaerror" not in found and any(words in found for words in _NO_ENGINE):
            return Refused(CORRUPTED, reason)
        step = (
            "; next step: nvidia-smi, which shows the GPU and the newest CUDA of its driver" if "cuda" in found else ""
        )
        return Refused(ENVIRONMENT, f"{engine}: cannot be loaded here: {reason}{step}")

    def _first(self, otherwise: str) -> str:
        """The first error that was logged, which the later ones follow from."""
        return self._logger.errors[0] if self._logger.errors else _line(otherwise)


def layers_of(trt: Any, engine: Any) -> list[list[str]]:
    """Name, type, and names of the ONNX nodes of every layer, as the engine's own inspector tells.

    The type is empty, and nodes are not named, where the engine was built to tell no more than names.
    """
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [
        [layer, ""]
        if isinstance(layer, str)
        else [
            str(layer.get("Name", "")),
            str(layer.get("LayerType", "")),
            *re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(layer.get("Metadata", ""))),
        ]
        for layer in json.loads(text).get("Layers", [])
    ]


def plugin_names(layers: Iterable[Sequence[str]]) -> set[str]:
    """Names of plugin layers, and of the ONNX nodes that they were made of.

    A plugin layer is never fused with others, so that a layer without a type that bears a node's name alone is taken
    for one: layers of several nodes have names that list them all.

    Args:
        layers: What `layers_of` returns.
    """
    return {
        name
        for layer, kind, *nodes in layers
        if not kind or kind.lower().startswith(_PLUGIN_LAYER)
        for name in (layer, *nodes)
    }


def numpy_type(trt: Any, dtype: Any) -> Any:
    """The numpy type of one of TensorRT's, bfloat16 included."""
    import ml_dtypes
    import numpy as np

    if dtype == getattr(trt, "bfloat16", None):
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(trt.nptype(dtype))


def _typed(trt: Any, engine: Any, name: str, value: Any) -> Array:
    """An output as an array of its own; the runner uses its buffers again."""
    import numpy as np

    raw = np.asarray(value.array).reshape(-1).view(np.uint8)
    typed: Array = raw.view(numpy_type(trt, engine.get_tensor_dtype(name))).reshape(tuple(value.shape)).copy()
    return typed


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors; the first says what was wrong, the later ones what followed from it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and len(self.errors) < _LOGGED_ERRORS:
                self.errors.append(_line(message))

    return Logger()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Polygraphy's own log."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


if __name__ == "__main__":
    main()
