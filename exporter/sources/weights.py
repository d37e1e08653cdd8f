"""Refuse weights that no runtime could compute with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import ExportFailed

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def refuse_non_finite(location: str, model: nn.Module | ExportedProgram) -> None:
    """Check that every parameter is finite. Buffers may hold -inf on purpose (masks).

    Raises:
        ExportFailed: a parameter holds NaN or an infinity.
    """
    import torch

    for name, parameter in model.named_parameters():
        values = parameter.detach()
        # The sum, one pass without a temporary, is finite in all but a damaged or a very large parameter.
        if not values.is_floating_point() or math.isfinite(float(values.sum())):
            continue
        count = int((~torch.isfinite(values)).sum())
        if count:
            what = "value" if count == 1 else "values"
            raise ExportFailed(
                f"{location}: {name} holds {count} {what} of {values.numel()} that {'is' if count == 1 else 'are'} not "
                "finite (NaN or infinity), so every output would be; next step: repair or save the checkpoint again"
            )
