"""Attention sites as a table, for every command that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..exporter.sites import AttentionSite


def sites_table(sites: Sequence[AttentionSite], densities: Sequence[float | None] | None = None) -> Table:
    """One row per site: layer, operator, pattern, heads, inputs besides Q, K, V, density if given, lowering."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "operator", "pattern", "heads", "with"):
        table.add_column(title, overflow="fold")
    if densities is not None:
        table.add_column("density", justify="right")
    table.add_column("lowered to", overflow="fold")
    for index, site in enumerate(sites):
        extras = ", ".join(name for name in site.inputs if name not in ("Q", "K", "V"))
        cells = [site.layer or site.node, site.operator, site.pattern, site.heads, extras]
        if densities is not None:
            density = densities[index]
            cells.append("" if density is None else f"{density:.1%}")
        table.add_row(*cells, " / ".join(rung.lowering for rung in site.ladder if rung.chosen))
    return table
