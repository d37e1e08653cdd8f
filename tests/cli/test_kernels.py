"""``longspan kernels`` and ``longspan export --gpu-arch``: what is printed, what is refused, and with which code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from longspan.cli.main import run
from longspan.exporter.kernel_packs import embedded_pack
from longspan.plugins.gpu.pack import read_pack, write_pack

from ..exporter.models import BERT, write_config
from ..plugins.packs import pack

Command = Callable[..., str]
DESCRIBED = ("--operator", "SlidingWindowAttention", "--dtype", "float16", "--head-size", "64")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: object) -> str:
        capsys.readouterr()
        assert run([*map(str, arguments)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def command(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = run([*map(str, arguments)])
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return code, captured.err

    return command


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A pack that nobody compiled."""
    write_pack(pack(), tmp_path / "made-up.pack")
    return tmp_path / "made-up.pack"


def test_list_says_what_a_pack_executes_and_where(printed: Command, made_up: Path) -> None:
    lines = printed("kernels", "list", made_up).splitlines()
    assert lines[0].startswith("2 kernels, ") and lines[0].endswith(" of code, by compiler 1")
    assert lines[1].split() == ["operator", "T", "D", "group", "features", "kernels", "runs", "on"]
    assert " ".join(lines[2].split()) == (
        "SlidingWindowAttention float16 8 2 attn_mask, dilation 1/2 2 sm_80, PTX (sm_80 and later)"
    )
    assert len(lines) == 3


def test_list_as_json(printed: Command, made_up: Path) -> None:
    content = json.loads(printed("kernels", "list", made_up, "--json"))
    assert (content["compiler"], content["kernels"]) == ("compiler 1", 2)
    first, second = content["recipes"]
    assert (first["form"], second["form"]) == ("cubin", "ptx")
    assert first["match"]["dilation"] == [1, 2] and first["paths"] == {"whole": ["forward"]}


def test_show_has_resources_and_a_bound_and_claims_no_measurement(printed: Command, made_up: Path) -> None:
    lines = printed("kernels", "show", made_up, "--length", 1000, "--window", 100).splitlines()
    assert lines[0].split() == ["kernel", "for", "regs", "spilled", "shared", "per", "SM", "FLOP/B", "bound"]
    row = lines[1].split()
    assert row[:8] == ["forward", "sm_80", "64", "0", "B", "1.0", "KiB", "8"] and row[-1] in ("compute", "memory")
    assert lines[2].split()[:3] == ["forward", "sm_80", "PTX"]
    assert lines[-2].endswith("A100 SXM 80 GB (NVIDIA A100 datasheet)") and lines[-1] == "nothing here was measured"


def test_show_one_kernel_with_its_parameters(printed: Command, made_up: Path) -> None:
    text = printed("kernels", "show", made_up, "forw")
    assert text.count("\nmachine code for sm_80") == 1 and text.count("PTX, resources as compiled for sm_80") == 1
    rows = [line.split() for line in text.splitlines()]
    assert ["left", "i32", "1", "attribute", "left_window_size"] in rows
    assert ["rows", "i32", "1", "size", "S_q", "tiles", "*"] in rows
    assert "GFLOP" in text and "limited by" in text and "nothing here was measured" in text


def test_show_as_json(printed: Command, made_up: Path) -> None:
    first, _ = json.loads(printed("kernels", "show", made_up, "--json", "--length", 100, "--window", 4))
    assert (first["name"], first["registers"], first["stack"], first["shared"]) == ("forward", 64, 0, 1024)
    assert first["code_bytes"] == 44 and first["constants"] == {"BLOCK_M": "16", "lse": "none"}
    assert first["parameters"][0] == {"name": "q", "type": "*fp16", "meaning": "input:Q", "divisor": 16}
    execution = first["execution"]
    # Two heads with dilations 1 and 2: 9 keys each, less those beyond the ends; two products of 8 channels.
    assert execution["flops"] == 2 * 16 * (880 + 860) and execution["bytes"] == 2 * 100 * 16 * 3
    assert execution["flops_per_byte"] == execution["flops"] / execution["bytes"]
    assert execution["roofline"]["device"] == "A100 SXM 80 GB"


def test_a_bundle_is_a_pack_too(printed: Command, gpu_bundle: Path) -> None:
    listed = printed("kernels", "list", gpu_bundle)
    assert "float32" in listed and "attn_mask" in listed and "sm_80, PTX (sm_80 and later)" in listed
    shown = printed("kernels", "show", gpu_bundle)
    assert shown.count("window_forward_fp32_d16x16_sm80") == 4 and "merge_parts_fp32" in shown


