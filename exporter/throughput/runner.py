"""Run trials in child processes, and foresee those that would not end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...plugins.registry import operators
from ..devices import CPU
from ..engines.running.inference_process import environment_for
from .machine import available_memory, busy_seconds
from .report import CRASHED, FAILED, OK, OUT_OF_MEMORY, OVER_LIMIT, WRONG_PATH
from .settings import BenchSettings
from .statistics import next_latency
from .trial import FEWEST_SAMPLES
from .variants import Variant

_MODULE, _ENGINE_MODULE = "longspan.exporter.throughput.trial", "longspan.exporter.throughput.engine_trial"
_MEMORY_SHARE = 0.9
# A trial watches its own limit between runs; one that is still in a run this long after is ended from here.
_GRACE_S = 5.0
_GIB = 1 << 30


def memory_limit(settings: BenchSettings) -> int:
    """Bytes that a trial which begins now may take."""
    return settings.memory_limit_bytes or int(_MEMORY_SHARE * available_memory())


def run_trial(variant: Variant, inputs: Path, settings: BenchSettings, sgemm: Path | None = None) -> dict[str, Any]:
    """Run one trial.

    Args:
        variant: What to run; it must be available.
        inputs: npz file with the graph's inputs.
        settings: How to measure; the profile is written beside `inputs`.
        sgemm: Model of one matrix product to time in the same process afterwards; None for none.

    Returns:
        What the child printed, or a record with the state and the reason when it ended otherwise.
    """
    request = {
        "model": str(variant.model),
        "library": variant.library,
        "inputs": str(inputs),
        "providers": list(settings.providers),
        "device": settings.device,
        "threads": settings.threads,
        "warm_up_ms": settings.warm_up_ms,
        "iterations": settings.iterations,
        "duration_s": settings.duration_s,
        "time_limit_s": settings.time_limit_s,
        # CUDA reserves far more addresses than it uses memory.
        "memory_limit_bytes": memory_limit(settings) if settings.device == CPU else None,
        "kernel_operators": [operator.name for operator in operators()],
        "folder": str(inputs.parent),
        "sgemm": None if sgemm is None else str(sgemm),
        "engine": None if variant.engine is None else str(variant.engine),
        "module": variant.module,
    }
    begin = _clocks()
    try:
        child = subprocess.run(
            [sys.executable, "-m", _ENGINE_MODULE if variant.module else _MODULE],
            input=json.dumps(request),
            env=environment_for(variant.module),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=settings.time_limit_s + _GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _outcome(OVER_LIMIT, f"did not end within {settings.time_limit_s:g} s")
    if child.returncode:
        return _crash(child.returncode, child.stderr)
    try:
        outcome: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        return _outcome(FAILED, f"the trial printed no result: {_last_line(child.stderr)}")
    outcome["others_cores"] = _others(begin)
    return _verified(outcome, variant, settings)


def _clocks() -> tuple[float, float, float]:
    """Wall time, CPU time of the whole machine, CPU time of this process and its ended children, in seconds."""
    own = os.times()
    return time.perf_counter(), busy_seconds(), own.user + own.system + own.children_user + own.children_system


def _others(begin: tuple[float, float, float]) -> float:
    """Cores that other processes kept busy since `begin`: what disturbs a measurement."""
    wall, machine, own = (now - then for now, then in zip(_clocks(), begin, strict=True))
    return max(0.0, (machine - own) / wall)


def foresee(
    variant: Variant, length: int, medians_s: Mapping[int, float], peaks: Mapping[int, int], settings: BenchSettings
) -> dict[str, Any] | None:
    """The outcome of a trial that is not worth starting; None for one that is.

    Attention's part grows with the variant's power of the length and everything else more slowly, so scaling the last
    measurement by that power overestimates; hence a trial is skipped only beyond twice the limit.

    Args:
        variant: What would run.
        length: Tokens.
        medians_s: Its medians so far by length, in seconds.
        peaks: Its peak resident memory beyond the loaded model so far by length, in bytes.
        settings: The limits.
    """
    run_s = next_latency(medians_s, length, variant.exponent)
    fewest = 1 + FEWEST_SAMPLES
    if run_s is not None and run_s * fewest > 2 * settings.time_limit_s:
        return _outcome(
            OVER_LIMIT,
            f"not started: a run would take up to {run_s:.3g} s (from {medians_s[max(medians_s)]:.3g} s at "
            f"{max(medians_s)} tokens), and {fewest} are needed within {settings.time_limit_s:g} s; raise --time-limit",
        )
    need = next_latency(peaks, length, variant.exponent)
    limit = memory_limit(settings)
    if need is not None and need > 2 * limit:
        return _outcome(
            OUT_OF_MEMORY,
            f"not started: would need up to {need / _GIB:.3g} GiB, and {limit / _GIB:.3g} GiB are allowed",
        )
    return None


def _verified(outcome: dict[str, Any], variant: Variant, settings: BenchSettings) -> dict[str, Any]:
    """Replace the outcome of a trial that ran something else than was asked for."""
    if outcome["status"] != OK:
        return outcome
    executed = outcome["executed"]
    if executed["kernel_nodes"] != variant.kernel_nodes:
        return _outcome(
            WRONG_PATH,
            f"the session ran {executed['kernel_nodes']} longspan kernels, expected {variant.kernel_nodes}",
        )
    for operator, least in variant.operators.items():
        calls = sum(of_provider.get(operator, 0) for of_provider in executed["nodes"].values())
        if calls < least:
            return _outcome(WRONG_PATH, f"the session ran {operator} {calls} times, expected {least}")
    wanted = variant.provider or settings.providers[0]
    if outcome["providers"][0] != wanted:
        return _outcome(WRONG_PATH, f"the session uses {outcome['providers'][0]}, asked for was {wanted}")
    return outcome


def _crash(returncode: int, stderr: str) -> dict[str, Any]:
    if returncode == -signal.SIGKILL:
        return _outcome(OUT_OF_MEMORY, "killed with SIGKILL, most likely by the system for want of memory")
    if returncode < 0:
        return _outcome(CRASHED, f"ended by {signal.Signals(-returncode).name}: {_last_line(stderr)}".rstrip(": "))
    return _outcome(CRASHED, f"exit code {returncode}: {_last_line(stderr)}")


def _outcome(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
