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
from longspan.exporter.engines.graphs.prepare import dtype_of, prepare
from longspan.exporter.graph_io import save_model
from longspan.exporter.parity.inputs import draw_inputs

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


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
