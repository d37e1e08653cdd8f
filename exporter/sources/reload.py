"""The source of a bundle again: nothing of it is loaded before it is known to be what was exported.

A bundle may come from anybody, and its manifest with it: what the manifest says was allowed when it was exported
allows nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..errors import BundleCorrupted, InvalidRequest
from ..manifest import SourceRecord, sha256_of
from .base import FACTORY, PROGRAM, SourceRequest, file_of, form_of
from .huggingface import is_hub_id, read_files


@dataclass(frozen=True)
class Consent:
    """What the user says about the source of a bundle, now.

    Attributes:
        location: Where the model is; None for where the manifest says.
        allow_pickle: Read weights that are stored as pickles, which can run any code.
        trust_remote_code: Let the model's own Python code run.
    """

    location: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


def request_again(bundle: Bundle, consent: Consent) -> SourceRequest:
    """The request that loads what a bundle was made from.

    Raises:
        InvalidRequest: the source is not there, is not what was exported, or would run code that the user has not
            allowed.
        BundleCorrupted: the manifest does not say what the source was.
    """
    record = bundle.manifest.source
    location = consent.location or record.location
    hub = _from_hub(record)
    if not record.files and not hub:
        raise BundleCorrupted(
            f"{bundle.path}: manifest.json has no hashes of its source {record.location}; next step: export again"
        )
    if not hub and not Path(file_of(location)).exists():
        raise InvalidRequest(
            f"{location}: the model that this bundle was made from is not there; next step: say where it is now, with "
            "--source"
        )
    form, expected = form_of(location), record.kind if record.kind in (FACTORY, PROGRAM) else ""
    if form != expected:
        raise InvalidRequest(
            f"{location}: is {form or 'a model of Hugging Face'}, and this bundle was made from "
            f"{expected or 'a model of Hugging Face'}; next step: give the model as it was with --source"
        )
    _refuse_unasked(bundle, location, consent)
    request = SourceRequest.again(
        record, consent.location, allow_pickle=consent.allow_pickle, trust_remote_code=consent.trust_remote_code
    )
    refuse_differing(location, record.files, hashes_of(request))
    return request


def refuse_differing(location: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse a source that is not what was exported.

    Args:
        location: The source.
        expected: SHA-256 of each file when it was exported.
        found: SHA-256 of each file now.

    Raises:
        InvalidRequest: a file differs, is missing or has been added.
    """
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        raise InvalidRequest(
            f"{location}: {', '.join(differing)} differ from what was exported (SHA-256), so nothing can be proved "
            "about the bundle; next step: export again, or give the model as it was with --source"
        )


def hashes_of(request: SourceRequest) -> dict[str, str]:
    """SHA-256 of each file that loading the request reads, by name; empty for a hub id."""
    return {file.name: sha256_of(file) for file in _files_of(request)}


def _files_of(request: SourceRequest) -> list[Path]:
    path = Path(file_of(request.location))
    if path.is_dir():
        return read_files(path, request.random_weights)
    return [path] if path.is_file() else []


def _from_hub(record: SourceRecord) -> bool:
    """Whether the manifest describes a model that was fetched under its name, so that no file of it has a hash."""
    return not record.files and record.kind in ("huggingface", "config") and is_hub_id(record.location)


def _refuse_unasked(bundle: Bundle, location: str, consent: Consent) -> None:
    """Refuse what the user has not allowed, whatever the manifest says."""
    record = bundle.manifest.source
    if record.pickled_weights and not consent.allow_pickle:
        raise InvalidRequest(
            f"{location}: was exported from pickled weights, and pickles can run any code; if you trust them, add "
            "--allow-pickle"
        )
    if record.remote_code and not consent.trust_remote_code:
        raise InvalidRequest(
            f"{location}: was exported by Python code of its own; if you trust it, add --trust-remote-code"
        )
    if form_of(location) != FACTORY or consent.location is not None:
        return
    # A factory beside the bundle's model came with it, and its hash from the same hand. So may one that a relative
    # location finds, which export never writes.
    file = Path(file_of(location))
    if not file.is_absolute() or file.resolve().is_relative_to(bundle.path.resolve()):
        raise InvalidRequest(
            f"{location}: is Python code that the bundle chose; if you trust it, add --source {location}"
        )
