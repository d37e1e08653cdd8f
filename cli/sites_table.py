"""Attention sites as a table, for every command that lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from ..exporter.inspection import SiteReport
    from ..exporter.sites.groups import Fold
    from ..exporter.sites.record import AttentionSite, StandardSite

# Optional inputs that belong to the pattern, in the words of a reader who does not know the operator.
_FEATURES = {
    "global_mask": "global",
    "band_bias": "bias",
    "distance_bias": "bias",
    "sinks": "sinks",
    "spans": "spans",
    "block_masks": "masks",
    "q_positions": "positions",
}
_UNKNOWN = "?"

# Title, right-aligned or not; the order of `_Row`.
_COLUMNS = {
    "layer": False,
    "operator": False,
    "pattern": False,
    "window": True,
    "blocks": True,
    "heads": True,
    "density": True,
    "saved": True,
    "recognised by": False,
    "replaced": False,
}
# What a narrow terminal reads above the table where it is the same for all sites.
_LIFTED = ("operator", "recognised by", "replaced")
# Columns stand two blanks apart where there is room for it.
_WIDE = 100


@dataclasses.dataclass(frozen=True)
class Row:
    """What the table says about a site; a fold of several sites shares everything but its name."""

    layer: str
    operator: str = ""
    pattern: str = ""
    window: str = ""
    blocks: str = ""
    heads: str = ""
    density: str = ""
    saved: str = ""
    recognised_by: str = ""
    replaced: str = "no"

    @property
    def cells(self) -> dict[str, str]:
        """Text by column title."""
        return dict(zip(_COLUMNS, dataclasses.astuple(self), strict=True))


def encoder_lines(encoder_of: str) -> list[str]:
    """What is exported of an encoder-decoder of this class; nothing for other models."""
    return [f"the encoder of {encoder_of}; its decoder is not exported"] if encoder_of else []


def row_of(site: AttentionSite) -> Row:
    """The row of a site that is replaced, without costs."""
    from ..exporter.sites.groups import name_of

    words, sizes = site.short_pattern
    pattern = [words, *(name for key, name in _FEATURES.items() if key in site.inputs)]
    row = Row(
        layer=name_of(site),
        operator=site.operator,
        pattern=", ".join(pattern),
        heads=site.heads.replace(" ", ""),
        recognised_by=site.recognised_by,
        replaced="yes",
    )
    # An empty column is left out, so a model of one operator has one of the two.
    return dataclasses.replace(row, window=sizes) if site.kind.is_window else dataclasses.replace(row, blocks=sizes)


def row_with_cost(report: SiteReport) -> Row:
    """The row of a site that is replaced, with its density and what it saves."""
    heads = f"{report.heads}" if report.heads == report.kv_heads else f"{report.heads}/{report.kv_heads}"
    return dataclasses.replace(
        row_of(report.site),
        heads=heads if report.heads else "",
        density=_UNKNOWN if report.density is None else f"{report.density:.1%}",
        saved=_UNKNOWN if report.saved is None else f"{report.saved:.1%}",
    )


def sites_table(
    rows: Sequence[Row], standard: Sequence[StandardSite], width: int, fold: bool = True
) -> tuple[list[str], Table]:
    """One row per site, or per fold of sites that differ in their layer's number only.

    Args:
        rows: The sites that are replaced.
        standard: The sites that are not.
        width: Columns of the terminal. Where the table is wider, what all sites share moves to lines above it.
        fold: Whether to fold.

    Returns:
        The lines above the table, and the table.
    """
    from rich.console import Console

    rows = [*rows, *(Row(layer=site.layer) for site in standard)]
    # A standard site's reason is not in its row, but tells sites apart.
    keys: list[Hashable] = [*([""] * (len(rows) - len(standard))), *(site.reason for site in standard)]
    folds = _folds(rows, keys if fold else range(len(rows)))
    cells = [rows[found.members[0]].cells | {"layer": found.label + _times(found)} for found in folds]
    titles = [title for title in _COLUMNS if any(row[title] for row in cells)]
    table = _table(cells, titles, width)
    lines: list[str] = []
    # Measured without a limit: the console's own width would cap the measure.
    measure = Console(width=10_000).measure
    if measure(table).maximum > width:
        # A site that stays standard has nothing to say about the operator.
        values = {title: {row[title] for row in cells if row[title]} for title in _LIFTED if title in titles}
        shared = [title for title, found in values.items() if len(found) == 1]
        lines = [f"{title}: {values[title].pop()}" for title in shared]
        titles = [title for title in titles if title not in shared]
        table = _table(cells, titles, width)
    names = {found.skeleton for found in folds}
    if measure(table).maximum > width and len(names) == 1 and all(found.numbers for found in folds):
        lines.append(f"layer: {names.pop()}")
        cells = [row | {"layer": found.numbers + _times(found)} for row, found in zip(cells, folds, strict=True)]
        table = _table(cells, titles, width)
    return lines, table


def _folds(rows: Sequence[Row], keys: Sequence[Hashable]) -> tuple[Fold, ...]:
    from ..exporter.sites.groups import fold_alike

    alike = [(dataclasses.replace(row, layer=""), key) for row, key in zip(rows, keys, strict=True)]
    return fold_alike([row.layer for row in rows], alike)


def _times(fold: Fold) -> str:
    return f" ×{len(fold.members)}" if len(fold.members) > 1 else ""


def _table(cells: Sequence[dict[str, str]], titles: Sequence[str], width: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=width < _WIDE, header_style="bold")
    for title in titles:
        # Module names are the only long texts: they give way, and stay whole over several lines.
        justify: Literal["left", "right"] = "right" if _COLUMNS[title] else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title != "layer")
    for row in cells:
        table.add_row(*(row[title] for title in titles))
    return table


def lowering_lines(sites: Sequence[AttentionSite]) -> list[str]:
    """The lowering ladder, once for each group of sites that share it: what was chosen, what was refused and why."""
    from ..exporter.sites.groups import fold_alike, name_of

    groups: dict[tuple[object, ...], list[str]] = {}
    for found in fold_alike([name_of(site) for site in sites], [site.ladder for site in sites]):
        groups.setdefault(sites[found.members[0]].ladder, []).append(found.label + _times(found))
    lines = []
    for ladder, labels in groups.items():
        if len(groups) > 1:
            lines.append(f"{', '.join(labels)}:")
        lines += [f"  {'✓' if rung.chosen else '✗'} {rung.lowering}: {rung.reason}" for rung in ladder]  # type: ignore[attr-defined]
    return lines


def pattern_lines(sites: Sequence[AttentionSite], notes: Sequence[tuple[str, ...]] = ()) -> list[str]:
    """Patterns that the table has no room for, and what must be known about the numbers, with the layers of each.

    Args:
        sites: The sites that are replaced.
        notes: What is to be said of each; nothing where left out.
    """
    from ..exporter.sites.groups import fold_alike, name_of

    names = [name_of(site) for site in sites]
    patterns = [recorded.describe() if (recorded := site.recorded) else "" for site in sites]
    told = list(zip(patterns, notes or [()] * len(sites), strict=True))
    layers: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for found in fold_alike(names, told):
        layers.setdefault(told[found.members[0]], []).append(found.label)
    lines = []
    for (pattern, own), labels in layers.items():
        lines += [f"pattern of {', '.join(labels)}: {pattern}"] if pattern else []
        lines += [f"note: {', '.join(labels)}: {note}" for note in own]
    return lines


def standard_lines(standard: Sequence[StandardSite]) -> list[str]:
    """Attention that stays standard, once for each reason, with the layers it holds for."""
    from ..exporter.sites.groups import fold_alike

    folds = fold_alike([site.layer for site in standard], [site.reason for site in standard])
    reasons: dict[str, list[str]] = {}
    for found in folds:
        reasons.setdefault(standard[found.members[0]].reason, []).append(found.label)
    return [f"not replaced: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
