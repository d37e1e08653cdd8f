"""Hierarchical decomposition of trained absolute position embeddings.

Su Jianlin, "Hierarchical decomposition of positional encoding lets BERT handle long text" (2020): with trained vectors
``p_1 … p_n`` and a weight ``α``, the base vectors ``u_i = (p_i - α p_1) / (1 - α)`` give

    q_{(i-1)n + j} = α u_i + (1 - α) u_j,    i, j = 1 … n

for up to n² positions, and ``q_j = p_j`` for the first n, so that short texts are unchanged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from .errors import InvalidRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def extend_positions(trained: torch.Tensor, count: int, alpha: float) -> torch.Tensor:
    """Extend trained position vectors.

    Args:
        trained: (n, hidden) vectors of positions 0 … n-1.
        count: Positions wanted, at most n².
        alpha: Weight of the coarse position.

    Returns:
        (count, hidden) vectors in the type of `trained`, computed in float64; the first n are the trained ones.

    Raises:
        InvalidRequest: `count` is above n².
    """
    import torch

    n = trained.shape[0]
    if count > n * n:
        raise InvalidRequest(f"--max-positions {count}: {n} trained positions extend to {n}² = {n * n} at most")
    if count <= n:
        return trained[:count].clone()
    vectors = trained.double()
    base = (vectors - alpha * vectors[:1]) / (1 - alpha)
    index = torch.arange(count, device=trained.device)
    extended = alpha * base[index // n] + (1 - alpha) * base[index % n]
    # Exact, where the decomposition is equal only up to rounding.
    extended[:n] = vectors
    return extended.to(trained.dtype)


def extend_model(model: PreTrainedModel, max_positions: int, alpha: float) -> tuple[PreTrainedModel, int]:
    """Copy a BERT-type encoder so that it accepts `max_positions` tokens.

    Args:
        model: A model with one ``position_embeddings`` table. Where the table has a padding row (RoBERTa counts
            positions from ``padding_idx + 1``), the rows up to it are kept as they are.
        max_positions: Tokens that the new model accepts.
        alpha: Weight of the coarse position.

    Returns:
        The new model (the old one is unchanged), and the number of tokens that the old one accepted.

    Raises:
        InvalidRequest: the model has no trained absolute positions, or already accepts that many.
    """
    import torch

    tables = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, torch.nn.Embedding)
    }
    if len(tables) != 1:
        raise InvalidRequest(
            f"--max-positions: {type(model).__name__} has {len(tables)} tables called position_embeddings; allowed: "
            "an encoder with one table of trained absolute positions (BERT, RoBERTa, ELECTRA, …); relative or rotary "
            "positions need no extension"
        )
    ((name, table),) = tables.items()
    if float(table.weight.detach().float().std(dim=0).max()) == 0.0:
        raise InvalidRequest(f"--max-positions: {name} holds the same vector for every position")
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    trained = table.weight.detach()[first:]
    if max_positions <= trained.shape[0]:
        raise InvalidRequest(
            f"--max-positions {max_positions}: the model accepts {trained.shape[0]} tokens already; ask for more, or "
            "leave the option out"
        )
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = first + max_positions
    weights = dict(model.state_dict())
    extended = extend_positions(trained, max_positions, alpha)
    weights[f"{name}.weight"] = torch.cat([table.weight.detach()[:first], extended])
    longer = type(model)._from_config(config, dtype=model.dtype)
    longer.load_state_dict(weights)
    longer.tie_weights()
    return longer.eval(), trained.shape[0]
