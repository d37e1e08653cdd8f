"""Bundles are written whole or not at all, and read back with their hashes checked."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from longspan.exporter.bundle import Bundle
from longspan.exporter.conversion import Conversion
from longspan.exporter.errors import BundleCorrupted, ExportFailed, InvalidRequest
from longspan.exporter.manifest import InputRecord, Manifest, OutputRecord, SourceRecord
from longspan.exporter.sites.record import AttentionSite, Rung
from longspan.exporter.whole_folders import check_destination, reserved

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


def write_bundle(out: Path, write_model: Callable[[Path], Manifest] = write) -> Bundle:
    with reserved(out, force=True) as reservation:
        return Bundle(out, reservation.write(write_model))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Writes half a bundle to sys.argv[1], then dies at the point that sys.argv[2] names.
KILLED = """
import os, signal, sys
from pathlib import Path
from longspan.exporter import whole_folders

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write(folder):
    (folder / "model.onnx").write_bytes(b"half")
    if sys.argv[2] == "writing":
        die()
    return type("Manifest", (), {})

whole_folders.dataclasses.replace = lambda manifest, files: type("M", (), {"to_json": lambda self: "{}"})()
if sys.argv[2] == "renaming":
    rename = Path.rename
    Path.rename = lambda self, to: die() if self.name == "new" else rename(self, to)
with whole_folders.reserved(Path(sys.argv[1]), force=True) as reservation:
    reservation.write(write)
