"""The process that runs an engine: what goes through it unchanged, and that its end is one clear line."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from longspan.exporter.engines.running.exchange import read_arrays, write_arrays
from longspan.exporter.engines.running.inference_process import InferenceEnded, InferenceProcess
from longspan.exporter.errors import BundleCorrupted, EnvironmentLacks, ExportFailed

STAND_IN = (sys.executable, str(Path(__file__).with_name("inference_stand_in.py")))


def start(monkeypatch: pytest.MonkeyPatch, fault: str = "", timeout_s: float = 60.0) -> InferenceProcess:
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    return InferenceProcess("tensorrt", command=STAND_IN, timeout_s=timeout_s)


def test_arrays_of_every_type_and_shape_survive(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "float16": generator.standard_normal((3, 5)).astype(np.float16),
        "bfloat16": generator.standard_normal((2, 7)).astype(ml_dtypes.bfloat16),
        "bool": generator.integers(0, 2, (3, 1)).astype(bool),
        "int64": generator.integers(-5, 5, (4,)),
        "scalar": np.float32(3.5).reshape(()),
        "none": np.zeros((0, 8), np.float32),
        "slices": generator.standard_normal((6, 4)).astype(np.float32)[::2, 1:],
    }
    records = write_arrays(tmp_path / "arrays", arrays)
    read = read_arrays(tmp_path / "arrays", records)
    (tmp_path / "arrays").write_bytes(b"")
    assert read.keys() == arrays.keys()
    for name, value in arrays.items():
        assert read[name].dtype == value.dtype and read[name].shape == value.shape
        assert np.array_equal(read[name], value)


def test_large_inputs_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(monkeypatch)
    value = np.arange(1 << 22, dtype=np.int64)
    outputs, seconds = process.infer({"x": value}, 3)
    assert seconds == 0.5 and list(outputs) == ["x 3"] and np.array_equal(outputs["x 3"], value)
    # A second, smaller one does not see what the first left.
    outputs, _ = process.infer({"y": value[:2]}, 0)
    assert outputs["y 0"].tolist() == [0, 1]
    process.close()


def test_which_tensorrt_polygraphy_takes_is_decided_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    for module, provider in (("tensorrt", "stand-in"), ("tensorrt_rtx", "stand-in 1")):
        process = InferenceProcess(module, command=STAND_IN)
        assert process.open(Path("engine"), None)["provider"] == provider
        process.close()


def test_a_slow_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(monkeypatch, "slow")
    begin = time.monotonic()
    process.infer({"x": np.zeros(2)})
    assert time.monotonic() - begin >= 0.3
    process.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", r"ended by SIGABRT: cudaErrorIllegalAddress$"),
        ("leave", r"ended by exit code 7"),
    ],
)
def test_a_process_that_ends_says_how(monkeypatch: pytest.MonkeyPatch, fault: str, message: str) -> None:
    process = start(monkeypatch, fault)
    with pytest.raises(InferenceEnded, match=message) as caught:
        process.infer({"x": np.zeros(2)})
    assert "\n" not in str(caught.value)
    # Nothing is answered any more, and closing what has ended is no error.
    with pytest.raises(InferenceEnded):
        process.infer({"x": np.zeros(2)})
    process.close()
    with pytest.raises(InferenceEnded):
        process.infer({"x": np.zeros(2)})


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(monkeypatch, "hang", timeout_s=5.0)
    with pytest.raises(InferenceEnded, match="no answer in 5 s"):
        process.infer({"x": np.zeros(2)})
    process.close()


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("refuse", ExportFailed, "no kernel image"),
        ("nonsense", ExportFailed, "ValueError: first line second line"),
    ],
)
def test_errors_leave_the_process_alive(
    monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[Exception], message: str
) -> None:
    process = start(monkeypatch, fault)
    for _ in range(2):
        with pytest.raises(kind, match=message) as caught:
            process.infer({"x": np.zeros(2)})
        assert not isinstance(caught.value, InferenceEnded)
    process.close()


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentLacks, match="No module named 'tensorrt'"):
        start(monkeypatch, "no module")


def test_a_corrupted_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(monkeypatch, "corrupted")
    with pytest.raises(BundleCorrupted, match="magicTag"):
        process.open(Path("engine"), None)
    process.close()


def test_the_process_ends_with_what_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(monkeypatch)
    child = process._child
    del process
    assert child.poll() is not None or child.wait(10) == 0


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", BundleCorrupted, "empty"),
        (b"no engine at all", BundleCorrupted, "readHeader"),
        (b"no engine at all" * 64, BundleCorrupted, "magicTag"),
    ],
)
def test_tensorrt_rtx_itself_refuses_what_is_no_engine(
    tmp_path: Path, content: bytes, kind: type[Exception], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "model.engine").write_bytes(content)
    process = InferenceProcess("tensorrt_rtx")
    assert process.version == __import__("tensorrt_rtx").__version__
    with pytest.raises(kind, match=message):
        process.open(tmp_path / "model.engine", None)
    process.close()


def test_no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(monkeypatch)
    folder = process._folder.name
    process.close()
    process.close()
    assert not os.path.exists(folder)  # noqa: PTH110
    assert process._child.returncode == 0
