"""``longspan doctor``."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    """Say what this machine has, what it lacks, what that costs, and the command that brings it."""
    from rich.table import Table

    from ..exporter.environment import examine
    from .terminal import console

    findings = examine()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
        return 0
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = "[green]✓[/]" if finding.present else "[red]✗[/]"
        text = finding.found if finding.present else f"missing: {finding.cost}; next step: {finding.remedy}"
        table.add_row(mark, finding.name, text.replace("[", "\\["))
    console().print(table)
    return 0
