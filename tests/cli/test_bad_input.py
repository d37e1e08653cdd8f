"""What users get wrong, and what machines do to them: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from longspan.cli.main import run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from ..exporter.models import BERT, write_config

MODELS = """
import torch
from longspan.plugins.sliding_window_attention.torch_op import sliding_window_attention

class NoAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.linear(x)

class Windowed(NoAttention):
    left, heads, kv_heads = 3, 2, 2
    def forward(self, x):
        q = self.linear(x)
        return sliding_window_attention(
            q, x, x, left_window_size=self.left, right_window_size=0, q_num_heads=self.heads, kv_num_heads=self.kv_heads
        )

class Wide(Windowed):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(8, 4096)
    def forward(self, x):
        return self.wide(super().forward(x))

def _made(model, **settings):
    for name, value in settings.items():
        setattr(model, name, value)
    return model, {"x": torch.zeros(2, 9, 8)}

def no_attention():
    return _made(NoAttention())

def windowed():
    return _made(Windowed())

def wide():
    return _made(Wide())

def uneven_heads():
    return _made(Windowed(), heads=3, kv_heads=3)

def uneven_groups():
    return _made(Windowed(), heads=4, kv_heads=3)

def negative_window():
    return _made(Windowed(), left=-2)

def not_a_number():
    model, inputs = windowed()
    with torch.no_grad():
        model.linear.weight[3, :2] = float("nan")
    return model, inputs
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return str(path)


@pytest.fixture(scope="module")
def bert_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "architectures"})).save_pretrained(folder)
    return folder


