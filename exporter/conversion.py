"""What an export may change in a model before it is traced."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidRequest

DEFAULT_ALPHA = 0.4
"""Weight of the coarse position in the hierarchical decomposition (Su 2020)."""


@dataclass(frozen=True)
class Conversion:
    """Changes of the model's mathematics that the user asked for; none by default.

    Attributes:
        window: Turn dense self-attention into a window of this many neighbours, half on each side (as Longformer counts
            its ``attention_window``); even.
        global_tokens: With `window`: the first tokens that see all keys and that all queries see.
        max_positions: Extend trained absolute position embeddings to this many tokens.
        alpha: Weight of the coarse position in the extension, strictly between 0 and 1.

    Raises:
        InvalidRequest: a value is out of range, or `global_tokens` is given without `window`.
    """

    window: int | None = None
    global_tokens: int = 0
    max_positions: int | None = None
    alpha: float = DEFAULT_ALPHA

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 2 or self.window % 2):
            raise InvalidRequest(
                f"--window {self.window}: must be an even number of 2 or more, half of it on each side of a token; "
                "try --window 512"
            )
        if self.global_tokens < 0:
            raise InvalidRequest(f"--global-tokens {self.global_tokens}: must be 0 or more")
        if self.global_tokens and self.window is None:
            raise InvalidRequest("--global-tokens needs --window: dense attention is global everywhere already")
        if self.max_positions is not None and self.max_positions < 1:
            raise InvalidRequest(f"--max-positions {self.max_positions}: must be 1 or more")
        if not 0.0 < self.alpha < 1.0 or self.alpha == 0.5:
            raise InvalidRequest(
                f"--alpha {self.alpha}: must lie strictly between 0 and 1 and differ from 0.5, where positions "
                "(i, j) and (j, i) become one; the paper's value is 0.4"
            )


UNCHANGED = Conversion()
"""The model as it is."""
