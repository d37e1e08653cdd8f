"""Converted graphs of real exports against the float64 model: how far off they are, what makes them fail, what parses.

The graphs run with the rounding that their types say (`rounding.py`). What is allowed is what ``check --engine``
allows: torch in the same type is the yardstick, see `exporter/parity/tolerances.py`. ``pytest -rP`` prints the errors.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from longspan.exporter.bundle import Bundle
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.engines.graphs.body_graph import body_graph
from longspan.exporter.engines.precision.conversion import convert_precision
from longspan.exporter.families import Family, find_family
from longspan.exporter.parity.comparison import Comparison
from longspan.exporter.parity.oracle import float64_arithmetic, float64_copy, typed_copy
from longspan.exporter.parity.plan import Wanted, plan
from longspan.exporter.parity.report import CaseReport
from longspan.exporter.parity.runners import RuntimePath, torch_runners
from longspan.exporter.parity.tolerances import Overrides, Scale, lowering_tolerance, numpy_name
from longspan.exporter.pipeline import prepare
from longspan.exporter.sources import SourceRequest
from polygraphy.backend.onnxrt import OnnxrtRunner

from .prepared_graphs import feed_of, graph_of, source_of
from .rounding import explicitly_rounded, rounded_everywhere, run, run_rounded, session_of
from .rtx import rtx

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("decoder", "longformer", "bigbird", "longt5-local", "experts")
DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
Feed = dict[str, Any]


@functools.cache
def models_of(name: str) -> tuple[Family, dict[str, Any]]:
    """The adapter, and the model in float64 and in each narrow type."""
    model: Any = source_of(name).model
    family = find_family(model, UNCHANGED)
    assert family is not None
    narrow = {dtype: typed_copy(model, getattr(torch, numpy_name(dtype))) for dtype in DTYPES}
    return family, {"fp64": float64_copy(model), **narrow}


def in_torch(name: str, dtype: str, feed: Feed) -> np.ndarray[Any, Any]:
    """The first output of the intercepted model in a type, as float64."""
    family, models = models_of(name)
    arithmetic = float64_arithmetic if dtype == "fp64" else contextlib.nullcontext
    with torch.no_grad(), family.intercept(models[dtype], UNCHANGED), arithmetic():
        result = models[dtype](**{key: torch.from_numpy(value) for key, value in feed.items()})[0]
    return np.asarray(result.double().numpy())


@functools.cache
def allowed(name: str, dtype: str, length: int, padding: str = "right") -> tuple[np.ndarray[Any, Any], float]:
    """The float64 model's output, and how far from it a runtime of a type may be."""
    feed = feed_of(graph_of(name), length, padding)
    truth = in_torch(name, "fp64", feed)
    error = float(np.abs(in_torch(name, dtype, feed) - truth).max())
    # 64 channels at most, 48 in the widest sum of the others; two layers.
    scale = Scale(terms=64, depth=2)
    numpy_type = np.dtype(DTYPES[dtype].numpy())
    return truth, lowering_tolerance(error, float(np.abs(truth).max()), numpy_type, scale)


