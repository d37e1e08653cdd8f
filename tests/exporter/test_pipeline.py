"""Export from MODEL to a bundle that ONNX Runtime runs, and its failures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from longspan.exporter import Conversion, SourceRequest, export, inspect
from longspan.exporter.bundle import Bundle
from longspan.exporter.errors import ExportFailed, InvalidRequest, NothingReplaced
from longspan.exporter.graph_io import read_interface, save_model
from longspan.exporter.pipeline import prepare, rewrite

from .models import BERT, LONGFORMER, write_config

MODEL_WITH_OPERATOR = """
import torch
from longspan.plugins.sliding_window_attention.torch_op import sliding_window_attention

class Attention(torch.nn.Module):
    def forward(self, x):
        return sliding_window_attention(x, x, x, left_window_size=3, right_window_size=0, q_num_heads=2, kv_num_heads=2)

def make():
    return Attention(), {"x": torch.randn(2, 9, 8)}

def frozen():
    return Frozen(), {"x": torch.randn(2, 9, 8)}

class Frozen(Attention):
    def forward(self, x):
        return super().forward(x) if x.shape[1] == 9 else x
"""


@pytest.fixture(scope="module")
def longformer(longformer_bundle: Path) -> Bundle:
    return Bundle.open(longformer_bundle)


def run(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path).run(None, feed)


def test_the_sites_are_recorded(longformer: Bundle) -> None:
    sites = longformer.manifest.sites
    assert [site.layer for site in sites] == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    assert [site.attributes["left_window_size"] for site in sites] == [4, 8]
    assert [site.reach for site in sites] == [4, 8]
    assert all(site.recognised_by == "family longformer" for site in sites)
    refused = {rung.lowering: rung.reason for rung in sites[0].ladder if not rung.chosen}
    assert "global_mask" in refused["standard op"] and "CUDA only" in refused["contrib op"]


def test_the_written_file_has_dynamic_batch_and_sequence(longformer: Bundle) -> None:
    for record in longformer.manifest.inputs:
        assert record.shape == ("batch", "sequence")
    assert longformer.manifest.outputs[0].shape == ("batch", "sequence", 64)


def test_the_file_is_valid_and_holds_no_quadratic_value(longformer: Bundle) -> None:
    model = onnx.load(longformer.model_path)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model)
    for value in inferred.graph.value_info:
        dims = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert dims.count("sequence") <= 1, value.name


def test_the_function_body_computes_the_model(longformer: Bundle) -> None:
    prepared = prepare(SourceRequest.again(longformer.manifest.source), longformer.manifest.conversion)
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((1, 5), (3, 47)):
        feed = {
            "input_ids": torch.randint(2, 500, (batch, length), generator=generator),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
            "global_attention_mask": torch.zeros(batch, length, dtype=torch.int64),
        }
        feed["global_attention_mask"][:, 2] = 1
        with torch.no_grad():
            expected = prepared.source.model(**feed).last_hidden_state.numpy()
        got = run(longformer.model_path, {name: value.numpy() for name, value in feed.items()})[0]
        # float32 through two layers of O(1) activations.
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


def test_a_longer_windowed_encoder_runs_beyond_its_trained_length(tmp_path: Path) -> None:
    config = write_config(tmp_path, BERT)
    conversion = Conversion(window=16, max_positions=300, global_tokens=1)
    bundle = export(SourceRequest(str(config), random_weights=True), tmp_path / "out", conversion=conversion)
    manifest = bundle.manifest
    assert (manifest.max_length, manifest.trained_length, manifest.faithful) == (300, 64, False)
    assert "window" in manifest.approximation and "beyond 64" in manifest.approximation
    ids = np.ones((1, 300), np.int64)
    feed = {"input_ids": ids, "attention_mask": ids, "token_type_ids": np.zeros_like(ids)}
    assert np.isfinite(run(bundle.model_path, feed)[0]).all()
    # The 3-D layout cancels the head transposes, so none is left around the operator.
    assert "Transpose" not in {node.op_type for node in onnx.load(bundle.model_path).graph.node}


@pytest.fixture
def operator_file(tmp_path: Path) -> Path:
    path = tmp_path / "model_with_operator.py"
    path.write_text(MODEL_WITH_OPERATOR)
    return path


def test_a_module_may_call_the_operator_itself(operator_file: Path, tmp_path: Path) -> None:
    bundle = export(f"{operator_file}:make", tmp_path / "out")
    (site,) = bundle.manifest.sites
    assert site.recognised_by == "longspan operator in the model" and site.pattern == "3 left, 0 right"
    assert run(bundle.model_path, {"x": np.zeros((3, 20, 8), np.float32)})[0].shape == (3, 20, 8)


def test_a_traced_program_may_call_the_operator(operator_file: Path, tmp_path: Path) -> None:
    from longspan.exporter.sources import load_source

    source = load_source(SourceRequest(f"{operator_file}:make"))
    dims = {"x": {0: torch.export.Dim("n"), 1: torch.export.Dim("s")}}
    program = torch.export.export(source.model, (), kwargs=dict(source.example_inputs), dynamic_shapes=dims)
    torch.export.save(program, tmp_path / "model.pt2")
    bundle = export(str(tmp_path / "model.pt2"), tmp_path / "out")
    assert bundle.manifest.inputs[0].shape == ("batch", "sequence", 8)
    assert run(bundle.model_path, {"x": np.zeros((1, 30, 8), np.float32)})[0].shape == (1, 30, 8)


def test_a_length_that_tracing_would_fix_is_an_error(operator_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="sequence"):
        export(f"{operator_file}:frozen", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fixed_dimension_in_the_file_is_an_error(longformer: Bundle, tmp_path: Path) -> None:
    model = onnx.load(longformer.model_path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 150
    onnx.save(model, tmp_path / "model.onnx")
    drawn = {record.name: record for record in longformer.manifest.inputs}
    with pytest.raises(ExportFailed, match="fixed the sequence dimension to 150"):
        read_interface(tmp_path / "model.onnx", drawn)


def test_nothing_to_replace_is_an_error(tmp_path: Path) -> None:
    request = SourceRequest(str(write_config(tmp_path, BERT)), random_weights=True)
    with pytest.raises(NothingReplaced, match="no attention site"):
        export(request, tmp_path / "out")
    longformer = SourceRequest(str(write_config(tmp_path / "other", LONGFORMER)), random_weights=True)
    with pytest.raises(NothingReplaced, match="--window"):
        export(longformer, tmp_path / "out", conversion=Conversion(window=16))


def test_a_bundle_is_not_overwritten_unasked(longformer: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="--force"):
        export("anything", longformer.path)


def test_large_weights_go_beside_the_model(longformer: Bundle, tmp_path: Path) -> None:
    source = longformer.manifest.source
    graph = rewrite(SourceRequest.again(source), longformer.manifest.conversion).graph
    save_model(graph, tmp_path / "model.onnx", external_data_bytes=1000)
    assert (tmp_path / "model.onnx.data").stat().st_size > 100_000
    assert (tmp_path / "model.onnx").stat().st_size < 200_000
    feed = {record.name: np.ones((1, 12), np.int64) for record in longformer.manifest.inputs}
    for small, large in zip(run(longformer.model_path, feed), run(tmp_path / "model.onnx", feed), strict=True):
        np.testing.assert_array_equal(small, large)


def test_inspect_says_the_same_of_a_model_and_of_its_bundle(longformer: Bundle) -> None:
    of_bundle = inspect(longformer.path, length=100)
    of_model = inspect(SourceRequest.again(longformer.manifest.source), length=100)
    assert of_bundle.sites == of_model.sites
    # (100 rows x 9 keys less 4 + 3 + 2 + 1 keys cut off at each end) of 100 x 100 pairs.
    assert of_bundle.sites[0].density == pytest.approx((100 * 9 - 20) / 10_000)
    with pytest.raises(InvalidRequest, match="length 0"):
        inspect(longformer.path, length=0)
