"""Small models whose engines are built, run and compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.exporter import Conversion, SourceRequest, export
from longspan.exporter.bundle import Bundle

from ..exporter.models import BERT, LONGFORMER, write_config

_BIGBIRD: dict[str, Any] = {
    "architectures": ["BigBirdModel"],
    "model_type": "big_bird",
    "attention_type": "block_sparse",
    "block_size": 16,
    "num_random_blocks": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
MODELS = {"longformer": LONGFORMER, "bert": BERT, "bigbird": _BIGBIRD}
"""Windows with global tokens, a window that a conversion cut, and block lists of dynamic length."""


def exported(name: str, folder: Path) -> Path:
    """The bundle of a model with random weights."""
    config = write_config(folder / "source", MODELS[name])
    conversion = Conversion(window=16) if name == "bert" else Conversion()
    return export(SourceRequest(str(config), random_weights=True), folder / "bundle", conversion=conversion).path


def largest(bundle: Path, batch: int, length: int) -> str:
    """A shape for the options of a build."""
    manifest = Bundle.open(bundle).manifest
    return f"{manifest.inputs[0].name}:[{batch},{min(length, manifest.max_length or length)}]"
