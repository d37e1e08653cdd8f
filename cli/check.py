"""``longspan check``."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import PASS, THRESHOLD_FAILED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..exporter.parity import CaseReport, CheckReport
    from ..exporter.parity.report import Judged


def _lengths(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(length) for length in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not N,N,…, e.g. 1,511,2049") from None


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", metavar="MODEL", help="Where the exported model is now, if it moved.")
@click.option("--allow-pickle", is_flag=True, help="Read the source's pickled weights, which can run any code.")
@click.option("--trust-remote-code", is_flag=True, help="Let the source's own Python code run.")
@click.option(
    "--lengths", callback=_lengths, metavar="N,…", help="Check these lengths, not those the windows call for."
)
@click.option("--max-length", type=int, metavar="N", help="Longest input (default: all the model takes, at most 8192).")
@click.option("--input-shapes", multiple=True, metavar="INPUT:[N,…]", help="Check this shape instead of the sweep.")
@click.option("--load-inputs", metavar="FILE", help="Check inputs from a file that Polygraphy or --save-inputs wrote.")
@click.option("--save-inputs", metavar="FILE", help="Keep the inputs, for --load-inputs here or in polygraphy run.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
@click.option("--rtol", multiple=True, metavar="[OUTPUT:]X", help="Relative tolerance instead of the derived one.")
@click.option("--atol", multiple=True, metavar="[OUTPUT:]X", help="Absolute tolerance instead of the derived one.")
@click.option("--original-max-length", type=int, metavar="N", help="Run the original model up to N tokens (8192).")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the bundle computes.",
)
@click.option("--engine", metavar="NAME", help="Check this engine of BUNDLE, which longspan build made, in its place.")
@click.option("--require-kernel", is_flag=True, help="Fail with code 5 where the function body runs instead.")
@click.option(
    "--sites/--no-sites", default=None, help="Compare every attention site in one case (default: where a path fails)."
)
@click.option(
    "--judge", "judge_only", is_flag=True, help="Run nothing: judge the last report (or the file BUNDLE) again."
)
@click.option(
    "--json", "json_file", metavar="FILE", help="Also write the report to FILE; - prints it and nothing else."
)
@click.option("--junit", "junit_file", metavar="FILE", help="Also write the JUnit XML to FILE.")
@click.option("--html", "html_file", metavar="FILE", help="Also write the page to FILE.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundle: Path,
    judge_only: bool,
    json_file: str | None,
    junit_file: str | None,
    html_file: str | None,
    **options: Any,
) -> int:
    """Prove that BUNDLE computes what its model does.

    The model runs in torch, in float64, with its own attention and with the exported pattern; the bundle runs in ONNX
    Runtime by the longspan kernel and by the function body. Lengths stand around each window of the model, because a
    window that holds the whole text computes the same as dense attention. Tolerances are derived from the float64 run.

    With --engine an engine runs alone in place of the bundle, at those lengths that its optimization profiles admit.

    The report is kept in BUNDLE/reports: check.json, check.junit.xml and check.html; that of an engine in
    BUNDLE/reports/engines/NAME. With --judge it is judged again under other tolerances, exactly, and nothing in BUNDLE
    changes.
    """
    from ..exporter.errors import InvalidRequest
    from ..exporter.parity.publish import JUNIT_FILE
    from ..exporter.parity.saved import REPORT_FILE
    from .terminal import console

    for option, file in (("--json", json_file), ("--junit", junit_file), ("--html", html_file)):
        if file not in (None, "-") and not Path(str(file)).absolute().parent.is_dir():
            raise InvalidRequest(f"{option} {file}: its folder does not exist")
    if options["engine"] and ctx.get_parameter_source("device") is not click.core.ParameterSource.DEFAULT:
        raise InvalidRequest("--engine: an engine computes where it was built for; leave out --device")
    report, origin = _judged(ctx, bundle, options) if judge_only else _checked(bundle, options)
    _copies(report, json_file, junit_file, html_file)
    if json_file == "-":
        from ..exporter.parity.saved import to_json

        click.echo(to_json(report), nl=False)
    else:
        print_report(report, console())
        beside = "" if judge_only else f", with {REPORT_FILE} and {JUNIT_FILE} beside it"
        console().print(f"report: {origin}{beside}", soft_wrap=True, markup=False)
    return PASS if report.passed else THRESHOLD_FAILED


def _checked(bundle: Path, options: dict[str, Any]) -> tuple[CheckReport, Path]:
    """Run the check; and where its reports are."""
    from ..exporter import check
    from ..exporter.parity.publish import PAGE_FILE
    from .terminal import progress

    with progress("check") as stage:
        given = {name: value for name, value in options.items() if value is not None}
        report = check(bundle, progress=stage, **given)
    engine = () if report.engine is None else ("engines", report.engine.name)
    return report, bundle.joinpath("reports", *engine, PAGE_FILE)


def _judged(ctx: click.Context, bundle: Path, options: dict[str, Any]) -> tuple[CheckReport, Path]:
    """Judge a saved check again; neither torch nor ONNX Runtime is imported."""
    from ..exporter.errors import FallbackRan, InvalidRequest
    from ..exporter.parity import Overrides, judge
    from ..exporter.parity.saved import load_for

    useless = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in options
        and parameter.name not in ("rtol", "atol", "require_kernel", "engine")
        and ctx.get_parameter_source(str(parameter.name)) is not click.core.ParameterSource.DEFAULT
    ]
    if useless:
        raise InvalidRequest(f"--judge runs nothing, so {', '.join(useless)} would have no effect; leave it out")
    report, file = load_for(bundle, options["engine"])
    report = judge(report, Overrides.parse(options["rtol"], options["atol"]))
    others = [f"{node}: {ran}" for node, ran in report.paths[0].sites.items() if ran != "kernel"]
    if options["require_kernel"] and (others or not report.paths[0].ran):
        raise FallbackRan(f"{file}: --require-kernel: {report.paths[0].reason or ', '.join(others)}")
    return report, file


def _copies(report: CheckReport, json_file: str | None, junit_file: str | None, html_file: str | None) -> None:
    """Write the report where the user wants it besides."""
    from ..exporter.parity.junit import to_junit
    from ..exporter.parity.saved import to_json
    from ..exporter.reports.files import write_copy

    if json_file not in (None, "-"):
        write_copy(to_json(report), str(json_file), "--json")
    if junit_file is not None:
        write_copy(to_junit(report), junit_file, "--junit")
    if html_file is not None:
        from ..exporter.reports.check_page import check_page

        write_copy(check_page(report), html_file, "--html")


def print_report(report: CheckReport, terminal: Console) -> None:
    """Print the cases, what each path did, the smallest tolerances and the verdict."""
    terminal.print(_lowering_table(report))
    terminal.print()
    for line in _lowering_lines(report):
        terminal.print(line, soft_wrap=True)
    terminal.print()
    if not report.faithful and any(_approximation(case) for case in report.cases):
        terminal.print(_approximation_table(report))
        terminal.print()
    for line in [*_approximation_lines(report), *_scope_lines(report)]:
        terminal.print(line, soft_wrap=True)
    if any(case.outputs for case in report.cases):
        terminal.print()
        terminal.print(_minimum_table(report))
    if report.site_comparison is not None and report.site_comparison.outputs:
        terminal.print()
        terminal.print(_sites_table(report))
    terminal.print()
    for line in _verdict(report):
        terminal.print(line, soft_wrap=True)


def _minimum_table(report: CheckReport) -> Table:
    """The smallest tolerances that would pass in every case."""
    from rich.table import Table

    from ..exporter.parity import minimum_tolerances

    table = Table(box=None, pad_edge=False, header_style="bold", title="Smallest tolerances that would pass")
    for title in ("output", "by", "--atol alone", "--rtol alone", "both equal"):
        table.add_column(title)
    for least in minimum_tolerances(report):
        values = (_tolerance(value) for value in (least.atol, least.rtol, least.common))
        table.add_row(least.output, least.path, *values)
    return table


def _tolerance(value: float) -> str:
    """Rounded up, so that what is printed passes."""
    if math.isinf(value):
        return "none"
    text = f"{value:.2e}"
    return text if float(text) >= value else f"{value * 1.005:.2e}"


def _sites_table(report: CheckReport) -> Table:
    """One row per site: its error by each path, and what is allowed."""
    from rich.table import Table

    comparison = report.site_comparison
    assert comparison is not None
    paths = [path.name for path in report.paths if path.ran]
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"Every site at {comparison.case}")
    for title in ("site", "pattern", *paths, "allowed"):
        table.add_column(title)
    for output in comparison.outputs:
        site = report.site(output.name)
        cells = [_cell(output.lowering[path]) if path in output.lowering else "not run" for path in paths]
        allowed = {f"{judged.tolerance:.1e}" for judged in output.lowering.values()}
        table.add_row(site.layer or site.node, site.pattern, *cells, *allowed)
    return table


def _lowering_table(report: CheckReport) -> Table:
    """One row per case: the output that comes closest to its tolerance by any path."""
    from rich.table import Table

    paths = [path.name for path in report.paths if path.ran]
    several = len({output.name for case in report.cases for output in case.outputs}) > 1
    table = Table(box=None, pad_edge=False, header_style="bold", title="Lowering error: runtime against float64")
    for title in ("batch", "length"):
        table.add_column(title, justify="right")
    for title in ("padding", "global tokens", *(["worst output"] if several else []), *paths, "allowed"):
        table.add_column(title)
    for entry in report.cases:
        case = entry.case
        cells = [str(case.batch), f"{case.length:,}", case.padding, case.global_tokens]
        output = entry.worst()
        if output is None:
            table.add_row(*cells, f"skipped: {entry.skipped}" if entry.skipped else "not run")
            continue
        allowed = {judged.tolerance for judged in output.lowering.values()}
        cells += [output.name] if several else []
        cells += [_cell(output.lowering[path]) if path in output.lowering else "not run" for path in paths]
        table.add_row(*cells, *(f"{tolerance:.1e}" for tolerance in allowed))
    return table


def _cell(judged: Judged) -> str:
    mark = "[green]✓[/]" if judged.passed else "[red]✗[/]"
    return f"{judged.error.note or format(judged.error.max_abs, '.1e')} {mark}"


def _lowering_lines(report: CheckReport) -> list[str]:
    lines = []
    for path in report.paths:
        if not path.ran:
            lines.append(f"[bold]{path.name}[/]: not run: {path.reason}")
            continue
        seen = f"[red]{path.what_ran}[/]" if path.others else path.what_ran
        dtype = f", {path.dtype}" if path.dtype else ""
        line = f"[bold]{path.name}[/]: {seen} ({path.runtime}, {path.provider}{dtype})"
        worst = report.worst(path.name)
        if worst is not None:
            case, output = worst
            judged = output.lowering[path.name]
            line += f"; closest to its tolerance: {_of_allowed(judged)} at {case}, output {output.name}"
        lines.append(line)
        lines += [f"{path.name}: {note}" for note in path.notes]
    if report.engine is not None:
        lines += [f"outside its optimization profiles: {line}" for line in report.engine.outside]
    return lines


def _of_allowed(judged: Judged) -> str:
    return f"{_cell(judged)} of {judged.tolerance:.1e} allowed"


def _approximation(entry: CaseReport) -> list[Judged]:
    return [output.approximation for output in entry.outputs if output.approximation is not None]


def _approximation_table(report: CheckReport) -> Table:
    from rich.table import Table

    table = Table(
        box=None, pad_edge=False, header_style="bold", title="Approximation error: pattern against original, float64"
    )
    for title in ("batch", "length"):
        table.add_column(title, justify="right")
    for title in ("padding", "output", "largest", "rms", "cosine", ""):
        table.add_column(title)
    for entry in report.cases:
        for output in entry.outputs:
            judged = output.approximation
            if judged is None:
                continue
            error = judged.error
            must = "" if judged.tolerance is None else f"must be equal here {'✓' if judged.passed else '[red]✗[/]'}"
            table.add_row(
                str(entry.case.batch),
                f"{entry.case.length:,}",
                entry.case.padding,
                output.name,
                f"{error.max_abs:.1e}",
                f"{error.rms:.1e}",
                f"{error.cosine:.6f}",
                must,
            )
    return table


def _approximation_lines(report: CheckReport) -> list[str]:
    compared = [(entry, judged) for entry in report.cases for judged in _approximation(entry)]
    reasons = collections.Counter(entry.original for entry in report.cases if entry.original)
    lines = [
        f"[bold]original model[/]: not compared in {count} of {len(report.cases)} cases: {reason}"
        for reason, count in reasons.items()
    ]
    if report.faithful and compared:
        worst = max((judged for _, judged in compared), key=lambda judged: judged.error.max_abs)
        lines.insert(0, f"[bold]original model[/]: the same mathematics, float64 against float64: {_of_allowed(worst)}")
    elif compared:
        lowest = min(judged.error.cosine for _, judged in compared)
        lines.insert(0, f"[bold]original model[/]: approximated ({report.approximation}); lowest cosine {lowest:.6f}")
    return lines


def _scope_lines(report: CheckReport) -> list[str]:
    lines = []
    # What an engine does not take is listed with its path.
    outside = report.engine is not None and report.engine.outside
    if report.max_length is not None and report.checked_length < report.max_length and not outside:
        lines.append(
            f"checked up to {report.checked_length:,} of the {report.max_length:,} tokens that the model accepts; "
            f"--max-length {report.max_length} checks them all"
        )
    if not report.source_verified:
        lines.append("the source comes from the hub and was loaded anew; the bundle holds no hashes to verify it by")
    if report.differing_versions:
        then = ", ".join(f"{name} {version}" for name, version in report.differing_versions.items())
        lines.append(f"exported with other versions: {then}")
    return lines


def _verdict(report: CheckReport) -> list[str]:
    from rich.markup import escape

    from ..exporter.parity.report import describe_first_off

    failures = report.failures
    if not failures:
        if report.fallback:
            return [f"[bold red]FAIL[/]: the kernel was required: {report.fallback}"]
        ran = " and ".join(path.name for path in report.paths if path.ran)
        compared = sum(1 for case in report.cases if case.outputs)
        skipped = f", {len(report.cases) - compared} skipped" if compared < len(report.cases) else ""
        return [f"[bold green]pass[/]: {compared} cases, by {ran}{skipped}"]
    more = f" (and {len(failures) - 1} more errors)" if len(failures) > 1 else ""
    found = (describe_first_off(report, path.name) for path in report.paths)
    return [f"[bold red]FAIL[/]: {escape(failures[0])}{more}", *(escape(line) for line in found if line)]
