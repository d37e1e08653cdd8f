"""``longspan doctor``."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .errors import ENVIRONMENT_LACKS, PASS

if TYPE_CHECKING:
    from ..exporter.environment import Finding


@click.command("doctor")
@click.option("--strict", is_flag=True, help="Exit with 4 when export or check on a CPU lack something.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(strict: bool, as_json: bool) -> int:
    """Say what this machine has, what it lacks, what that costs, and the command that brings it."""
    from ..exporter.environment import examine
    from .terminal import progress

    with progress("doctor") as stage:
        stage("import packages, run a kernel")
        findings = examine()
    if as_json:
        entries = [dataclasses.asdict(finding) | {"status": finding.status} for finding in findings]
        click.echo(json.dumps(entries, indent=2, ensure_ascii=False))
    else:
        _print(findings)
    ready = all(finding.present for finding in findings if finding.needed)
    return ENVIRONMENT_LACKS if strict and not ready else PASS


def _print(findings: Sequence[Finding]) -> None:
    from rich.table import Table

    from .terminal import console

    terminal = console()
    for group, members in itertools.groupby(findings, key=lambda finding: finding.group):
        terminal.print(group, style="bold")
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
        table.add_column(width=3, justify="right")
        table.add_column(width=20)
        table.add_column(overflow="fold")
        for finding in members:
            table.add_row(_mark(finding), finding.name, _text(finding).replace("[", "\\["))
        terminal.print(table)
    lacking = [finding.name for finding in findings if finding.needed and not finding.present]
    if lacking:
        terminal.print(f"not ready: export and check need {', '.join(lacking)}", style="bold red")
        return
    kernels = next(finding for finding in findings if finding.name == "kernel library")
    way = "with the longspan kernels" if kernels.present else "on function bodies, without the longspan kernels"
    terminal.print(f"ready: export, check and bench run on this CPU, {way}", style="bold green")


def _mark(finding: Finding) -> str:
    if finding.present:
        return "[green]✓[/]"
    return "[red]✗[/]" if finding.needed or finding.found else "–"


def _text(finding: Finding) -> str:
    if finding.present:
        return finding.found
    state = f"{finding.found}: {finding.problem}" if finding.found else "missing"
    return f"{state}; costs: {finding.cost}; next step: {finding.remedy}"
