"""The reference models of papers: patterns against the papers' masks, in float64 and as ONNX graphs."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from longspan.exporter import InvalidRequest, SourceRequest, check, export
from longspan.exporter.parity.oracle import float64_arithmetic, float64_copy
from longspan.exporter.sources import load_source

MODELS = Path(__file__).parents[2] / "samples" / "models"

# Two float64 computations of O(1) activations through a few layers differ by accumulated rounding only.
TOLERANCE = 1e-12

FACTORIES = {
    "sparse_transformer": ("strided", "strided_heads", "fixed", "fixed_heads"),
    "atrous": ("local", "atrous", "sparse", "sparse_causal"),
    "phi3_small": ("small",),
    "big_bird_etc": ("itc", "etc"),
}
ALL = [(file, factory) for file, factories in FACTORIES.items() for factory in factories]
NAMES = [f"{file}-{factory}" for file, factory in ALL]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the models as a script in it would see it."""
    monkeypatch.syspath_prepend(str(MODELS))
    before = dict(sys.modules)
    yield
    for name in [*FACTORIES, "eager"]:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


def module_of(file: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(file, MODELS / f"{file}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[file] = module
    specification.loader.exec_module(module)
    return module


def model_of(file: str, factory: str) -> Any:
    """A model of random weights whose attention is far from uniform, in float64."""
    torch.manual_seed(0)
    model = getattr(module_of(file), factory)()[0].eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("qkv.weight"):
                weight *= 4
    return float64_copy(model)


def feed(batch: int, length: int, padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        count = length // (3 + row)
        if padding == "right" and count:
            mask[row, -count:] = 0
        elif padding == "left":
            mask[row, :count] = 0
        elif padding == "holes":
            mask[row, 2 + row :: 5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def error(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Largest difference of tokens that are not padding, between the pattern and the paper's mask."""
    outputs = []
    for eager in (False, True):
        model.config.eager = eager
        with torch.no_grad(), float64_arithmetic():
            outputs.append(model(**inputs))
    model.config.eager = False
    assert all(torch.isfinite(output).all() for output in outputs)
    difference = (outputs[0] - outputs[1]).abs().amax(-1)
    return float((difference * inputs["attention_mask"]).max())


# Strides are 32, rates 8, blocks 16 with two to five of them in reach.
LENGTHS = [1, 8, 16, 31, 32, 33, 48, 64, 65, 97, 128, 150]


@pytest.mark.parametrize(("file", "factory"), ALL, ids=NAMES)
def test_patterns_are_the_masks_of_the_papers(file: str, factory: str) -> None:
    model = model_of(file, factory)
    lengths = [192] if factory == "itc" else LENGTHS
    for index, length in enumerate(lengths):
        for batch, padding in ((1, "none"), (3, ("right", "left", "holes")[index % 3])):
            found = error(model, feed(batch, length, padding))
            assert found < TOLERANCE, (length, batch, padding, found)


@pytest.mark.parametrize(("file", "factory"), ALL, ids=NAMES)
def test_a_mask_that_is_one_off_is_seen(file: str, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: hiding a single allowed pair from the eager code is an error."""
    model = model_of(file, factory)
    module = sys.modules[file]
    right = module.allowed

    def wrong(*arguments: Any) -> torch.Tensor:
        mask = right(*arguments).clone()
        mask[..., -1, -1] = False
        return mask

    monkeypatch.setattr(module, "allowed", wrong)
    assert error(model, feed(1, 192, "none")) > 1e-6


@pytest.mark.parametrize(
    ("file", "factory"), [("sparse_transformer", "fixed"), ("phi3_small", "small")], ids=["fixed", "phi-3-small"]
)
def test_it_learns(file: str, factory: str) -> None:
    """With gradients on, attention is dense and differentiable; its values are those of the operator."""
    model = model_of(file, factory)
    inputs = feed(2, 40, "none")
    with torch.no_grad():
        plain = model(**inputs)
    learning = model(**inputs)
    assert float((learning.detach() - plain).abs().max()) < TOLERANCE
    learning.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters() if weight.numel())


OPERATORS = {
    "sparse_transformer-strided_heads": ["SlidingWindowAttention"] * 4,
    "sparse_transformer-fixed": ["BlockSparseAttention"] * 2,
    "atrous-sparse": ["BlockSparseAttention"] * 2,
    "phi3_small-small": ["BlockSparseAttention", "SlidingWindowAttention"],
    "big_bird_etc-itc": ["BlockSparseAttention"] * 2,
    "big_bird_etc-etc": ["BlockSparseAttention"] * 2,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_exported(name: str, tmp_path: Path, kernel_library: str) -> None:
    """By kernel and by function body, at other lengths than the traced one, against the eager code in float64."""
    file, factory = name.split("-")
    location = f"{MODELS / file}.py:{factory}"
    bundle = export(SourceRequest(location), tmp_path / "bundle")
    graph = ir.load(bundle.path / "model.onnx").graph
    nodes = [node for node in graph if node.domain == "longspan"]
    assert [node.op_type for node in nodes] == OPERATORS[name]
    assert all(node.metadata_props["longspan.pattern"] for node in nodes)
    lists = {
        tuple(value.name for value in node.inputs[3:7]) for node in nodes if node.op_type == "BlockSparseAttention"
    }
    assert len(lists) <= (2 if factory == "itc" else 1), "layers of one pattern share their lists"
    model = float64_copy(load_source(SourceRequest(location)).model)  # type: ignore[arg-type]
    model.config.eager = True
    for library in (None, kernel_library):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if library is not None:
            options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(bundle.path / "model.onnx", options, providers=["CPUExecutionProvider"])
        for batch, length, padding in ((1, 192, "none"), (3, 192, "left"), (3, 33, "right"), (1, 1, "none")):
            if factory == "itc" and length != 192:
                continue
            inputs = feed(batch, length, padding)
            with torch.no_grad(), float64_arithmetic():
                wanted = model(**inputs).numpy()
            (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
            difference = np.abs(found - wanted).max(-1) * inputs["attention_mask"].numpy()
            # float32 through a few layers, on outputs that layer norms keep near 1.
            assert difference.max() < 64 * np.finfo(np.float32).eps * max(1.0, np.abs(wanted).max()), (batch, length)


def test_a_model_of_one_length_is_checked_at_that_length(tmp_path: Path) -> None:
    bundle = export(f"{MODELS / 'big_bird_etc.py'}:itc", tmp_path / "bundle")
    assert bundle.manifest.max_length == bundle.manifest.fixed_length == 192
    report = check(bundle.path)
    assert report.passed and {case.case.length for case in report.cases} == {192}
    with pytest.raises(InvalidRequest, match="for 192 tokens only"):
        check(bundle.path, lengths=[100])


def test_the_example_of_the_page_on_ones_own_model(tmp_path: Path) -> None:
    page = (MODELS.parents[1] / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    code = textwrap.dedent(page[page.index("    import torch\n") : page.index("That is all")])
    (tmp_path / "my_model.py").write_text(code, encoding="utf-8")
    bundle = export(f"{tmp_path / 'my_model.py'}:factory", tmp_path / "bundle")
    (site,) = bundle.manifest.sites
    assert site.operator == "BlockSparseAttention" and site.attributes["q_block_size"] == 16
