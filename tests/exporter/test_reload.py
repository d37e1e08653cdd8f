"""What check and bench refuse of a bundle's source before anything of it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from longspan.cli.main import run
from longspan.exporter import export
from longspan.exporter.bundle import Bundle
from longspan.exporter.errors import BundleCorrupted, ExporterError, ExportFailed, InvalidRequest
from longspan.exporter.manifest import sha256_of
from longspan.exporter.sources import SourceRequest, load_source
from longspan.exporter.sources.reload import Consent, request_again
from longspan.exporter.throughput.variants import stock_variant
from longspan.exporter.whole_folders import MANIFEST_FILE
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from .models import BERT, write_config

FACTORY = """
from pathlib import Path
import torch
from longspan.plugins.sliding_window_attention.torch_op import sliding_window_attention

Path(__file__).with_suffix(".ran").touch()

class Layer(torch.nn.Module):
    def forward(self, x):
        return sliding_window_attention(
            x, x, x, left_window_size=3, right_window_size=0, q_num_heads=2, kv_num_heads=2
        )

def make():
    return Layer(), {"x": torch.randn(2, 9, 8)}

def leaves():
    raise SystemExit("left")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "layer.py"
    path.parent.mkdir()
    path.write_text(FACTORY)
    return path


@pytest.fixture
def bundle(file: Path, tmp_path: Path) -> Path:
    path = export(f"{file}:make", tmp_path / "bundle").path
    ran(file).unlink()
    return path


def ran(file: Path) -> Path:
    return file.with_suffix(".ran")


def edit(bundle: Path, **source: Any) -> None:
    """Change the source in a manifest, as somebody who passes a bundle on could."""
    data = json.loads((bundle / MANIFEST_FILE).read_text())
    data["source"] |= source
    (bundle / MANIFEST_FILE).write_text(json.dumps(data))


def refusals(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], consent: Consent) -> list[str]:
    """The lines of `check`, which must exit with 2, and of the stock export of `bench`, which must not be made."""
    options = [] if consent.location is None else ["--source", consent.location]
    options += ["--allow-pickle"] * consent.allow_pickle + ["--trust-remote-code"] * consent.trust_remote_code
    capsys.readouterr()
    assert run(["check", str(bundle), "--lengths", "4", *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    variant = stock_variant(Bundle.open(bundle), tmp_path, consent)
    assert variant.model is None
    return [line, variant.unavailable]


def test_what_was_exported_is_loaded_again(file: Path, bundle: Path) -> None:
    assert run(["check", str(bundle), "--lengths", "4"]) == 0
    assert ran(file).exists()


def test_a_factory_that_changed_does_not_run(
    file: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FACTORY + "\n")
    for consent in (Consent(), Consent(f"{file}:make")):
        for line in refusals(bundle, tmp_path, capsys, consent):
            assert "layer.py differ from what was exported (SHA-256)" in line
    assert not ran(file).exists()


def test_a_cached_compilation_beside_a_factory_does_not_run(file: Path, bundle: Path) -> None:
    import importlib.util
    import py_compile

    other, marker = file.with_name("other.py"), file.with_name("cached")
    other.write_text(f"open({str(marker)!r}, 'w')\n")
    cached = Path(importlib.util.cache_from_source(str(file)))
    py_compile.compile(str(other), cfile=str(cached), doraise=True)
    # The date and size by which Python takes a cached file for that of a source.
    stat = file.stat()
    content = bytearray(cached.read_bytes())
    content[8:16] = int(stat.st_mtime).to_bytes(4, "little") + stat.st_size.to_bytes(4, "little")
    cached.write_bytes(content)
    assert run(["check", str(bundle), "--lengths", "4"]) == 0
    assert ran(file).exists() and not marker.exists()


def test_a_factory_that_came_with_the_bundle_needs_consent(
    file: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = Path(shutil.copy(file, bundle))
    edit(bundle, location=f"{inside}:make")
    for line in refusals(bundle, tmp_path, capsys, Consent()):
        assert f"add --source {inside}:make" in line
    assert not ran(inside).exists()
    edit(bundle, location=f"{os.path.relpath(file)}:make")
    for line in refusals(bundle, tmp_path, capsys, Consent()):
        assert "add --source" in line
    assert not ran(file).exists()
    assert run(["check", str(bundle), "--lengths", "4", "--source", f"{inside}:make"]) == 0
    assert ran(inside).exists()


@pytest.mark.parametrize("files", [{}, {"layer.py": "00"}, {"other.py": "00"}])
def test_hashes_of_the_source_cannot_be_left_out(file: Path, bundle: Path, files: dict[str, str]) -> None:
    edit(bundle, files=files)
    with pytest.raises(InvalidRequest if files else BundleCorrupted):
        request_again(Bundle.open(bundle), Consent())
    assert run(["check", str(bundle), "--lengths", "4"]) == (2 if files else 3)
    assert not ran(file).exists()


@pytest.mark.parametrize("kind", ["config", "huggingface", "program"])
def test_a_factory_cannot_pass_as_something_else(file: Path, bundle: Path, kind: str) -> None:
    for files in ({}, {"layer.py": sha256_of(file)}):
        edit(bundle, kind=kind, files=files)
        with pytest.raises(ExporterError):
            request_again(Bundle.open(bundle), Consent())
    assert not ran(file).exists()


@pytest.mark.parametrize(
    ("field", "consent", "flag"),
    [
        ("pickled_weights", Consent(allow_pickle=True), "--allow-pickle"),
        ("remote_code", Consent(trust_remote_code=True), "--trust-remote-code"),
    ],
)
def test_a_permission_is_asked_for_again(
    longformer_bundle: Path,
    copied: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    field: str,
    consent: Consent,
    flag: str,
) -> None:
    bundle = copied(longformer_bundle)
    edit(bundle, **{field: True})
    for line in refusals(bundle, tmp_path, capsys, Consent()):
        assert f"add {flag}" in line
    request = request_again(Bundle.open(bundle), consent)
    assert (request.allow_pickle, request.trust_remote_code) == (consent.allow_pickle, consent.trust_remote_code)
    assert run(["check", str(bundle), "--lengths", "4", flag]) == 0


def test_a_record_gives_no_permission(longformer_bundle: Path) -> None:
    record = Bundle.open(longformer_bundle).manifest.source
    request = SourceRequest.again(dataclasses.replace(record, pickled_weights=True, remote_code=True))
    assert not request.allow_pickle and not request.trust_remote_code


def test_a_model_of_the_hub_is_not_looked_for_here(
    longformer_bundle: Path, copied: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied(longformer_bundle)
    edit(bundle, location="owner/name", files={})
    assert request_again(Bundle.open(bundle), Consent()).location == "owner/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"config\.json differ from what was exported"):
        request_again(Bundle.open(bundle), Consent())


def test_a_factory_that_exits_is_an_error(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="the factory raised SystemExit: left"):
        load_source(SourceRequest(f"{file}:leaves"))
    early = tmp_path / "early.py"
    early.write_text("raise SystemExit('left')")
    with pytest.raises(ExportFailed, match="importing it raised SystemExit: left"):
        load_source(SourceRequest(f"{early}:make"))


@pytest.mark.parametrize("typed", ["layer.py:make", "./layer.py:make", "../source/layer.py:make"])
def test_a_relative_location_is_found_from_another_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(file.parent)
    bundle = export(typed, tmp_path / "bundle")
    location = Path(bundle.manifest.source.location.removesuffix(":make"))
    assert location.is_absolute() and location.samefile(file)
    monkeypatch.chdir(tmp_path)
    assert run(["check", str(bundle.path), "--lengths", "4"]) == 0


def test_a_relative_configuration_is_recorded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, BERT)
    monkeypatch.chdir(tmp_path)
    assert load_source(SourceRequest("config.json", random_weights=True)).record.location == str(config)
    assert load_source(SourceRequest(".", random_weights=True)).record.location == str(tmp_path)


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "architectures"})).save_pretrained(folder)
    return folder


