"""Pictures of attention patterns: one PNG of small multiples, and the same in characters for a terminal."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import textwrap
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EnvironmentLacks, InvalidRequest
from .inspection import Inspection, SiteReport
from .masks import Scale, scale_for
from .patterns import Lengths, Pattern, to_json
from .sites.groups import fold_alike, name_of
from .sites.kind import GLOBAL, PARTLY, SEEN, UNSEEN, Cells, Unknown
from .sites.record import AttentionSite
from .sites.recorded_pattern import picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_CELLS = 64
TEXT_CELLS = 24

# The palette of Okabe and Ito: apart for every kind of colour vision. By the value of a cell.
_COLOURS = ("#eef0f2", "#0072B2", "#E69F00", "#8cbfdf")
_INK, _FAINT = "#222222", "#6b6b6b"
_COLUMNS = 4
_PANEL_INCHES = 2.5
_DPI = 200

_MOST_LINES = 4
_BLOCKS = " ▀▄█"
_ASCII = " '.#"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pattern and the layers that have it.

    Attributes:
        title: The layers, and the heads where their dilations differ.
        pattern: The pattern in words.
        density: Counted pairs over all pairs, of all heads, at the inspection's length; None where unknown.
        cells: (n, n) of `UNSEEN`, `SEEN`, `GLOBAL` and `PARTLY` (`sites.kind`); row = query, column = key.
    """

    title: str
    pattern: str
    density: float | None
    cells: Cells


def panels(inspection: Inspection, cells: int) -> tuple[tuple[Panel, ...], Scale]:
    """One panel per distinct pattern of an inspection's sites, all at one scale.

    The scale follows the widest window or block (`masks.scale_for`) and shows no more tokens than the model accepts.
    Global tokens stand at the start of the text; where the model's input decides on them, one is drawn. A site that
    cannot be drawn has no panel: `inspect` has said why.

    Args:
        inspection: What `inspect` returned.
        cells: Rows and columns of each panel.

    Raises:
        InvalidRequest: no site can be drawn.
    """
    reports = inspection.sites
    widest = max((report.site.kind.picture_width(report.site) for report in reports), default=0)
    scale = scale_for(widest, cells, inspection.max_length)
    folds = fold_alike([name_of(report.site) for report in reports], [_look(report) for report in reports])
    found: list[Panel] = []
    reasons = []
    for fold in folds:
        report = reports[fold.members[0]]
        try:
            drawn = report.site.kind.picture(report.site, inspection.graph, scale, max(1, inspection.global_tokens))
        except Unknown as error:
            reasons.append(f"{fold.title}: {error}")
            continue
        found += [
            Panel(f"{fold.title}{heads}", _words(report.site, head), report.density, drawn[head])
            for heads, head in _distinct(drawn)
        ]
    if not found:
        raise InvalidRequest(f"--picture: nothing can be drawn: {'; '.join(reasons)}; next step: leave --picture out")
    return tuple(found), scale


def _look(report: SiteReport) -> Hashable:
    """What decides how a site's picture looks."""
    return report.site.pattern, "global_mask" in report.site.inputs, report.density, report.saved, report.notes


def _words(site: AttentionSite, head: int) -> str:
    """The pattern of one head of a site, in words."""
    recorded = site.recorded
    if recorded is not None and recorded.heads > 1:
        recorded = recorded.head(head)
        site = dataclasses.replace(site, pattern_json=to_json(recorded))
    words = site.pattern + (", global tokens" if "global_mask" in site.inputs else "")
    # A window's own words say nothing about the pattern that it stands for.
    return words if site.lists or recorded is None else f"{words} ({recorded.describe()})"


def _distinct(pictures: Sequence[Cells]) -> list[tuple[str, int]]:
    """The first head of each different picture, with the words ``", heads …"`` where there are several."""
    groups: dict[bytes, list[int]] = {}
    for head, picture in enumerate(pictures):
        groups.setdefault(picture.tobytes(), []).append(head)
    several = len(groups) > 1
    return [(f", {_heads(heads)}" if several else "", heads[0]) for heads in groups.values()]


def _heads(heads: list[int]) -> str:
    if len(heads) == 1:
        return f"head {heads[0]}"
    adjacent = all(b == a + 1 for a, b in itertools.pairwise(heads))
    return f"heads {heads[0]}–{heads[-1]}" if adjacent else f"heads {','.join(map(str, heads))}"