@pytest.fixture
def bert_folder(bert_saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_saved, tmp_path / "bert"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder is looked up on the hub; the answer must not depend on the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with a code and return its line, leaving the folder of its output as it was."""

    by_others = {"__pycache__", "reports"}

    def files() -> list[Path]:
        found = (path for path in tmp_path.rglob("*") if path.suffix != ".pyc")
        return sorted(path for path in found if not by_others & set(path.relative_to(tmp_path).parts))

    def command(code: int, *arguments: object) -> str:
        before = files()
        assert run([str(argument) for argument in arguments]) == code
        printed = capsys.readouterr()
        assert printed.err.startswith("longspan: error: ") and printed.err.count("\n") == 1, printed.err
        assert printed.out == ""
        assert files() == before
        return printed.err.removeprefix("longspan: error: ").rstrip("\n")

    return command


def test_a_missing_model(fails: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such file or folder" in fails(2, "export", tmp_path / "missing", out)
    assert "no such file" in fails(2, "export", tmp_path / "missing.pt2", out)
    assert "no such file" in fails(2, "export", f"{tmp_path}/missing.py:make", out)
    line = fails(4, "export", "missing", out)
    assert line.startswith("missing: no such folder, and the hub did not give it")
    for command in ("check", "bench"):
        assert "no such folder; next step: longspan export MODEL" in fails(2, command, tmp_path / "missing")
    assert "no such file or folder" in fails(2, "inspect", tmp_path / "missing")


def test_a_folder_without_a_model(fails: Callable[..., str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in fails(2, "export", empty, tmp_path / "out")
    assert "has no config.json" in fails(2, "inspect", empty)
    assert "has no manifest.json, so it is not a bundle" in fails(2, "check", empty)
    write_config(empty, BERT)
    assert "has no weights (*.safetensors)" in fails(2, "export", empty, tmp_path / "out")


def test_a_bundle_where_a_model_is_expected(fails: Callable[..., str], tmp_path: Path, longformer_bundle: Path) -> None:
    assert "is a bundle already" in fails(2, "export", longformer_bundle, tmp_path / "out")


def test_a_model_without_attention(fails: Callable[..., str], models: str, tmp_path: Path) -> None:
    line = fails(3, "export", f"{models}:no_attention", tmp_path / "out")
    assert "no attention site was replaced in models.NoAttention" in line and "docs/families.md" in line


def test_nothing_to_replace(fails: Callable[..., str], tmp_path: Path) -> None:
    config = write_config(tmp_path, BERT)
    assert "add --window N" in fails(3, "export", config, tmp_path / "out", "--random-weights")


@pytest.mark.parametrize("command", ["check", "bench", "inspect"])
def test_a_truncated_model_file(
    fails: Callable[..., str], copied: Callable[[Path], Path], longformer_bundle: Path, command: str
) -> None:
    bundle = copied(longformer_bundle)
    content = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(content[: len(content) // 2])
    line = fails(3, command, bundle)
    assert "model.onnx: differs from what was written (SHA-256); next step: export again" in line


def test_weights_changed_after_export(
    fails: Callable[..., str], copied: Callable[[Path], Path], longformer_bundle: Path
) -> None:
    bundle = copied(longformer_bundle)
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    assert "model.onnx: differs" in fails(3, "check", bundle)


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 99}', '{"schema_version": 1}', "\xff"])
def test_a_damaged_manifest(
    fails: Callable[..., str], copied: Callable[[Path], Path], longformer_bundle: Path, text: str
) -> None:
    bundle = copied(longformer_bundle)
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    line = fails(3, "inspect", bundle)
    assert str(bundle) in line and "next step: export again" in line


def test_a_manifest_cannot_name_files_elsewhere(
    fails: Callable[..., str], copied: Callable[[Path], Path], longformer_bundle: Path
) -> None:
    bundle = copied(longformer_bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../secret"] = "00"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert "'../secret'" in fails(3, "inspect", bundle)


@pytest.mark.parametrize("command", ["check", "inspect"])
@pytest.mark.parametrize("files", [["model.onnx"], {}, {"model.onnx": 3}, {"other": "00"}, "model.onnx", None])
def test_a_manifest_without_the_hash_of_the_model(
    fails: Callable[..., str], copied: Callable[[Path], Path], longformer_bundle: Path, files: Any, command: str
) -> None:
    bundle = copied(longformer_bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
    line = fails(3, command, bundle)
    assert "manifest.json" in line and "next step: export again" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "0"], "--window 0: must be an even number of 2 or more"),
        (["--window", "-8"], "--window -8: must be an even number of 2 or more"),
        (["--window", "128"], "--window 128: the model accepts 64 tokens"),
        (["--window", "16", "--global-tokens", "65"], "--global-tokens 65: the model accepts 64 tokens"),
        (["--window", "16", "--max-positions", "5000"], "64² = 4096 at most"),
        (["--window", "16", "--max-positions", "0"], "--max-positions 0: must be 1 or more"),
    ],
)
def test_windows_that_do_not_fit(fails: Callable[..., str], tmp_path: Path, options: list[str], words: str) -> None:
    config = write_config(tmp_path, BERT)
    assert words in fails(2, "export", config, tmp_path / "out", "--random-weights", *options)


def test_a_window_that_the_operator_does_not_allow(fails: Callable[..., str], models: str, tmp_path: Path) -> None:
    line = fails(3, "export", f"{models}:negative_window", tmp_path / "out")
    assert "left_window_size = -2: must be -1 (unbounded), 0 or positive" in line


@pytest.mark.parametrize(("length", "allowed"), [("0", "1 or more"), ("-1", "1 or more"), ("257", "1 … 256")])
def test_a_length_that_the_model_does_not_take(
    fails: Callable[..., str], longformer_bundle: Path, length: str, allowed: str
) -> None:
    line = fails(2, "inspect", longformer_bundle, "--length", length)
    assert f"--length {length}: must be {allowed}" in line


def test_heads_that_do_not_divide(fails: Callable[..., str], models: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "source", BERT, num_attention_heads=3)
    line = fails(3, "export", config, tmp_path / "out", "--random-weights", "--window", "16")
    assert "hidden size (64) is not a multiple of the number of attention heads (3)" in line
    line = fails(3, "export", f"{models}:uneven_heads", tmp_path / "out")
    assert "Q has 8 channels, which 3 heads do not divide" in line
    line = fails(3, "export", f"{models}:uneven_groups", tmp_path / "out")
    assert "q_num_heads = 4 is not a multiple of kv_num_heads = 3" in line


def test_weights_that_are_not_numbers(
    fails: Callable[..., str], models: str, bert_folder: Path, tmp_path: Path
) -> None:
    line = fails(3, "export", f"{models}:not_a_number", tmp_path / "out")
    assert "linear.weight holds 2 values of 64 that are not finite" in line
    weights = load_file(bert_folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][5] = float("inf")
    save_file(weights, bert_folder / "model.safetensors", metadata={"format": "pt"})
    line = fails(3, "export", bert_folder, tmp_path / "out", "--window", "16")
    assert "encoder.layer.1.output.dense.bias holds 1 value of 64 that is not finite" in line


def test_pickled_weights(fails: Callable[..., str], bert_folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(bert_folder / "model.safetensors"), bert_folder / "pytorch_model.bin")
    (bert_folder / "model.safetensors").unlink()
    line = fails(2, "export", bert_folder, tmp_path / "out", "--window", "16")
    assert "pickled (pytorch_model.bin)" in line and "add --allow-pickle" in line


def test_remote_code(fails: Callable[..., str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "evil.py").write_text("raise SystemExit('ran')")
    config: dict[str, Any] = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(b"")
    assert "add --trust-remote-code" in fails(2, "export", source, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "bert", "hidden_size": "many"}', "\xff"])
def test_a_configuration_that_is_none(fails: Callable[..., str], bert_folder: Path, tmp_path: Path, text: str) -> None:
    (bert_folder / "config.json").write_bytes(text.encode("latin-1"))
    assert str(bert_folder) in fails(3, "export", bert_folder, tmp_path / "out", "--window", "16")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_weights(fails: Callable[..., str], bert_folder: Path, tmp_path: Path, damage: str) -> None:
    file = bert_folder / "model.safetensors"
    content = file.read_bytes()
    damaged = {"truncated": content[:-1000], "header": b"\xff" * 16 + content[16:], "empty": b""}[damage]
    file.write_bytes(damaged)
    assert "model.safetensors" in fails(3, "export", bert_folder, tmp_path / "out", "--window", "16")


def test_weights_of_another_shape(fails: Callable[..., str], bert_folder: Path, tmp_path: Path) -> None:
    write_config(bert_folder, json.loads((bert_folder / "config.json").read_text()), intermediate_size=96)
    line = fails(3, "export", bert_folder, tmp_path / "out", "--window", "16")
    assert "encoder.layer.0.intermediate.dense" in line


def test_a_source_that_changed_after_export(
    fails: Callable[..., str], models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", f"{models}:windowed", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    Path(models).write_text(MODELS.replace("left, heads, kv_heads = 3", "left, heads, kv_heads = 2"))
    assert "models.py" in fails(2, "check", tmp_path / "out")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], models: str, tmp_path: Path) -> None:
    from longspan.exporter import pipeline

    save = pipeline.save_model

    def save_to_full_disk(graph: Any, file: Path) -> None:
        file.symlink_to("/dev/full")
        save(graph, file)

    monkeypatch.setattr(pipeline, "save_model", save_to_full_disk)
    line = fails(3, "export", f"{models}:windowed", tmp_path / "new" / "out")
    assert "could not be written: No space left on device" in line and "make room" in line


def test_a_limit_on_file_sizes(fails: Callable[..., str], small_files: None, models: str, tmp_path: Path) -> None:
    line = fails(3, "export", f"{models}:wide", tmp_path / "new" / "out")
    assert "could not be written: File too large" in line and "ulimit -f" in line


def test_a_folder_that_nobody_may_write(fails: Callable[..., str], models: str) -> None:
    assert "could not be written: " in fails(3, "export", f"{models}:windowed", "/proc/longspan/out")


def test_an_output_that_holds_something_else(fails: Callable[..., str], models: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    for force in ([], ["--force"]):
        assert "holds files that are not a bundle" in fails(2, "export", f"{models}:windowed", out, *force)
    assert "is a file" in fails(2, "export", f"{models}:windowed", out / "thesis.tex", "--force")


def test_interruption_while_writing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: str, tmp_path: Path
) -> None:
    def half(graph: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("longspan.exporter.pipeline.save_model", half)
    assert run(["export", f"{models}:windowed", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip() == "longspan: interrupted"
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_two_exports_to_one_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: str, tmp_path: Path
) -> None:
    from longspan.exporter import pipeline

    arguments = ["export", f"{models}:windowed", str(tmp_path / "out"), "--force"]
    load, second = pipeline.load_source, []

    def meanwhile(request: Any) -> Any:
        if not second:
            second.append(None)
            second[0] = run(arguments)
        return load(request)

    monkeypatch.setattr(pipeline, "load_source", meanwhile)
    assert run(arguments) == 0
    assert second == [2]
    assert "another export is writing there" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "out")]) == 0
