"""``longspan check``: what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from longspan.cli.main import run
from longspan.exporter.bundle import MODEL_FILE
from longspan.exporter.manifest import sha256_of
from longspan.exporter.parity.cases import LONGEST
from longspan.exporter.parity.comparison import ORIGINAL_LONGEST
from longspan.exporter.whole_folders import MANIFEST_FILE

Copy = Callable[[Path], Path]


def wrong(bundle: Path) -> Path:
    """Make the second site's window wider by one key on the left."""
    model = onnx.load(bundle / MODEL_FILE)
    site = [node for node in model.graph.node if node.domain == "longspan"][1]
    next(attribute for attribute in site.attribute if attribute.name == "left_window_size").i += 1
    onnx.save(model, bundle / MODEL_FILE)
    data = json.loads((bundle / MANIFEST_FILE).read_text())
    data["files"][MODEL_FILE] = sha256_of(bundle / MODEL_FILE)
    (bundle / MANIFEST_FILE).write_text(json.dumps(data))
    return bundle


def test_pass(longformer_bundle: Path, copied: Copy, kernel_library: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(copied(longformer_bundle)), "--lengths", "1,40", "--require-kernel"]) == 0
    captured = capsys.readouterr()
    assert "kernel: ran at 2 of 2 sites" in captured.out and "function body: ran at 2 of 2 sites" in captured.out
    assert "the same mathematics" in captured.out and "pass: " in captured.out
    assert "checked up to 40 of the 256 tokens" in captured.out
    assert "check.json" in captured.out
    assert captured.err == ""


def test_the_approximation_has_a_table_of_its_own(
    bert_bundle: Path, copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(copied(bert_bundle)), "--lengths", "9,60"]) == 0
    out = capsys.readouterr().out
    assert "Approximation error" in out and "must be equal here ✓" in out
    assert "approximated (dense attention cut to a window; positions extended beyond 64)" in out


def test_fail_names_the_first_case(longformer_bundle: Path, copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(wrong(copied(longformer_bundle))), "--lengths", "9,40"]) == 1
    out = capsys.readouterr().out
    verdict = next(line for line in out.splitlines() if line.startswith("FAIL: "))
    assert "x 40," in verdict and "lowering error by" in verdict and "tolerance" in verdict and "more errors" in verdict


def test_without_the_library(
    longformer_bundle: Path, copied: Copy, no_library: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copied(longformer_bundle)
    assert run(["check", str(bundle), "--lengths", "4"]) == 0
    out = capsys.readouterr().out
    assert "kernel: not run: liblongspan_ort.so is not installed" in out and "by function body" in out
    assert run(["check", str(bundle), "--lengths", "4", "--require-kernel"]) == 5
    assert "--require-kernel" in capsys.readouterr().err


def test_json(longformer_bundle: Path, copied: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, file = copied(longformer_bundle), tmp_path / "report.json"
    assert run(["check", str(bundle), "--lengths", "4", "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((bundle / "reports" / "check.json").read_text())
    assert run(["check", str(wrong(bundle)), "--lengths", "40", "--json", str(file)]) == 1
    data = json.loads(file.read_text())
    assert data["passed"] is False and data["failures"]


def test_judged_again_without_a_rerun(
    longformer_bundle: Path, copied: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copied(longformer_bundle)
    assert run(["check", str(bundle), "--lengths", "4,40", "--sites"]) == 0
    out = capsys.readouterr().out
    assert "Smallest tolerances that would pass" in out and "Every site at" in out
    printed = next(line for line in out.splitlines() if line.startswith("last_hidden_state  function body"))
    least = printed.split()[3]
    before = {file.name: file.read_bytes() for file in (bundle / "reports").iterdir()}
    # Judging needs neither the runtime nor torch: it answers in a process that cannot import them.
    code = (
        "import sys\n"
        "for name in ('torch', 'onnxruntime', 'transformers', 'onnx', 'polygraphy'): sys.modules[name] = None\n"
        "from longspan.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    xml, page = tmp_path / "out.xml", tmp_path / "out.html"

    def judged(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "check", *arguments, "--judge"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    strict = judged(str(bundle), "--atol", "0", "--junit", str(xml), "--html", str(page))
    assert strict.returncode == 1 and "FAIL: " in strict.stdout, strict.stderr
    assert 'failures="0"' not in xml.read_text().splitlines()[1] and "✗ Fail" in page.read_text()
    # A saved file does as well as its bundle; what is printed as smallest passes.
    enough = judged(str(bundle / "reports" / "check.json"), "--atol", "1e-4", "--atol", f"last_hidden_state:{least}")
    assert enough.returncode == 0 and "pass: " in enough.stdout, enough.stderr
    assert {file.name: file.read_bytes() for file in (bundle / "reports").iterdir()} == before
    assert run(["check", str(bundle), "--judge", "--lengths", "4"]) == 2
    assert "--judge runs nothing, so --lengths would have no effect" in capsys.readouterr().err


def test_judging_needs_a_report(longformer_bundle: Path, copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = copied(longformer_bundle)
    for file in bundle.glob("reports/*"):
        file.unlink()
    assert run(["check", str(bundle), "--judge"]) == 2
    assert "longspan check BUNDLE writes it" in capsys.readouterr().err


def test_the_first_site_off_is_printed(
    longformer_bundle: Path, copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(wrong(copied(longformer_bundle))), "--lengths", "9,40"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "first site off" in line)
    assert " x 40, " in line and "encoder.layer.1.attention.self" in line and "times over" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--lengths", "4", "--junit", "no/such/folder/file"],
            "--junit no/such/folder/file: its folder does not exist",
        ),
        (["--lengths", "4", "--html", "no/such/folder/file"], "--html no/such/folder/file: its folder does not exist"),
        (["--lengths", "4,x"], "'4,x' is not N,N"),
        (["--lengths", "257"], "1 to 256"),
        (["--atol", "y:x"], "--atol y:x"),
        (["--rtol", "y:1"], "no such output"),
        (["--input-shapes", "input_ids:[1]"], "--input-shapes"),
        (["--load-inputs", "no such file"], "no such file"),
        (["--source", "no such model"], "--source"),
        (["--lengths", "4", "--json", "no/such/folder/file"], "--json"),
    ],
)
def test_usage(
    longformer_bundle: Path, copied: Copy, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["check", str(copied(longformer_bundle)), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_onnxruntime_missing(
    longformer_bundle: Path, copied: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(["check", str(copied(longformer_bundle))]) == 4
    assert "pip install 'longspan[cpu]'" in capsys.readouterr().err


def test_help_states_the_defaults_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"at most {LONGEST}" in out and f"({ORIGINAL_LONGEST})" in out
    code = (
        "import sys; from longspan.cli.main import run; run(['check', '--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'transformers', 'polygraphy', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
