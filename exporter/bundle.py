"""Bundles on disk, read back with their hashes checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleCorrupted, InvalidRequest
from .manifest import Manifest
from .whole_folders import BUNDLE, MANIFEST_FILE, read_manifest, verify_files

MODEL_FILE = "model.onnx"
REPORTS_FOLDER = "reports"


@dataclass(frozen=True)
class Bundle:
    """An exported model in a folder."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL_FILE

    @property
    def reports_path(self) -> Path:
        """Folder of the check and bench reports; it may not exist yet."""
        return self.path / REPORTS_FOLDER

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, to_run: bool = True) -> Bundle:
        """Read the bundle in folder `path`.

        Args:
            path: The bundle's folder.
            to_run: Whether its model will be read, so that what the ONNX file refers to matters; needs onnx.

        Raises:
            InvalidRequest: there is no such folder, or it holds no bundle.
            BundleCorrupted: a file is missing, is a link, has no hash in the manifest or differs from it.
        """
        folder = Path(path)
        file = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise InvalidRequest(f"{folder}: no such folder; next step: longspan export MODEL {folder}")
        if not file.is_file():
            raise InvalidRequest(
                f"{folder}: has no {MANIFEST_FILE}, so it is not a bundle; write one with longspan export"
            )
        manifest = read_manifest(folder, Manifest.from_json, BUNDLE)
        if MODEL_FILE not in manifest.files:
            raise BundleCorrupted(f"{file}: has no hash of {MODEL_FILE}; next step: export again")
        verify_files(folder, manifest.files, BUNDLE)
        references = _weight_files(folder / MODEL_FILE) if to_run else set()
        unlisted = sorted(references - {Path(name).as_posix() for name in manifest.files})
        if unlisted:
            raise BundleCorrupted(
                f"{folder / MODEL_FILE}: reads {', '.join(map(repr, unlisted))}, of which {MANIFEST_FILE} has no hash; "
                "next step: export again"
            )
        return cls(folder, manifest)


def _weight_files(model: Path) -> set[str]:
    """Files beside an ONNX file that hold weights of it; none of them is opened.

    Raises:
        BundleCorrupted: the file is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(model, load_external_data=False)
    except DecodeError as error:
        raise BundleCorrupted(f"{model}: is not an ONNX file ({error}); next step: export again") from error
    # Where a tensor may stand: initializers and attributes, of the graph, its subgraphs and the functions.
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    tensors: list[onnx.TensorProto] = []
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            tensors.extend(graph.initializer)
            tensors.extend(part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
            continue
        for attribute in nodes.pop().attribute:
            graphs.extend([attribute.g] * attribute.HasField("g") + list(attribute.graphs))
            tensors.extend([attribute.t, *attribute.tensors])
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                tensors.extend([sparse.values, sparse.indices])
    return {
        Path(entry.value).as_posix() for tensor in tensors for entry in tensor.external_data if entry.key == "location"
    }