def explain_scale(scale: Scale, inspection: Inspection) -> str:
    """How pictures of `inspection` at `scale` are to be read."""
    if scale.unit == 1:
        return f"{scale.length:,} tokens, each cell one query and one key"
    sites = [report.site for report in inspection.sites]
    words = []
    if any(not site.lists for site in sites):
        words.append(f"windows are divided by {scale.unit}")
    if any(max(site.attributes.get("dilation", [1])) > 1 for site in sites):
        words.append("the steps of a dilation are drawn in cells")
    if any("global_mask" in site.inputs for site in sites):
        words.append("a global token takes a whole cell")
    if any(site.lists for site in sites):
        words.append("block lists are drawn to scale")
    return f"{scale.length:,} tokens, each cell {scale.unit} queries and {scale.unit} keys; {', '.join(words)}"


def draw_png(inspection: Inspection, path: Path) -> None:
    """Draw every distinct pattern of an inspection into one PNG.

    Raises:
        EnvironmentLacks: matplotlib is not installed.
        InvalidRequest: no site can be drawn.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn, scale = panels(inspection, PNG_CELLS)
    columns = min(_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    # The margins hold the figure's title and legend in inches, whatever the number of panels.
    top, bottom, side, gap, row_gap = 1.05, 0.95, 0.75, 0.8, 1.15
    width = max(side + columns * _PANEL_INCHES + (columns - 1) * gap + 0.3, 6.0)
    height = top + rows * _PANEL_INCHES + (rows - 1) * row_gap + bottom
    with rc_context({"font.size": 8, "axes.edgecolor": _FAINT, "text.color": _INK}):
        # No pyplot: it would keep the figure and choose a backend for the whole process.
        figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        for index, panel in enumerate(drawn):
            row, column = divmod(index, columns)
            left = side + column * (_PANEL_INCHES + gap)
            lower = height - top - (row + 1) * _PANEL_INCHES - row * row_gap
            box = (left / width, lower / height, _PANEL_INCHES / width, _PANEL_INCHES / height)
            _draw_panel(figure.add_axes(box), panel, scale, inspection, first=column == 0)
        _draw_words(figure, inspection, drawn, scale)
        buffer = io.BytesIO()
        figure.savefig(buffer)
    # Whole or not at all, as far as one write can be.
    path.write_bytes(buffer.getvalue())


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        EnvironmentLacks: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise EnvironmentLacks(
            "the picture needs matplotlib, which is not installed; next step: pip install 'longspan[report]'"
        ) from error


def _draw_panel(axes: Axes, panel: Panel, scale: Scale, inspection: Inspection, first: bool) -> None:
    from matplotlib.colors import ListedColormap

    # Each cell becomes a square of equal pixels with a hairline around it, so nothing is interpolated.
    axes.imshow(
        panel.cells,
        cmap=ListedColormap(_COLOURS),
        vmin=0,
        vmax=len(_COLOURS) - 1,
        interpolation="nearest",
        extent=(0, scale.length, scale.length, 0),
    )
    axes.set_xticks([], minor=False)
    lines = [scale.length * step / scale.cells for step in range(1, scale.cells)]
    axes.hlines(lines, 0, scale.length, colors="white", linewidth=0.35)
    axes.vlines(lines, 0, scale.length, colors="white", linewidth=0.35)
    ticks = [scale.length * quarter // 4 for quarter in range(5)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks] if first else [])
    axes.tick_params(length=2, width=0.5, labelsize=6.5, labelcolor=_FAINT, color=_FAINT)
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    if first:
        axes.set_ylabel("query", color=_FAINT, size=7.5)
    axes.set_xlabel("key", color=_FAINT, size=7.5)
    lines_of_text = textwrap.wrap(panel.pattern, 40, max_lines=2, placeholder=" …")
    if panel.density is not None:
        lines_of_text.append(f"{panel.density:.1%} of all pairs at {inspection.length:,} tokens")
    axes.set_title("\n".join(lines_of_text), loc="left", size=7.5, color=_FAINT, pad=5)
    axes.annotate(
        textwrap.shorten(panel.title, 38, placeholder=" …"),
        (0, 1),
        xytext=(0, 6 + 10.5 * len(lines_of_text)),
        xycoords="axes fraction",
        textcoords="offset points",
        size=9,
        weight="bold",
        va="bottom",
        annotation_clip=False,
    )


def _draw_words(figure: Figure, inspection: Inspection, drawn: tuple[Panel, ...], scale: Scale) -> None:
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    name = inspection.model_class.rpartition(".")[2]
    margin = 0.2 / width
    figure.text(margin, 1 - 0.2 / height, f"{name}: which keys each query sees", size=11, weight="bold", va="top")
    figure.text(margin, 0.12 / height, explain_scale(scale, inspection), size=7, color=_FAINT, va="bottom")
    names = ((SEEN, "seen"), (PARTLY, "seen in part"), (GLOBAL, "of and to a global token"))
    kinds = [(kind, words) for kind, words in names if any((panel.cells == kind).any() for panel in drawn)]
    kinds.append((UNSEEN, "not seen"))
    handles: list[Any] = [
        Patch(facecolor=_COLOURS[kind], label=words, edgecolor=_FAINT, linewidth=0.3) for kind, words in kinds
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(margin - 0.05 / width, 0.24 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=7.5,
        handlelength=1,
        handleheight=1,
        borderpad=0.1,
        columnspacing=1.5,
    )


def picture_lines(inspection: Inspection, width: int, encoding: str) -> list[str]:
    """The patterns in characters, side by side, two cells of a column in one character.

    Args:
        inspection: What `inspect` returned.
        width: Characters per line.
        encoding: What stdout can show; without block characters in it, ASCII is used.

    Raises:
        InvalidRequest: no site can be drawn.
    """
    drawn, scale = panels(inspection, TEXT_CELLS)
    return _side_by_side(drawn, explain_scale(scale, inspection), width, encoding)


def pattern_lines(pattern: Pattern, width: int = 80, encoding: str = "utf-8", limit: int | None = None) -> list[str]:
    """A pattern in characters, one picture per kind of head; for patterns that no model has yet.

    Args:
        pattern: The pattern.
        width: Characters per line.
        encoding: As for `picture_lines`.
        limit: Tokens to show at most, unless a cell per token does; None shows what the pattern's thresholds ask for.

    Raises:
        InvalidRequest: the pattern is for other lengths than the picture's.
    """
    scale = scale_for(2 * max(pattern.thresholds, default=0), TEXT_CELLS, limit)
    heads: dict[Pattern, list[int]] = {}
    for head, own in enumerate(pattern.by_head()):
        heads.setdefault(own, []).append(head)
    drawn = [
        Panel(
            _heads(alike) if len(heads) > 1 else "",
            own.describe(),
            own.density(Lengths.of(scale.length)),
            picture_of(own, scale)[0],
        )
        for own, alike in heads.items()
    ]
    cell = "one query and one key" if scale.unit == 1 else f"{scale.unit} queries and {scale.unit} keys"
    return _side_by_side(drawn, f"{scale.length:,} tokens, each cell {cell}", width, encoding)


def _side_by_side(drawn: Sequence[Panel], explained: str, width: int, encoding: str) -> list[str]:
    plain = not _can_show(_BLOCKS + "┌─┐│└┘–…", encoding)
    blocks = [_block(panel, plain) for panel in drawn]
    # A frame and one space: three stand side by side in 80 columns.
    per_row = max(1, (width + 1) // (TEXT_CELLS + 3))
    lines = []
    for start in range(0, len(blocks), per_row):
        row = blocks[start : start + per_row]
        tallest = max(map(len, row))
        # Frames stand level: the words above them are padded at the top.
        padded = [[" " * (TEXT_CELLS + 2)] * (tallest - len(block)) + block for block in row]
        lines += [" ".join(parts).rstrip() for parts in zip(*padded, strict=True)]
        lines.append("")
    lines += textwrap.wrap(explained, width)
    return [line.replace("–", "-").replace("…", "...") for line in lines] if plain else lines


def _block(panel: Panel, plain: bool) -> list[str]:
    characters = _ASCII if plain else _BLOCKS
    left, top, right, side, lower, corner = "+-+|++" if plain else "┌─┐│└┘"
    width = TEXT_CELLS + 2
    words = textwrap.wrap(panel.title, width)
    words += textwrap.wrap(panel.pattern, width, max_lines=_MOST_LINES, placeholder=" …")
    words += [] if panel.density is None else [f"{panel.density:.1%} of pairs"]
    seen = panel.cells != UNSEEN
    upper, under = seen[::2].astype(int), seen[1::2].astype(int)
    body = [
        "".join(characters[a + 2 * b] for a, b in zip(*rows, strict=True)) for rows in zip(upper, under, strict=True)
    ]
    frame = [left + top * TEXT_CELLS + right, *(side + row + side for row in body), lower + top * TEXT_CELLS + corner]
    return [line.ljust(width) for line in words] + frame


def _can_show(characters: str, encoding: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
