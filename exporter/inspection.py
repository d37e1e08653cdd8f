"""What a bundle's attention sites are, or what an export of a model would make of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..plugins.sliding_window_attention.definition import Attributes, Shapes, cost
from .bundle import MANIFEST_FILE, Bundle
from .conversion import UNCHANGED, Conversion
from .errors import InvalidRequest
from .sites import AttentionSite, StandardSite
from .sources import SourceRequest


@dataclass(frozen=True)
class SiteReport:
    """One site and what it saves at one length.

    Attributes:
        site: The site.
        density: Scored query-key pairs over all pairs, without global tokens; None where the heads are unknown.
    """

    site: AttentionSite
    density: float | None


@dataclass(frozen=True)
class Inspection:
    """The sites of a bundle or a model.

    Attributes:
        target: What was inspected.
        length: Tokens that the densities are for.
        sites: One report per site, in graph order.
        standard: Attention that stays as the stock exporter makes it.
    """

    target: str
    length: int
    sites: tuple[SiteReport, ...]
    standard: tuple[StandardSite, ...] = ()


def inspect(
    target: str | os.PathLike[str] | SourceRequest, *, length: int = 4096, conversion: Conversion = UNCHANGED
) -> Inspection:
    """List the attention sites of a bundle, or those that exporting a model would replace.

    A model is loaded and traced, nothing is written.

    Args:
        target: A bundle's folder, or MODEL as `export` takes it.
        length: Tokens to compute densities for.
        conversion: For a model: what to change in its mathematics.

    Raises:
        InvalidRequest: there is no such bundle or model, or `length` is below 1.
        NothingReplaced: the model has no site.
        ExportFailed: the model cannot be traced.
        BundleCorrupted: the bundle's files are damaged.
    """
    if length < 1:
        raise InvalidRequest(f"length {length}: must be 1 or more")
    request = target if isinstance(target, SourceRequest) else SourceRequest(os.fspath(target))
    if (Path(request.location) / MANIFEST_FILE).is_file():
        manifest = Bundle.open(request.location).manifest
        sites, standard = manifest.sites, manifest.standard_sites
    else:
        from .pipeline import rewrite

        rewritten = rewrite(request, conversion)
        sites, standard = rewritten.sites, rewritten.standard
    reports = tuple(SiteReport(site, _density(site, length)) for site in sites)
    return Inspection(request.location, length, reports, standard)


def _density(site: AttentionSite, length: int) -> float | None:
    attributes = Attributes.from_mapping(site.attributes)
    heads = attributes.q_num_heads
    if not heads:
        return None
    shapes = Shapes("bsd", 1, heads, attributes.kv_num_heads, length, length, 1, 1)
    return cost(shapes, attributes).pairs / (heads * length * length)