"""


def killed(out: Path, where: str) -> None:
    code = subprocess.run([sys.executable, "-c", KILLED, str(out), where], check=False).returncode
    assert code == -signal.SIGKILL


def test_a_manifest_survives_the_way_through_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 99}', '{"schema_version": 2, "source": {}}'])
def test_other_texts_are_no_manifest(text: str) -> None:
    with pytest.raises(BundleCorrupted):
        Manifest.from_json(text)


@pytest.mark.parametrize("change", [{"pattern_json": 3}, {"pattern_json": None}, {"lists": ["computed"]}, {"more": 1}])
def test_a_site_of_other_types_is_refused(change: dict[str, object]) -> None:
    data = json.loads(MANIFEST.to_json())
    assert data["sites"]
    data["sites"][0] |= change
    with pytest.raises(BundleCorrupted, match="not a Longspan manifest"):
        Manifest.from_json(json.dumps(data))


def test_what_is_written_can_be_opened(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "out")
    opened = Bundle.open(tmp_path / "out")
    assert opened == written
    assert dataclasses.replace(opened.manifest, files={}) == MANIFEST
    assert names(tmp_path) == ["out"]


def test_a_full_disk_leaves_nothing_not_even_the_folders_above(tmp_path: Path) -> None:
    def fill(folder: Path) -> Manifest:
        (folder / "model.onnx.data").write_bytes(b"half")
        Path("/dev/full").write_bytes(b"the other half")
        return MANIFEST

    with pytest.raises(ExportFailed, match=r"No space left on device \([\d,]+ MiB free\).*make room"):
        write_bundle(tmp_path / "models" / "new" / "out", fill)
    assert names(tmp_path) == []


def test_a_limit_on_file_sizes_leaves_the_old_bundle(tmp_path: Path, small_files: None) -> None:
    def too_large(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(bytes(1 << 17))
        return MANIFEST

    write_bundle(tmp_path / "out")
    with pytest.raises(ExportFailed, match=r"File too large.*ulimit"):
        write_bundle(tmp_path / "out", too_large)
    assert Bundle.open(tmp_path / "out").model_path.read_bytes() == b"model"
    assert names(tmp_path) == ["out"]


def test_an_interruption_leaves_the_old_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "out", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert Bundle.open(tmp_path / "out").model_path.read_bytes() == b"model"
    assert names(tmp_path) == ["out"]


def test_a_killed_export_leaves_the_old_bundle_and_is_tidied_by_the_next(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out")
    killed(tmp_path / "out", "writing")
    assert names(tmp_path) == [".out.export", "out"]
    assert Bundle.open(tmp_path / "out").model_path.read_bytes() == b"model"
    write_bundle(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_an_old_bundle_that_a_killed_export_had_moved_aside_comes_back(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out")
    killed(tmp_path / "out", "renaming")
    assert names(tmp_path) == [".out.export"]
    with pytest.raises(InvalidRequest, match="--force"), reserved(tmp_path / "out", force=False):
        pytest.fail("the old bundle was not put back before the destination was judged")
    assert names(tmp_path) == ["out"]
    assert Bundle.open(tmp_path / "out").model_path.read_bytes() == b"model"


def test_of_two_exports_to_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    with reserved(tmp_path / "out", force=False) as first:
        with pytest.raises(InvalidRequest, match="another export is writing there"):
            write_bundle(tmp_path / "out")
        first.write(write)
    assert names(tmp_path) == ["out"]
    write_bundle(tmp_path / "out")


def test_what_came_to_stand_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with reserved(tmp_path / "out", force=True) as reservation:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(InvalidRequest, match="would be lost"):
            reservation.write(write)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_new_bundle_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out")
    (tmp_path / "out" / "reports").mkdir()
    write_bundle(tmp_path / "out")
    assert not (tmp_path / "out" / "reports").exists()


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path) -> None:
    write_bundle(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "reports").mkdir()
    write_bundle(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "real" / "reports").exists()


def test_changed_and_missing_files_are_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleCorrupted, match=r"model\.onnx: differs"):
        Bundle.open(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").unlink()
    with pytest.raises(BundleCorrupted, match=r"model\.onnx: is missing"):
        Bundle.open(tmp_path / "out")


def external_tensor(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def as_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))


def in_a_branch(tensor: onnx.TensorProto) -> onnx.ModelProto:
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))


def in_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    function = onnx.helper.make_function("d", "f", [], ["c"], [constant], [onnx.helper.make_opsetid("", 20)])
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), functions=[function])


@pytest.mark.parametrize("model", [as_initializer, in_a_branch, in_a_function])
def test_weights_beside_the_model_must_have_a_hash(
    tmp_path: Path, model: Callable[[onnx.TensorProto], onnx.ModelProto]
) -> None:
    def write_external(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(model(external_tensor("model.onnx.data")).SerializeToString())
        (folder / "model.onnx.data").write_bytes(bytes(4))
        return MANIFEST

    write_bundle(tmp_path / "out", write_external)
    manifest = Bundle.open(tmp_path / "out").manifest
    listed = {"model.onnx": manifest.files["model.onnx"]}
    (tmp_path / "out" / "manifest.json").write_text(dataclasses.replace(manifest, files=listed).to_json())
    with pytest.raises(BundleCorrupted, match=r"reads 'model\.onnx\.data', of which manifest\.json has no hash"):
        Bundle.open(tmp_path / "out")


@pytest.mark.parametrize("location", ["/etc/hostname", "../other"])
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    def write_external(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(as_initializer(external_tensor(location)).SerializeToString())
        return MANIFEST

    write_bundle(tmp_path / "out", write_external)
    with pytest.raises(BundleCorrupted, match="has no hash"):
        Bundle.open(tmp_path / "out")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    def write_text(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(b"\xff\xff")
        return MANIFEST

    write_bundle(tmp_path / "out", write_text)
    with pytest.raises(BundleCorrupted, match="is not an ONNX file"):
        Bundle.open(tmp_path / "out")


def test_links_are_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out")
    model = tmp_path / "out" / "model.onnx"
    model.rename(tmp_path / "elsewhere.onnx")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleCorrupted, match="is a link"):
        Bundle.open(tmp_path / "out")


def test_a_linked_folder_inside_is_refused(tmp_path: Path) -> None:
    def write_nested(folder: Path) -> Manifest:
        (folder / "weights.d").write_bytes(b"")
        return write(folder)

    manifest = write_bundle(tmp_path / "out", write_nested).manifest
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "weights.d").rename(tmp_path / "elsewhere" / "file")
    (tmp_path / "out" / "inner").symlink_to(tmp_path / "elsewhere")
    files = {"model.onnx": manifest.files["model.onnx"], "inner/file": manifest.files["weights.d"]}
    (tmp_path / "out" / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(BundleCorrupted, match="is a link"):
        Bundle.open(tmp_path / "out")


def test_destinations_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    check_destination(tmp_path / "new", force=False)
    check_destination(tmp_path, force=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="would be lost"):
        check_destination(tmp_path, force=True)
    with pytest.raises(InvalidRequest, match="is a file"):
        check_destination(tmp_path / "notes.txt", force=True)
    with pytest.raises(InvalidRequest, match="mount point"):
        check_destination(Path("/proc"), force=True)
    write_bundle(tmp_path / "out")
    with pytest.raises(InvalidRequest, match="--force"):
        check_destination(tmp_path / "out", force=False)
    check_destination(tmp_path / "out", force=True)
