"""What `inference.TensorRT` makes of inputs, outputs, layers and errors, with a runner that only pretends to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from longspan.exporter.engines.running.inference_worker import (
    CORRUPTED,
    ENVIRONMENT,
    FAILED,
    Refused,
    TensorRT,
    layers_of,
    plugin_names,
)
from longspan.exporter.throughput import engine_trial
from polygraphy.common import FormattedArray
from polygraphy.exception import PolygraphyException

trt = pytest.importorskip("tensorrt_rtx")

Array = npt.NDArray[Any]


class Runner:
    """Polygraphy's runner, but that outputs are the inputs, in buffers that are used again."""

    def __init__(self, types: Mapping[str, Any], shape_inputs: frozenset[str] = frozenset()) -> None:
        self.engine = SimpleNamespace(
            num_io_tensors=len(types),
            get_tensor_name=list(types).__getitem__,
            get_tensor_dtype=types.__getitem__,
            is_shape_inference_io=lambda name: name in shape_inputs,
        )
        self.profiles: list[int] = []
        self.feeds: list[dict[str, Any]] = []
        self.given: dict[str, Any] = {}
        self.error = ""
        self._buffers: dict[str, Array] = {}

    def set_profile(self, index: int) -> None:
        self.profiles.append(index)

    def infer(self, feed: dict[str, Any], **given: Any) -> dict[str, FormattedArray]:
        if self.error:
            raise PolygraphyException(self.error)
        self.feeds.append(feed)
        self.given = given
        outputs = {}
        for name, value in feed.items():
            array = value.array if isinstance(value, FormattedArray) else value
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            buffer = self._buffers.setdefault(name, np.empty_like(raw))
            buffer[:] = raw
            outputs[name] = FormattedArray(buffer, shape=value.shape)
        return outputs

    def last_inference_time(self) -> float:
        return 0.125


def session(shape_inputs: frozenset[str] = frozenset(), **types: Any) -> TensorRT:
    made = TensorRT()
    made.hello("tensorrt_rtx")
    made.runner = Runner(types, shape_inputs)
    return made


def test_inputs_and_outputs_have_the_engines_types() -> None:
    made = session(tokens=trt.int64, half=trt.float16, brain=trt.bfloat16, mask=trt.bool)
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    feed = {"tokens": np.arange(6).reshape(2, 3), "half": values, "brain": values, "mask": values > 0}
    outputs, seconds = made.infer(feed, 0)
    assert seconds == 0.125
    assert {name: value.dtype for name, value in outputs.items()} == {
        "tokens": np.int64, "half": np.float16, "brain": ml_dtypes.bfloat16, "mask": np.bool_
    }  # fmt: skip
    assert np.array_equal(outputs["brain"], values.astype(ml_dtypes.bfloat16)) and outputs["brain"].shape == (2, 3, 4)
    assert np.array_equal(outputs["half"], values.astype(np.float16))
    assert np.array_equal(outputs["tokens"], feed["tokens"])
    # numpy's own types go as they are; Polygraphy does not know the other.
    assert isinstance(made.runner.feeds[0]["half"], np.ndarray)
    assert isinstance(made.runner.feeds[0]["brain"], FormattedArray)
    # The runner uses its buffers again.
    made.infer({**feed, "half": -values}, 0)
    assert np.array_equal(outputs["half"], values.astype(np.float16))


def test_an_input_of_another_kind_is_refused() -> None:
    with pytest.raises(Refused, match="input tokens is int32, the engine takes int64") as caught:
        session(tokens=trt.int64).infer({"tokens": np.zeros(3, np.int32)}, 0)
    assert caught.value.kind == FAILED


def test_an_input_that_the_engine_does_not_have_is_left_out() -> None:
    made = session(x=trt.float32)
    made.infer({"x": np.zeros(2, np.float32), "unused": np.zeros(3, np.int64)}, 0)
    assert made.runner.feeds[0].keys() == {"x"}


