from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from longspan.plugins.dense_baseline import dense_function_body
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.functions import attach_function_bodies

from .block_sparse_cases import LISTS
from .block_sparse_cases import Case as BlockCase
from .block_sparse_cases import expected as block_expected
from .function_sites import feeds, session, site
from .sliding_window_cases import Case, expected
from .test_function_body import TOLERANCE

WINDOW = {"left_window_size": 3, "right_window_size": 2}


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize(
    ("case", "dense"),
    [
        (Case("plain", WINDOW), {}),
        (Case("causal", WINDOW | {"is_causal": 1, "scale": 0.5}), {"is_causal": 1, "scale": 0.5}),
        (Case("grouped", WINDOW, ("attn_mask",), heads=4, padded=((12, 19), (0, 3))), {}),
        (Case("lengths", WINDOW, ("nonpad_kv_seqlen",), seq_q=1, seq_k=23, lengths=(23, 9)), {}),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_computes_the_site_without_its_window(case: Case, dense: dict[str, Any], layout: str) -> None:
    operands = case.operands(layout)
    model = site(operands, case.node_attributes(layout), lse=False)
    attach_function_bodies(model)
    node = model.graph.node(0)
    model.functions[node.op_identifier()] = dense_function_body(node)
    y = session(model).run(None, feeds(operands))[0]
    want = expected(Case(**{**vars(case), "attributes": dense}), layout, operands)[0]
    np.testing.assert_allclose(y, want, rtol=0, atol=TOLERANCE)
    assert np.abs(want - expected(case, layout)[0]).max() > 0.1  # the window does matter here


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
def test_computes_a_block_sparse_site_without_its_lists(layout: str) -> None:
    case = BlockCase("lists", features=("attn_mask", "block_masks"), heads=4, padded=((12, 19), (0, 3)))
    operands = case.operands(layout)
    model = site(operands, case.node_attributes(layout), lse=False, op_type="BlockSparseAttention")
    attach_function_bodies(model)
    node = model.graph.node(0)
    model.functions[node.op_identifier()] = dense_function_body(node)
    y = session(model).run(None, feeds(operands))[0]
    every = replace(case, density=None, features=("attn_mask",)).operands(layout)
    dense = {name: operands.get(name, array) for name, array in every.items()} | {name: every[name] for name in LISTS}
    want = block_expected(case, layout, dense)[0]
    np.testing.assert_allclose(y, want, rtol=0, atol=TOLERANCE)
    assert np.abs(want - block_expected(case, layout)[0]).max() > 0.1  # the lists do matter here


def test_sites_with_lse_are_refused() -> None:
    case = Case("plain", WINDOW)
    model = site(case.operands("bhsd"), WINDOW)
    with pytest.raises(InvalidOperands, match="no lse output"):
        dense_function_body(model.graph.node(0))
