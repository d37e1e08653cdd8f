"""The Triton kernels on a CUDA device: every case against the reference, and what only a device can show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.gpu import launch

from ..plugins.kernel_agreement import CASES, Run, disagreement, execute, plan, reference, runs

RUNS = list(runs())
DEVICE = "cuda"


def by_name(operator: str, name: str, dtype: str = "float32") -> Run:
    """One case, with four axes."""
    (case,) = (case for case in CASES[operator].CASES if case.name == name)
    return Run(operator, case, "bhsd", dtype)


# Both operators, both paths: many rows and few.
SHOWN = [
    by_name("SlidingWindowAttention", "everything"),
    by_name("SlidingWindowAttention", "decode", "bfloat16"),
    by_name("SlidingWindowAttention", "many blocks", "float16"),
    by_name("BlockSparseAttention", "everything"),
    by_name("BlockSparseAttention", "large blocks", "bfloat16"),
    by_name("BlockSparseAttention", "decode", "float16"),
]
IDS = [run.name for run in SHOWN]


@pytest.fixture
def no_synchronising() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_kernel_agrees_with_the_reference(run: Run) -> None:
    assert disagreement(run, DEVICE).message == ""


@pytest.mark.parametrize("run", SHOWN, ids=IDS)
def test_planning_and_launching_never_wait(run: Run, no_synchronising: None) -> None:
    operands = run.operands(DEVICE)
    planned = plan(run.operator, operands, run.attributes, lse=True)
    launch.run(planned, operands, launch.allocate(planned, operands["Q"].device))


@pytest.mark.parametrize("run", SHOWN, ids=IDS)
def test_a_graph_replays_on_new_values(run: Run) -> None:
    operands = run.operands(DEVICE)
    planned = plan(run.operator, operands, run.attributes, lse=True)
    buffers = launch.allocate(planned, operands["Q"].device)
    launch.run(planned, operands, buffers)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, lse = launch.run(planned, operands, buffers)
    assert lse is not None
    for buffer in buffers.values():
        buffer.fill_(-5)
    operands["Q"].mul_(-0.5)
    y.fill_(float("nan"))
    graph.replay()
    direct = execute(run.operator, operands, run.attributes)
    np.testing.assert_array_equal(y.double().cpu().numpy(), direct[0])
    np.testing.assert_array_equal(lse.double().cpu().numpy(), direct[1])


@pytest.mark.parametrize("run", SHOWN, ids=IDS)
def test_runs_on_the_stream_that_is_current(run: Run) -> None:
    operands = run.operands(DEVICE)
    expected = execute(run.operator, operands, run.attributes)
    planned = plan(run.operator, operands, run.attributes, lse=True)
    buffers = launch.allocate(planned, operands["Q"].device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    # The queries come late, on that stream alone: a kernel on another one would read what was there before.
    late, operands["Q"] = operands["Q"], torch.full_like(operands["Q"], float("nan"))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        operands["Q"].copy_(late)
        y, _ = launch.run(planned, operands, buffers)
    stream.synchronize()
    np.testing.assert_array_equal(y.double().cpu().numpy(), expected[0])


@pytest.mark.parametrize("run", SHOWN, ids=IDS)
def test_the_same_call_gives_the_same_bits(run: Run) -> None:
    operands = run.operands(DEVICE)
    first, second = (execute(run.operator, operands, run.attributes) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_length_out_of_range_is_reported_by_its_place() -> None:
    run = by_name("SlidingWindowAttention", "offsets")
    operands = run.operands(DEVICE)
    operands["nonpad_kv_seqlen"][1] = run.case.keys + 1
    with pytest.raises(InvalidOperands, match=r"nonpad_kv_seqlen\[batch 1\]"):
        execute(run.operator, operands, run.attributes)


def test_an_index_out_of_range_is_reported_by_its_place() -> None:
    run = by_name("BlockSparseAttention", "block masks")
    operands = run.operands(DEVICE)
    operands["kv_num_blocks"][0, 0, 2] = 1
    operands["kv_indices"][0, 0, 2, 0] = 1 << 20
    with pytest.raises(InvalidOperands, match=r"kv_indices\[batch 0, head 0, row 2, slot 0\]"):
        execute(run.operator, operands, run.attributes)


@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_head_sizes_at_a_length_of_many_tiles(size: int, dtype: str) -> None:
    torch.manual_seed(size)
    q = torch.randn(1, 4, 1000, size, dtype=getattr(torch, dtype), device=DEVICE)
    k, v = torch.randn(2, 1, 2, 1000, size, dtype=q.dtype, device=DEVICE)
    operands, attributes = {"Q": q, "K": k, "V": v}, {"left_window_size": 300, "right_window_size": 77}
    y, lse = execute("SlidingWindowAttention", operands, attributes)
    expected_y, expected_lse = reference("SlidingWindowAttention", operands, attributes)
    # Each term of the softmax is rounded once, and Y once; V is within about 5 of 0.
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=2 * rounding * float(v.abs().max()))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("operator", ["SlidingWindowAttention", "BlockSparseAttention"])
def test_memory_grows_with_the_length_alone(operator: str) -> None:
    def peak(length: int) -> int:
        q = torch.zeros(1, 2, length, 64, dtype=torch.float16, device=DEVICE)
        operands: dict[str, Any] = {"Q": q, "K": q.clone(), "V": q.clone()}
        attributes = {"left_window_size": 256, "right_window_size": 256}
        if operator == "BlockSparseAttention":
            rows = torch.arange(length // 128, dtype=torch.int32, device=DEVICE).view(1, 1, -1, 1)
            counts = torch.ones(1, 1, length // 128, dtype=torch.int32, device=DEVICE)
            operands |= {"kv_num_blocks": torch.zeros_like(counts), "kv_indices": rows[..., :0].contiguous(),
                         "full_kv_num_blocks": counts, "full_kv_indices": rows}  # fmt: skip
            attributes = {"q_block_size": 128, "kv_block_size": 128}
        planned = plan(operator, operands, attributes, lse=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        launch.run(planned, operands)
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
        # Y and the buffers, each rounded up to what the allocator hands out.
        assert used <= q.nbytes + planned.workspace_bytes + 2048 * (len(planned.path.buffers) + 1)
        return used

    short, long = peak(1 << 14), peak(1 << 16)
    assert long <= 4.1 * short