def test_a_record_says_what_was_used_not_what_was_allowed(bert_folder: Path) -> None:
    request = SourceRequest(str(bert_folder), allow_pickle=True, trust_remote_code=True)
    record = load_source(request).record
    assert not record.pickled_weights and not record.remote_code
    torch.save(load_file(bert_folder / "model.safetensors"), bert_folder / "pytorch_model.bin")
    assert not load_source(request).record.pickled_weights
    (bert_folder / "model.safetensors").unlink()
    assert load_source(request).record.pickled_weights


def test_code_of_the_model_that_ran_is_recorded(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    (bert_folder / "own_config.py").write_text(
        "from transformers import BertConfig\nclass OwnConfig(BertConfig):\n    model_type = 'own-bert'\n"
    )
    config = json.loads((bert_folder / "config.json").read_text())
    config |= {"model_type": "own-bert", "auto_map": {"AutoConfig": "own_config.OwnConfig"}}
    (bert_folder / "config.json").write_text(json.dumps(config))
    record = load_source(SourceRequest(str(bert_folder), trust_remote_code=True)).record
    assert record.remote_code and "own_config.py" in record.files


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_a_model_of_the_hub_is_pinned(
    bert_folder: Path, monkeypatch: pytest.MonkeyPatch, has_safetensors: bool
) -> None:
    config, model = BertConfig.from_pretrained(bert_folder), BertModel.from_pretrained(bert_folder)
    config._commit_hash = "c0ffee"
    asked: list[tuple[str, bool | None]] = []

    def load_config(location: str, **options: Any) -> BertConfig:
        assert location == "owner/name"
        asked.append((options["revision"], None))
        return config

    def load_model(location: str, **options: Any) -> tuple[BertModel, dict[str, list[str]]]:
        assert location == "owner/name"
        asked.append((options["revision"], options["use_safetensors"]))
        if options["use_safetensors"] and not has_safetensors:
            raise OSError("owner/name does not appear to have a file named model.safetensors")
        return model, {"mismatched_keys": [], "missing_keys": []}

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load_config)
    monkeypatch.setattr(BertModel, "from_pretrained", load_model)
    record = load_source(SourceRequest("owner/name", allow_pickle=True)).record
    models = [("c0ffee", True)] if has_safetensors else [("c0ffee", True), ("c0ffee", False)]
    assert asked == [("main", None), *models]
    assert record.revision == "c0ffee" and record.location == "owner/name"
    assert record.pickled_weights is not has_safetensors
    asked.clear()
    load_source(SourceRequest.again(record, allow_pickle=True))
    assert asked == [("c0ffee", None), *models]
    assert SourceRequest.again(record, "other/name").revision == ""
