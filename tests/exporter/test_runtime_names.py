"""What ran at each site, from the names in ONNX Runtime's profile."""

from __future__ import annotations

from typing import Any

import pytest
from longspan.exporter.errors import ExportFailed
from longspan.exporter.parity.runners import FUNCTION_BODY, KERNEL, what_ran
from longspan.exporter.runtime_names import expansions
from longspan.exporter.sites.record import AttentionSite

WINDOW, BLOCKS = "SlidingWindowAttention", "BlockSparseAttention"
FIRST = [f"_inlfunc_{WINDOW}_node_Add_1_kernel_time", f"_inlfunc_{WINDOW}_node_Mul_2_kernel_time"]
SECOND = [f"_inlfunc_{WINDOW}_token_0_node_Add_1_kernel_time"]
THIRD = [f"_inlfunc_{WINDOW}_token_11_node_Add_1_kernel_time", "node_Add_1_kernel_time"]


def event(name: str, operator: str = "Add") -> dict[str, Any]:
    return {"cat": "Node", "name": name, "args": {"op_name": operator, "provider": "CPUExecutionProvider"}}


def sites(*operators: str) -> list[AttentionSite]:
    return [AttentionSite(f"node_{i}", "", name, (), {}, "") for i, name in enumerate(operators)]


def test_expansions_are_told_apart_by_their_number() -> None:
    assert expansions(FIRST, WINDOW) == 1
    assert expansions(FIRST + SECOND + THIRD, WINDOW) == 3
    assert expansions(FIRST + SECOND + THIRD, BLOCKS) == 0


def test_kernels_are_known_by_name_and_bodies_by_number() -> None:
    events = [event("node_1_kernel_time", WINDOW), *map(event, FIRST)]
    ran, provider = what_ran(events, sites(WINDOW, WINDOW))
    assert ran == {"node_0": FUNCTION_BODY, "node_1": KERNEL} and provider == "CPUExecutionProvider"


def test_a_site_of_which_nothing_ran_is_found_although_others_of_its_operator_ran() -> None:
    with pytest.raises(ExportFailed, match=r"node_0, node_1: .* at 1 of these sites"):
        what_ran([*map(event, FIRST)], sites(WINDOW, WINDOW))
    with pytest.raises(ExportFailed, match=r"node_1: .*longspan::BlockSparseAttention at 1 of these sites"):
        what_ran([*map(event, FIRST + SECOND)], sites(WINDOW, BLOCKS, WINDOW))
    ran, _ = what_ran([*map(event, FIRST + SECOND), event("node_1_kernel_time", BLOCKS)], sites(WINDOW, BLOCKS, WINDOW))
    assert list(ran.values()) == [FUNCTION_BODY, KERNEL, FUNCTION_BODY]
