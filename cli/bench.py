"""``longspan bench``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import PASS, THRESHOLD_FAILED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..exporter.throughput.comparison import BenchComparison
    from ..exporter.throughput.report import BenchReport, Row

_MIB = 1 << 20


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 512,1024,2048") from None


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",")]
    return tuple(name for name in names if name not in ("", "none"))


def _fraction(ctx: click.Context, param: click.Parameter, value: str) -> float:
    try:
        return float(value.removesuffix("%")) / 100 if value.endswith("%") else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a fraction such as 5% or 0.05") from None


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--lengths",
    callback=_numbers,
    metavar="N,…",
    help="Tokens per sequence; default: powers of two up to the model's limit.",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences per run.")
@click.option(
    "--against",
    callback=_names,
    metavar="NAME,…",
    default="body,dense,stock",
    show_default=True,
    help="Baselines: body (the bundle without the library), dense (dense attention), stock (stock export); or none.",
)
@click.option("--source", metavar="MODEL", help="Where the exported model is now, if it moved.")
@click.option("--allow-pickle", is_flag=True, help="Read the source's pickled weights, which can run any code.")
@click.option("--trust-remote-code", is_flag=True, help="Let the source's own Python code run.")
@click.option("--iterations", type=int, default=10, show_default=True, help="Least number of timed runs.")
@click.option("--duration", type=float, default=1.0, show_default=True, metavar="S", help="Least time of timed runs.")
@click.option(
    "--warm-up", type=float, default=200.0, show_default=True, metavar="MS", help="Least time of warm-up runs."
)
@click.option(
    "--rounds", type=int, default=1, show_default=True, help="Repeat all trials, new processes, pooled samples."
)
@click.option(
    "--time-limit", type=float, default=120.0, show_default=True, metavar="S", help="Longest time of a trial."
)
@click.option("--memory-limit", type=int, metavar="MIB", help="Most memory of a trial; default: 90 % of what is free.")
@click.option("--threads", type=int, default=0, show_default=True, help="Intra-op threads; 0: ONNX Runtime's choice.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the bundle computes.",
)
@click.option("--engine", default="", metavar="NAME", help="Time this engine of BUNDLE too, where it computes.")
@click.option(
    "--global-tokens", type=int, metavar="N", help="First tokens, global; default: 1 where the graph takes them."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
@click.option("--require-kernel", is_flag=True, help="Exit with 5 when the longspan kernels do not run.")
@click.option(
    "--min-speedup",
    type=float,
    metavar="X",
    help="Exit with 1 unless X times as fast as dense and stock at the longest length measured for both.",
)
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the report here as well; - for stdout, without a table."
)
@click.option("--html", "html_file", metavar="FILE", help="Write the page here as well.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw the plot (needs matplotlib).")
@click.option(
    "--compare", "other", type=click.Path(path_type=Path), metavar="FILE", help="Compare with an earlier report."
)
@click.option(
    "--regression",
    callback=_fraction,
    default="5%",
    show_default=True,
    metavar="X%",
    help="With --compare: exit with 1 where a time grew by more, its whole 95 % interval considered.",
)
@click.option("--force-compare", is_flag=True, help="Compare although machine, model or settings differ.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundle: Path,
    lengths: tuple[int, ...],
    batch: int,
    against: tuple[str, ...],
    source: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    iterations: int,
    duration: float,
    warm_up: float,
    rounds: int,
    time_limit: float,
    memory_limit: int | None,
    threads: int,
    device: str,
    engine: str,
    global_tokens: int | None,
    seed: int,
    require_kernel: bool,
    min_speedup: float | None,
    json_file: str | None,
    html_file: str | None,
    plot: bool,
    other: Path | None,
    regression: float,
    force_compare: bool,
) -> int:
    """Time BUNDLE against its function bodies, dense attention and the stock export of the same model.

    With --engine an engine of BUNDLE, which longspan build made, is timed beside them, and they are held against it.

    Every trial runs in a process of its own. The report goes to BUNDLE/reports: bench.json, bench.html, bench.png. With
    --compare the times are also held against an earlier bench.json; where BUNDLE is such a file itself, nothing is
    measured and the two files are compared.
    """
    from ..exporter import bench
    from ..exporter.devices import PROVIDERS
    from ..exporter.errors import InvalidRequest
    from ..exporter.throughput import BenchSettings
    from ..exporter.throughput.benchmark import PAGE_FILE, Earlier, compare_saved
    from .terminal import console, progress

    for option, file in (("--json", json_file), ("--html", html_file)):
        if file not in (None, "-") and not Path(str(file)).absolute().parent.is_dir():
            raise InvalidRequest(f"{option} {file}: its folder does not exist")
    if engine and ctx.get_parameter_source("device") is not click.core.ParameterSource.DEFAULT:
        raise InvalidRequest("--engine: an engine computes where it was built for; leave out --device")
    earlier = None if other is None else Earlier.read(other, regression, force_compare)
    if bundle.is_file():
        report = compare_saved(bundle, earlier)
        _output(report, json_file, html_file, plot)
        return verdict(report, min_speedup)
    settings = BenchSettings(
        lengths=lengths,
        batch=batch,
        against=against,
        threads=threads,
        providers=PROVIDERS[device],
        warm_up_ms=warm_up,
        iterations=iterations,
        duration_s=duration,
        rounds=rounds,
        time_limit_s=time_limit,
        memory_limit_bytes=None if memory_limit is None else memory_limit * _MIB,
        global_tokens=global_tokens,
        seed=seed,
        engine=engine,
    )
    with progress("bench") as stage:
        report = bench(
            bundle,
            settings,
            source=source,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            require_kernel=require_kernel,
            plot=plot,
            against=earlier,
            progress=stage,
            command=shlex.join(["longspan", *sys.argv[1:]]),
        )
    _output(report, json_file, html_file, plot)
    if json_file != "-":
        console().print(f"report: {bundle / 'reports' / PAGE_FILE}", soft_wrap=True, markup=False)
    return verdict(report, min_speedup)


def _output(report: BenchReport, json_file: str | None, html_file: str | None, plot: bool) -> None:
    """Print the report, and write it where the user wants it besides."""
    from ..exporter.reports.files import write_copy
    from ..exporter.throughput.saved import to_json

    if html_file is not None:
        from ..exporter.reports.bench_page import bench_page

        write_copy(bench_page(report, plot), html_file, "--html")
    if json_file == "-":
        click.echo(to_json(report), nl=False)
        return
    if json_file:
        write_copy(to_json(report), json_file, "--json")
    print_report(report)


def verdict(report: BenchReport, min_speedup: float | None) -> int:
    """Exit code: whether the bundle ran wherever limits allowed, was as fast as asked, and no slower than before."""
    from ..exporter.throughput.comparison import describe

    failed = [f"{row.title} {row.status} at {row.length:,} tokens: {row.reason}" for row in report.broken]
    if min_speedup is not None:
        judged = [found for found in report.crossovers if found.baseline in ("dense", "stock")]
        measured = [found for found in judged if found.speedup_at_longest is not None]
        if not measured:
            failed.append("--min-speedup: neither dense SDPA nor the stock export was measured")
        failed += [
            f"--min-speedup: {found.speedup_at_longest:.3g}x against {found.baseline} at {found.longest:,} tokens, "
            f"below {min_speedup:g}x"
            for found in measured
            if found.speedup_at_longest is not None and found.speedup_at_longest < min_speedup
        ]
    if report.comparison is not None:
        failed += [f"--compare {report.comparison.other}: {describe(row)}" for row in report.comparison.regressions]
    for line in failed:
        click.echo(f"longspan: failed: {line}", err=True)
    return THRESHOLD_FAILED if failed else PASS


def print_report(report: BenchReport) -> None:
    """Print the table, the crossovers and the notes."""
    from ..exporter.throughput.report import describe_crossover
    from ..exporter.throughput.variants import TITLES
    from .terminal import console

    terminal = console()
    settings = report.settings
    threads = f"{settings.threads} threads" if settings.threads else "default threads"
    terminal.print(f"{report.model}: {report.attention}", style="bold", soft_wrap=True)
    terminal.print(
        f"{report.machine.short}; {settings.providers[0]}, {threads}, batch {settings.batch}", soft_wrap=True
    )
    terminal.print(bench_table(report))
    terminal.print(
        "p50, p90, p99: latency in ms; spread: (p90 - p10) / p50; MiB: peak memory of the process; ratio: to "
        f"{TITLES[report.reference]}",
        soft_wrap=True,
    )
    reasons = list(dict.fromkeys((row.title, row.status, row.reason) for row in report.rows if row.reason))
    for title, status, reason in reasons:
        terminal.print(f"{title}: {status}: {reason}", soft_wrap=True, markup=False)
    for found in report.crossovers:
        terminal.print(describe_crossover(found, report.reference), soft_wrap=True)
    for line in report.diagnosis:
        terminal.print(line, soft_wrap=True, markup=False)
    if report.comparison is not None:
        _print_comparison(report.comparison, terminal)
    for note in report.notes:
        terminal.print(f"note: {note}", soft_wrap=True, markup=False)


def _print_comparison(comparison: BenchComparison, terminal: Console) -> None:
    """Print every compared row, and what weakens the comparison."""
    from ..exporter.throughput.comparison import describe

    terminal.print(f"against {comparison.other} of {comparison.created}:", soft_wrap=True, markup=False)
    for row in comparison.rows:
        terminal.print(f"  {describe(row)}", soft_wrap=True, markup=False)
    for line in comparison.missing:
        terminal.print(f"  not measured now: {line}", soft_wrap=True, markup=False)
    if comparison.differences:
        terminal.print(f"  what else differs: {'; '.join(comparison.differences)}", soft_wrap=True, markup=False)
    if comparison.within_process:
        terminal.print(
            "  one of the two has a single round: the intervals hold nothing of what differs between processes; "
            "--rounds 3 measures that as well",
            soft_wrap=True,
        )


def bench_table(report: BenchReport) -> Table:
    """One row per variant and length, 80 columns wide; a variant that was not measured shows its state."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for title in ("tokens", "variant", "p50 ms", "p90", "p99", "spread", "runs", "tokens/s", "MiB", "ratio"):
        table.add_column(title, justify="left" if title == "variant" else "right", no_wrap=True)
    previous = None
    for row in report.rows:
        length = f"{row.length:,}" if row.length != previous else ""
        table.add_row(length, row.title, *_cells(row), style="bold" if row.variant == report.reference else "")
        previous = row.length
    return table


def _cells(row: Row) -> list[str]:
    latency = row.latency
    if latency is None or row.tokens_per_s is None or row.peak_rss_bytes is None:
        return [row.status]
    return [
        *(_milliseconds(value) for value in (latency.median, latency.p90, latency.p99)),
        f"{latency.spread:.0%}",
        f"{latency.runs:,}",
        f"{row.tokens_per_s:,.0f}",
        f"{row.peak_rss_bytes / _MIB:,.0f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    ]


def _milliseconds(value: float) -> str:
    """Three significant digits below 100, whole milliseconds above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
