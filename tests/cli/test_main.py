"""The command group: help without heavy imports, exit codes, one line per error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from longspan.cli import errors as exit_codes
from longspan.cli.main import run
from longspan.exporter import errors
from longspan.plugins import InvalidOperands, LibraryMissing

from ..exporter.models import BERT, LONGFORMER, write_config

COMMANDS = ("export", "check", "bench", "inspect", "doctor")


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from longspan.cli.main import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("Usage: longspan")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("x"), 2),
        (InvalidOperands("x"), 2),
        (errors.ExportFailed("x"), 3),
        (errors.NothingReplaced("x"), 3),
        (errors.BundleCorrupted("x"), 3),
        (errors.EnvironmentLacks("x"), 4),
        (LibraryMissing("x"), 4),
        (errors.FallbackRan("x"), 5),
        (ValueError("x"), None),
    ],
)
def test_every_error_has_its_exit_code(error: Exception, code: int | None) -> None:
    assert exit_codes.exit_code(error) == code


def test_export_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, LONGFORMER)
    out = tmp_path / "out"
    assert run(["export", str(config), str(out), "--random-weights"]) == 0
    printed = capsys.readouterr()
    assert "2 sites replaced, up to 256 tokens" in printed.out
    assert "✗ contrib op: GroupQueryAttention is causal only" in printed.out
    assert printed.err == ""
    assert run(["inspect", str(out), "--json", "--length", "64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["site"]["layer"] for site in report["sites"]] == [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert run(["inspect", str(out)]) == 0
    assert "4+4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "{config}", "{out}"], 2, "add --random-weights"),
        (["export", "{config}", "{out}", "--random-weights"], 3, "no attention site was replaced"),
        (["export", "{config}", "{out}", "--random-weights", "--window", "7"], 2, "--window 7: must be an even number"),
        (["export", "{config}", "{out}", "--random-weights", "--window", "0"], 2, "--window 0: must be an even number"),
        (["export", "nowhere/at/all", "{out}"], 2, "no such file or folder"),
        (["export", "{config}", "{out}", "--window", "x"], 2, "not a valid integer"),
        (["export", "{config}"], 2, "Missing argument 'OUT'"),
        (["check", "nowhere"], 2, "nowhere: no such folder"),
        (["bench", "nowhere"], 2, "nowhere: no such folder"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    config = write_config(tmp_path / "source", BERT)
    out = tmp_path / "out"
    assert run([argument.format(config=config, out=out) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("longspan: error: ") and printed.err.count("\n") == 1
    assert not out.exists()


def test_debug_shows_the_traceback_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "nowhere"], debug=True) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "longspan: error: nowhere: no such folder; next step: longspan export MODEL nowhere"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("two\nlines"),
            "longspan: internal error: RuntimeError: two lines; this is a bug in longspan: run again with --debug and "
            "report it",
        ),
        (PermissionError(13, "Permission denied", "model.onnx"), "longspan: error: model.onnx: Permission denied"),
        (MemoryError(), "longspan: error: out of memory; next step: a shorter length, a smaller batch, or more memory"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_exit_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("longspan.exporter.environment.examine", fail)
    assert run(["doctor"]) == exit_codes.EXPORT_FAILED
    assert capsys.readouterr().err == f"{line}\n"


def test_an_encoding_that_lacks_a_character_gets_its_plain_form(longformer_bundle: Path) -> None:
    from longspan.cli.terminal import PLAIN

    assert "✓ layers 0–5 ×6, ✗ 64² … 漢".encode("ascii", errors=PLAIN) == b"+ layers 0-5 x6, x 64^2 ... ?"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    program = "from longspan.cli.main import main; main()"
    command = [sys.executable, "-c", program, "inspect", str(longformer_bundle), "--picture", "-"]
    finished = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert finished.returncode == 0 and finished.stdout.isascii()
    assert b"x standard op: ONNX Attention" in finished.stdout and b"+------" in finished.stdout