@pytest.mark.parametrize("inlined", [False, True], ids=["sites", "bodies"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_export_is_as_accurate_as_torch_in_that_type(name: str, dtype: str, inlined: bool) -> None:
    graph = body_graph(graph_of(name)) if inlined else graph_of(name)
    result = convert_precision(graph, dtype)
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    again = ir.to_proto(convert_precision(result.model, dtype).model)
    assert again.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    rounded = explicitly_rounded(result.model)
    for length in (1, 17, 101):
        feed = feed_of(graph, length)
        truth, tolerance = allowed(name, dtype, length)
        error = np.abs(next(iter(run(rounded, feed).values())) - truth).max()
        largest = np.abs(truth).max()
        relative = f"{error / largest:.1e} of the largest value, allowed {tolerance / largest:.1e}"
        print(f"{name} {dtype}, {'bodies' if inlined else 'sites'}, {length} tokens: {relative}")
        assert 0 < error <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_products_and_attention_are_narrow_and_softmax_and_norms_are_not(name: str) -> None:
    for graph in (graph_of(name), body_graph(graph_of(name))):
        found: dict[str, set[Any]] = {}
        for node in convert_precision(graph, "fp16").model.graph.all_nodes():
            types = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
            found.setdefault("longspan" if node.domain else node.op_type, set()).update(types)
        wide = ("Softmax", "LayerNormalization", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Sin", "Cos", "Exp")
        assert all(ir.DataType.FLOAT16 not in found.get(operator, set()) for operator in wide)
        assert ir.DataType.FLOAT16 in found["MatMul"]
        if "longspan" in found:
            assert ir.DataType.FLOAT16 in found["longspan"] and ir.DataType.FLOAT not in found["longspan"]
        else:
            # Every product that a softmax feeds, or whose result it takes, is of the narrow type.
            assert found["MatMul"] == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("name", ["decoder", "longformer"])
def test_function_bodies_of_a_converted_graph_compute_in_float32_inside(name: str) -> None:
    graph = ir.to_proto(body_graph(convert_precision(graph_of(name), "fp16").model))
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(graph).graph.value_info
    }
    inside = [node for node in graph.graph.node if "/" in node.name and node.op_type in ("Softmax", "MatMul")]
    assert inside and {types[name] for node in inside for name in node.output} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_islands_a_decoder_is_right_only_where_positions_are_small(dtype: str) -> None:
    graph = graph_of("decoder")
    naive, ours = rounded_everywhere(graph, DTYPES[dtype]), convert_precision(graph, dtype).model
    for length, right in ((64, True), (2600, False)):
        feed = feed_of(graph, length, "none")
        truth, tolerance = allowed("decoder", dtype, length, "none")
        error, without = (
            float(np.abs(next(iter(outputs.values())) - truth).max())
            for outputs in (run_rounded(ours, feed), run(naive, feed))
        )
        assert error <= tolerance
        assert right or without > 4 * tolerance, (length, without, tolerance)


def wider(graph: ir.Model) -> ir.Model:
    """The graph with a window that is off by one at its last site."""
    changed = graph.clone()
    [*_, site] = [node for node in changed.graph if node.domain == "longspan"]
    name = "left_window_size"
    site.attributes[name] = ir.AttrInt64(name, site.attributes[name].as_int() + 1)
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sweep_of_check_passes_a_converted_graph_and_fails_a_broken_one(
    longformer_bundle: Path, dtype: str, kernel_library: str
) -> None:
    bundle = Bundle.open(longformer_bundle)
    graph = convert_precision(ir.load(bundle.model_path), dtype).model
    cases = swept(bundle, dtype, right=explicitly_rounded(graph), wrong=explicitly_rounded(wider(graph)))
    assert len(cases) > 10 and not any("right" in case.failing_paths for case in cases)
    assert {output.dtype for case in cases for output in case.outputs} == {numpy_name(dtype)}
    failing = {case.case.length for case in cases if "wrong" in case.failing_paths}
    # The first text that a window of 8 on each side cuts has 10 tokens.
    assert failing and min(failing) >= 10 and max(failing) == 256


def swept(bundle: Bundle, dtype: str, **graphs: ir.Model) -> list[CaseReport]:
    """The cases of ``check --engine`` for graphs in the place of engines, by the name of their path."""
    manifest = bundle.manifest
    planned = plan(manifest, Wanted())
    runners = torch_runners(
        prepare(SourceRequest.again(manifest.source), manifest.conversion), manifest, numpy_name(dtype)
    )
    paths = [
        RuntimePath(name, OnnxrtRunner(session_of(graph)), "", {}, dtype=numpy_name(dtype))
        for name, graph in graphs.items()
    ]
    comparison = Comparison(manifest, runners, paths, Overrides(), original_longest=0)
    with comparison.active():
        return [comparison.run(case, planned.feed(index)) for index, case in enumerate(planned.cases)]


@pytest.mark.parametrize(
    # Engines of the decoder are built below. Operators that bfloat16 lacks stand in the mixture of experts.
    ("name", "dtype"),
    [("bigbird", "fp16"), ("longt5-local", "fp16"), ("experts", "bf16")],
)
def test_tensorrt_rtx_parses_a_converted_graph(name: str, dtype: str, tmp_path: Path) -> None:
    built = rtx(convert_precision(body_graph(graph_of(name)), dtype).model, tmp_path)
    assert built.parsed and not built.errors
    products = [kind for kind, _, _ in built.layers if kind == "MATRIX_MULTIPLY"]
    assert products


def test_tensorrt_rtx_builds_an_engine_of_each_type_which_are_not_the_same(tmp_path: Path) -> None:
    graph = body_graph(graph_of("decoder"))
    shapes = {value.name or "": ((1, 8), (1, 32), (2, 64)) for value in graph.graph.inputs}
    engines = {
        dtype: rtx(convert_precision(graph, dtype).model, tmp_path, shapes, "SM89", dtype)
        for dtype in ("fp32", *DTYPES)
    }
    assert all(built.bytes and not built.errors for built in engines.values())
    assert len({built.sha256 for built in engines.values()}) == 3
