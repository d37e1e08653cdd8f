"""One trial: one model, one length, one process. ``python -m longspan.exporter.throughput.trial < request.json``.

The process imports numpy and ONNX Runtime only, so that its memory is the session's and not the exporter's. It reads a
JSON request from stdin and writes one JSON line to stdout; everything that libraries print goes to stderr.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime_names import INLINED

START = time.perf_counter()

FEWEST_SAMPLES = 3
"""Runs below which a trial that meets its time limit reports no statistics."""

_CONTROL_FLOW = ("If", "Loop", "Scan")
"""Operators whose time holds that of the graphs which they run."""

_SGEMM_S = 1.0
"""Time that must be left for the matrix product; it takes about a quarter of it."""


def main(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run the trial that stdin asks for and print its result."""
    request = json.load(sys.stdin)
    # Native libraries may print; the result must stand alone on the real stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result = run(request)
    except MemoryError as error:
        result = {"status": "out of memory", "reason": f"MemoryError: {error}"}
    except Exception as error:
        result = failure(error)
    answer.write(json.dumps(result) + "\n")
    answer.flush()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load, prove the path, warm up, time.

    Args:
        request: ``model``, ``library`` (or None), ``inputs`` (an npz file), ``providers``, ``device`` (where inputs
            and outputs lie while it is timed), ``threads`` (0: the runtime's choice), ``warm_up_ms``, ``iterations``,
            ``duration_s``, ``time_limit_s``, ``memory_limit_bytes`` (or None), ``kernel_operators`` (names of operators
            that have kernels), ``folder`` (for the profile), ``sgemm`` (a model of one matrix product to time for
            comparison, or None), ``engine`` (folder of an ``ort`` build to open as it was recorded, or None).

    Returns:
        ``status`` and, when ``"ok"``, the samples, memory and what the session executed.
    """
    deadline = START + request["time_limit_s"]
    if request["memory_limit_bytes"]:
        # Allocations beyond the limit fail here as an error, instead of making the system kill some process.
        limit = int(request["memory_limit_bytes"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import numpy as np
    import onnxruntime as ort

    memory = {"imports": peak_rss_bytes()}
    begin = time.perf_counter()
    session = _session(ort, request)
    load_s = time.perf_counter() - begin
    memory["session"] = peak_rss_bytes()
    with np.load(request["inputs"]) as drawn:
        wanted = {value.name for value in session.get_inputs()}
        missing = sorted(wanted - set(drawn.files))
        if missing:
            return {"status": "failed", "reason": f"the graph takes {', '.join(missing)}, which the bundle's does not"}
        feeds = {name: drawn[name] for name in drawn.files if name in wanted}

    begin = time.perf_counter()
    outputs = session.run(None, feeds)
    first_s = expected_s = time.perf_counter() - begin
    # The first run also fetches memory from the system; the second says what a run costs.
    if time.perf_counter() + first_s < deadline:
        begin = time.perf_counter()
        outputs = session.run(None, feeds)
        expected_s = min(first_s, time.perf_counter() - begin)
    executed = _executed(Path(session.end_profiling()), request["kernel_operators"])
    not_finite = [
        value.name
        for value, array in zip(session.get_outputs(), outputs, strict=True)
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
    ]
    if not_finite:
        return {"status": "failed", "reason": f"output {', '.join(not_finite)} holds values that are not finite"}
    shapes = {value.name: list(array.shape) for value, array in zip(session.get_outputs(), outputs, strict=True)}
    del outputs

    call = functools.partial(session.run, None, feeds)
    if request["device"] != "cpu":
        call = functools.partial(session.run_with_iobinding, bound(ort, session, feeds, request["device"]))
    timing = timed(call, request, deadline, expected_s)
    memory["peak"] = peak_rss_bytes()
    providers = session.get_providers()
    del session
    sgemm_gflops = None
    if request["sgemm"] and time.perf_counter() + _SGEMM_S < deadline:
        sgemm_gflops = _sgemm(ort, np, request)
    return outcome(
        timing,
        request,
        expected_s,
        load_s=load_s,
        first_run_s=first_s,
        memory_bytes=memory,
        providers=providers,
        outputs=shapes,
        executed=executed,
        sgemm_gflops=sgemm_gflops,
    )


def outcome(timing: dict[str, Any], request: dict[str, Any], expected_s: float, **seen: Any) -> dict[str, Any]:
    """The result of a trial that ran to its end: whether it has enough samples, and what was seen.

    Args:
        timing: What `timed` returned.
        request: What was asked for.
        expected_s: What a run was expected to take, in seconds.
        seen: The other entries of the result; see `run`.
    """
    enough = not timing["cut_short"] or len(timing["samples_ns"]) >= FEWEST_SAMPLES
    reason = "" if enough else f"{request['time_limit_s']:g} s are too few for runs of about {expected_s:.3g} s"
    return {"status": "ok" if enough else "over limit", "reason": reason, **seen, **timing}


def _sgemm(ort: Any, np: Any, request: dict[str, Any]) -> float:
    """What the same runtime reaches with the same threads in one large matrix product, at best, in GFLOP/s."""
    session = ort.InferenceSession(request["sgemm"], _options(ort, request), providers=request["providers"])
    generator = np.random.default_rng(0)
    feeds = {value.name: generator.standard_normal(value.shape, dtype=np.float32) for value in session.get_inputs()}
    (rows, terms), (_, columns) = (value.shape for value in session.get_inputs())
    session.run(None, feeds)
    clock, best = time.perf_counter, float("inf")
    end = clock() + _SGEMM_S / 4
    while clock() < end:
        begin = clock()
        session.run(None, feeds)
        best = min(best, clock() - begin)
    return float(2e-9 * rows * terms * columns / best)


def bound(ort: Any, session: Any, feeds: dict[str, Any], device: str) -> Any:
    """A binding of inputs and outputs in a device's memory, so that a run copies nothing. A run still waits for it."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
    for value in session.get_outputs():
        binding.bind_output(value.name, device, 0)
    return binding


def _options(ort: Any, request: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.log_severity_level = 3
    return options


def _session(ort: Any, request: dict[str, Any]) -> Any:
    prefix = str(Path(request["folder"]) / "profile")
    if request["engine"]:
        from ..engines.onnxruntime.session import open_ort_session

        return open_ort_session(request["engine"], threads=request["threads"], profile=prefix)
    options = _options(ort, request)
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    if request["library"]:
        options.register_custom_ops_library(request["library"])
    return ort.InferenceSession(request["model"], options, providers=request["providers"])


def timed(call: Any, request: dict[str, Any], deadline: float, expected_s: float) -> dict[str, Any]:
    """Warm up, then run until both the iterations and the duration are reached, or the deadline is near.

    Args:
        call: Runs once and waits for it.
        request: See `run`.
        deadline: When the trial must have ended, by `time.perf_counter`.
        expected_s: Seconds that a run takes.
    """
    clock = time.perf_counter_ns
    warm_up_runs = 0
    begin = clock()
    while (clock() - begin) / 1e6 < request["warm_up_ms"]:
        # Leave time for the samples that a report needs.
        if time.perf_counter() + (FEWEST_SAMPLES + 1) * expected_s > deadline:
            break
        call()
        warm_up_runs += 1
    samples: list[int] = []
    fewest = min(FEWEST_SAMPLES, request["iterations"])
    late = time.perf_counter() + fewest * expected_s > deadline
    gc.collect()
    gc.disable()
    usage, began = resource.getrusage(resource.RUSAGE_SELF), clock()

    def unfinished() -> bool:
        return len(samples) < int(request["iterations"]) or (clock() - began) / 1e9 < float(request["duration_s"])

    while unfinished() and not late:
        start = clock()
        call()
        samples.append(clock() - start)
        late = time.perf_counter() + samples[-1] / 1e9 > deadline
    cut_short = unfinished()
    wall_s, after = (clock() - began) / 1e9, resource.getrusage(resource.RUSAGE_SELF)
    gc.enable()
    busy_s = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return {
        "samples_ns": samples,
        "warm_up_runs": warm_up_runs,
        "cut_short": cut_short,
        "cores_used": busy_s / wall_s if wall_s else 0.0,
        "preemptions": after.ru_nivcsw - usage.ru_nivcsw,
    }


def _executed(profile: Path, kernel_operators: list[str]) -> dict[str, Any]:
    """What the session's own profile says about the last profiled run.

    Returns:
        ``kernel_nodes``: calls of longspan kernels; ``nodes``: calls per execution provider and operator;
        ``time_us``: time of the ``run`` and of its parts: ``attention`` (kernels, and the nodes of the functions that
        stand in for them), ``matmul`` and ``other`` nodes.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    profile.unlink()
    runs = [event for event in events if event.get("name") == "model_run"]
    run = max(runs, key=lambda event: event["ts"])
    nodes: dict[str, dict[str, int]] = {}
    time_us = {"run": run["dur"], "attention": 0, "matmul": 0, "other": 0}
    kernel_nodes = 0
    expanded = tuple(INLINED + operator for operator in kernel_operators)
    profiled = [
        event
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= run["ts"]
    ]
    # A loop of a function stands for what runs inside it, under names that do not tell whose they are; of any other
    # node that runs a graph, only what runs inside counts.
    outer = [event for event in profiled if event["args"]["op_name"] in _CONTROL_FLOW]
    within = [(event["ts"], event["ts"] + event["dur"], event) for event in outer if event["name"].startswith(expanded)]
    for event in profiled:
        operator, provider = event["args"]["op_name"], event["args"].get("provider", "")
        of_provider = nodes.setdefault(provider, {})
        of_provider[operator] = of_provider.get(operator, 0) + 1
        kernel_nodes += operator in kernel_operators
        end = event["ts"] + event["dur"]
        if any(begin <= event["ts"] and end <= last and event is not other for begin, last, other in within):
            continue
        if operator in _CONTROL_FLOW and not event["name"].startswith(expanded):
            continue
        if operator in kernel_operators or event["name"].startswith(expanded):
            part = "attention"
        else:
            part = "matmul" if "MatMul" in operator or "Gemm" in operator else "other"
        time_us[part] += event["dur"]
    return {"kernel_nodes": kernel_nodes, "nodes": nodes, "time_us": time_us}


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far.

    ``getrusage`` is no use here: the kernel carries the peak of the process that forked over an exec, so a child of
    a process with a model in memory starts with that model's size. ``VmHWM`` belongs to this program's memory alone.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; next step: bench on Linux")


def failure(error: Exception) -> dict[str, Any]:
    """The outcome of a trial that ended with an error."""
    text = str(error)
    memory = any(word in text for word in ("bad_alloc", "Failed to allocate memory", "bad allocation"))
    first_line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    reason = f"{type(error).__name__}: {first_line}"
    return {"status": "out of memory" if memory else "failed", "reason": reason[:500]}


if __name__ == "__main__":
    main(run)
