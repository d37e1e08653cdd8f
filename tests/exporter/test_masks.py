"""Masks for pictures, against what the reference lets each query see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.masks import Mask, Scale, mask_of, scale_for, sketch
from longspan.plugins import InvalidOperands
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

HEADS = 2


def seen(attributes: dict[str, Any], length: int, global_positions: list[int]) -> Mask:
    """What the reference lets each query see: with equal scores and the identity as V, the keys of positive weight."""
    given = Attributes.from_mapping({"q_num_heads": HEADS, "kv_num_heads": HEADS, **attributes})
    zeros = np.zeros((1, HEADS, length, 4))
    values = np.broadcast_to(np.eye(length), (1, HEADS, length, length))
    global_mask = np.zeros((1, length), bool)
    global_mask[0, global_positions] = True
    out, _ = sliding_window_attention(zeros, zeros, values, attributes=given, global_mask=global_mask)
    return np.asarray(out[0] > 0)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize("global_positions", [[], [0], [2, 5]])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"left_window_size": 0, "right_window_size": 0},
        {"left_window_size": 2, "right_window_size": 1},
        {"left_window_size": 2, "right_window_size": -1},
        {"left_window_size": -1, "right_window_size": 1, "dilation": 2},
        {"left_window_size": 3, "right_window_size": 2, "is_causal": 1},
        {"left_window_size": -1, "right_window_size": -1, "is_causal": 1},
        {"left_window_size": 2, "right_window_size": 2, "dilation": [3]},
        {"left_window_size": 2, "right_window_size": 2, "dilation": [1, 3]},
        {"left_window_size": 50, "right_window_size": 40},
    ],
)
def test_a_mask_is_what_the_reference_sees(
    attributes: dict[str, Any], length: int, global_positions: list[int]
) -> None:
    inside = [position for position in global_positions if position < length]
    mask = mask_of(attributes, length, inside)
    heads = 2 if attributes.get("dilation") == [1, 3] else 1
    assert mask.shape == (heads, length, length)
    np.testing.assert_array_equal(np.broadcast_to(mask, (HEADS, length, length)), seen(attributes, length, inside))


def test_a_number_of_global_tokens_means_the_first_ones() -> None:
    band = {"left_window_size": 1, "right_window_size": 1}
    np.testing.assert_array_equal(mask_of(band, 6, 2), mask_of(band, 6, [0, 1]))
    assert mask_of(band, 3, 5).all()
    assert mask_of(band, 0, 1).shape == (1, 0, 0)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"global tokens \[6\]: must lie in 0 … 5"):
        mask_of({}, 6, [6])
    with pytest.raises(InvalidRequest, match="length -1"):
        mask_of({}, -1)
    with pytest.raises(InvalidOperands, match="dilation"):
        mask_of({"dilation": [0]}, 6)


def test_the_widest_band_takes_about_a_quarter_of_the_picture() -> None:
    wide = {"left_window_size": 256, "right_window_size": 256}
    narrow = {"left_window_size": 16, "right_window_size": 16}
    scale = scale_for(512, cells=64)
    assert scale == Scale(cells=64, unit=32) and scale.length == 2048
    assert sketch(wide, scale)[0, 32].sum() == 17
    assert sketch(narrow, scale)[0, 32].sum() == 1
    assert sketch({}, scale).all()
    assert sketch(wide, scale, global_tokens=1)[0, :, 0].all()


def test_small_and_unbounded_windows_are_drawn_token_by_token() -> None:
    assert scale_for(8, cells=24).unit == 1
    assert scale_for(0, cells=24) == Scale(24, 1)


def test_a_dilated_band_keeps_its_stripes() -> None:
    dilated = {"left_window_size": 32, "right_window_size": 32, "dilation": [2]}
    scale = scale_for(64 * 2, cells=64)
    assert scale.unit == 8
    row = np.flatnonzero(sketch(dilated, scale)[0, 32])
    assert row.tolist() == list(range(24, 41, 2))