def test_a_profile_is_chosen_where_it_changes() -> None:
    made = session(x=trt.float32)
    for profile in (0, 0, 2, 2, 0):
        made.infer({"x": np.zeros(2, np.float32)}, profile)
    assert made.runner.profiles == [0, 2, 0]


def test_the_first_error_that_tensorrt_logged_is_what_is_told() -> None:
    made = session(x=trt.float32)
    made.runner.error = "`execute_async_v3()` failed. Please see the logging output above for details."
    with pytest.raises(Refused, match="execute_async_v3") as caught:
        made.infer({"x": np.zeros(2, np.float32)}, 0)
    assert caught.value.kind == FAILED
    made._logger.log(trt.ILogger.WARNING, "is not it")
    for message in ("the cause\nin two lines", "what followed"):
        made._logger.log(trt.ILogger.ERROR, message)
    assert made._first("otherwise") == "the cause in two lines"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Error Code 1: Serialization (Serialization assertion plan.header.size == blobSize failed.", CORRUPTED),
        ("[runtime.cpp::readHeader::765] Error Code 2: Internal Error", CORRUPTED),
        ("Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)", ENVIRONMENT),
        ("Error Code 2: OutOfMemory", ENVIRONMENT),
    ],
)
def test_damage_is_told_from_what_is_missing(message: str, kind: str) -> None:
    made = session()
    made._logger.log(trt.ILogger.ERROR, message)
    refusal = made._refusal("x/model.engine", "")
    assert refusal.kind == kind
    if "CUDA driver" in message:
        assert "x/model.engine: cannot be loaded here: " in str(refusal) and "next step: nvidia-smi" in str(refusal)


def test_layers_as_an_inspector_tells_them() -> None:
    def engine(layers: list[Any]) -> Any:
        text = json.dumps({"Layers": layers, "Bindings": []})
        return SimpleNamespace(
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda form: text)
        )

    detailed = [
        {"Name": "__mye1", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_a]\u001e[ONNX Layer: node_b]"},
        {"Name": "renamed", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: site_1]"},
        {"Name": "site_2", "LayerType": "Plugin"},
    ]
    found = layers_of(trt, engine(detailed))
    assert found[0] == ["__mye1", "gemm", "node_a", "node_b"]
    assert plugin_names(found) == {"renamed", "site_1", "site_2"}
    named = layers_of(trt, engine(["{ForeignNode[a...site_1]}", "site_2"]))
    assert "site_2" in plugin_names(named) and "site_1" not in plugin_names(named)


def test_timed_runs_find_their_inputs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeviceArray:
        copies = 0

        @staticmethod
        def raw(shape: tuple[int, ...]) -> DeviceArray:
            made = DeviceArray()
            made.shape = shape
            return made

        def copy_from(self, host: Array) -> DeviceArray:
            assert host.dtype == np.uint8 and host.shape == self.shape
            DeviceArray.copies += 1
            return self

    monkeypatch.setattr("polygraphy.cuda.DeviceArray", DeviceArray)
    device = engine_trial.Device("tensorrt_rtx")
    device._session = session(frozenset({"sizes"}), x=trt.bfloat16, sizes=trt.int64)
    device._session.runner.infer = lambda feed, **given: seen.append((feed, given))  # type: ignore[method-assign]
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
    device.keep({"x": np.ones((2, 3), np.float32), "sizes": np.arange(2)})
    for _ in range(3):
        device.run()
    assert DeviceArray.copies == 1 and len(seen) == 3
    feed, given = seen[-1]
    assert feed["x"].shape == (2, 3) and feed["x"].array.shape == (12,)
    # What TensorRT reads as a shape stays where the host reads it.
    assert np.array_equal(feed["sizes"].array, [0, 1])
    assert given == {"check_inputs": False, "copy_outputs_to_host": False, "return_raw_buffers": True}
