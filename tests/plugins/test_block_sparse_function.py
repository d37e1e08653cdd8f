from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from longspan.plugins.functions import attach_function_bodies

from .block_sparse_cases import CASES, Case, expected
from .function_sites import Array, feeds, session, site

# |V| stays below 4 and scores below 16, whose rounding errors of 2^-24 relative each move a weight.
TOLERANCE = 4 * 16 * 2.0**-24 * 2


def block_site(operands: dict[str, Array], attributes: dict[str, Any], **options: Any) -> ir.Model:
    model = site(operands, attributes, op_type="BlockSparseAttention", **options)
    attach_function_bodies(model)
    return model


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, layout: str) -> None:
    operands = case.operands(layout)
    # A site without lse takes another softmax. Both meet both layouts in other tests.
    model = block_site(operands, case.node_attributes(layout), lse=layout == "bhsd")
    got = session(model).run(None, feeds(operands))
    for mine, want in zip(got, expected(case, layout), strict=False):
        np.testing.assert_allclose(mine, want, rtol=0, atol=TOLERANCE)
