"""Attention sites as a table, for every command that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..exporter.sites import AttentionSite, StandardSite

# Optional inputs in the words of a reader who does not know the operator; three projections are one feature.
_FEATURES = {
    "attn_mask": "padding",
    "nonpad_kv_seqlen": "lengths",
    "global_mask": "global tokens",
    "global_Q": "global projections",
    "band_bias": "bias",
    "sinks": "sinks",
    "spans": "spans",
}


def sites_table(sites: Sequence[AttentionSite], densities: Sequence[float | None] | None = None) -> Table:
    """One row per site: layer, operator, pattern, heads, features, density if given, lowering."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "operator", "pattern", "heads", "with"):
        table.add_column(title, overflow="fold")
    if densities is not None:
        table.add_column("density", justify="right")
    for index, site in enumerate(sites):
        features = ", ".join(words for name, words in _FEATURES.items() if name in site.inputs)
        cells = [site.layer or site.node, site.operator, site.pattern, site.heads, features]
        if densities is not None:
            density = densities[index]
            cells.append("" if density is None else f"{density:.1%}")
        table.add_row(*cells)
    return table


def lowering_lines(sites: Sequence[AttentionSite]) -> list[str]:
    """The lowering ladder, once for each group of sites that share it: what was chosen, what was refused and why."""
    groups: dict[tuple[object, ...], int] = {}
    for site in sites:
        groups[site.ladder] = groups.get(site.ladder, 0) + 1
    lines = []
    for ladder, count in groups.items():
        if len(groups) > 1:
            lines.append(f"{count} sites:")
        lines += [f"  {'✓' if rung.chosen else '✗'} {rung.lowering}: {rung.reason}" for rung in ladder]  # type: ignore[attr-defined]
    return lines


def standard_lines(standard: Sequence[StandardSite]) -> list[str]:
    """Attention that stays standard, once for each reason, with the layers it holds for."""
    layers: dict[str, list[str]] = {}
    for site in standard:
        layers.setdefault(site.reason, []).append(site.layer)
    return [f"not replaced: {', '.join(names)}: {reason}" for reason, names in layers.items()]
