"""The graph that TensorRT gets, run in ONNX Runtime against the bundle that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from longspan.exporter.bundle import Bundle
from longspan.exporter.engines import BuildRequest
from longspan.exporter.engines.graphs.prepare import prepare
from longspan.exporter.engines.graphs.typed import dtype_of
from longspan.exporter.engines.profiles import longest_sizes, profiles_of
from longspan.exporter.graph_io import save_model
from longspan.exporter.parity.inputs import draw_inputs

from .prepared_graphs import WIDE, graph_of

# What a network of two layers makes of roundings to a type, in units of its eps at the size of the largest output.
ROUNDINGS = 8


@pytest.mark.parametrize(("dtype", "eps"), [("fp32", 2.0**-23), ("fp16", 2.0**-10)])
def test_bodies_are_inlined_and_compute_the_same(
    longformer_bundle: Path, tmp_path: Path, dtype: str, eps: float
) -> None:
    bundle = Bundle.open(longformer_bundle)
    model = ir.load(bundle.model_path)
    request = BuildRequest("tensorrt-rtx", dtype, compute_capabilities=("sm89",))
    prepared = prepare(model, request, ())
    assert prepared.dtype == dtype_of(prepared.model) == dtype
    assert not prepared.model.functions
    assert {node.domain for node in prepared.model.graph.all_nodes()} == {""}
    save_model(prepared.model, tmp_path / "prepared.onnx")
    run, original = (_session(path) for path in (tmp_path / "prepared.onnx", bundle.model_path))
    for length in (1, 7, 17, 100, 256):
        feed = draw_inputs(bundle.manifest.inputs, 2, length, padding="right", global_tokens="several")
        mask = feed["attention_mask"].astype(bool)
        ours, wanted = run.run(None, feed)[0][mask], original.run(None, feed)[0][mask]
        assert np.abs(ours - wanted).max() <= ROUNDINGS * eps * np.abs(wanted).max()


def test_products_inside_the_bodies_are_in_the_type_asked_for(longformer_bundle: Path) -> None:
    model = ir.load(Bundle.open(longformer_bundle).model_path)
    request = BuildRequest("tensorrt-rtx", "fp16", compute_capabilities=("sm75",))
    graph = prepare(model, request, ()).model.graph
    products = {value.dtype for node in graph.all_nodes() if node.op_type == "MatMul" for value in node.inputs if value}
    softmaxes = {
        value.dtype for node in graph.all_nodes() if node.op_type == "Softmax" for value in node.inputs if value
    }
    assert (products, softmaxes) == ({ir.DataType.FLOAT16}, {ir.DataType.FLOAT})


def test_the_ladder_has_the_attention_layer_where_no_key_is_left_out(longformer_bundle: Path) -> None:
    request = BuildRequest("tensorrt-rtx", "fp16", compute_capabilities=("sm89",))
    model = graph_of("wide-decoder")
    for longest, wanted in ((WIDE, "native layer"), (WIDE + 1, "function body")):
        prepared = prepare(model, request, (), longest={"sequence": longest})
        assert {site.lowering for site in prepared.sites} == {wanted}
        assert all([rung.chosen for rung in site.ladder[-2:]] == [False, True] for site in prepared.sites)
        layers = [node for node in prepared.model.graph if node.op_type == "Attention"]
        assert len(layers) == (2 if wanted == "native layer" else 0)
        assert all(value.dtype == ir.DataType.FLOAT16 for node in layers for value in node.inputs[:1] if value)
        assert dtype_of(prepared.model) == "fp16"
    reasons = {site.ladder[1].reason for site in prepare(model, BuildRequest("tensorrt", plugin_api="none"), ()).sites}
    assert len(reasons) == 1 and "that of other versions of TensorRT is not" in reasons.pop()
    bundle = Bundle.open(longformer_bundle)
    (reason,) = {site.ladder[1].reason for site in prepare(ir.load(bundle.model_path), request, ()).sites}
    assert reason == "TensorRT's Attention layer has no global_mask"


def test_the_longest_texts_of_all_profiles_count(longformer_bundle: Path) -> None:
    manifest = Bundle.open(longformer_bundle).manifest
    name = manifest.inputs[0].name
    profiles = profiles_of(manifest, (), (), (f"{name}:[2,200] {name}:[3,100]",))
    assert longest_sizes(profiles, manifest) == {"batch": 3, "sequence": 200}
    assert longest_sizes((), manifest) == {}


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
