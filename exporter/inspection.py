"""What a bundle's attention sites are, or what an export of a model would make of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins.attention.operands import Shapes
from ..plugins.sliding_window_attention.definition import Attributes, cost
from .bundle import MANIFEST_FILE, Bundle
from .conversion import UNCHANGED, Conversion
from .errors import InvalidRequest
from .sites import AttentionSite, StandardSite, longspan_nodes
from .sources import SourceRequest

if TYPE_CHECKING:
    import onnx_ir as ir

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
        density: Scored query-key pairs over all pairs; 1 at most.
        flops: Floating-point operations of its two matrix products; None where sizes are unknown.
        dense_flops: The same for dense attention of the same heads, which scores every pair.
        saved: 1 - density: the share of `dense_flops` that is not spent.
    """

    site: AttentionSite
    heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    density: float
    flops: int | None
    dense_flops: int | None
    saved: float


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

    def to_json(self) -> str:
        """Indented JSON text: every field of every site, and its pattern in words."""
        data = dataclasses.asdict(self)
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
    length = _checked(length, source.max_length)
    return Inspection(
        target=request.location,
        kind="model",
        model_class=source.record.model_class,
        random_weights=source.record.random_weights,
        length=length,
        max_length=source.max_length,
        global_tokens=conversion.global_tokens,
        approximation=approximation(rewritten.prepared, conversion),
        sites=_reports(rewritten.sites, rewritten.graph, length, conversion.global_tokens),
        standard=rewritten.standard,
        encoder_of=source.record.encoder_of,
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
    length = _checked(length, manifest.max_length)
    global_tokens = manifest.conversion.global_tokens
    return Inspection(
        target=location,
        kind="bundle",
        model_class=manifest.source.model_class,
        random_weights=manifest.source.random_weights,
        length=length,
        max_length=manifest.max_length,
        global_tokens=global_tokens,
        approximation=manifest.approximation,
        sites=_reports(manifest.sites, ir.load(bundle.model_path), length, global_tokens),
        standard=manifest.standard_sites,
        encoder_of=manifest.source.encoder_of,
    )


def _checked(length: int | None, limit: int | None) -> int:
    if length is None:
        return DEFAULT_LENGTH if limit is None else min(DEFAULT_LENGTH, limit)
    if limit is not None and length > limit:
        raise InvalidRequest(f"--length {length}: must be 1 … {limit}, which is what the model accepts")
    return length


def _reports(
    sites: tuple[AttentionSite, ...], graph: ir.Model, length: int, global_tokens: int
) -> tuple[SiteReport, ...]:
    nodes = {node.name: node for node in longspan_nodes(graph)}
    return tuple(_report(site, nodes.get(site.node), length, global_tokens) for site in sites)


def _report(site: AttentionSite, node: ir.Node | None, length: int, global_tokens: int) -> SiteReport:
    attributes = Attributes.from_mapping(site.attributes)
    sizes = _sizes(node, attributes)
    heads, kv_heads = sizes.get("heads", 0), sizes.get("kv_heads", 0)
    size, v_size = sizes.get("head_size", 0), sizes.get("v_head_size", 0)
    globals_here = min(global_tokens, length) if "global_mask" in site.inputs else 0
    # Where the heads are unknown, as many as have a dilation of their own stand for all: the density is the same.
    counted = heads or len(attributes.dilation)
    shapes = Shapes("bsd", 1, counted, kv_heads or counted, length, length, size, v_size)
    work = cost(shapes, attributes, global_tokens=globals_here)
    pairs = counted * length * length
    known = heads and size and v_size
    density = min(1.0, work.pairs / pairs)
    dense = 2 * pairs * (size + v_size)
    return SiteReport(
        site=site,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        v_head_size=v_size,
        density=density,
        flops=min(work.flops, dense) if known else None,
        dense_flops=dense if known else None,
        saved=1.0 - density,
    )


def _sizes(node: ir.Node | None, attributes: Attributes) -> Mapping[str, int]:
    """Heads and head sizes of a node, as far as its attributes and the shapes of its values tell."""
    values = node.inputs[:3] if node is not None else (None, None, None)
    q, k, v = (value.shape if value is not None else None for value in values)
    sizes: dict[str, Any] = {"heads": attributes.q_num_heads, "kv_heads": attributes.kv_num_heads}
    for name, heads, shape in (("head_size", "heads", q), ("", "kv_heads", k), ("v_head_size", "kv_heads", v)):
        if shape is None or len(shape) not in (3, 4):
            continue
        if len(shape) == 4:
            sizes[heads] = shape[1]
            sizes[name] = shape[3]
        elif sizes[heads] and isinstance(shape[2], int):
            sizes[name] = shape[2] // sizes[heads]
    return {name: size for name, size in sizes.items() if isinstance(size, int)}
