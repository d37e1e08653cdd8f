"""What the tests of a family share: its model in float64, inputs with padding, and the comparison with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.families import Family
from longspan.exporter.graph_io import save_model
from longspan.exporter.parity.oracle import float64_arithmetic, float64_copy
from longspan.exporter.sources import Source, SourceRequest, load_source
from longspan.exporter.tracing import trace
from longspan.plugins.functions import attach_function_bodies

from .models import write_config

# Two float64 computations of O(1) activations through two layers differ by accumulated rounding only.
TOLERANCE = 1e-12


def load_steep(folder: Path, config: dict[str, Any], *queries: str, **changes: Any) -> Source:
    """A model with random weights whose attention is far from uniform.

    Args:
        folder: Where config.json is written.
        config: Its content.
        queries: Last names of the projections that make queries; their weights are multiplied by 4.
        changes: What to change in `config`.
    """
    source = load_source(SourceRequest(str(write_config(folder, config, **changes)), random_weights=True))
    with torch.no_grad():
        for name, weight in source.model.named_parameters():  # type: ignore[union-attr]
            if name.split(".")[-2] in queries:
                weight *= 4
    return source


def double_of(source: Source) -> Any:
    """The model in float64."""
    return float64_copy(source.model)  # type: ignore[arg-type]


def padded_feed(batch: int, length: int, padding: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens and a padding mask.

    Args:
        batch: Rows.
        length: Tokens per row.
        padding: ``none``; ``right`` or ``left``, of a third in the last row, and of a little less in each row before;
            ``holes``, one token in seven.
        seed: Seed of the tokens.
    """
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        count = max(0, length // 3 - 5 * (batch - 1 - row))
        if padding == "right":
            mask[row, length - count :] = 0
        elif padding == "left":
            mask[row, :count] = 0
        elif padding == "holes":
            mask[row, 3 + row :: 7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def original(model: Any, feed: dict[str, torch.Tensor], by: Family) -> torch.Tensor:
    """The first output of a model's own code, every step of it in float64."""
    with torch.no_grad(), by.original(model), float64_arithmetic():
        return model(**feed)[0]


def intercepted(model: Any, feed: dict[str, torch.Tensor], by: Family) -> torch.Tensor:
    """The first output with its attention intercepted, in float64."""
    with torch.no_grad(), by.intercept(model, UNCHANGED), float64_arithmetic():
        return model(**feed)[0]


def worst(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference over the tokens that are not padding; those that are may hold anything finite."""
    assert torch.isfinite(ours).all()
    return float(((ours - theirs).abs().amax(dim=-1) * mask).max())


def error(model: Any, by: Family, feed: dict[str, torch.Tensor]) -> float:
    """Largest difference between a model intercepted and its own code."""
    return worst(intercepted(model, feed, by), original(model, feed, by), feed["attention_mask"])


def export_graph(source: Source, by: Family) -> ir.Model:
    """Trace with interception, and attach function bodies."""
    graph = trace(source, by, UNCHANGED)
    attach_function_bodies(graph)
    return graph


def session_of(graph: ir.Model, path: Path, library: str = "") -> onnxruntime.InferenceSession:
    """Save a graph and open it with a library of kernels; without one, function bodies run."""
    save_model(graph, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output of a session, in float64."""
    (first, *_) = session.run(None, {name: value.numpy() for name, value in feed.items()})
    return torch.from_numpy(np.asarray(first, np.float64))
