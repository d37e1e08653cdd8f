"""The bundle's manifest: what was exported, from what, how, and what may be expected of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conversion import Conversion
from .errors import BundleCorrupted
from .sites.record import AttentionSite, Rung, StandardSite

SCHEMA_VERSION = 2
"""2 added to each site its recorded pattern and where its block lists come from; no release wrote version 1."""


@dataclass(frozen=True)
class SourceRecord:
    """Where a model came from, so that an export can be repeated and checked.

    Attributes:
        kind: ``"huggingface"``, ``"config"``, ``"factory"`` or ``"program"``.
        location: The MODEL argument: a folder, file or ``file.py:factory``, absolute, or a hub id.
        model_class: Python class of the traced module.
        files: SHA-256 of each file that was read, by name relative to `location`.
        random_weights: Whether weights were drawn instead of read.
        seed: Seed of the random weights and of the example inputs.
        pickled_weights: Whether pickles were loaded, which needs ``--allow-pickle``.
        remote_code: Whether Python code of the model's own ran, which needs ``--trust-remote-code``.
        inputs: Forward inputs that ``--inputs`` chose; empty for the default choice.
        revision: Commit of a model of the hub; empty for what has none.
        encoder_of: Class of the encoder-decoder of which only the encoder is exported; empty for other models.
    """

    kind: str
    location: str
    model_class: str
    files: dict[str, str]
    random_weights: bool = False
    seed: int = 0
    pickled_weights: bool = False
    remote_code: bool = False
    inputs: tuple[str, ...] = ()
    revision: str = ""
    encoder_of: str = ""


@dataclass(frozen=True)
class InputRecord:
    """One graph input, as read back from the written file.

    Attributes:
        name: Input name.
        dtype: numpy type name.
        shape: A size, or ``"batch"`` or ``"sequence"``, or another symbol, per dimension.
        role: ``"tokens"``, ``"padding_mask"``, ``"global_mask"`` or ``"data"``; decides how checking fills it.
        low: Smallest value to draw (integers).
        high: Largest value to draw, inclusive (integers).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str
    low: int = 0
    high: int = 1


@dataclass(frozen=True)
class OutputRecord:
    """One graph output, as read back from the written file."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def fixed_length(inputs: Iterable[InputRecord]) -> int | None:
    """The one size of the first sequence among these inputs, their dimension 1; None where it is open."""
    sequences = [record.shape[1] for record in inputs if len(record.shape) > 1]
    return sequences[0] if sequences and isinstance(sequences[0], int) else None


@dataclass(frozen=True)
class KernelsRecord:
    """The GPU kernels that the model carries; see ``docs/kernel-packs.md``.

    Attributes:
        targets: ``"sm_90"``, …, ``"ptx"``.
        pack: SHA-256 in the pack's header, by which nodes name it.
        bytes: Size of the pack.
        kernels: Kernels in it.
        compiler: What compiled them.
        refused: Why a site has none, by the name of its node.
    """

    targets: tuple[str, ...]
    pack: str
    bytes: int
    kernels: int
    compiler: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but its weights.

    Attributes:
        source: Where the model came from.
        conversion: What was changed in its mathematics before tracing.
        family: Name of the adapter that recognised the sites; empty when the model held longspan operators itself.
        faithful: Whether the sites compute what the original model does; else `approximation` says what differs.
        approximation: Where the approximation error comes from; empty when faithful and not converted.
        max_length: Longest sequence that the model accepts; None when unlimited.
        trained_length: Longest sequence that the original model accepts; None when unlimited or the same.
        inputs: Graph inputs.
        outputs: Graph outputs.
        sites: Attention sites with their lowering.
        opset: Opset of the default domain.
        versions: Versions of the packages that took part.
        created: UTC time, ISO 8601.
        standard_sites: Attention that was seen and stays as the stock exporter makes it.
        gpu: GPU kernels in the model; None where there are none.
        files: SHA-256 of each file of the bundle but this one.
        schema_version: Version of this record.
    """

    source: SourceRecord
    conversion: Conversion
    family: str
    faithful: bool
    approximation: str
    max_length: int | None
    trained_length: int | None
    inputs: tuple[InputRecord, ...]
    outputs: tuple[OutputRecord, ...]
    sites: tuple[AttentionSite, ...]
    opset: int
    versions: dict[str, str]
    created: str
    standard_sites: tuple[StandardSite, ...] = ()
    gpu: KernelsRecord | None = None
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def fixed_length(self) -> int | None:
        """The one length that the graph takes; None where its sequence is open."""
        return fixed_length(self.inputs)

    def to_json(self) -> str:
        """Indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse what `to_json` wrote.

        Raises:
            BundleCorrupted: the text is not a manifest of a supported version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise BundleCorrupted(
                    f"manifest.json has schema version {version}; allowed: {SCHEMA_VERSION}; next step: export again"
                )
            data["source"] = SourceRecord(**_tuples(data["source"], "inputs"))
            data["conversion"] = Conversion(**data["conversion"])
            data["inputs"] = tuple(InputRecord(**_tuples(record, "shape")) for record in data["inputs"])
            data["outputs"] = tuple(OutputRecord(**_tuples(record, "shape")) for record in data["outputs"])
            data["sites"] = tuple(site_of(record) for record in data["sites"])
            data["standard_sites"] = tuple(StandardSite(**record) for record in data.get("standard_sites", ()))
            if data.get("gpu") is not None:
                data["gpu"] = KernelsRecord(**_tuples(data["gpu"], "targets"))
            _check_files("files", data["files"])
            _refuse_outside(data["files"])
            _check_files("source.files", data["source"].files)
            if not isinstance(data["source"].location, str) or not isinstance(data["source"].revision, str):
                raise TypeError("location or revision of the source is not a text")
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleCorrupted(
                f"manifest.json is not a Longspan manifest ({type(error).__name__}: {error}); next step: export again"
            ) from error


def _check_files(name: str, files: Any) -> None:
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise TypeError(f"{name} is not a table of SHA-256 by name")


def _refuse_outside(files: dict[str, str]) -> None:
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise BundleCorrupted(f"manifest.json names {name!r}, outside the bundle; next step: export again")


def site_of(record: dict[str, Any]) -> AttentionSite:
    """The site of its JSON values.

    Raises:
        KeyError: a value is missing.
        TypeError: a value is of another type, or there is one too many.
    """
    record = _tuples(record, "inputs")
    record["ladder"] = tuple(Rung(**rung) for rung in record["ladder"])
    site = AttentionSite(**record)
    if not isinstance(site.pattern_json, str) or not isinstance(site.lists, str):
        raise TypeError(f"pattern or lists of site {site.node} is not a text")
    return site


def _tuples(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {name: tuple(value) if name in keys else value for name, value in record.items()}


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
