"""What a bundle's attention sites are, or what an export of a model would make of them."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle
from .conversion import UNCHANGED, Conversion
from .errors import InvalidRequest
from .manifest import fixed_length
from .sites.graph import SiteGraph
from .sites.kind import Unknown
from .sites.record import AttentionSite, StandardSite
from .sources import SourceRequest
from .whole_folders import MANIFEST_FILE

DEFAULT_LENGTH = 4096
"""Tokens to compute costs for; less where the model accepts less."""


@dataclass(frozen=True)
class SiteReport:
    """One site and what it saves at one length, for one text.

    Attributes:
        site: The site.
        heads: Query heads; 0 where unknown.
        kv_heads: Key and value heads; 0 where unknown.
        head_size: Channels of a query head; 0 where unknown.
        v_head_size: Channels of a value head; 0 where unknown.
        density: Query-key pairs that its softmaxes count over all pairs; a key that is counted twice is two. None where
            the graph does not say; `notes` then says why.
        flops: Floating-point operations of its two matrix products; None where sizes or pairs are unknown.
        dense_flops: The same for dense attention of the same heads, which scores every pair.
        saved: The share of `dense_flops` that is not spent; None where `density` is.
        length: Tokens that these numbers are for: another number than the inspection's where block lists are fixed.
        notes: What a reader of the numbers must know, and where the graph contradicts the recorded pattern.
    """

    site: AttentionSite
    heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    density: float | None
    flops: int | None
    dense_flops: int | None
    saved: float | None
    length: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """The attention of a bundle or a model.

    Attributes:
        target: What was inspected.
        kind: ``"bundle"``, or ``"model"`` where the sites are those that an export would replace.
        model_class: Python class of the module.
        random_weights: Whether the module is a small one of the same architecture, with fewer layers and short windows.
        length: Tokens that costs are for.
        max_length: Longest sequence that the model accepts; None when unlimited.
        global_tokens: Global tokens that `flops` and `density` count at sites that take them.
        approximation: Where the result differs from the original model, and why; empty when it does not.
        sites: One report per site that is replaced, in graph order.
        standard: Attention that stays as the stock exporter makes it.
        encoder_of: Class of the encoder-decoder of which only the encoder is exported; empty for other models.
        graph: The graph of the sites, for pictures; no part of the JSON.
    """

    target: str
    kind: str
    model_class: str
    random_weights: bool
    length: int
    max_length: int | None
    global_tokens: int
    approximation: str
    sites: tuple[SiteReport, ...]
    standard: tuple[StandardSite, ...]
    encoder_of: str = ""
    graph: SiteGraph | None = dataclasses.field(default=None, compare=False, repr=False)

    def to_json(self) -> str:
        """Indented JSON text: every field of every site, and its pattern in words."""
        data = dataclasses.asdict(dataclasses.replace(self, graph=None))
        del data["graph"]
        for entry, report in zip(data["sites"], self.sites, strict=True):
            entry["pattern"] = report.site.pattern
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def inspect(
    target: str | os.PathLike[str] | SourceRequest,
    *,
    length: int | None = None,
    conversion: Conversion = UNCHANGED,
) -> Inspection:
    """List the attention sites of a bundle, or those that exporting a model would replace.

    A model is loaded and traced, nothing is written.

    Args:
        target: A bundle's folder, or MODEL as `export` takes it.
        length: Tokens to compute costs for; `DEFAULT_LENGTH`, or what the model accepts if that is less.
        conversion: For a model: what to change in its mathematics.

    Raises:
        InvalidRequest: there is no such bundle or model, `length` is out of range, or a bundle is to be converted.
        NothingReplaced: the model has no site.
        ExportFailed: the model cannot be traced.
        BundleCorrupted: the bundle's files are damaged.
        EnvironmentLacks: a package is missing.
    """
    if length is not None and length < 1:
        raise InvalidRequest(f"--length {length}: must be 1 or more")
    request = target if isinstance(target, SourceRequest) else SourceRequest(os.fspath(target))
    if (Path(request.location) / MANIFEST_FILE).is_file():
        return _inspect_bundle(request.location, length, conversion)
    from .pipeline import approximation, rewrite

    rewritten = rewrite(request, conversion)
    source = rewritten.prepared.source
    length = _checked(length, source.max_length, fixed_length(source.input_records.values()))
    graph = SiteGraph(rewritten.graph, tuple(source.input_records.values()))
    return Inspection(
        target=request.location,
        kind="model",
        model_class=source.record.model_class,
        random_weights=source.record.random_weights,
        length=length,
        max_length=source.max_length,
        global_tokens=conversion.global_tokens,
        approximation=approximation(rewritten.prepared, conversion),
        sites=_reports(rewritten.sites, graph, length, conversion.global_tokens),
        standard=rewritten.standard,
        encoder_of=source.record.encoder_of,
        graph=graph,
    )


def _inspect_bundle(location: str, length: int | None, conversion: Conversion) -> Inspection:
    import onnx_ir as ir

    if conversion != UNCHANGED:
        raise InvalidRequest(
            f"{location}: is a bundle, exported already; options that change a model do not apply; next step: inspect "
            "the model that it came from"
        )
    bundle = Bundle.open(location)
    manifest = bundle.manifest
    length = _checked(length, manifest.max_length, manifest.fixed_length)
    global_tokens = manifest.conversion.global_tokens
    graph = SiteGraph(ir.load(bundle.model_path), manifest.inputs)
    return Inspection(
        target=location,
        kind="bundle",
        model_class=manifest.source.model_class,
        random_weights=manifest.source.random_weights,
        length=length,
        max_length=manifest.max_length,
        global_tokens=global_tokens,
        approximation=manifest.approximation,
        sites=_reports(manifest.sites, graph, length, global_tokens),
        standard=manifest.standard_sites,
        encoder_of=manifest.source.encoder_of,
        graph=graph,
    )


def _checked(length: int | None, limit: int | None, fixed: int | None) -> int:
    if fixed is not None:
        if length not in (None, fixed):
            raise InvalidRequest(f"--length {length}: the model is made for {fixed} tokens only; allowed: that")
        return fixed
    if length is None:
        return DEFAULT_LENGTH if limit is None else min(DEFAULT_LENGTH, limit)
    if limit is not None and length > limit:
        raise InvalidRequest(f"--length {length}: must be 1 … {limit}, which is what the model accepts")
    return length


def _reports(
    sites: tuple[AttentionSite, ...], graph: SiteGraph, length: int, global_tokens: int
) -> tuple[SiteReport, ...]:
    return tuple(_report(site, graph, length, global_tokens) for site in sites)


def _report(site: AttentionSite, graph: SiteGraph, length: int, global_tokens: int) -> SiteReport:
    sizes = graph.sizes(site)
    named = dataclasses.asdict(sizes)
    try:
        work = site.kind.work(site, graph, length, global_tokens)
    except Unknown as error:
        return SiteReport(
            site, **named, density=None, flops=None, dense_flops=None, saved=None, length=length, notes=(str(error),)
        )
    return SiteReport(
        site,
        **named,
        density=work.terms / work.pairs,
        flops=2 * work.computed * sizes.channels if sizes.channels else None,
        dense_flops=2 * work.pairs * sizes.channels if sizes.channels else None,
        saved=1.0 - work.computed / work.pairs,
        length=work.length,
        notes=work.notes,
    )
