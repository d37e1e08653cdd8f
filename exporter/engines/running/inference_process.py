"""Talk to `inference` in its process, and say in one line why it ended where it did."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ...errors import BundleCorrupted, EnvironmentLacks, ExporterError, ExportFailed
from .exchange import Array, read_arrays, write_arrays
from .inference_worker import CORRUPTED, ENVIRONMENT, FAILED

MODULE = "longspan.exporter.engines.running.inference_worker"

_RTX_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"
_KINDS: dict[str, type[ExporterError]] = {
    ENVIRONMENT: EnvironmentLacks,
    CORRUPTED: BundleCorrupted,
    FAILED: ExportFailed,
}
_TIMEOUT_S = 600.0
_GRACE_S = 5.0


class InferenceEnded(ExportFailed):
    """The process that runs an engine crashed, or did not answer in time."""


class InferenceProcess:
    """A process that runs one engine; it ends with this object."""

    def __init__(
        self, module: str, *, command: Sequence[str] = (sys.executable, "-m", MODULE), timeout_s: float = _TIMEOUT_S
    ) -> None:
        """Start the process.

        Args:
            module: ``"tensorrt"`` or ``"tensorrt_rtx"``.
            command: What to start.
            timeout_s: Longest time that an answer may take.

        Raises:
            EnvironmentLacks: the module cannot be imported.
            InferenceEnded: the process ended.
        """
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="longspan-engine-")
        self._log = (Path(self._folder.name) / "log").open("w+", encoding="utf-8", errors="replace")
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment_for(module)
        )
        self._finalizer = weakref.finalize(self, _end, self._child, self._log, self._folder)
        self._pending = b""
        self.version = str(self._ask({"do": "hello", "module": module})["version"])
        """Version of the module."""

    def open(self, engine: Path, library: Path | None) -> dict[str, Any]:
        """Load an engine.

        Args:
            engine: Its file.
            library: Plugin library that it needs; None for none.

        Returns:
            ``layers``, see `inference_worker.layers_of`; ``provider``: what runs it.

        Raises:
            BundleCorrupted: the file is not a whole engine.
            EnvironmentLacks: the engine or the library cannot be loaded here.
            InferenceEnded: the process ended.
        """
        return self._ask(
            {
                "do": "open",
                "engine": str(engine.absolute()),
                "library": None if library is None else str(library.absolute()),
            }
        )

    def infer(self, feed: Mapping[str, Array], profile: int = 0) -> tuple[dict[str, Array], float]:
        """Run the engine once.

        Args:
            feed: Its inputs.
            profile: Index of the optimization profile.

        Returns:
            Outputs by name, and the seconds that the runtime took.

        Raises:
            ExportFailed: the engine refused the inputs, or failed.
            InferenceEnded: the process ended.
        """
        if not self._finalizer.alive:
            raise self._ended()
        source, target = (Path(self._folder.name) / name for name in ("inputs", "outputs"))
        inputs = write_arrays(source, feed)
        answer = self._ask(
            {"do": "infer", "profile": profile, "file": str(source), "inputs": inputs, "out": str(target)}
        )
        return read_arrays(target, answer["outputs"]), float(answer["seconds"])

    def close(self) -> None:
        """End the process, if it has not ended; a second call does nothing."""
        self._finalizer()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except (OSError, ValueError):
            raise self._ended() from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise _KINDS[answer["kind"]](answer["error"])
        return answer

    def _line(self) -> bytes:
        """The next line of the process.

        Raises:
            InferenceEnded: there is none.
        """
        assert self._child.stdout is not None
        descriptor, deadline = self._child.stdout.fileno(), time.monotonic() + self._timeout_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._child.kill()
                raise InferenceEnded(f"the process that runs the engine gave no answer in {self._timeout_s:g} s")
            read = os.read(descriptor, 1 << 16)
            if not read:
                raise self._ended()
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _ended(self) -> InferenceEnded:
        """How the process ended, with the last thing that it said."""
        if not self._finalizer.alive:
            return InferenceEnded("the process that runs the engine was closed")
        try:
            code = self._child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how += ", most likely by the system for want of memory"
        last = f": {said[-1][:500]}" if said else ""
        return InferenceEnded(f"the process that runs the engine ended by {how}{last}")


def environment_for(module: str) -> dict[str, str]:
    """The environment of a process that uses Polygraphy with ``tensorrt`` or ``tensorrt_rtx``, or with neither."""
    environment = {name: value for name, value in os.environ.items() if name != _RTX_VARIABLE}
    return environment | ({_RTX_VARIABLE: "1"} if module == "tensorrt_rtx" else {})


def _end(child: subprocess.Popen[bytes], log: TextIO, folder: tempfile.TemporaryDirectory[str]) -> None:
    """End a process that reads until its input ends, by force where it does not."""
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(OSError):
        child.stdin.close()
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()
    log.close()
    folder.cleanup()
