"""``longspan inspect``."""

from __future__ import annotations

import dataclasses
import json

import click

from .options import conversion_from, conversion_options, request_from, source_options


@click.command("inspect")
@click.argument("target", metavar="MODEL|BUNDLE")
@click.option("--length", type=int, default=4096, show_default=True, help="Tokens to compute the density for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@conversion_options
@source_options
def command(target: str, length: int, as_json: bool, **options: object) -> int:
    """List the attention sites of a bundle, or those that exporting MODEL would replace."""
    conversion = conversion_from(options)
    from ..exporter import inspect
    from .sites_table import lowering_lines, sites_table, standard_lines
    from .terminal import console, progress

    with progress("inspect") as stage:
        stage(target)
        inspection = inspect(request_from(target, options), length=length, conversion=conversion)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(inspection), indent=2, ensure_ascii=False))
        return 0
    terminal = console()
    densities = [report.density for report in inspection.sites]
    terminal.print(sites_table([report.site for report in inspection.sites], densities))
    lowering = lowering_lines([report.site for report in inspection.sites])
    terminal.print("\n".join([*lowering, *standard_lines(inspection.standard)]))
    terminal.print(f"{len(inspection.sites)} sites; density = scored pairs over all pairs at {length:,} tokens")
    return 0
