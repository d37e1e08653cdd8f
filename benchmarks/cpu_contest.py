"""What the CPU benchmarks share: contestants that take turns, one-node models, the floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from longspan.plugins import operator, ort_library_path
from onnx import TensorProto, helper

Array = npt.NDArray[Any]
Run = Callable[[], Array]

SGEMM_SIZE = 1536
ONE_THREAD = "sgemm, 1 thread"
PAUSE_SECONDS = 0.1  # lets the worker threads of one library fall asleep before the next is timed
MUST_FLOOR, STRETCH_FLOOR = 0.6, 0.8
MUST_OPTION = 1.05


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition, in order: on the clock, and of processor time over all threads."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest repetition: the one that other processes disturbed least."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle repetition."""
        return float(np.median(self.seconds))

    def __str__(self) -> str:
        columns = (self.best, self.median, max(self.seconds), min(self.cpu_seconds))
        return " ".join(f"{seconds * 1e3:9.2f}" for seconds in columns)


def interleave(contestants: Mapping[str, Run], repetitions: int) -> dict[str, Timing]:
    """Time each contestant `repetitions` times, in turns, after one run to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, run in contestants.items():
            time.sleep(PAUSE_SECONDS)
            # On one thread nothing but the caller's own time counts, whatever other pools still spin.
            clock = time.thread_time if name == ONE_THREAD else time.process_time
            start, cpu_start = time.perf_counter(), clock()
            run()
            end, cpu_end = time.perf_counter(), clock()
            if repetition:
                seconds[name].append(end - start)
                cpu_seconds[name].append(cpu_end - cpu_start)
    return {name: Timing(tuple(seconds[name]), tuple(cpu_seconds[name])) for name in contestants}


def table(timings: Mapping[str, Timing], errors: Mapping[str, float]) -> None:
    """Print the timings, and the error of each contestant that was checked."""
    print(f"{'':22}{'best ms':>9} {'median':>9} {'worst':>9} {'best CPU':>9}   error")
    for contestant, timing in timings.items():
        error = f"{errors[contestant]:.1e}" if contestant in errors else ""
        print(f"{contestant:22}{timing}   {error}")


@dataclass(frozen=True)
class Floor:
    """How close a kernel comes to what sgemm would need for its operations.

    Attributes:
        sgemm_flops_per_second: On all threads, in this run.
        floor_seconds: What sgemm would need.
        floor_share: That, as a share of what the kernel needed.
        floor_share_of_processor_time: The same in processor time, against sgemm on one thread.
    """

    sgemm_flops_per_second: float
    floor_seconds: float
    floor_share: float
    floor_share_of_processor_time: float

    @classmethod
    def of(cls, flops: int, timings: Mapping[str, Timing], contestant: str) -> Floor:
        """From timings that hold sgemm on all threads and on one."""
        once, ours = 2 * SGEMM_SIZE**3, timings[contestant]
        rate = once / timings["sgemm"].best
        one_thread = flops / once * min(timings[ONE_THREAD].cpu_seconds)
        return cls(rate, flops / rate, flops / rate / ours.best, one_thread / min(ours.cpu_seconds))

    def __str__(self) -> str:
        rate, floor = self.sgemm_flops_per_second / 1e9, self.floor_seconds * 1e3
        return (f"sgemm {rate:.0f} GFLOP/s, floor {floor:.1f} ms: {self.floor_share:.0%} of the floor, "
                f"in processor time {self.floor_share_of_processor_time:.0%} "
                f"(must {MUST_FLOOR:.0%}, stretch {STRETCH_FLOOR:.0%})")  # fmt: skip


def record(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """All samples, for JSON."""
    return {name: asdict(timing) for name, timing in timings.items()}


def compare_options(title: str, contestants: Mapping[str, Run], repetitions: int) -> dict[str, Any]:
    """What each option adds to the processor time of the one called plain; print and return it."""
    timings = interleave(contestants, repetitions)
    print(f"\ncost of options, {title}\n{'':22}{'best ms':>9} {'median':>9} {'worst':>9} {'best CPU':>9}")
    ratios = {}
    for name, timing in timings.items():
        ratios[name] = min(timing.cpu_seconds) / min(timings["plain"].cpu_seconds)
        print(f"{name:22}{timing}   {ratios[name] - 1:+.1%} processor time (must be at most +5%)")
    return {
        "timings": record(timings),
        "ratios": ratios,
        "verdicts": {name: ratio <= MUST_OPTION for name, ratio in ratios.items()},
    }


_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.bool_): TensorProto.BOOL,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
}


def node_session(
    node: onnx.NodeProto,
    feeds: Mapping[str, Array],
    threads: int,
    library: bool,
    shared: Mapping[str, str] | None = None,
) -> Run:
    """A function that runs the one-node model through ONNX Runtime and returns its first output.

    Args:
        node: The node.
        feeds: Its inputs by name.
        threads: Of the session.
        library: Whether the node needs the operator library.
        shared: Outputs that must be written over an input: the input of each.
    """
    import onnxruntime as ort

    inputs = [helper.make_tensor_value_info(name, _TYPES[x.dtype], x.shape) for name, x in feeds.items()]
    names = (node.output[0], *(shared or ()))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "node", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(node.domain, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(ort_library_path())
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if not shared:
        return lambda: session.run(None, feeds)[0]
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(node.output[0])
    for name, source in shared.items():
        binding.bind_ortvalue_output(name, values[source])

    def run() -> Array:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return run


def kernel(name: str, feeds: Mapping[str, Array], attributes: Mapping[str, Any], threads: int) -> Run:
    """One of this project's operators through ONNX Runtime."""
    definition = operator(name)
    names = [tensor.name if tensor.name in feeds else "" for tensor in definition.inputs]
    node = helper.make_node(definition.name, names, ["Y"], domain=definition.domain, **attributes)
    return node_session(node, feeds, threads, library=True)


def sgemm(threads: int) -> Run:
    """A square product through torch, on so many threads."""
    import torch

    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)

    def run() -> Array:
        torch.set_num_threads(threads)
        return torch.mm(a, b, out=out).numpy()

    return run
