"""One small configuration for each family that declares windows or chunks, and what its layers must become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WINDOW = 8
"""Keys that a query sees in the windowed layers of causal families, its own included."""

_SHARED: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class WindowedFamily:
    """A family under test.

    Attributes:
        model_class: Class of ``transformers``.
        changes: What its configuration has beyond the shared sizes.
        windowed: Layers that are replaced, by position.
        left: Keys before a query's own.
        right: Keys after it.
        chunk: Tokens of a chunk; 0 where the layers have windows.
        adapter: Name of the adapter that must recognise it.
    """

    model_class: str
    changes: dict[str, Any] = field(default_factory=dict)
    windowed: tuple[int, ...] = (0, 1)
    left: int = WINDOW - 1
    right: int = 0
    chunk: int = 0
    adapter: str = "declared-windows"

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return {**_SHARED, "architectures": [self.model_class], **self.changes}


FAMILIES: dict[str, WindowedFamily] = {
    "mistral": WindowedFamily("MistralModel", {"model_type": "mistral", "sliding_window": WINDOW}),
    "mixtral": WindowedFamily(
        "MixtralModel",
        {"num_hidden_layers": 1, "model_type": "mixtral", "sliding_window": WINDOW, "num_local_experts": 4},
        windowed=(0,),
    ),
    "ministral": WindowedFamily(
        "MinistralModel",
        {
            "num_hidden_layers": 1,
            "model_type": "ministral",
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention"],
        },
        windowed=(0,),
    ),
    "ministral3": WindowedFamily(
        "Ministral3Model", {"num_hidden_layers": 1, "model_type": "ministral3", "sliding_window": WINDOW}, windowed=(0,)
    ),
    "qwen2": WindowedFamily(
        "Qwen2Model",
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        windowed=(1,),
    ),
    "qwen3": WindowedFamily(
        "Qwen3Model",
        {
            "num_hidden_layers": 1,
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
        },
        windowed=(0,),
    ),
    "gemma2": WindowedFamily(
        "Gemma2Model",
        {"model_type": "gemma2", "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        windowed=(0,),
    ),
    "gemma3_text": WindowedFamily(
        "Gemma3TextModel",
        {
            "model_type": "gemma3_text",
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 8,
        },
        windowed=(0,),
    ),
    "gpt_oss": WindowedFamily(
        "GptOssModel",
        {
            "model_type": "gpt_oss",
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        windowed=(0,),
    ),
    "phi3": WindowedFamily(
        "Phi3Model", {"num_hidden_layers": 1, "model_type": "phi3", "sliding_window": WINDOW}, windowed=(0,)
    ),
    "starcoder2": WindowedFamily(
        "Starcoder2Model", {"num_hidden_layers": 1, "model_type": "starcoder2", "sliding_window": WINDOW}, windowed=(0,)
    ),
    "cohere2": WindowedFamily(
        "Cohere2Model",
        {
            "num_hidden_layers": 1,
            "model_type": "cohere2",
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention"],
        },
        windowed=(0,),
    ),
    "olmo3": WindowedFamily(
        "Olmo3Model",
        {"num_hidden_layers": 1, "model_type": "olmo3", "sliding_window": WINDOW, "layer_types": ["sliding_attention"]},
        windowed=(0,),
    ),
    "smollm3": WindowedFamily(
        "SmolLM3Model",
        {
            "num_hidden_layers": 1,
            "model_type": "smollm3",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "no_rope_layers": [0],
            "layer_types": ["sliding_attention"],
        },
        windowed=(0,),
    ),
    "modernbert": WindowedFamily(
        "ModernBertModel",
        {
            "model_type": "modernbert",
            "local_attention": 8,
            "layer_types": _ALTERNATING,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        windowed=(0,),
        left=4,
        right=4,
    ),
    "modernbert-decoder": WindowedFamily(
        "ModernBertDecoderModel",
        {
            "model_type": "modernbert-decoder",
            "local_attention": 16,
            "layer_types": _ALTERNATING,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        windowed=(0,),
    ),
    "gpt_neo": WindowedFamily(
        "GPTNeoModel",
        {
            "model_type": "gpt_neo",
            "window_size": WINDOW,
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
        },
        windowed=(1,),
        adapter="gpt-neo",
    ),
    "llama4_text": WindowedFamily(
        "Llama4TextModel",
        {
            "model_type": "llama4_text",
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "moe_layers": [0],
            "floor_scale": 16,
        },
        windowed=(0,),
        chunk=WINDOW,
    ),
}