def test_compile_for_a_bundle(printed: Command, gpu_bundle: Path, tmp_path: Path) -> None:
    said = printed("kernels", "compile", gpu_bundle, "--arch", "sm_80", "--out", tmp_path / "packs", "--jobs", 1)
    file = tmp_path / "packs" / "longspan.pack"
    assert file.read_bytes() == embedded_pack(gpu_bundle / "model.onnx")
    assert [entry.name for entry in file.parent.iterdir()] == ["longspan.pack"]
    assert f"{file}: 6 kernels for sm_80, ptx" in said and f"next: longspan kernels show {file}" in said
    assert len(read_pack(file).recipes) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--arch", "sm_75", *DESCRIBED), "architecture sm_75: GPU kernels are not tuned for it; allowed: sm_80"),
        (("--arch", "sm_80"), "what to compile is not said; next step: name a bundle, or give --dtype and --head-size"),
        (("--arch", "sm_80", *DESCRIBED, "--name", "a/b"), "--name a/b: must be the name of a file"),
        (("--arch", "sm_80", *DESCRIBED, "--group", "none"), "--group none: must be a whole number from 1"),
        (("--arch", "sm_80", *DESCRIBED[:-1], "64x"), "--head-size : must be a whole number"),
        (("--arch", "sm_80", *DESCRIBED[:-1], "512"), "head size of 512: GPU kernels go up to 256"),
        (("--arch", "sm_80", *DESCRIBED, "--features", "magic"), "SlidingWindowAttention has no such feature"),
        (("no-bundle", "--arch", "sm_80"), "no-bundle: no such folder"),
        (("no-bundle", "--arch", "sm_80", "--dtype", "float16"), "a bundle says itself what its sites need"),
        (DESCRIBED, "Missing option '--arch'"),
    ],
)
def test_compile_refuses_what_it_cannot_do(
    refused: Callable[..., tuple[int, str]], tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    code, said = refused("kernels", "compile", *arguments, "--out", tmp_path / "packs")
    assert code == 2 and reason in said
    assert not (tmp_path / "packs").exists()


def test_compile_replaces_nothing_unasked(refused: Callable[..., tuple[int, str]], made_up: Path) -> None:
    before = made_up.read_bytes()
    arguments = ("kernels", "compile", *DESCRIBED, "--arch", "sm_80", "--out")
    code, said = refused(*arguments, made_up.parent, "--name", "made-up")
    assert code == 2 and "is there already" in said and "--force" in said
    code, said = refused(*arguments, made_up)
    assert code == 2 and "is not a folder" in said
    assert made_up.read_bytes() == before


def test_without_triton_the_environment_lacks_something(
    refused: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    out = tmp_path / "out"
    model = write_config(tmp_path / "model", BERT)
    for arguments in (
        ("kernels", "compile", *DESCRIBED, "--arch", "sm_80", "--out", out),
        ("export", model, out, "--random-weights", "--window", 16, "--gpu-arch", "sm_80"),
    ):
        code, said = refused(*arguments)
        assert code == 4 and "Triton, which is not installed; next step: pip install 'longspan[gpu]'" in said
    assert not out.exists()


def test_damaged_packs_are_refused(refused: Callable[..., tuple[int, str]], made_up: Path) -> None:
    data = bytearray(made_up.read_bytes())
    data[200] ^= 1
    made_up.write_bytes(data)
    for command in ("list", "show"):
        code, said = refused("kernels", command, made_up)
        assert code == 3 and "made-up.pack: differs from what was written (SHA-256)" in said
    made_up.write_text("no pack")
    code, said = refused("kernels", "list", made_up)
    assert code == 3 and "less than the header" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere",), "no such folder"),
        (("made-up.pack", "backward"), "no kernel is called backward; there are: forward"),
        (("made-up.pack", "--length", "0"), "--length 0: must be 1 or more"),
        (("made-up.pack", "--density", "2"), "--density 2.0: must be above 0"),
    ],
)
def test_show_refuses_what_is_not_there(
    refused: Callable[..., tuple[int, str]], made_up: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    reason: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(made_up.parent)
    code, said = refused("kernels", "show", *arguments)
    assert code == 2 and reason in said


def test_a_bundle_without_kernels_says_how_to_get_them(
    refused: Callable[..., tuple[int, str]], bert_bundle: Path
) -> None:
    code, said = refused("kernels", "list", bert_bundle)
    assert code == 2 and "has no GPU kernels; next step: export it with --gpu-arch" in said


def test_export_refuses_unknown_architectures_before_it_begins(
    refused: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, said = refused("export", "no model", tmp_path / "out", "--gpu-arch", "sm_61")
    assert code == 2 and "architecture sm_61" in said
