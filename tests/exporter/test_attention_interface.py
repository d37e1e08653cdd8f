"""Declared windows and chunks, family by family: against the model's own attention, and in the exported graph."""

from __future__ import annotations

import ast
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from longspan.exporter.conversion import UNCHANGED, Conversion
from longspan.exporter.errors import ExportFailed, InvalidRequest
from longspan.exporter.families import Family, attention_interface, family_by_name, find_family
from longspan.exporter.families import gpt_neo as gpt_neo_adapter
from longspan.exporter.graph_io import save_model
from longspan.exporter.manifest import Manifest
from longspan.exporter.parity.oracle import float64_arithmetic, float64_copy
from longspan.exporter.pipeline import rewrite
from longspan.exporter.sites.record import StandardSite, find_sites
from longspan.exporter.sources import Source, SourceRequest, load_source
from longspan.exporter.tracing import trace
from longspan.plugins.functions import attach_function_bodies

from .models import BERT, write_config
from .windowed_models import FAMILIES, WINDOW, WindowedFamily

pytestmark = pytest.mark.usefixtures("one_thread")

# Two float64 computations of O(1) activations through two layers differ by accumulated rounding only.
TOLERANCE = 1e-12
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1)

WANTED = (
    "mistral mixtral ministral ministral3 qwen2 qwen3 gemma2 gemma3_text gpt_oss phi3 starcoder2 cohere2 olmo3 smollm3 "
    "gpt_neo modernbert modernbert-decoder llama4_text"
)
"""What docs/families.md promises."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windowed")


def load(folder: Path, config: dict[str, Any], **changes: Any) -> Source:
    return load_source(SourceRequest(str(write_config(folder, config, **changes)), random_weights=True))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> WindowedFamily:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def source(family: WindowedFamily, folder: Path) -> Source:
    return load(folder / family.model_class, family.config)


def adapter(source: Source) -> Family:
    found = find_family(source.model, UNCHANGED)  # type: ignore[arg-type]
    assert found is not None
    return found


def padded_rows(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Four rows: no padding, left, right, and nothing but padding."""
    ids = torch.randint(3, 100, (4, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(4, length, dtype=torch.int64)
    mask[1, : length // 3] = 0
    mask[2, length - length // 4 :] = 0
    mask[3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def original(model: Any, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), float64_arithmetic():
        return model(**feed)[0]


def intercepted(model: Any, feed: dict[str, torch.Tensor], by: Family) -> torch.Tensor:
    with torch.no_grad(), by.intercept(model, UNCHANGED), float64_arithmetic():
        return model(**feed)[0]


def worst(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference over the tokens that are not padding; those that are may hold anything finite."""
    assert torch.isfinite(ours).all()
    return float(((ours - theirs).abs().amax(dim=-1) * mask).max())


def test_every_promised_family_is_covered() -> None:
    assert sorted(FAMILIES) == sorted(WANTED.split())
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    names = {family.model_class.removesuffix("Model").removesuffix("Text") for family in FAMILIES.values()}
    assert [name for name in sorted(names) if name.lower() not in page.lower().replace(" ", "").replace("-", "")] == []


def test_the_windowed_layers_are_sites_and_the_others_are_listed(family: WindowedFamily, source: Source) -> None:
    by, model = adapter(source), source.model
    assert by.name == family.adapter and by.faithful(model, UNCHANGED)  # type: ignore[arg-type]
    layers = range(model.config.num_hidden_layers)  # type: ignore[union-attr]
    assert [layer_of(name) for name in by.sites(model, UNCHANGED)] == list(family.windowed)  # type: ignore[arg-type]
    standard = by.standard(model, UNCHANGED)  # type: ignore[arg-type]
    assert [layer_of(site.layer) for site in standard] == [n for n in layers if n not in family.windowed]
    assert all(site.reason.startswith("full attention: every query sees") for site in standard)


def layer_of(name: str) -> int:
    """The number in a module's name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def test_matches_the_original_around_the_window(source: Source) -> None:
    by, double = adapter(source), float64_copy(source.model)  # type: ignore[arg-type]
    for length in LENGTHS:
        feed = padded_rows(length)
        theirs = original(double, feed)
        assert worst(intercepted(double, feed, by), theirs, feed["attention_mask"]) < TOLERANCE, length


def test_a_window_off_by_one_would_be_seen(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    by, double = adapter(source), float64_copy(source.model)  # type: ignore[arg-type]
    banded = attention_interface.banded_attention

    def shorter(*args: Any, left: int, **keywords: Any) -> torch.Tensor:
        return banded(*args, left=left - 1, **keywords)

    from longspan.exporter.families import chunked_attention, declared_windows

    for module in (declared_windows, chunked_attention, gpt_neo_adapter):
        monkeypatch.setattr(module, "banded_attention", shorter)
    feed = padded_rows(2 * WINDOW + 1)
    assert worst(intercepted(double, feed, by), original(double, feed), feed["attention_mask"]) > 1e-5


def test_the_model_is_as_before_after_the_context(source: Source) -> None:
    model: Any = source.model
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), adapter(source).intercept(model, UNCHANGED):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    double = float64_copy(model)
    feed = padded_rows(5)
    torch.testing.assert_close(original(double, feed), original(double, feed), rtol=0, atol=0)


def test_exported_graph(family: WindowedFamily, source: Source, tmp_path: Path) -> None:
    rewritten = rewrite(SourceRequest(source.record.location, random_weights=True), UNCHANGED)
    graph, sites = rewritten.graph, rewritten.sites
    assert rewritten.standard == adapter(source).standard(source.model, UNCHANGED)  # type: ignore[arg-type]
    assert [layer_of(site.layer) for site in sites] == list(family.windowed)
    assert {(site.attributes["left_window_size"], site.attributes["right_window_size"]) for site in sites} == {
        (family.left, family.right)
    }
    for value in graph.graph.inputs:
        assert all(isinstance(dim, ir.SymbolicDim) for dim in value.shape or ())
    traced_from = {node.name: layers_of(node) for node in graph.graph}
    model = tmp_path / "model.onnx"
    save_model(graph, model)

    full = set(range(source.model.config.num_hidden_layers)) - set(family.windowed)  # type: ignore[union-attr]
    # Masks are made outside of any layer; nothing is left of them where no layer is full.
    assert {layer for name in quadratic(model) for layer in traced_from[name] or full} == full

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    double = float64_copy(source.model)  # type: ignore[arg-type]
    for length in (5, 2 * WINDOW + 5):
        feed = padded_rows(length, seed=1)
        ours = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feed.items()})[0])
        theirs = original(double, feed)
        # float32 through two layers of at most 48 summands each; the largest activations set the scale.
        bound = 48 * float(np.finfo(np.float32).eps) * float(theirs.abs().max())
        assert worst(ours.double(), theirs, feed["attention_mask"]) < bound


def layers_of(node: ir.Node) -> set[int]:
    """Numbers of the layers that a node was traced from; empty for what is computed once for all."""
    names = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return {int(part) for name in names[:-1] for part in name.split(".") if part.isdigit()}


def quadratic(model: Path) -> set[str]:
    """Names of the nodes with an output that grew like the square of the length, as ONNX Runtime ran them.

    The nodes of function bodies, which have other names, are among them.
    """
    short, long = (largest_outputs(model, length) for length in (31, 124))
    return {name for name, elements in long.items() if elements > 8 * max(short[name], 1)}


def largest_outputs(model: Path, length: int) -> dict[str, int]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.profile_file_prefix = True, str(model.with_name(f"profile{length}"))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    ones = np.ones((1, length), np.int64)
    session.run(None, {value.name: ones for value in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    largest: dict[str, int] = {}
    for event in events:
        if event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            shapes = [shape for output in event["args"]["output_type_shape"] for shape in output.values()]
            largest[name] = max([math.prod(shape) for shape in shapes] + [largest.get(name, 0)])
    return largest


# What the adapter must leave alone, or refuse.


@functools.cache
def mistral(folder: Path) -> Source:
    return load(folder / "mistral", FAMILIES["mistral"].config)


def test_without_a_padding_mask(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, FAMILIES["mistral"].config)
    source = load_source(SourceRequest(str(config), random_weights=True, inputs=("input_ids",)))
    by = adapter(source)
    graph = trace(source, by, UNCHANGED)
    assert [site.inputs for site in find_sites(graph, "test")] == [("Q", "K", "V")] * 2
    attach_function_bodies(graph)
    save_model(graph, tmp_path / "model.onnx")
    assert not quadratic(tmp_path / "model.onnx")


def test_positions_that_restart_keep_their_stock_mask(folder: Path) -> None:
    source = mistral(folder)
    double: Any = float64_copy(source.model)  # type: ignore[arg-type]
    by = adapter(source)
    packed = {"input_ids": padded_rows(20)["input_ids"], "position_ids": torch.arange(20).remainder(13).expand(4, -1)}
    theirs = original(double, packed)
    torch.testing.assert_close(intercepted(double, packed, by), theirs, rtol=0, atol=TOLERANCE)
    together = original(double, {"input_ids": packed["input_ids"]})
    assert float((together - theirs).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        {**FAMILIES["mistral"].config, "sliding_window": None},
        {**FAMILIES["gemma3_text"].config, "layer_types": ["full_attention"] * 2},
        BERT,
        {**BERT, "model_type": "t5", "architectures": ["T5Model"], "d_model": 32, "d_kv": 8, "num_layers": 2},
    ],
    ids=["no window", "full layers only", "bidirectional and dense", "encoder-decoder"],
)
def test_models_without_declared_windows_have_no_site(config: dict[str, Any], tmp_path: Path) -> None:
    model: Any = load(tmp_path, config).model
    assert family_by_name("declared-windows").sites(model, UNCHANGED) == []


def test_a_window_of_the_users_choice_does_not_replace_declared_ones(tmp_path: Path) -> None:
    config = write_config(tmp_path, FAMILIES["mistral"].config)
    request = SourceRequest(str(config), random_weights=True)
    with pytest.raises(InvalidRequest, match="declares windows of its own"):
        rewrite(request, Conversion(window=16))


def t5_gemma() -> dict[str, Any]:
    part = {**FAMILIES["gemma2"].config, "model_type": "t5_gemma_module"}
    config = {"model_type": "t5gemma", "architectures": ["T5GemmaModel"], "encoder": part, "decoder": part}
    return {**config, "vocab_size": 100}


def test_of_an_encoder_decoder_with_windows_the_encoder_is_exported(tmp_path: Path) -> None:
    source = load(tmp_path, t5_gemma())
    assert source.record.encoder_of == "T5GemmaModel" and type(source.model).__name__ == "T5GemmaEncoder"
    by, double = adapter(source), float64_copy(source.model)  # type: ignore[arg-type]
    assert [layer_of(name) for name in by.sites(source.model, UNCHANGED)] == [0]  # type: ignore[arg-type]
    for length in LENGTHS:
        feed = padded_rows(length)
        assert worst(intercepted(double, feed, by), original(double, feed), feed["attention_mask"]) < TOLERANCE, length


def test_a_model_with_windows_that_needs_more_than_a_text_is_refused_with_the_reason() -> None:
    from transformers import AutoConfig, T5GemmaModel

    config = t5_gemma()
    with pytest.raises(ExportFailed, match="does not run on input_ids and attention_mask alone"):
        find_family(T5GemmaModel(AutoConfig.for_model(config.pop("model_type"), **config)), UNCHANGED)


def test_an_unknown_argument_of_the_attention_leaves_its_layer_standard(folder: Path, tmp_path: Path) -> None:
    from transformers.models.mistral import modeling_mistral

    class Biased(modeling_mistral.MistralAttention):  # type: ignore[misc]
        def forward(self, *args: Any, **keywords: Any) -> Any:
            return super().forward(*args, position_bias=torch.zeros(()), **keywords)

    source = load(tmp_path, FAMILIES["mistral"].config)
    model: Any = source.model
    model.layers[1].self_attn.__class__ = Biased
    by = adapter(source)
    assert by.sites(model, UNCHANGED) == ["layers.0.self_attn"]
    (standard,) = by.standard(model, UNCHANGED)
    assert standard.layer == "layers.1.self_attn" and "passes position_bias" in standard.reason
    double = float64_copy(model)
    feed = padded_rows(20)
    assert worst(intercepted(double, feed, by), original(double, feed), feed["attention_mask"]) < TOLERANCE


def test_standard_layers_are_in_the_manifest(folder: Path) -> None:
    found = mistral(folder)
    manifest = Manifest(
        source=found.record, conversion=UNCHANGED, family="declared-windows", faithful=True, approximation="",
        max_length=None, trained_length=None, inputs=(), outputs=(), sites=(), opset=20, versions={}, created="",
        standard_sites=(StandardSite("layers.1", "full attention"),),
    )  # fmt: skip
    assert Manifest.from_json(manifest.to_json()) == manifest
