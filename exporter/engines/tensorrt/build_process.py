"""Run `build_worker` in a process of its own, and say in one line why it ended where it did."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import EnvironmentLacks, ExporterError, ExportFailed, InvalidRequest

_WORKER = "longspan.exporter.engines.tensorrt.build_worker"
_KINDS: dict[str, type[ExporterError]] = {"environment": EnvironmentLacks, "request": InvalidRequest}


def build_in_child(
    title: str, request: Mapping[str, Any], progress: Callable[[str], None], warn: Callable[[str], None]
) -> dict[str, Any]:
    """Build an engine.

    Args:
        title: What people call the target, for errors.
        request: See `build_worker.build`.
        progress: Told each stage, and how far the builder is.
        warn: Told what TensorRT warns of, once each.

    Returns:
        What `build_worker.build` returns.

    Raises:
        EnvironmentLacks: a package, a library or a GPU is missing.
        ExportFailed: the engine cannot be built, or TensorRT ended the process.
    """
    warned: set[str] = set()
    node = version = ""
    stage = "before parsing"
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        child = subprocess.Popen(
            [sys.executable, "-m", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            with child.stdin:
                child.stdin.write(json.dumps(request))
            for line in child.stdout:
                event = json.loads(line)
                if event["event"] == "version":
                    version = event["version"]
                elif event["event"] == "stage":
                    stage = event["text"]
                    progress(stage)
                elif event["event"] == "node":
                    node = event["text"]
                elif event["event"] == "progress":
                    progress(_described(event["phases"]))
                elif event["event"] == "warning" and event["text"] not in warned:
                    warned.add(event["text"])
                    warn(event["text"])
                elif event["event"] in ("built", "failed"):
                    result = event
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        printed.seek(0)
        last = next((text.strip() for text in reversed(printed.readlines()) if text.strip()), "")
    name = f"{title} {version}".strip()
    if result is None or (child.returncode and result["event"] == "built"):
        where = f"parsing node {node}" if stage == "parse" and node else f"the stage {stage!r}"
        raise ExportFailed(
            f"{name} ended its process ({_ending(child.returncode)}) in {where}: {last[:500]}".rstrip(": ")
        )
    if result["event"] == "failed":
        raise _KINDS.get(result["kind"], ExportFailed)(f"{name}: {result['reason']}")
    return result


def _described(phases: list[list[Any]]) -> str:
    """The outermost phase and the innermost one, with how far each is."""
    chosen = phases[:1] + phases[-1:] if len(phases) > 1 else phases
    return " › ".join(f"{name} {done}/{steps}" for name, done, steps in chosen)


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL, most likely by the system for want of memory"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
