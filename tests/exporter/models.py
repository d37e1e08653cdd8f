"""Small models that several tests export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGFORMER: dict[str, Any] = {
    "architectures": ["LongformerModel"],
    "model_type": "longformer",
    "attention_window": [8, 16],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 258,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "type_vocab_size": 1,
}
BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def write_config(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """Write `config` with `changes` and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config | changes))
    return path
