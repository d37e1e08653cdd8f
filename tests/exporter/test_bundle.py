"""Bundles are written whole or not at all, and read back with their hashes checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from longspan.exporter.bundle import Bundle, check_destination, write_bundle
from longspan.exporter.conversion import Conversion
from longspan.exporter.errors import BundleCorrupted, InvalidRequest
from longspan.exporter.manifest import InputRecord, Manifest, OutputRecord, SourceRecord
from longspan.exporter.sites import AttentionSite, Rung

MANIFEST = Manifest(
    source=SourceRecord("config", "config.json", "BertModel", {"config.json": "00"}, inputs=("input_ids",)),
    conversion=Conversion(window=16, max_positions=100),
    family="windowed-encoder",
    faithful=False,
    approximation="a window",
    max_length=100,
    trained_length=64,
    inputs=(InputRecord("input_ids", "int64", ("batch", "sequence"), "tokens", 1, 99),),
    outputs=(OutputRecord("y", "float32", ("batch", "sequence", 8)),),
    sites=(
        AttentionSite(
            "node", "layer.0", "SlidingWindowAttention", ("Q", "K", "V"), {"dilation": [1, 2]}, "family x",
            (Rung("function body", True, "because"),),
        ),
    ),
    opset=20,
    versions={"torch": "2"},
    created="2026-01-01T00:00:00+00:00",
)  # fmt: skip


def write(folder: Path) -> Manifest:
    (folder / "model.onnx").write_bytes(b"model")
    return MANIFEST


def test_a_manifest_survives_the_way_through_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 99}', '{"schema_version": 1, "source": {}}'])
def test_other_texts_are_no_manifest(text: str) -> None:
    with pytest.raises(BundleCorrupted):
        Manifest.from_json(text)


def test_what_is_written_can_be_opened(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "out", write)
    opened = Bundle.open(tmp_path / "out")
    assert opened == written
    assert dataclasses.replace(opened.manifest, files={}) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_bundle(tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", write)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "out", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (Bundle.open(tmp_path / "out").path / "model.onnx").read_bytes() == b"model"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_bundle_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", write)
    (tmp_path / "out" / "reports").mkdir()
    write_bundle(tmp_path / "out", write)
    assert not (tmp_path / "out" / "reports").exists()


def test_changed_and_missing_files_are_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", write)
    (tmp_path / "out" / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleCorrupted, match=r"model\.onnx: differs"):
        Bundle.open(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").unlink()
    with pytest.raises(BundleCorrupted, match=r"model\.onnx: is missing"):
        Bundle.open(tmp_path / "out")


def test_destinations_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    check_destination(tmp_path / "new", force=False)
    check_destination(tmp_path, force=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="would be lost"):
        check_destination(tmp_path, force=True)
    with pytest.raises(InvalidRequest, match="is a file"):
        check_destination(tmp_path / "notes.txt", force=True)
    write_bundle(tmp_path / "out", write)
    with pytest.raises(InvalidRequest, match="--force"):
        check_destination(tmp_path / "out", force=False)
    check_destination(tmp_path / "out", force=True)
