"""Pictures of masks: which panels there are, what they show, in a PNG and in characters."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from longspan.exporter.errors import EnvironmentLacks
from longspan.exporter.inspection import Inspection, SiteReport
from longspan.exporter.masks import mask_of
from longspan.exporter.patterns import Causal, PerHead, Window, systems
from longspan.exporter.pictures import draw_png, panels, pattern_lines, picture_lines
from longspan.exporter.sites.kind import GLOBAL, SEEN, UNSEEN
from longspan.exporter.sites.record import AttentionSite


def report(layer: int, global_mask: bool = False, **attributes: Any) -> SiteReport:
    inputs = ("Q", "K", "V", *(["global_mask"] if global_mask else []))
    site = AttentionSite("node", f"layer.{layer}", "SlidingWindowAttention", inputs, attributes, "family x")
    return SiteReport(site, 4, 4, 8, 8, 0.125, 1, 8, 0.875, 4096)


def inspection(*sites: SiteReport, **changes: Any) -> Inspection:
    made = Inspection("x", "model", "models.Model", False, 4096, None, 0, "", sites, ())
    return dataclasses.replace(made, **changes)


WINDOW = {"left_window_size": 256, "right_window_size": 256}
SMALL = {"left_window_size": 2, "right_window_size": 1}


def test_each_pattern_is_drawn_once_at_one_scale() -> None:
    causal = {"left_window_size": 63, "right_window_size": 0, "is_causal": 1}
    drawn, scale = panels(inspection(report(0, **WINDOW), report(1, **causal), report(2, **WINDOW)), 64)
    assert [(panel.title, panel.pattern) for panel in drawn] == [
        ("layers 0,2", "256 left, 256 right"),
        ("layer 1", "63 left, 0 right, causal"),
    ]
    assert scale.unit == 32
    assert (drawn[0].cells[32] == SEEN).sum() == 17 and (drawn[1].cells[32] == SEEN).sum() == 3
    assert not np.triu(drawn[1].cells, 1).any()


def test_small_windows_are_drawn_pair_by_pair() -> None:
    (panel,), scale = panels(inspection(report(0, **SMALL)), 24)
    assert scale.unit == 1
    np.testing.assert_array_equal(panel.cells == SEEN, mask_of(SMALL, 24)[0])


def test_global_tokens_are_marked_apart_and_one_stands_for_an_unknown_number() -> None:
    (panel,), _ = panels(inspection(report(0, global_mask=True, **SMALL)), 24)
    assert (panel.cells[10:, 0] == GLOBAL).all() and (panel.cells[0, 3:] == GLOBAL).all()
    assert panel.cells[0, 0] == SEEN and panel.cells[10, 1] == UNSEEN and "global tokens" in panel.pattern
    (panel,), _ = panels(inspection(report(0, global_mask=True, **SMALL), global_tokens=3), 24)
    assert (panel.cells[10, :3] == GLOBAL).all()


def test_heads_with_dilations_of_their_own_have_panels_of_their_own() -> None:
    drawn, _ = panels(inspection(report(0, dilation=[1, 1, 2, 3], **SMALL)), 24)
    assert [panel.title for panel in drawn] == ["layer 0, heads 0–1", "layer 0, head 2", "layer 0, head 3"]
    assert np.flatnonzero(drawn[1].cells[10]).tolist() == [6, 8, 10, 12]


def test_no_more_tokens_are_shown_than_the_model_accepts() -> None:
    _, scale = panels(inspection(report(0, **WINDOW), max_length=512), 64)
    assert scale.length == 512


def test_the_png_is_one_picture_however_many_panels(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 5):
        sites = [report(i, left_window_size=i, right_window_size=i) for i in range(count)]
        draw_png(inspection(*sites), tmp_path / "masks.png")
        content = (tmp_path / "masks.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        sizes.append((int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")))
    # Four to a row, so that the fifth begins a second one.
    assert sizes[1][0] > 2 * sizes[0][0] and sizes[1][1] > 1.5 * sizes[0][1]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'longspan\[report\]'"):
        draw_png(inspection(report(0, **SMALL)), tmp_path / "masks.png")
    assert not (tmp_path / "masks.png").exists()


def test_characters_hold_two_cells_each() -> None:
    lines = picture_lines(inspection(report(0, left_window_size=1, right_window_size=0)), 80, "utf-8")
    frame = lines.index("┌" + "─" * 24 + "┐")
    assert lines[:frame] == ["layer 0", "1 left, 0 right", "12.5% of pairs"]
    # Rows 0 and 1 see keys 0 and 0–1; rows 2 and 3 see 1–2 and 2–3.
    assert lines[frame + 1] == "│" + "█▄".ljust(24) + "│"
    assert lines[frame + 2] == "│" + " ▀█▄".ljust(24) + "│"
    assert lines[frame + 13] == "└" + "─" * 24 + "┘"


def test_a_terminal_without_blocks_gets_ascii() -> None:
    sites = [report(i, left_window_size=1, right_window_size=0) for i in (0, 1)]
    lines = picture_lines(inspection(*sites), 80, "ascii")
    assert "|" + "#.".ljust(24) + "|" in lines and "layers 0-1" in lines
    assert all(line.isascii() for line in lines)


def test_panels_stand_side_by_side_as_far_as_they_fit() -> None:
    sites = inspection(*(report(i, left_window_size=i, right_window_size=i) for i in range(4)))
    for width, side_by_side in ((20, 1), (80, 3), (120, 4)):
        lines = picture_lines(sites, width, "utf-8")
        assert max(line.count("┌") for line in lines) == side_by_side
        assert sum(line.count("┌") for line in lines) == 4


def test_a_pattern_without_a_model_is_drawn() -> None:
    lines = pattern_lines(PerHead((Causal(), Window(2, 0), Causal())), width=60)
    assert "heads 0,2" in lines[0] and "head 1" in lines[0] and "causal" in lines[1]
    assert lines[-1] == "24 tokens, each cell one query and one key"
    assert max(map(len, lines)) <= 60
    body = [line[1:25] for line in lines if line.startswith("│")]
    # Two rows of a triangle in a line.
    assert body == [("█" * row + "▄").ljust(24) for row in range(1, 24, 2)]
    plain = pattern_lines(systems.big_bird(64), encoding="ascii")
    assert plain[-1] == "768 tokens, each cell 32 queries and 32 keys" and all(map(str.isascii, plain))
    assert pattern_lines(systems.big_bird(64), limit=100)[-1].startswith("96 tokens")
