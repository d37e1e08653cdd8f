from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from longspan.plugins.sliding_window_attention.torch_op import sliding_window_attention_lse

from .sliding_window_cases import CASES, Case, expected


def run(case: Case, layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    given: dict[str, Any] = {}
    for name, array in case.operands(layout).items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        given[name.lower()] = tensor.to(dtype) if tensor.is_floating_point() and name != "spans" else tensor
    if "spans" in given:
        given["spans"] = given["spans"].float()
    return sliding_window_attention_lse(**given, **case.node_attributes(layout))


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, layout: str) -> None:
    y, lse = run(case, layout, torch.float64)
    want_y, want_lse = expected(case, layout)
    np.testing.assert_allclose(y.numpy(), want_y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=1e-12)
