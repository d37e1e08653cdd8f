"""``longspan inspect``: one row per site, costs, pictures, the same for a model as for its bundle."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from longspan.cli.main import run
from longspan.cli.sites_table import row_of, sites_table
from longspan.exporter.sites.record import AttentionSite, StandardSite
from rich.console import Console

from ..exporter.models import LONGFORMER, write_config


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def command(*arguments: object) -> str:
        capsys.readouterr()
        assert run(["inspect", *map(str, arguments)]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return command


def test_json_lists_every_site_with_its_costs(inspected: Callable[..., str], longformer_bundle: Path) -> None:
    report = json.loads(inspected(longformer_bundle, "--json", "--length", 100))
    assert (report["kind"], report["length"], report["max_length"]) == ("bundle", 100, 256)
    first, second = report["sites"]
    assert first["site"]["layer"] == "encoder.layer.0.attention.self" and first["pattern"] == "4 left, 4 right"
    assert (first["heads"], first["kv_heads"], first["head_size"], first["v_head_size"]) == (4, 4, 16, 16)
    # 100 rows of 9 keys, less 4 + 3 + 2 + 1 at each end; two products of 16 channels, two operations each, 4 heads.
    pairs = 100 * 9 - 20
    assert first["flops"] == 4 * 4 * 16 * pairs and first["dense_flops"] == 4 * 4 * 16 * 100 * 100
    assert first["density"] == pytest.approx(pairs / 10_000) and first["saved"] == pytest.approx(1 - pairs / 10_000)
    assert second["density"] > first["density"]


def test_a_model_is_inspected_without_exporting_it(
    inspected: Callable[..., str], longformer_bundle: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, LONGFORMER)
    arguments = ("--random-weights", "--json")
    of_model = json.loads(inspected(config, *arguments))
    of_bundle = json.loads(inspected(longformer_bundle, "--json"))
    assert of_model["kind"] == "model" and of_model["length"] == 256
    assert of_model["sites"] == of_bundle["sites"] and of_model["standard"] == of_bundle["standard"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_table_says_what_was_replaced_and_how(inspected: Callable[..., str], longformer_bundle: Path) -> None:
    lines = inspected(longformer_bundle, "--length", 100).splitlines()
    assert lines[0] == "LongformerModel: 2 attention sites replaced"
    (row,) = [line for line in lines if line.startswith("encoder.layer.1")]
    assert row.split() == ["encoder.layer.1.attention.self", "window,", "global", "8+8", "4", "16.3%", "83.7%"]
    shared = ["operator: SlidingWindowAttention", "recognised by: family longformer", "replaced: yes"]
    assert lines[1:4] == shared
    assert "  ✗ standard op: ONNX Attention has no global_mask, global_Q, global_K, global_V" in lines
    assert any("100 tokens, no global token (the input decides)" in line for line in lines)
    # (880 + 1628 pairs) x 4 heads x 64 operations, of 2 x 10,000 pairs.
    assert "these sites: 0.000642 GFLOP instead of 0.00512 (87.5% saved)" in lines


def test_an_approximation_is_said(inspected: Callable[..., str], bert_bundle: Path) -> None:
    out = inspected(bert_bundle)
    assert "random weights: a small model of this architecture" in out
    assert "approximates the original: dense attention cut to a window; positions extended beyond 64" in out
    assert "encoder.layer.0–1.attention.self ×2" in out


def test_alike_layers_are_one_line_unless_all_are_asked_for(inspected: Callable[..., str], bert_bundle: Path) -> None:
    assert inspected(bert_bundle).count("encoder.layer.") == 1
    assert inspected(bert_bundle, "--all").count("encoder.layer.") == 2
    assert len(json.loads(inspected(bert_bundle, "--json"))["sites"]) == 2


def test_the_picture_is_a_png_and_characters(
    inspected: Callable[..., str], longformer_bundle: Path, tmp_path: Path
) -> None:
    out = inspected(longformer_bundle, "--picture", tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert "4 left, 4 right, global" in out and out.count("┌") == 2 and "█" in out
    assert "┌" in inspected(longformer_bundle, "--picture", "-")
    assert "┌" not in inspected(longformer_bundle, "--picture", tmp_path / "masks.png", "--json")


@pytest.mark.parametrize(
    ("picture", "words"),
    [("masks.jpg", "must end in .png"), ("nowhere/masks.png", "its folder does not exist")],
)
def test_a_picture_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: str, words: str
) -> None:
    assert run(["inspect", str(tmp_path / "no model"), "--picture", str(tmp_path / picture)]) == 2
    assert words in capsys.readouterr().err


def test_a_bundle_cannot_be_converted(capsys: pytest.CaptureFixture[str], longformer_bundle: Path) -> None:
    assert run(["inspect", str(longformer_bundle), "--window", "16"]) == 2
    assert "is a bundle, exported already" in capsys.readouterr().err


def site(layer: int, left: int, **attributes: Any) -> AttentionSite:
    attributes |= {"left_window_size": left, "right_window_size": 0, "q_num_heads": 32, "kv_num_heads": 8}
    name = f"model.language_model.layers.{layer}.self_attn"
    return AttentionSite("node", name, "SlidingWindowAttention", ("Q", "K", "V"), attributes, "family declared-windows")


def lines_of(width: int, *sites: AttentionSite, standard: Sequence[StandardSite] = (), fold: bool = True) -> list[str]:
    above, table = sites_table([row_of(one) for one in sites], standard, width, fold)
    printed = io.StringIO()
    Console(width=width, file=printed).print(table)
    return [*above, *(line.rstrip() for line in printed.getvalue().splitlines())]


def test_a_narrow_terminal_reads_above_the_table_what_all_sites_share() -> None:
    sites = [site(i, 4095 if i % 2 else 1023, is_causal=1) for i in range(24)]
    assert lines_of(80, *sites) == [
        "operator: SlidingWindowAttention",
        "recognised by: family declared-windows",
        "replaced: yes",
        "layer                                              pattern       window heads",
        "model.language_model.layers.0,2,…,22.self_attn ×12 causal window 1023+0  32/8",
        "model.language_model.layers.1,3,…,23.self_attn ×12 causal window 4095+0  32/8",
    ]
    wide = lines_of(160, *sites)
    assert wide[0].split() == ["layer", "operator", "pattern", "window", "heads", "recognised", "by", "replaced"]
    assert len(wide) == 3


def test_sizes_of_blocks_and_of_windows_are_columns_of_their_own() -> None:
    lists = AttentionSite(
        "node", "other", "BlockSparseAttention", ("Q", "K", "V"), {"q_block_size": 64}, "family bigbird"
    )
    headings, window, blocks = lines_of(160, site(0, 1023, is_causal=1), lists)
    assert window[headings.index("window") :].split()[0] == "1023+0"
    assert blocks[headings.index("blocks") :].split()[0] == "64x128"
    assert "blocks" not in lines_of(160, site(0, 1023))[0] and "window" not in lines_of(160, lists)[0]


@pytest.mark.parametrize(
    ("attributes", "words", "standard", "contrib"),
    [
        ({"left": 7, "is_causal": 1}, "causal window", "windows are rejected", "left of the window"),
        ({"left": 7}, "window", "windows are rejected", "causal only"),
        ({"left": -1, "is_causal": 1}, "causal", "S x S scores", "padding at their end"),
        ({"left": -1}, "causal", "S x S scores", "padding at their end"),
        ({"left": -1, "right_window_size": -1}, "full", "S x S scores", "causal only"),
        ({"left": -1, "is_causal": 1, "dilation": [4]}, "causal dilated window", "no dilation", "no dilation"),
    ],
)
def test_windows_are_refused_for_reasons_that_hold_for_them(
    attributes: dict[str, Any], words: str, standard: str, contrib: str
) -> None:
    sides = {"left_window_size": attributes.pop("left"), "right_window_size": 0}
    one = AttentionSite("node", "a", "SlidingWindowAttention", ("Q", "K", "V"), sides | attributes, "family x")
    assert one.short_pattern[0] == words
    assert standard in one.kind.standard_refusal(one) and contrib in one.kind.contrib_refusal(one)


def test_a_narrower_one_reads_the_module_above_as_well() -> None:
    sites = [site(0, 1023), site(1, 4095, dilation=[1, 2])]
    lines = lines_of(60, *sites)
    assert "layer: model.language_model.layers.#.self_attn" in lines
    assert lines[-1] == "1     dilated window 4095+0 ×1/2  32/8"


def test_sites_that_stay_standard_are_rows_and_fold_by_their_reason() -> None:
    reasons = ["full attention", "full attention", "a mask that no operator knows"]
    standard = tuple(
        StandardSite(f"model.language_model.layers.{i}.self_attn", reason) for i, reason in enumerate(reasons, start=1)
    )
    lines = lines_of(160, site(0, 1023), standard=standard)
    assert [line.split()[0] for line in lines[1:]] == [
        "model.language_model.layers.0.self_attn",
        "model.language_model.layers.1–2.self_attn",
        "model.language_model.layers.3.self_attn",
    ]
    assert lines[1].endswith("yes") and lines[2].endswith("no")
    assert len(lines_of(160, site(0, 1023), standard=standard, fold=False)) == 5
