"""Graphs of small models as bundles hold them, whose attention is far from uniform; and how to run them."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.families import find_family
from longspan.exporter.graph_io import name_dimensions
from longspan.exporter.sources import Source, SourceRequest, load_source
from longspan.exporter.tracing import trace
from longspan.plugins.functions import attach_function_bodies

from ...shared import made_once
from ..family_checks import load_steep, padded_feed
from ..models import LONGFORMER
from ..test_led import CONFIG as LED
from ..test_longt5 import CONFIG as LONGT5
from ..windowed_models import FAMILIES

Array = npt.NDArray[Any]

SAMPLES = Path(__file__).parents[3] / "samples" / "models"

LENGTHS = (1, 17, 64, 101)
"""Below every window and block, at one, and off all of them."""

WIDE = 32
"""Window of ``wide-decoder``."""

PADDINGS = ("none", "right", "holes")

_BIGBIRD = {
    "architectures": ["BigBirdModel"],
    "model_type": "big_bird",
    "attention_type": "block_sparse",
    "block_size": 4,
    "num_random_blocks": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 160,
}
_CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "longformer": (LONGFORMER, ("query", "query_global")),
    "led": (LED, ("query", "query_global")),
    "bigbird": (_BIGBIRD, ("query",)),
    "longt5-local": ({**LONGT5, "encoder_attention_type": "local"}, ("q",)),
    "decoder": (FAMILIES["mistral"].config, ("q_proj",)),
    "experts": (FAMILIES["mixtral"].config, ("q_proj",)),
}
_FACTORIES = {
    "sparse-transformer": "sparse_transformer.py:strided",
    "sparse-transformer-heads": "sparse_transformer.py:strided_heads",
    "phi3-small": "phi3_small.py:small",
}
NAMES = (*_CONFIGS, *_FACTORIES)
_CONFIGS["wide-decoder"] = (
    {**FAMILIES["mistral"].config, "hidden_size": 64, "head_dim": 16, "sliding_window": WIDE},
    ("q_proj",),
)


factory: pytest.TempPathFactory | None = None
"""What `conftest` sets, so that the workers of a run share traced graphs."""


@functools.cache
def graph_of(name: str) -> ir.Model:
    """The graph of one of `NAMES`, or of a decoder with a wide window, with function bodies; nobody may change it."""
    if factory is None:
        return _traced(name)
    folder = made_once(factory, f"graph-{name}", lambda folder: ir.save(_traced(name), folder / "model.onnx"))
    return ir.load(folder / "model.onnx")


def _traced(name: str) -> ir.Model:
    source = source_of(name)
    family = find_family(source.model, UNCHANGED)  # type: ignore[arg-type]
    graph = trace(source, family, UNCHANGED)
    name_dimensions(graph)
    attach_function_bodies(graph)
    return graph


@functools.cache
def source_of(name: str) -> Source:
    """The model that the graph of one of `NAMES` is made of; nobody may change it."""
    if name in _CONFIGS:
        config, queries = _CONFIGS[name]
        with tempfile.TemporaryDirectory() as folder:
            return load_steep(Path(folder), config, *queries)
    sys.path.insert(0, str(SAMPLES))
    try:
        source = load_source(SourceRequest(str(SAMPLES / _FACTORIES[name])))
    finally:
        sys.path.remove(str(SAMPLES))
    with torch.no_grad():
        for parameter, weight in source.model.named_parameters():  # type: ignore[union-attr]
            if parameter.endswith("qkv.weight"):
                weight *= 4
    return source


def feed_of(graph: ir.Model, length: int, padding: str = "right") -> dict[str, Array]:
    """Two texts with padding, and other global tokens in each."""
    feed = {name: value.numpy() for name, value in padded_feed(2, length, padding).items()}
    marks = np.zeros((2, length), np.int64)
    marks[0, 0] = 1
    marks[1, :: max(length // 3, 1)] = 1
    feed |= {"global_attention_mask": marks, "token_type_ids": np.zeros((2, length), np.int64)}
    return {value.name or "": feed[value.name or ""] for value in graph.graph.inputs}


def session_of(graph: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = ir.to_proto(graph).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(graph: ir.Model, feeds: Sequence[dict[str, Array]]) -> list[Array]:
    """The first output for each feed."""
    session = session_of(graph)
    return [np.asarray(session.run(None, feed)[0]) for feed in feeds]


def assert_same(ours: ir.Model, theirs: ir.Model, rounding: float, lengths: Sequence[int] = LENGTHS) -> None:
    """Compare two graphs, with padding at the end and with holes.

    Args:
        ours: One graph.
        theirs: The other.
        rounding: Largest difference allowed, in parts of the largest value.
        lengths: Of the texts.
    """
    feeds = [feed_of(theirs, length, PADDINGS[k % len(PADDINGS)]) for k, length in enumerate(lengths)]
    for feed, mine, other in zip(feeds, run(ours, feeds), run(theirs, feeds), strict=True):
        scale = float(np.abs(other).max())
        assert scale > 0.1 and np.isfinite(mine).all()
        assert float(np.abs(mine - other).max()) <= rounding * scale, feed
