"""``longspan inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import conversion_from, conversion_options, request_from, source_options

if TYPE_CHECKING:
    from ..exporter.inspection import Inspection


@click.command("inspect")
@click.argument("target", metavar="MODEL|BUNDLE")
@click.option(
    "--length", type=int, metavar="N", help="Tokens to compute costs for; default 4096, or the model's limit."
)
@click.option("--all", "every", is_flag=True, help="A line for each site, also for those that differ in nothing.")
@click.option("--picture", metavar="FILE", help="Draw the masks, as a PNG and in the terminal; - for the latter only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@conversion_options
@source_options
def command(target: str, length: int | None, every: bool, picture: str | None, as_json: bool, **options: object) -> int:
    """List the attention sites of a bundle, or those that exporting MODEL would replace.

    Nothing is written, but the picture where asked for. Costs are those of one text without padding.
    """
    conversion = conversion_from(options)
    from ..exporter import inspect
    from .terminal import console, progress

    file = _picture_file(picture)
    with progress("inspect") as stage:
        stage(target)
        inspection = inspect(request_from(target, options), length=length, conversion=conversion)
    if file is not None:
        from ..exporter.pictures import draw_png

        draw_png(inspection, file)
    if as_json:
        click.echo(inspection.to_json(), nl=False)
        return 0
    terminal = console()
    _print(inspection, every)
    if picture is not None:
        from ..exporter.pictures import picture_lines

        lines = picture_lines(inspection, terminal.width, terminal.encoding)
        terminal.print("\n" + "\n".join(lines), markup=False, soft_wrap=True)
    if file is not None:
        terminal.print(f"picture: {file}", soft_wrap=True)
    return 0


def _picture_file(picture: str | None) -> Path | None:
    """The PNG to write, checked before any work is done.

    Raises:
        InvalidRequest: it cannot be a PNG file there.
        EnvironmentLacks: matplotlib is not installed.
    """
    from ..exporter.errors import InvalidRequest
    from ..exporter.pictures import require_matplotlib

    if picture in (None, "-"):
        return None
    file = Path(str(picture))
    if file.suffix != ".png":
        raise InvalidRequest(f"--picture {picture}: must end in .png; or - to see it in the terminal only")
    if not file.absolute().parent.is_dir():
        raise InvalidRequest(f"--picture {picture}: its folder does not exist")
    require_matplotlib()
    return file


def _print(inspection: Inspection, every: bool) -> None:
    from .sites_table import encoder_lines, lowering_lines, pattern_lines, row_with_cost, sites_table, standard_lines
    from .terminal import console

    terminal = console()
    sites = [report.site for report in inspection.sites]
    name = inspection.model_class.rpartition(".")[2]
    verb = "replaced" if inspection.kind == "bundle" else "would be replaced"
    stay = f", {len(inspection.standard)} stay standard" if inspection.standard else ""
    count = f"{len(sites)} attention site{'s' if len(sites) != 1 else ''}"
    terminal.print(f"{name}: {count} {verb}{stay}", style="bold", soft_wrap=True)
    rows = [row_with_cost(report) for report in inspection.sites]
    shared, table = sites_table(rows, inspection.standard, terminal.width, fold=not every)
    for line in [*encoder_lines(inspection.encoder_of), *shared]:
        terminal.print(line, soft_wrap=True)
    terminal.print(table)
    lines = [*pattern_lines(sites, [report.notes for report in inspection.sites]), *lowering_lines(sites)]
    for line in [*lines, *standard_lines(inspection.standard), *_cost_lines(inspection)]:
        terminal.print(line, soft_wrap=True, markup=False)
    if inspection.random_weights:
        terminal.print("random weights: a small model of this architecture, with fewer layers and short windows")
    if inspection.approximation:
        terminal.print(f"approximates the original: {inspection.approximation}", soft_wrap=True, markup=False)
    if inspection.kind == "model":
        terminal.print("next: longspan export, with the same arguments and a folder", soft_wrap=True)


def _cost_lines(inspection: Inspection) -> list[str]:
    """What the numbers mean, and their sum."""
    takes_global = any("global_mask" in report.site.inputs for report in inspection.sites)
    if inspection.global_tokens:
        global_tokens = f", {inspection.global_tokens} global token{'s' if inspection.global_tokens > 1 else ''}"
    else:
        global_tokens = ", no global token (the input decides)" if takes_global else ""
    lines = [
        f"density: pairs counted of all pairs; saved: FLOPs against dense attention; {inspection.length:,} tokens"
        f"{global_tokens}"
    ]
    costs = [(report.flops, report.dense_flops) for report in inspection.sites]
    known = [(flops, dense) for flops, dense in costs if flops is not None and dense is not None]
    if known and len(known) == len(costs):
        flops, dense = (sum(column) for column in zip(*known, strict=True))
        lines.append(
            f"these sites: {flops / 1e9:,.3g} GFLOP instead of {dense / 1e9:,.3g} ({1 - flops / dense:.1%} saved)"
        )
    return lines
