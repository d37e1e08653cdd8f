"""Every operator's torch ops: importing this module registers them with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .block_sparse_attention.torch_op import TRANSLATIONS as _BLOCK_SPARSE
from .sliding_window_attention.torch_op import TRANSLATIONS as _SLIDING_WINDOW


def onnx_translation_table() -> dict[Any, Callable[..., Any]]:
    """Entries that turn each op into one ``longspan`` node.

    They are for ``torch.onnx.export(model, args, dynamo=True, custom_translation_table=onnx_translation_table())``.
    """
    return {**_SLIDING_WINDOW, **_BLOCK_SPARSE}
