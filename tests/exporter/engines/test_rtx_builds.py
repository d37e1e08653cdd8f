"""Real builds with TensorRT-RTX on the CPU: parsed and compiled, at dynamic lengths; nothing here runs an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from longspan.exporter import ExportFailed
from longspan.exporter.engines.graphs.body_graph import body_graph
from longspan.exporter.engines.tensorrt.build_process import build_in_child
from longspan.plugins.functions import attach_function_bodies

from .prepared_graphs import graph_of
from .rtx import Built, Shapes, rtx

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDS = [("longformer", "SM120"), ("decoder", "SM86"), ("bigbird", "SM80")]
"""What other tests build is for SM89."""
PARSED = ("led", "longt5-local", "sparse-transformer", "sparse-transformer-heads", "phi3-small", "experts")
EXPECTED = ("has Int64 binding", "is being converted to INT32", "Overriding data to nullptr")
"""Warnings that mean nothing here: that inputs are int64, that masks of bits and empty lists are converted."""


def unexpected(built: Built) -> list[str]:
    return [text for text in built.warnings if not any(known in text for known in EXPECTED)]


def shapes_of(graph: ir.Model, longest: int = 160) -> Shapes:
    """One text of one token up to four of the longest."""
    names = [value.name or "" for value in graph.graph.inputs]
    return dict.fromkeys(names, ((1, 1), (1, longest // 2), (4, longest)))


@pytest.mark.parametrize(("name", "capability"), BUILDS)
def test_models_build_without_a_gpu(name: str, capability: str, tmp_path: Path) -> None:
    body = body_graph(graph_of(name))
    built = rtx(body, tmp_path, shapes_of(body), capability)
    assert built.parsed and built.bytes > 10_000, built.errors
    assert not built.errors and not unexpected(built)
    layers = {layer for _, layer, _ in built.layers}
    sites = [node.name for node in graph_of(name).graph if node.domain == "longspan"]
    for site in sites:
        products = [node.name for node in body.graph.all_nodes() if (node.name or "").startswith(f"{site}/MatMul")]
        assert len(products) >= 2 and layers.issuperset(products)


@pytest.mark.parametrize("name", PARSED)
def test_models_parse(name: str, tmp_path: Path) -> None:
    parsed = rtx(body_graph(graph_of(name)), tmp_path)
    assert parsed.parsed and not parsed.errors and not unexpected(parsed)


def test_why_the_lists_of_a_row_are_padded(tmp_path: Path) -> None:
    """The body that a bundle carries looks at the widths of the rows, which TensorRT-RTX cannot."""
    bundle = graph_of("bigbird")
    functions = {function.overload for function in bundle.functions.values()}
    assert not any("even" in overload for overload in functions), "the form that looks"
    import onnx.inliner

    inlined = onnx.inliner.inline_local_functions(ir.to_proto(bundle))
    parsed = rtx(ir.from_proto(inlined), tmp_path)
    assert not parsed.parsed and any("Sequence" in text for text in parsed.errors)


CACHED = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
    graph (float[B,8,R,16] q, float[B,2,T,16] k, float[B,2,T,16] v, int64[B] length) => (float[B,8,R,16] y) {{
        [site] y = longspan.SlidingWindowAttention <is_causal = 1, left_window_size = {left}> (q, k, v, , length)
    }}"""


@pytest.mark.parametrize("left", [7, 2000], ids=["all blocks at once", "one block at a time"])
def test_a_step_of_a_decoder_with_a_cache_builds(left: int, tmp_path: Path) -> None:
    """Fewer queries than keys, another number of valid keys in each text, four query heads to a key head."""
    bundle = ir.serde.deserialize_model(onnx.parser.parse_model(CACHED.format(left=left)))
    body = body_graph(bundle)
    attach_function_bodies(bundle)
    drawn = np.random.default_rng(0)
    for rows, keys in ((1, 40), (5, 40), (40, 40)):
        feed: dict[str, Any] = {
            "q": drawn.standard_normal((2, 8, rows, 16)).astype(np.float32),
            "k": drawn.standard_normal((2, 2, keys, 16)).astype(np.float32),
            "v": drawn.standard_normal((2, 2, keys, 16)).astype(np.float32),
            "length": np.array([keys, max(rows, keys - 11)], np.int64),
        }
        ours, theirs = (
            onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString()).run(None, feed)[0]
            for graph in (body, bundle)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
    shapes: Shapes = {
        "q": ((1, 8, 1, 16), (1, 8, 1, 16), (4, 8, 64, 16)),
        "k": ((1, 2, 1, 16), (1, 2, 512, 16), (4, 2, 4096, 16)),
        "v": ((1, 2, 1, 16), (1, 2, 512, 16), (4, 2, 4096, 16)),
        "length": ((1,), (1,), (4,)),
    }
    built = rtx(body, tmp_path, shapes, "SM89")
    assert built.bytes and not built.errors and not unexpected(built)
    assert ("LOOP_OUTPUT" in {kind for kind, _, _ in built.layers}) == (left == 2000)


def test_an_engine_that_cannot_run_at_a_bound_of_its_profile_is_refused(tmp_path: Path) -> None:
    """TensorRT sorts up to 3840 numbers, and builds for more with no more than a warning."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    text = """<ir_version: 10, opset_import: ["" : 20]>
        graph (float[n] x) => (float[n] y, int64[n] order) { size = Shape(x) [sort] y, order = TopK (x, size) }"""
    ir.save(ir.serde.deserialize_model(onnx.parser.parse_model(text)), tmp_path / "model.onnx")
    request: dict[str, Any] = {
        "target": "tensorrt-rtx", "model": str(tmp_path / "model.onnx"), "engine": str(tmp_path / "model.engine"),
        "capabilities": ["89"], "plugin": "none", "library": None, "timing_cache": None, "pool_limits": {},
        "hardware_compatibility": "none", "version_compatible": False, "weight_streaming": False, "strip": False,
        "refit": False, "optimization_level": None,
    }  # fmt: skip
    bounds = [{"x": {"min": (1,), "opt": (64,), "max": (longest,)}} for longest in (3840, 3841)]
    said: list[str] = []
    build_in_child("TensorRT-RTX", request | {"profiles": bounds[:1]}, said.append, said.append)
    assert (tmp_path / "model.engine").stat().st_size
    with pytest.raises(ExportFailed, match=r"sort: K exceeds the maximum value allowed \(3840\).*smaller --max-shapes"):
        build_in_child("TensorRT-RTX", request | {"profiles": bounds[1:]}, said.append, said.append)
