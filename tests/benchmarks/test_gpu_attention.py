"""The GPU benchmark without a GPU: its plumbing interpreted at tiny sizes, its clock on a stand-in."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu_attention.py"

# What a borrowed machine need not have; and, to show that, the finder of an installed longspan.
ALONE = """
import runpy, sys
absent = {"onnx", "onnxruntime", "onnx_ir", "onnxscript", "ml_dtypes", "transformers", "polygraphy", "click", "rich",
          "jinja2", "safetensors", "pytest", "matplotlib"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, *more)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if "longspan" not in repr(finder).lower()
                    and "scikit" not in repr(finder).lower()]
try:
    import longspan
except ModuleNotFoundError:
    pass
else:
    assert not hasattr(longspan, "plugins")
sys.modules.pop("longspan", None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_attention", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_attention"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program with torch, Triton and numpy, and a machine without a device."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(PROGRAM), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.bench
@pytest.mark.slow
def test_a_dry_run_checks_everything_and_measures_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_alone("--dry-run", "--run", "features,a,d,e,options", "--jobs", "1", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["dry_run"] and results["device"] is None and results["anchors_missed"] is None
    assert results["features"]["cases"] == len(results["features"]["runs"]) > 3
    assert results["wrong"] == results["not_run"] == []
    for case in "ade":
        assert set(results[case]["errors"]) == {"longspan", "FlexAttention", "SDPA"}, results[case]["absent"]
        assert not {"microseconds", "medians", "floor_us"} & results[case].keys()
    assert results["e"]["absent"]["ORT GroupQueryAttention"].startswith("not importable")
    assert "machine" not in results and "microseconds" not in results["options"]


def test_without_a_device_nothing_is_run_and_one_line_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_alone("--json", str(out))
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith("no CUDA device") and "nothing was measured" in line
    assert done.stdout == "" and not out.exists()


def test_what_the_budget_does_not_reach_is_not_run_and_not_passed() -> None:
    done = run_alone("--dry-run", "--run", "features,a,options", "--budget", "0.01", "--jobs", "1")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "0 of " in done.stdout and "options: not run, the time budget is spent" in done.stdout


def test_an_unknown_stage_is_refused() -> None:
    done = run_alone("--run", "features,f")
    assert done.returncode == 2
    assert "no stage f" in done.stderr


# Anchors, as published with the project: FLOPs over 790 TFLOP/s or bytes over 3.0 TB/s, whichever takes longer.
@pytest.mark.parametrize(("case", "microseconds"), [("a", 8.4), ("b", 67), ("c", 2610), ("d", 79), ("e", 5.6)])
def test_floors_are_those_of_the_anchors(program: ModuleType, case: str, microseconds: float) -> None:
    machine = program.Machine(790e12, 3.0e12, 0.0)
    assert machine.floor_us(program.SITES[case]) == pytest.approx(microseconds, rel=0.01)


def test_blocks_are_those_of_bigbird(program: ModuleType) -> None:
    from longspan.exporter.patterns import Lengths, build_lists
    from longspan.exporter.patterns.systems import big_bird_itc

    listed = program.SITES["d"].listed
    lists = build_lists(big_bird_itc(64, random=3, heads=1), Lengths.of(4096), 64, 64, heads=1)
    counts = (lists.kv_num_blocks + lists.full_kv_num_blocks)[0, 0]
    np.testing.assert_array_equal(listed.sum(-1), np.broadcast_to(counts, listed.shape[:2]))
    assert (listed[0] != listed[1]).any()  # every head draws its own
    numbers, indices = program._as_lists(listed)
    rebuilt = np.zeros_like(listed)
    for place in np.ndindex(numbers.shape):
        rebuilt[place][indices[place][: numbers[place]]] = True
    np.testing.assert_array_equal(rebuilt, listed)


@pytest.mark.parametrize("case", ["a", "c", "d", "e"])
def test_the_check_of_rows_refuses_what_is_wrong(program: ModuleType, case: str) -> None:
    site = program.TINY[case]
    bench = program.Bench(torch, "cpu", torch.float32, 0.0, True)
    operands = site.operands(bench)
    y = program.dense_attention(site, operands, bench)()
    assert program.error_of(site, operands, y)[1] < 0.1
    assert program.error_of(site, operands, y.roll(1, -1))[1] > 1
    assert program.error_of(site, operands, y * float("nan"))[1] == np.inf
    if not site.block:  # one key more on the left
        wider = program.replace(site, left=site.left + 1)
        assert program.error_of(wider, operands, y)[1] > 1


class Clock:
    """A stand-in for torch.cuda: calls take as long as they say, and what happens is written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def spend(self, name: str, microseconds: float) -> None:
        self.log.append(name)
        self.now += microseconds / 1e3

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            event.at = self.now
            self.log.append("event")

        event.record = record
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def clocked(program: ModuleType) -> Any:
    clock = Clock()
    bench = program.Bench(SimpleNamespace(cuda=clock), "cuda", None, 0.0, False)
    bench.__dict__["flush"] = SimpleNamespace(zero_=lambda: clock.spend("flush", 170))
    return bench, clock


def test_contestants_take_turns_and_each_finds_a_cold_cache(program: ModuleType, clocked: Any) -> None:
    bench, clock = clocked
    runs = {"one": lambda: clock.spend("one", 20), "two": lambda: clock.spend("two", 4000)}
    samples = program.timings(bench, runs)
    assert set(samples) == {"one", "two"} and len(samples["one"]) == len(samples["two"]) >= 10
    assert np.allclose(samples["one"], 20) and np.allclose(samples["two"], 4000)
    events = [name for name in clock.log if name != "synchronize"]
    turn = ["flush", "event", "one", "event", "flush", "event", "two", "event"]
    assert events == turn * (len(samples["one"]) + 1)


def test_runs_in_a_row_share_the_cache(program: ModuleType, clocked: Any) -> None:
    bench, clock = clocked
    assert program.back_to_back(bench, lambda: clock.spend("run", 30)) == pytest.approx(30)
    assert clock.log.count("flush") == 1


def test_invariants_compare_what_they_say(program: ModuleType) -> None:
    sites = [site for site, _ in program.group_sites("scaling", False).values()]
    times = {str(site.keys): 3.0 * site.keys**1.2 for site in sites}
    assert program.group_ratios("scaling", times, sites) == {"slope": pytest.approx(1.2)}
    assert program.group_ratios("doubling", {"4": 10.0, "8": 19.0, "16": 38.0}, []) == {"8 / 4": 1.9, "16 / 8": 2.0}
    assert program.group_ratios("options", {"plain": 10.0, "sinks": 11.0}, []) == {"sinks / plain": 1.1}
    doubled = [site.listed.sum() for site, _ in program.group_sites("doubling", False).values()]
    assert [b / a for a, b in itertools.pairwise(doubled)] == [2.0, 2.0, 2.0]


def test_anchors_are_judged_on_their_device_alone(program: ModuleType) -> None:
    for name, missed in (("NVIDIA H100 80GB HBM3", ["a/time"]), ("NVIDIA L4", [])):
        cuda = SimpleNamespace(get_device_name=lambda name=name: name)
        bench = program.Bench(SimpleNamespace(cuda=cuda), "cuda", None, 0.0, False)
        bench.judge("a/time", False)
        bench.judge("b/time", True)
        assert bench.missed == missed


def test_a_device_that_is_too_old_is_no_device(program: ModuleType) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True, get_device_capability=lambda: (7, 5), get_device_name=lambda: "NVIDIA T4"
    )
    assert program.no_device(SimpleNamespace(cuda=cuda)) == (
        "NVIDIA T4 has compute capability 7.5: the kernels need 8.0 or more"
    )


def test_a_process_that_crashes_is_a_fault_and_its_cases_are_not_run(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["first", "second", "third"]
    monkeypatch.setattr(program, "_chosen_runs", lambda *_: [SimpleNamespace(name=name) for name in names])
    child = (
        "import json, os; print(json.dumps({'run': 'first', 'message': 'Y is off'}), flush=True); "
        "print(json.dumps({'run': 'second', 'message': ''}), flush=True); os.abort()"
    )
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **files: started([sys.executable, "-c", child], **files))
    bench = program.Bench(torch, "cpu", None, program.time.monotonic() + 60, False)
    found = program.run_features(bench, 1, 1.0)
    assert found["wrong"] == ["first: Y is off"] and found["not_run"] == ["third"]
    assert len(found["faults"]) == 1 and "ended with -6" in found["faults"][0]
    assert "1 of 3 agree with the reference, 1 do not, 1 were not run" in capsys.readouterr().out


def test_a_case_whose_kernel_fails_is_wrong(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(program, "longspan_kernel", broken)
    monkeypatch.setattr(program, "PEERS", {"SDPA": program.dense_attention})
    bench = program.Bench(torch, "cpu", torch.float32, program.time.monotonic() + 60, True)
    found = program.run_case("a", bench, None)
    assert bench.wrong == ["case a: RuntimeError: an illegal memory access was encountered"]
    assert set(found["errors"]) == {"SDPA"}


class Device(Clock):
    """A stand-in for a whole device: graphs replay what was captured, unless it escaped."""

    def __init__(self, name: str = "NVIDIA H100 80GB HBM3") -> None:
        super().__init__()
        self.name, self.escapes = name, False
        self.made: list[tuple[Any, Any]] = []

    def __getattr__(self, _name: str) -> Any:  # streams and their contexts
        return lambda *_: SimpleNamespace(wait_stream=lambda _other: None)

    def get_device_name(self) -> str:
        return self.name

    def mem_get_info(self) -> tuple[int, int]:
        return 1 << 16, 1 << 16

    def stream(self, _stream: Any) -> Any:
        return contextlib.nullcontext()

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.spend("replay", 40))

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Any:
        self.made = []
        yield
        made = [] if self.escapes else self.made

        def replay() -> None:
            for tensor, values in made:
                tensor.copy_(values)
            self.spend("replay", 40)

        graph.replay = replay

    def run(self, values: Any) -> Any:
        """What a kernel does: writes values to a tensor, which the graph that is being captured remembers."""
        tensor = values.clone()
        self.made.append((tensor, values))
        return tensor


class Torch:
    """torch with that device."""

    def __init__(self, device: Device) -> None:
        self.cuda = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_a_graph_that_computes_is_replayed(program: ModuleType) -> None:
    device = Device()
    found = program.captured(Torch(device), lambda: device.run(torch.arange(5.0)))
    assert found.launched == "graph"
    before = device.now
    found.run()
    assert device.now - before == pytest.approx(0.04)


def test_a_graph_that_the_run_escaped_is_not_timed(program: ModuleType) -> None:
    device = Device()
    device.escapes = True
    found = program.captured(Torch(device), lambda: device.run(torch.arange(5.0)))
    assert found.launched == "from the host, as its graph computes something else"


def test_a_run_that_no_graph_can_hold_is_launched_from_the_host(program: ModuleType) -> None:
    device = Device()

    @contextlib.contextmanager
    def refuse(_graph: Any) -> Any:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    device.__dict__["graph"] = refuse
    found = program.captured(Torch(device), lambda: torch.arange(5.0))
    assert found.launched.startswith("from the host, as no graph can hold it (operation not permitted")


def test_cases_and_invariants_are_reported_with_ratios_floor_and_verdicts(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that follows a measurement, on a device whose every replay takes 40 microseconds."""
    device = Device()

    def contestant(site: Any, operands: Any, *_: Any, **__: Any) -> Any:
        values = program.dense_attention(site, operands, bench)()
        return lambda: device.run(values)

    monkeypatch.setattr(program, "longspan_kernel", contestant)
    monkeypatch.setattr(program, "PEERS", {"FlexAttention": contestant, "FlashAttention-2": contestant})
    tiny = {name: program.replace(site, must=(30, 20)) for name, site in program.TINY.items()}
    monkeypatch.setattr(program, "SITES", tiny)
    monkeypatch.setattr(program, "measure_machine", lambda _: program.Machine(1e9, 1e9, 5.0))
    monkeypatch.setattr(program, "group_sites", lambda group, _dry, whole=program.group_sites: whole(group, True))
    bench = program.Bench(Torch(device), "cpu", torch.float32, program.time.monotonic() + 60, False)
    bench.__dict__["flush"] = SimpleNamespace(zero_=lambda: device.spend("flush", 170))
    results = program.run_all(SimpleNamespace(run=[*tiny, *program.GROUPS], jobs=1), bench)
    assert bench.wrong == bench.not_run == []
    for name in tiny:
        assert results[name]["ratios"] == {"FlexAttention": pytest.approx(1), "FlashAttention-2": pytest.approx(1)}
        assert results[name]["launched"]["longspan"] == "graph"
        assert results[name]["floor_share"] == pytest.approx(results[name]["floor_us"] / 40)
        assert {f"{name}/time", f"{name}/FlashAttention-2"} <= set(bench.missed)  # 40 > 30 us; 1.0 < 1.2
        assert f"{name}/FlexAttention" not in bench.missed
    assert results["machine"]["launch_us"] == 5.0
    assert results["scaling"]["ratios"]["slope"] == pytest.approx(0, abs=1e-9)
    assert json.dumps(results, allow_nan=False)
    assert "anchor on an H100: must 30 us" in capsys.readouterr().out
